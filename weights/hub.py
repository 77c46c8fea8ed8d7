"""The Hugging Face Hub: a model from it by its id, and a folder to it."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOGIN = "`hf auth login`, or set HF_TOKEN"
PART = r"\w([\w.-]{0,94}\w)?"


def check_id(repo: str) -> None:
    """Raise ValueError where `repo` is not owner/name as the Hub takes them."""
    odd = "--" in repo or ".." in repo or repo.endswith(".git")
    if odd or not re.fullmatch(f"{PART}/{PART}", repo, re.ASCII):
        raise ValueError(
            f"{repo!r} is no id on the Hub: owner/name, each of letters, digits, - _ and . between "
            "them, up to 96; say you/my-model"
        )


def download(source: str) -> Path:
    """Download a model by its id, owner/name; FileNotFoundError where it is none."""
    owner, slash, name = source.partition("/")
    if not (slash and owner and name) or "/" in name or Path(owner).exists() or "." in owner:
        raise FileNotFoundError(f"no checkpoint at {source}")
    unseen = f"no model of that name, or a private one, which takes {LOGIN}"
    patterns = ["*.json", "*.safetensors", "*.bin"]
    try:
        from huggingface_hub import snapshot_download

        with one_reason({401: unseen, 404: unseen}):
            return Path(snapshot_download(source, allow_patterns=patterns))
    except ImportError:
        reason = "`pip install huggingface_hub` first"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise FileNotFoundError(f"nothing at {source}, and no download from the Hub: {reason}")


def connect(repo: str) -> "HfApi":
    """Return the Hub's client; PermissionError where its token may not write to `repo`."""
    try:
        from huggingface_hub import HfApi, get_token
    except ImportError as error:
        hint = "pip install -r requirements-extras.txt"
        raise ValueError(f"pushing needs {error.name}: {hint}") from None
    if not get_token():
        raise PermissionError(f"the Hub takes nothing without a token: {LOGIN}")
    api = HfApi()
    with one_reason({401: f"the Hub does not know this token: {LOGIN}"}):
        me = api.whoami()
    mine = [me["name"], *(group["name"] for group in me.get("orgs", []))]
    owner = repo.partition("/")[0]
    if owner.lower() not in (name.lower() for name in mine):
        raise PermissionError(f"{repo}: {owner} is not yours; this token is of {', '.join(mine)}")
    return api


def upload(api: "HfApi", folder: Path, repo: str, *, public: bool) -> str:
    """Commit a folder to a repository, new or there already; return its address.

    What else is in the repository stays, but for other weights. ValueError where it is public and
    should be private, or the other way round: then nothing is pushed.
    """
    with one_reason({403: f"this token may not write to {repo}: it takes one of the role write"}):
        address = str(api.create_repo(repo, private=not public, exist_ok=True))
        if api.model_info(repo).private == public:
            hint = "leave --public out" if public else "say --public"
            is_there = f"{address} is there and {'private' if public else 'public'}"
            raise ValueError(f"{is_there}: {hint}, or change its settings")
        message = "Push a model"
        # weights of others would be read instead
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=["unet*/*"]
        )
    return address


@contextmanager
def one_reason(meanings: dict[int | None, str]) -> Iterator[None]:
    """Turn whatever the Hub's client raises into one line.

    Args:
        meanings: what the Hub's answers mean here, by status.

    Raises:
        PermissionError: one of these answers. ValueError: what was asked for is wrong.
        OSError: another answer, or none.
    """
    from huggingface_hub import constants, utils

    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        yield
    except Exception as error:  # a network and a service can raise anything
        chain: list[BaseException] = [error]
        while cause := chain[-1].__cause__:  # threads hide what the Hub has answered
            chain.append(cause)
        if getattr(chain[-1], "filename", None):
            raise  # of this machine's disk
        responses = [getattr(cause, "response", None) for cause in chain]
        answer = next((response for response in responses if response is not None), None)
        status = getattr(answer, "status_code", None)
        if status in meanings:
            raise PermissionError(meanings[status]) from None
        if isinstance(error, ValueError):
            raise ValueError(" ".join(str(error).split())) from None
        if answer is not None:
            told = " ".join(str(chain[responses.index(answer)]).split())
            raise OSError(f"the Hub refuses: {told}") from None
        told = " ".join(str(chain[-1]).split()) or type(chain[-1]).__name__
        raise ConnectionError(f"no answer from {constants.ENDPOINT}: {told}") from None
