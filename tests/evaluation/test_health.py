"""A run's health: while it trains, by evaluate.py, and what is advised; the best checkpoint."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PROJECT, assert_same, best_of, curves, invoke, start, tiny, train, watched

from diffusion_utils import GaussianDiffusion, from_uint8
from evaluation.health import Health, advice_before
from evaluation.yardsticks import get_yardsticks
from pl_utils import VALIDATE, VALIDATION_TAGS
from training.datamodule import open_images
from weights import load_model

EVERY = "evaluation.validate_every=2"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    (tmp_path / "pretrained").symlink_to(PROJECT / "pretrained")
    return tmp_path


# ---- while training


@pytest.mark.parametrize(
    "others",
    [
        ("dataset.labels=true", "dataset.image_size=[16, 8]", "dataset.random_flip=true"),
        ("diffusion.prediction=v", "training.loss_weight=v", "training.ema_decay=0.05"),
        ("diffusion.prediction=x0", "dataset.validation_fraction=0"),
    ],
)
def test_looking_after_a_run_leaves_no_trace(tmp_path, others):
    with (tmp_path / "said").open("w+") as said:
        one, adam = train(tmp_path / "a", *others)
        other, other_adam = watched(tmp_path / "b", EVERY, *others, say=said)
        said.seek(0)
        text = said.read()
    assert_same(dict(one.state_dict()), dict(other.state_dict()))
    assert_same(adam, other_adam)
    assert len(re.findall("^health at step", text, re.M)) == 3
    names = {path.name for path in (tmp_path / "b/yardsticks").iterdir()}
    validates = "dataset.validation_fraction=0" not in others
    assert names >= {"best-linear", "memoriser", "training-images"}
    assert ("raw-weights" in names) == (validates and "training.ema_decay=0.05" not in others)
    linear = curves(tmp_path / "b/yardsticks/best-linear")
    assert linear.keys() == set(VALIDATION_TAGS)
    assert [step for step, _ in linear["val/loss"]] == [2, 4, 6]
    assert 0 < linear["val/loss"][0][1] < 1
    assert bool(curves(tmp_path / "b")) == validates
    # targets and weights are undone: this is the plain error of eps
    data, diffusion, plain = other.trainer.datamodule, other.diffusion, []
    for i, batch in enumerate(data.val_dataloader()[-1]):
        t, eps, *_ = other.draw(VALIDATE, i, len(batch.images))
        x_t = diffusion.q_sample(from_uint8(batch.images), t, eps)
        F = other.ema(x_t, t, batch.labels)
        plain.append((eps - diffusion.predict_eps(x_t, t, F)).square().flatten(1).mean(1))
    training = curves(tmp_path / "b/yardsticks/training-images")["val/loss"]
    assert training[-1][1] == pytest.approx(torch.cat(plain).mean().item(), rel=1e-4)


def test_losses_of_training_and_validation_have_the_same_noise(tmp_path):
    """Equal images have equal losses."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.save(tmp_path / "twice.npy", np.concatenate([pixels] * 2))
    order = np.random.default_rng(0).permutation(24)
    twice = np.empty((24, 8, 8, 1), np.uint8)
    twice[np.sort(order[:12])] = twice[np.sort(order[12:])] = pixels  # validation, training
    np.save(tmp_path / "twice.npy", twice)
    ddpm, _ = watched(
        tmp_path / "run", EVERY, "dataset.name=npy", f"dataset.root={tmp_path / 'twice.npy'}",
        "dataset.validation_fraction=0.5",
    )  # fmt: skip
    assert len(ddpm.validation_means) == 4
    assert ddpm.validation_means["ema", "train"] == ddpm.validation_means["ema", "validation"]
    assert ddpm.validation_means["raw", "train"] != ddpm.validation_means["ema", "train"]


def test_a_run_that_ends_sooner_measures_nothing(tmp_path):
    watched(tmp_path / "run", "evaluation.validate_every=100")
    assert not (tmp_path / "cache").exists()


def test_one_image_can_be_looked_after(tmp_path):
    """A person may overfit a single image on purpose."""
    np.save(tmp_path / "one.npy", np.full((8, 8, 8, 1), 100, np.uint8))
    with (tmp_path / "said").open("w+") as said:
        watched(
            tmp_path / "run", "dataset.name=npy", f"dataset.root={tmp_path / 'one.npy'}", EVERY,
            "dataset.validation_fraction=0", "logging.logger=csv", say=said,
        )  # fmt: skip
        said.seek(0)
        text = said.read()
    assert "health at step 6: training loss" in text
    assert "0 of 16 copies" in text
    assert "100% of the images are nearly of one color" in text
    (table,) = (tmp_path / "run").glob("csv/*/metrics.csv")
    assert "val/loss, training-images" in table.read_text()


