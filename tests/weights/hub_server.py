"""A stand-in for the Hugging Face Hub, that speaks what huggingface_hub needs and refuses as it."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

INLINE = 64 * 1024  # bytes; what is longer goes through LFS (the Hub: 10 MiB)


class Hub(ThreadingHTTPServer):
    """Repositories as {owner/name: {"private": bool, "commits": [{path: bytes}]}}."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.tokens = {"hf_you": "you", "hf_eve": "eve"}
        self.repos: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.asked: list[str] = []
        self.loses = 0  # bytes of each upload

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo]["commits"][-1]


class Answer(BaseHTTPRequestHandler):
    """One request. Uploads that are not what they say, and tokens that may not, are refused."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, status: int, content: dict | list | bytes = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status >= 400 and isinstance(content, dict):
            self.send_header("X-Error-Message", content["error"])
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_one(self) -> None:
        path, self.sent = unquote(urlsplit(self.path).path), self.body()
        self.server.asked.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = self.server.tokens.get(token)
        for method, pattern, answer in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                if token and not self.user and answer is not Answer.put:
                    return self.send(401, {"error": "Invalid credentials in Authorization header"})
                return answer(self, *match.groups())
        return self.send(404, {"error": f"no route {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    # ---- who, and which repository

    def whoami(self) -> None:
        if not self.user:
            return self.send(401, {"error": "Invalid username or password."})
        orgs = [{"name": "our-lab", "roleInOrg": "read"}] if self.user == "you" else []
        return self.send(200, {"type": "user", "name": self.user, "orgs": orgs})

    def may_write(self, repo: str) -> bool:
        if not self.user:
            self.send(401, {"error": "Unauthorized"})
        elif repo.partition("/")[0] != self.user:
            self.send(403, {"error": f"You don't have the rights to write to {repo}"})
        elif repo not in self.server.repos:
            self.send(404, {"error": "Repository not found"})
        else:
            return True
        return False

    def seen(self, repo: str) -> dict | None:
        found = self.server.repos.get(repo)
        if found and not (found["private"] and repo.partition("/")[0] != self.user):
            return found
        # as the Hub: without a token, what is private and what is not look the same
        status = 404 if self.user else 401
        self.send(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return None

    def create(self) -> None:
        asked = json.loads(self.sent)
        owner = asked.get("organization") or self.user
        repo = f"{owner}/{asked['name']}"
        if not self.user:
            return self.send(401, {"error": "Unauthorized"})
        if owner != self.user:
            return self.send(403, {"error": f"no rights to create a model under {owner}"})
        if repo in self.server.repos:
            address = f"{self.server.url}/{repo}"
            return self.send(409, {"error": "You already created this model repo", "url": address})
        private = asked.get("private", asked.get("visibility") == "private")
        first = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.server.repos[repo] = {"private": private, "commits": [first]}
        return self.send(200, {"url": f"{self.server.url}/{repo}", "name": repo})

    def info(self, repo: str, revision: str | None = None) -> None:
        if found := self.seen(repo):
            files = [{"rfilename": name} for name in found["commits"][-1]]
            facts = {"_id": "1", "id": repo, "modelId": repo, "private": found["private"]}
            facts |= {"sha": sha_of(found), "siblings": files, "tags": [], "downloads": 0}
            self.send(200, facts)

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        if found := self.seen(repo):
            entries = []
            for name, data in found["commits"][-1].items():
                entry = {"type": "file", "path": name, "size": len(data), "oid": blob(data)}
                if len(data) > INLINE:
                    sha = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 130}
                entries.append(entry)
            self.send(200, entries)

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if not (found := self.seen(repo)):
            return
        if (data := found["commits"][-1].get(name)) is None:
            return self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        etag = hashlib.sha256(data).hexdigest() if len(data) > INLINE else blob(data)
        return self.send(200, data, ETag=f'"{etag}"', X_Repo_Commit=sha_of(found))

    # ---- uploads

    def validate(self) -> None:
        header = json.loads(self.sent)["content"].split("---")[1]
        try:
            assert {"license", "library_name"} <= yaml.safe_load(header).keys()
        except Exception as error:  # whatever YAML says
            message = [{"message": str(error)}]
            return self.send(400, {"error": "bad", "errors": message, "warnings": []})
        return self.send(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if self.may_write(repo):
            there, modes = self.server.files(repo), []
            for file in json.loads(self.sent)["files"]:
                mode = "lfs" if file["size"] > INLINE else "regular"
                oid = blob(there[file["path"]]) if file["path"] in there else None
                entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                modes.append(entry | ({"oid": oid} if oid and mode == "regular" else {}))
            self.send(200, {"files": modes})

    def batch(self, repo: str) -> None:
        if self.may_write(repo):
            objects = []
            for wanted in json.loads(self.sent)["objects"]:
                entry = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in self.server.objects:
                    href = f"{self.server.url}/lfs/{wanted['oid']}"
                    entry["actions"] = {"upload": {"href": href}}
                objects.append(entry)
            self.send(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        arrived = self.sent[: len(self.sent) - self.server.loses]
        if hashlib.sha256(arrived).hexdigest() != oid:
            return self.send(400, {"error": "the SHA-256 is another"})
        self.server.objects[oid] = self.sent
        return self.send(200)

    def commit(self, repo: str, revision: str) -> None:
        if not self.may_write(repo):
            return
        files = dict(self.server.files(repo))
        lines = [json.loads(line) for line in self.sent.splitlines()]
        if lines[0]["key"] != "header" or not lines[0]["value"]["summary"]:
            return self.send(400, {"error": "a commit begins with its header"})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                if len(files[value["path"]]) > INLINE:
                    return self.send(413, {"error": f"{value['path']} belongs into LFS"})
            elif line["key"] == "lfsFile":
                data = self.server.objects.get(value["oid"])
                if data is None or len(data) != value["size"]:
                    return self.send(400, {"error": f"{value['path']} has not been uploaded"})
                files[value["path"]] = data
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.server.repos[repo]["commits"].append(files)
        oid = sha_of(self.server.repos[repo])
        url = f"{self.server.url}/{repo}/commit/{oid}"
        return self.send(200, {"success": True, "commitOid": oid, "commitUrl": url})


REPO, REVISION = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES = (
    ("GET", r"/api/whoami-v2", Answer.whoami),
    ("POST", r"/api/repos/create", Answer.create),
    ("POST", r"/api/validate-yaml", Answer.validate),
    ("GET", rf"/api/models/{REPO}", Answer.info),
    ("GET", rf"/api/models/{REPO}/revision/{REVISION}", Answer.info),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}(?:/(.*))?", Answer.tree),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", Answer.preupload),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", Answer.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Answer.batch),
    ("PUT", r"/lfs/(\w+)", Answer.put),
    ("GET HEAD", rf"/{REPO}/resolve/{REVISION}/(.+)", Answer.resolve),
)


def blob(data: bytes) -> str:
    """Return git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha_of(found: dict) -> str:
    """Return 40 hexadecimal digits of the newest commit."""
    files = [(name, blob(data)) for name, data in sorted(found["commits"][-1].items())]
    return hashlib.sha1(repr((len(found["commits"]), files)).encode()).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a Hub at a free port of this machine."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(10)
