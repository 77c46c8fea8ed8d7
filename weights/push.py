"""Publish a model on the Hugging Face Hub: diffusers' folder, with images, numbers and recipe."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from files import atomic_write
from weights.card import about_numbers, model_card
from weights.export import shareable, summary, write_diffusers
from weights.hub import check_id, connect, upload
from weights.model import Model, load_model

Draw = Callable[[Model, Path], str]  # writes images there, and returns what to say of them


def push_model(
    source: str,
    repo: str,
    *,
    weights: Literal["ema", "raw"],
    license: str,
    draw: Draw | None,
    public: bool,
    folder: Path | None = None,
) -> str:
    """Push a model to `repo` on the Hub, or write to `folder` what would be pushed; sum it up.

    Args:
        source: as `load_model` takes, and raises.
        repo: owner/name; it is made, or gets a new commit.
        draw: writes images.png.
        folder: a new path; then nothing needs the network.

    Raises:
        ValueError: diffusers cannot hold the model, or a name is wrong.
        PermissionError: there is no token, or it may not write there.
        OSError: the Hub refuses, or does not answer.
    """
    check_id(repo)
    if folder and folder.exists():
        raise ValueError(f"{folder} exists; choose another --output, or delete it")
    api = None if folder else connect(repo)
    model = load_model(source, weights)
    model.config = shareable(model.config)
    about = f"{summary(model)}, {model.weights} weights"
    numbers, kind = find_numbers(Path(source), model.digest()), "public" if public else "private"

    def write(place: Path) -> None:
        write_diffusers(model, place, license)
        images = draw(model, place / "images.png") if draw else ""
        card = model_card(model, license, repo, images=images, numbers=numbers)
        (place / "README.md").write_text(card, encoding="utf-8")

    if folder:
        with atomic_write(folder) as temporary:
            write(temporary)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = ", ".join(path.relative_to(folder).as_posix() for path in files)
        size = sum(path.stat().st_size for path in files) / 1e6
        would = f"would be pushed to {repo}, {kind}: {names} ({size:.1f} MB)"
        return f"{about}\nwritten and read back: {folder}\n{would}"
    assert api
    with TemporaryDirectory(prefix="push-") as name:
        write(Path(name))
        address = upload(api, Path(name), repo, public=public)
    return f"{about}\npushed: {address} ({kind})"


def find_numbers(source: Path, digest: str) -> list[str]:
    """Return what `evaluate.py` wrote of a model, in evaluations or its run, for the card."""
    found = []
    for path in sorted(p for f in (Path("evaluations"), source) for p in f.glob("*/metrics.json")):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # another's
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["recipe"]["digest"] == digest:
                found.append(about_numbers(facts))
    return found