# ---- evaluate.py and figures.py


def test_the_shipped_model_is_healthy(place, run):
    line = "pretrained/digits.safetensors --metrics health --num-images 64"
    output, facts = run(f"{line} --precision float32")
    health = facts["health"]
    losses = {name: values[0] for name, values in health["losses"].items()}
    assert losses["EMA, training"] == pytest.approx(0.124, abs=0.004)
    assert losses["EMA, validation"] == pytest.approx(0.136, abs=0.004)
    assert health["advice"] == {}
    assert "nothing is wrong" in output
    assert health["copies"]["pixels"] == [[0, 64], [0, 180]]
    assert facts["recipe"]["sampler"] == "unipc"
    assert facts["recipe"]["health"]["samples"] == 64
    with np.load(Path(re.search("^output: (.*)$", output, re.M)[1]) / "health.npz") as lines:
        assert lines["EMA, training"].mean() == pytest.approx(losses["EMA, training"])
    assert "only a model has a health" in run("configs/smoke.yml --metrics health", 2)[0]


def test_health_of_labels_beside_other_numbers(place, run, net, monkeypatch):
    overrides = "dataset.labels=true", "dataset.image_size=[16, 8]", "training.ema_decay=0.2"
    train(place / "run", *overrides, f"dataset.cache={place / 'cache'}")
    _, facts = run(f"run --metrics fid,health --extractor {net} --num-images 30 --timesteps 4")
    assert facts["scores"].keys() >= {"FID-30"}
    assert f"features of {net.name}" in facts["health"]["copies"]
    assert facts["health"]["losses"].keys() >= {"EMA, validation", "raw weights, training"}
    model = load_model(place / "run")
    images = open_images(model.config)["validation"]
    x, labels = images[[0, 1]]
    assert (model(x.float(), 3, labels) != model(x.float(), 3)).any()  # so they are told
    invoke("figures.py health run --num-images 9 --device cpu", place, monkeypatch)
    assert (place / "figures/health.png").stat().st_size > 10_000


@pytest.mark.slow
def test_two_processes_find_the_same(place):
    train(place / "run", "dataset.labels=true", f"dataset.cache={place / 'cache'}")
    found = []
    for devices in "1", "2":
        line = f"run --metrics health --num-images 20 --device cpu --devices {devices}"
        command = [sys.executable, str(PROJECT / "evaluate.py"), *shlex.split(line)]
        with start([*command, "--output", devices], place) as process:
            process.finish(timeout=300)
        found.append(json.loads((place / devices / "metrics.json").read_text())["health"])
    for name, values in found[0]["losses"].items():
        np.testing.assert_allclose(found[1]["losses"][name], values, rtol=1e-6)
    assert found[0]["copies"] == found[1]["copies"]
    for devices in "1", "2":
        line = f"configs/smoke.yml evaluation.validate_every=2 hardware.devices={devices}"
        line += f" hardware.accelerator=cpu training.keep_best=validation --run-name {devices}"
        command = [sys.executable, str(PROJECT / "train.py"), *shlex.split(line)]
        with start(command, place) as process:
            process.finish(timeout=300)
    one, two = (best_of(place / "lightning_logs" / name) for name in "12")
    assert one[0] == two[0]
    assert one[1]["validation"][0] == pytest.approx(two[1]["validation"][0], rel=0.2)


@pytest.mark.slow
def test_fifty_images_learned_by_heart_are_flagged(place, run, monkeypatch):
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[:100, :, :, None] * (255 / 16)).astype(np.uint8)
    np.save(place / "hundred.npy", pixels)
    line = "train.py configs/digits.yml dataset.name=npy dataset.root=hundred.npy"
    line += " dataset.labels=false dataset.validation_fraction=0.5 training.max_steps=2000"
    said = invoke(f"{line} guidance.scale=1", place, monkeypatch)
    assert "each of 50 images is seen 1,280 times" in said
    _, facts = run("lightning_logs/digits --metrics health")
    assert facts["health"]["advice"].keys() >= {"copies", "gap", "epochs"}
    (copied, drawn), (of_validation, _) = facts["health"]["copies"]["pixels"]
    assert copied > 0.3 * drawn
    assert of_validation == 0


