"""A model on the Hub and back: what is pushed, what is read, what is refused; a stand-in serves."""

import json
import shlex
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers import PROJECT, invoke, run, wake
from hub import diffusers, same_eps
from hub_server import INLINE, serving
from PIL import Image

from config import load_config
from model import build_network
from weights import load_model, write_checkpoint

CLASSES = ["dataset.labels=true", f"dataset.classes={[*map(str, range(10))]}"]


def write_run(folder: Path, *overrides: str, step: int = 6, seed: int = 1) -> Path:
    """Write a run of a tiny model whose EMA is not its raw weights."""
    config = load_config(
        PROJECT / "configs/smoke.yml", ["diffusion.beta_schedule=cosine", *overrides]
    )
    networks = {n: wake(build_network(config), seed + i) for i, n in enumerate(("unet", "ema"))}
    checkpoint = {
        "hyper_parameters": config.model_dump(mode="json"),
        "state_dict": torch.nn.ModuleDict(networks).state_dict(),
        "global_step": step,
    }
    write_checkpoint(checkpoint, folder / f"checkpoints/step-{step:08d}.ckpt")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("tiny") / "run", *CLASSES)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of this machine that commands in this process and in others find."""
    from huggingface_hub import constants

    with serving() as hub:
        # as plain HTTP: xet's storage speaks a protocol of its own, from compiled code
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        for name, value in (env | {"HF_TOKEN": "hf_you"}).items():
            monkeypatch.setenv(name, value)
        # read when the package was imported
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "hf/hub"),
            "HF_TOKEN_PATH": str(tmp_path / "hf/token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield hub


def push(source: Path, options: str, place: Path, monkeypatch, code: int = 0) -> str:
    return invoke(f"convert.py push {shlex.quote(str(source))} {options}", place, monkeypatch, code)


def pixels(folder: Path) -> dict[str, bytes]:
    files = folder.rglob("[0-9]*.png")
    return {str(path.relative_to(folder)): Image.open(path).tobytes() for path in files}


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_pushed_is_the_run(tiny, hub, tmp_path, monkeypatch, alone):
    """Its digest, its images and diffusers' eps; `alone` in a process that HF_ENDPOINT tells."""
    line = f"convert.py push {shlex.quote(str(tiny))} you/tiny --num-images 1"
    said = run(f"python {line}", tmp_path) if alone else invoke(line, tmp_path, monkeypatch)
    assert f"pushed: {hub.url}/you/tiny (private)" in said
    assert hub.repos["you/tiny"]["private"]
    files = hub.files("you/tiny")
    weights = [name for name in files if name.endswith((".safetensors", ".bin"))]
    assert weights == ["unet/diffusion_pytorch_model.safetensors"]  # one copy
    assert files[weights[0]] in hub.objects.values()
    assert files["images.png"][:4] == b"\x89PNG"
    before, after = load_model(tiny), load_model("you/tiny")
    assert after.digest() == before.digest() and after.config == before.config
    assert (after.step, after.weights) == (6, "ema")
    options = "--class-label all --num-images 2 --timesteps 3 --precision float32 --output-dir"
    invoke(f"sample.py you/tiny {options} theirs", tmp_path, monkeypatch)
    invoke(f"sample.py {shlex.quote(str(tiny))} {options} ours", tmp_path, monkeypatch)
    drawn = pixels(tmp_path / "theirs")
    assert len(drawn) == 20 and drawn == pixels(tmp_path / "ours")
    pipeline = diffusers.DDPMPipeline.from_pretrained("you/tiny")
    for label in (0, 9):
        same_eps(before, pipeline.unet, [0, 10, 19], label, label)


def test_a_second_push_is_a_commit_with_what_was_measured_since(tiny, hub, tmp_path, monkeypatch):
    """Other weights take the place of the first; what else is there stays, but other weights."""
    push(tiny, "you/tiny --num-images 0 --public --license mit", tmp_path, monkeypatch)
    assert not hub.repos["you/tiny"]["private"] and "images.png" not in hub.files("you/tiny")
    evaluate = "--metrics nll --nll-images 2 --stride 9 --device cpu"
    invoke(f"evaluate.py you/tiny {evaluate} --output evaluations/ema", tmp_path, monkeypatch)
    hub.files("you/tiny")["unet_ema/config.json"] = b"{}"
    hub.files("you/tiny")["LICENSE"] = b"mine"
    (tmp_path / "evaluations/odd").mkdir()
    (tmp_path / "evaluations/odd/metrics.json").write_text('["another\'s"]')
    cards = {}
    for weights in ("ema", "raw"):
        options = f"you/tiny --num-images {int(weights == 'raw')} --public --weights {weights}"
        push(tiny, options, tmp_path, monkeypatch)
        cards[weights] = hub.files("you/tiny")["README.md"].decode()
        assert load_model("you/tiny").digest() == load_model(tiny, weights).digest()
    assert len(hub.repos["you/tiny"]["commits"]) == 4
    scores = json.loads((tmp_path / "evaluations/ema/metrics.json").read_text())["scores"]
    assert f"| {scores['distortion']['value']:.4g} ± " in cards["ema"]
    assert cards["ema"].count("By `evaluate.py`: bits/dim of 2 validation images.") == 1
    assert "By `evaluate.py`" not in cards["raw"]  # those are the EMA's
    files = hub.files("you/tiny")
    assert "unet_ema/config.json" not in files and files["LICENSE"] == b"mine"
    assert "rows: 0, 1, 2" in cards["raw"] and "images.png" in files
    assert '- `diffusion.beta_schedule: "linear" -> "cosine"`' in cards["raw"]
    assert "license: unknown" in cards["raw"] and "library_name: diffusers" in cards["raw"]
    assert str(tiny.parent) not in cards["raw"]


