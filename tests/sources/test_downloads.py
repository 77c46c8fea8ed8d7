"""Downloads from a site of our own: whole or not at all, and one message without a network."""

import hashlib
import io
import os
import socket
import tarfile
import threading
import urllib.request
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets.utils
from helpers import load, pixels_of, random_pixels, write_cifar, write_idx

from sources import named
from sources.named import download


@contextmanager
def serve(files: dict[str, bytes], *, promise: int = 0):
    """A site; promise: how many bytes more than it sends it says there are."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content = files.get(self.path)
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"") + promise))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def test_a_file_is_downloaded_whole_or_not_at_all(tmp_path, monkeypatch):
    content, path = random_pixels(100_000).tobytes(), tmp_path / "deep" / "file.bin"
    options = dict(md5=md5(content), hint="put it there")
    with serve({"/file.bin": content, "/bad/file.bin": content[:-1]}) as (site, _):
        with pytest.raises(FileNotFoundError, match=r"404.*digest.*put it there"):
            download([f"{site}/none/file.bin", f"{site}/bad/file.bin"], path, **options)
        with monkeypatch.context() as patch:

            def interrupted(url, filename):
                Path(filename).write_bytes(content[:1000])
                raise KeyboardInterrupt

            patch.setattr(torchvision.datasets.utils, "_urlretrieve", interrupted)
            with pytest.raises(KeyboardInterrupt):
                download([f"{site}/file.bin"], path, **options)
        assert list(path.parent.iterdir()) == []
        download([f"{site}/none/file.bin", f"{site}/file.bin"], path, **options)
    with (
        serve({"/file.bin": content[:-1]}, promise=1) as (site, _),
        pytest.raises(FileNotFoundError, match="digest"),
    ):
        download([f"{site}/file.bin"], tmp_path / "other.bin", **options)
    assert path.read_bytes() == content
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "file.bin"]


def test_mnist_is_downloaded_once(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    written = write_idx(tmp_path / "site", count=10)
    files = {f"/{p.name}": p.read_bytes() for p in (tmp_path / "site").iterdir()}
    monkeypatch.setattr(MNIST, "resources", [(name[1:], md5(c)) for name, c in files.items()])
    with serve(files) as (site, asked):
        monkeypatch.setattr(MNIST, "mirrors", [f"{site}/"])
        for labels in (False, True, True):
            parts = load(tmp_path, "mnist", image_size=28, channels=1, labels=labels)
            assert np.array_equal(pixels_of(parts)[:, 0], written["train"])
            wanted = [path for path in files if labels or "images" in path]
            assert {path: asked.count(path) for path in asked} == dict.fromkeys(wanted, 2)


def test_cifar10_is_unpacked_whole(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    pixels = write_cifar(tmp_path / "site")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        archive.add(tmp_path / "site" / "cifar-10-batches-py", "cifar-10-batches-py")
    content = stream.getvalue()
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(content))
    half = tmp_path / "root" / ".download-killed.tmp" / "cifar-10-batches-py"  # of a killed process
    half.mkdir(parents=True)
    with serve({"/cifar-10-python.tar.gz": content}) as (site, _):
        monkeypatch.setattr(CIFAR10, "url", f"{site}/cifar-10-python.tar.gz")
        parts = load(tmp_path, "cifar10", image_size=32)
    assert torch.equal(parts["validation"][list(range(5))].images, torch.from_numpy(pixels[5]))
    assert [p.name for p in (tmp_path / "root").iterdir() if not p.name.startswith(".")] == [
        "cifar-10-batches-py"
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mnist", r"MNIST/raw.*cannot be downloaded.*dataset\.root"),
        ("flowers102", r"flowers-102/jpg.*cannot be downloaded.*dataset\.root"),
        ("cifar10", r"cifar-10-batches-py.*cannot be downloaded.*dataset\.root"),
    ],
)
def test_without_a_network_there_is_one_message(name, says, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(FileNotFoundError, match=says) as caught:
        load(tmp_path, name)
    assert "this machine seems to be offline; http" in str(caught.value)
    assert "Name or service not known" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_silent_site_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(named, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file.bin"
        with pytest.raises(FileNotFoundError, match=r"timed out\); put it there"):
            download([url], tmp_path / "file.bin", md5="0", hint="put it there")
    assert socket.getdefaulttimeout() is None


def test_leftovers_of_killed_processes_go_after_a_day(tmp_path):
    for name, age in (("old", 2), ("new", 0)):
        (tmp_path / f".download-{name}.tmp").mkdir()
        time = datetime.now().timestamp() - age * 24 * 3600
        os.utime(tmp_path / f".download-{name}.tmp", (time, time))
    (tmp_path / "mine.tmp").touch()
    os.utime(tmp_path / "mine.tmp", (1, 1))
    with pytest.raises(FileNotFoundError):
        download(["file:///nowhere"], tmp_path / "file.bin", md5="0", hint="put it there")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".download-new.tmp", "mine.tmp"]