# ---- the verdict


def health(config=None, step=2800, loss=0.13, trained=0.12, **changes):
    losses = {("ema", "validation"): loss, ("ema", "train"): trained}
    config = config or tiny("training.warmup_steps=100", "training.max_steps=3000")
    return Health(**{"config": config, "step": step, "losses": losses, "linear": 0.2} | changes)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, []),
        ({"loss": 1.4, "trained": 1.3}, ["diverged"]),
        ({"loss": float("nan"), "trained": float("nan")}, ["diverged"]),
        ({"step": 50, "loss": 1.4, "trained": 1.3}, []),  # still warming up
        ({"loss": 0.25, "trained": 0.24}, ["above linear"]),
        ({"loss": 0.25, "trained": 0.24, "step": 700}, []),  # young, of 3,000 steps
        ({"loss": 0.25, "trained": 0.24, "few": True}, []),  # the line itself is learned by heart
        ({"loss": 0.2, "trained": 0.12}, ["gap"]),
        ({"loss": 0.3, "trained": 0.1}, ["gap"]),  # above linear, for another reason
        ({"copies": (9, 256), "validation_copies": (0, 180)}, ["copies"]),
        ({"copies": (9, 256), "validation_copies": (7, 180)}, []),
        ({"copies": (2, 20)}, []),  # too few to tell
        ({"clipped": 0.1}, ["clipped"]),
        ({"clipped": 0.7, "step": 150}, []),
        ({"skipped": 0.02}, ["skipped"]),
        ({"best": (0.12, 400)}, ["rising"]),
        ({"best": (0.128, 400)}, []),
    ],
)
def test_what_is_wrong_is_said_with_a_number(changes, kinds):
    found = list(health(**changes).advice())
    assert [advice.kind for advice in found] == kinds
    assert all(re.search(r"\d|nan", advice.text) for advice in found)


def test_a_young_ema_is_to_blame_for_its_loss():
    losses = {("ema", "validation"): 0.32, ("ema", "train"): 0.31}
    losses |= {("raw", "validation"): 0.16, ("raw", "train"): 0.15}
    config = tiny("training.ema_decay=0.998", "training.warmup_steps=100", "training.max_steps=500")
    young = health(config, 500, losses=losses)
    assert [advice.kind for advice in young.advice()] == ["EMA lags"]
    assert young.summary() == (
        "validation loss 0.32: 60% above the best linear denoiser, 3% above training; "
        "EMA is 37% initial weights, raw weights have 0.16"
    )
    goes_on = tiny("training.ema_decay=0.998", "training.max_steps=5000")
    assert not [*health(goes_on, 500, losses=losses).advice()]  # it will forget
    unknown = health(goes_on, 0, losses={("raw", "train"): 0.1})  # the file of somebody else
    assert unknown.summary() == "training loss 0.1: 50% below the best linear denoiser"
    assert not [*unknown.advice()]
    assert health(copies=(0, 256)).summary() == (
        "validation loss 0.13: 35% below the best linear denoiser, 8% above training; "
        "0 of 256 copies; EMA has forgotten its start"
    )


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        ((), []),
        (("diffusion.timesteps=100",), ["schedule"]),
        (("diffusion.timesteps=100", "diffusion.beta_schedule=cosine"), []),
        (("training.ema_decay=0.9999",), ["EMA too slow"]),
        (("training.max_steps=400000",), ["epochs"]),
    ],
)
def test_what_is_wrong_from_the_start(tmp_path, overrides, kinds):
    base = "diffusion.timesteps=1000", "training.max_steps=3000"
    config = tiny(*base, f"dataset.cache={tmp_path}", *overrides)
    diffusion, images = GaussianDiffusion(**config.diffusion.model_dump()), open_images(config)
    known = get_yardsticks(images, diffusion, flips=False, cache=tmp_path, say=print)
    found = list(advice_before(config, diffusion, known, len(images["train"])))
    assert [advice.kind for advice in found] == kinds
    dark = known._replace(levels=np.array([0, 16]), flat=np.array(0.3))
    assert {"range", "flat"} <= {a.kind for a in advice_before(config, diffusion, dark, 1617)}
    assert torch.isfinite(torch.from_numpy(known.spectrum)).all()