def test_a_dry_run_needs_no_network_no_token_and_no_package(tiny, tmp_path, monkeypatch):
    def blocked(*_):
        raise AssertionError("a dry run asks the network")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = push(tiny, "you/mine --dry-run --num-images 3", tmp_path, monkeypatch)
    assert "would be pushed to you/mine, private: README.md, ddpm.json, images.png" in said
    assert load_model(tmp_path / "mine").digest() == load_model(tiny).digest()
    assert Image.open(tmp_path / "mine/images.png").size == (3 * 66 + 2, 10 * 66 + 2)
    there = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    assert "mine exists" in push(tiny, "you/mine --dry-run", tmp_path, monkeypatch, 2)
    assert there == {path: path.read_bytes() for path in there}
    options = "you/mine --dry-run --num-images 0 --output other"
    assert "written and read back: other" in push(tiny, options, tmp_path, monkeypatch)
    said = push(tiny, "you/mine", tmp_path, monkeypatch, 2)
    assert "huggingface_hub" in said and "requirements-extras.txt" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "other"]


@pytest.mark.parametrize(
    "repo", ["x", "a/b/c", "'a b/c'", "a/", "/b", "a/-b", "a/b--c", "ä/b", "''"]
)
def test_a_wrong_id_is_refused_before_anything_is_done(repo, tmp_path, monkeypatch):
    for options in ("--dry-run", ""):
        said = push(Path("nowhere"), f"{options} {repo}", tmp_path, monkeypatch, 2)
        assert "no id on the Hub" in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_may_not_be_is_one_message_and_nothing_is_pushed(tiny, hub, tmp_path, monkeypatch):
    def refused(options: str, code: int = 2) -> str:
        said = push(tiny, options, tmp_path, monkeypatch, code)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and said.endswith(f"{errors[0]}\n")
        return errors[0]

    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    draws = "--num-images 0"
    assert "eve is not yours; this token is of you, our-lab" in refused("eve/theirs")
    assert not hub.objects
    assert "may not write to our-lab/x" in refused(f"our-lab/x {draws}")  # a member who reads
    assert "--output is of --dry-run" in refused("you/x --output x")
    heads = write_run(tmp_path / "heads", "model.num_heads=2")
    assert "not for diffusers" in push(heads, f"you/x {draws}", tmp_path, monkeypatch, 2)
    hub.repos["you/open"] = {"private": False, "commits": [{}]}
    assert "is there and public: say --public" in refused(f"you/open {draws}")
    hub.repos["you/closed"] = {"private": True, "commits": [{}]}
    assert "is there and private: leave --public out" in refused(f"you/closed --public {draws}")
    assert "letters, digits" in refused(f"you/x {draws} --license '[x'")
    hub.loses = 1
    assert "the SHA-256 is another" in refused(f"you/x {draws}", 1)
    assert [len(hub.repos[f"you/{name}"]["commits"]) for name in ("open", "closed", "x")] == [1] * 3
    assert not list(place.iterdir())


def test_no_token_a_wrong_token_and_no_network(tiny, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    said = push(tiny, "you/x", tmp_path, monkeypatch, 2)
    assert "does not know this token: `hf auth login`, or set HF_TOKEN" in said
    monkeypatch.delenv("HF_TOKEN")
    said = push(tiny, "you/x", tmp_path, monkeypatch, 2)
    assert "without a token: `hf auth login`, or set HF_TOKEN" in said
    assert hub.asked == ["GET /api/whoami-v2"]
    hub.repos["you/x"] = {"private": True, "commits": [{}]}
    said = invoke("sample.py you/x", tmp_path, monkeypatch, 2)
    assert "or a private one, which takes `hf auth login`" in said
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("HF_TOKEN", "hf_you")
    for line, code in ((f"convert.py push '{tiny}' you/x", 1), ("sample.py you/x", 2)):
        said = invoke(line, tmp_path, monkeypatch, code)
        assert f"no answer from {constants.ENDPOINT}: " in said and "Connection refused" in said
        assert len(said.splitlines()) == 1


def test_ctrl_c_leaves_nothing(tiny, hub, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", stop)
    push(tiny, "you/x --num-images 0", tmp_path, monkeypatch, 130)
    monkeypatch.setattr("generation.folder.draw_grid", stop)
    push(tiny, "you/x --dry-run", tmp_path, monkeypatch, 130)
    assert not list(place.iterdir()) and [p.name for p in tmp_path.iterdir()] == ["temporary"]


def test_the_stand_in_refuses_as_the_hub_does(hub):
    def ask(path: str, data: bytes, method: str = "POST", token: str = "hf_you") -> int:
        headers = {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(hub.url + path, data, headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code

    create = json.dumps({"name": "x", "organization": "you"}).encode()
    assert [ask("/api/repos/create", create, token=t) for t in ("hf_eve", "", "hf_you")] == [
        403, 401, 200,
    ]  # fmt: skip
    assert ask("/lfs/" + 64 * "0", b"x", "PUT") == 400 and not hub.objects
    header = {"key": "header", "value": {"summary": "s"}}
    lfs = {"key": "lfsFile", "value": {"path": "w", "oid": 64 * "0", "size": 1}}
    large = {"key": "file", "value": {"path": "w", "content": "A" * 2 * INLINE}}
    for line, status in ((lfs, 400), (large, 413)):
        lines = b"\n".join(json.dumps(x).encode() for x in (header, line))
        assert ask("/api/models/you/x/commit/main", lines) == status
    assert list(hub.files("you/x")) == [".gitattributes"]
