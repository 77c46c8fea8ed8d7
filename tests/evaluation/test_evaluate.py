"""evaluate.py in this process, on digits and a network of a few thousand weights."""

import hashlib
import json
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from helpers import PROJECT, Net, assert_same, start, tiny, train, values
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from evaluation.callback import Evaluation
from evaluation.extractor import INCEPTION
from evaluation.likelihood import bits_per_dim
from generation import make_denoiser
from training.datamodule import open_images
from weights import load_model


class Registered(FeatureExtractorBase):
    """`Net` as torch-fidelity knows extractors."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        self.net = Net()

    get_provided_features_list = staticmethod(lambda: ("features", "logits"))
    can_be_compiled = staticmethod(lambda: False)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"

    def forward(self, images):
        found = dict(zip(("features", "logits"), self.net(images), strict=True))
        exact = self.name == "test-net-64"
        return tuple(found[k].double() if exact else found[k] for k in self.features_list)


for name in ("test-net", "test-net-64"):
    torch_fidelity.register_feature_extractor(name, Registered)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, two folders of digits, and an extractor."""
    folder = tmp_path_factory.mktemp("place")
    train(folder / "run", f"dataset.cache={folder / 'data/cache'}")
    digits = load_digits()
    for name, chosen in (("low", digits.target < 5), ("high", digits.target >= 5)):
        (folder / name).mkdir()
        for row in np.flatnonzero(chosen)[:300]:
            pixels = (digits.images[row] * (255 / 16)).round().astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{row:04d}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Net().eval()).save(folder / "net.pt")
    (folder / "configs").symlink_to(PROJECT / "configs")
    return folder


# ---- the numbers


def test_two_folders_as_torch_fidelity_measures_them(place, run):
    output, facts = run("low --reference high --extractor test-net --batch-size 37")
    wanted = torch_fidelity.calculate_metrics(
        input1=str(place / "low"), input2=str(place / "high"), feature_extractor="test-net",
        isc=True, fid=True, kid=True, prc=True, kid_subset_size=300, cuda=False, cache=False,
        save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    assert wanted["frechet_inception_distance"] > 0.005
    assert 0 < wanted["recall"] < 1
    found = values(facts)
    fid = found.pop("FID-300")
    assert found == pytest.approx(
        {
            "IS-300": wanted["inception_score_mean"],
            "KID": wanted["kernel_inception_distance_mean"],
            "precision-300": wanted["precision"],
            "recall-300": wanted["recall"],
        },
        rel=1e-6,
    )
    # it takes the mean in the features' precision, we in float64: equal where they are float64
    assert fid == pytest.approx(wanted["frechet_inception_distance"], rel=1e-5)
    exact = torch_fidelity.calculate_metrics(
        input1=str(place / "low"), input2=str(place / "high"), feature_extractor="test-net-64",
        fid=True, cuda=False, cache=False, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    found = values(run("low --reference high --extractor test-net-64 --metrics fid")[1])
    assert found["FID-300"] == pytest.approx(exact["frechet_inception_distance"], rel=1e-9)
    assert fid == pytest.approx(exact["frechet_inception_distance"], rel=1e-6)
    assert facts["scores"]["IS-300"]["error"] == pytest.approx(wanted["inception_score_std"])
    assert "FID-300" in output
    assert "without NLL: only a model has a likelihood" in output
    same = run("low --reference low --extractor test-net --metrics fid,kid,pr")[1]
    assert values(same)["FID-300"] == pytest.approx(0, abs=1e-6)
    assert values(same)["precision-300"] == values(same)["recall-300"] == 1


def test_a_run_is_measured_whole(place, run):
    line = "run --extractor net.pt --num-images 21 --timesteps 5 --nll-images 9"
    output, facts = run(f"{line} --batch-size 8")
    assert "it will take about" in output
    assert "3 batches of 8 images x 5 steps, 23 calls for the likelihood" in output  # 9 x 20 / 8
    names = ["FID-21", "IS-21", "KID", "precision-21", "recall-21", "NLL", "rate", "distortion"]
    assert list(facts["scores"]) == [*names, "prior"]
    recipe = facts["recipe"]
    assert recipe["timesteps"] == 5
    assert recipe["seeds"] == [0, 20]
    assert recipe["step"] == 6
    assert len(recipe["extractor"]["sha256"]) == 64
    assert facts["reference"]["images"] == 1617
    assert "21 images, not 50,000" in facts["not as in the paper"]
    # other batches, and images kept
    line = "run --extractor net.pt --num-images 21 --timesteps 5 --metrics fid,is --batch-size 5"
    few = values(run(f"{line} --save-images --output kept")[1])
    assert few == pytest.approx({k: values(facts)[k] for k in ("FID-21", "IS-21")}, rel=1e-5)
    images = sorted(Path("kept/images").glob("*.png"))
    assert len(images) == 21
    # a stopped one makes what is missing
    images[3].unlink()
    times = {path: path.stat().st_mtime_ns for path in images if path.exists()}
    again = run(f"{line} --save-images --output kept")[1]
    assert values(again) == pytest.approx(few, rel=1e-6)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert images[3].exists()
    # the folder measures as the run did
    line_of_folder = "kept/images --reference configs/smoke.yml --extractor net.pt"
    assert values(run(f"{line_of_folder} --metrics fid,is")[1]) == pytest.approx(few, rel=1e-6)
    # another recipe does not go over it
    output, _ = run(f"{line} --seed 1 --save-images --output kept", code=2)
    assert "holds another evaluation (seeds differ)" in output


def test_likelihood_of_a_split(run):
    facts = run("run --metrics nll --nll-images 9 --seed 5 --output some")[1]
    model = load_model("run")
    rows = np.linspace(0, 179, 9).round().astype(int).tolist()
    images = open_images(model.config)["validation"][rows].images
    denoiser, seeds = make_denoiser(model.network, model.diffusion), list(range(5, 14))
    options = dict(variance="large", batch_size=9)
    wanted = bits_per_dim(denoiser, model.diffusion, images, seeds, **options)
    found = np.load("some/nll.npz")
    assert found["rows"].tolist() == rows
    np.testing.assert_allclose(found["bits"], wanted.bits, rtol=1e-4)
    total = (wanted.prior + wanted.bits.sum(dim=1)).numpy()
    score = facts["scores"]["NLL"]
    assert score["value"] == pytest.approx(total.mean(), rel=1e-5)
    assert score["error"] == pytest.approx(total.std(ddof=1) / 3, rel=1e-4)
    parts = values(facts)
    assert parts["rate"] + parts["distortion"] == pytest.approx(parts["NLL"])
    assert facts["recipe"]["nll"]["split"] == "validation"
    assert not {"images", "seeds", "sampler"} & facts["recipe"].keys()  # nothing was sampled
    line = "run --metrics nll --split train --nll-images 3 --stride 3"
    assert list(values(run(line)[1])) == [
        "nll-estimate (stride 3)", "rate-estimate (stride 3)", "distortion", "prior"
    ]  # fmt: skip


def test_a_config_is_measured_by_its_validation_images(run):
    _, facts = run("configs/smoke.yml --extractor net.pt --metrics fid,is")
    assert list(facts["scores"]) == ["FID-180", "IS-180"]
    assert facts["scores"]["FID-180"]["value"] < 0.1


def test_references(place, run):
    line = "low --extractor net.pt --metrics fid --reference"
    one = values(run(f"{line} high")[1])
    cached = max(Path("data/cache").glob("reference-*.npz"), key=lambda p: p.stat().st_mtime)
    assert values(run(f"{line} {cached}")[1]) == one
    before = cached.stat().st_mtime_ns
    assert values(run(f"{line} high")[1]) == one
    assert cached.stat().st_mtime_ns == before  # read, not made again
    cached.write_bytes(cached.read_bytes()[:1000])
    assert values(run(f"{line} high")[1]) == one
    with np.load(cached) as statistics:
        np.savez(place / "ttur.npz", mu=statistics["mu"], sigma=statistics["sigma"])
    output, facts = run("low --extractor net.pt --reference ttur.npz")
    assert "without KID: ttur.npz holds no features" in output
    assert list(values(facts)) == ["FID-300", "IS-300"]
    assert values(facts)["FID-300"] == one["FID-300"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nowhere", "no checkpoint at nowhere"),
        ("low --metrics fid,iss", "'iss' is unknown; did you mean is?"),
        ("low --metrics fid", "low has no dataset: say --reference"),
        ("low --metrics nll", "only a model has a likelihood"),
        ("low --reference nowhere", "nowhere"),
        ("low --reference big", "big is 9x8, and what is measured is 8x8"),
        ("mixed", "b.png in mixed is 9x8 and the first image is 8x8"),
        ("low --timesteps 3", "--timesteps is of a model"),
        ("low --num-images 301", "low has 300"),
        ("run --timesteps 99", "timesteps 99"),
        ("run --extractor nothing", "no TorchScript file, nor one of"),
        ("run --stride 20 --metrics nll", "--stride 20"),
        ("run --nll-images 181 --metrics nll", "validation has 180"),
        ("run --device tpu", "--device tpu"),
        ("run --devices 0", "--devices"),
        ("run --num-images 3 --metrics pr", "3 images are too few for it, 4 are needed"),
        ("low --metrics fid --reference single", "1 images are too few for it, 2 are needed"),
        ("low --reference narrow.npz", "another extractor made it"),
        ("low --reference odd.npz", "holds no statistics"),
        ("low --metrics is --output foreign", "metrics.json is not of this command"),
    ],
)
def test_mistakes_end_in_one_message(place, run, line, says):
    for name, widths in (("big", {"a": 9}), ("single", {"a": 8}), ("mixed", {"a": 8, "b": 9})):
        (place / name).mkdir(exist_ok=True)
        for file, width in widths.items():
            Image.new("L", (width, 8)).save(place / name / f"{file}.png")
    np.savez(place / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(place / "odd.npz", mu=np.full(3, np.nan), sigma=np.eye(3), count=[1, 2])
    (place / "foreign").mkdir(exist_ok=True)
    (place / "foreign" / "metrics.json").write_text('{"recipe": "flour"}')
    extractor = "" if "--extractor" in line else "--extractor net.pt"
    code = 1 if line == "mixed" else 2  # found while it is read
    output, _ = run(f"{line} {extractor}", code)
    assert says in " ".join(output.split())
    assert len(output.splitlines()) < 12


# ---- on several ranks, and while training


def test_evaluation_while_training_leaves_no_trace(place, tmp_path):
    one = train(tmp_path / "one")
    overrides = [
        f"dataset.cache={tmp_path / 'cache'}", f"evaluation.extractor={place / 'net.pt'}",
        "evaluation.evaluate_every=3", "evaluation.evaluate_images=9",
    ]  # fmt: skip
    evaluation = Evaluation(tiny(*overrides), Console(quiet=True))
    other = train(tmp_path / "two", *overrides, callbacks=[evaluation])
    assert_same(dict(one[0].state_dict()), dict(other[0].state_dict()))
    assert_same(one[1], other[1])
    events = EventAccumulator(str(tmp_path / "two"))
    events.Reload()
    for name in ("FID-9", "IS-9", "KID-9"):
        assert [e.step for e in events.Scalars(f"evaluation/{name} unipc 10")] == [3, 6]


@pytest.mark.slow
def test_two_processes_are_one(place):
    """Also through torchrun."""
    line = "run --extractor net.pt --num-images 21 --timesteps 5 --metrics fid,is,kid,pr"
    script = str(PROJECT / "evaluate.py")
    found = {}
    for name, launcher, devices in (
        ("one", [], "1"),
        ("two", [], "2"),
        ("three", ["-m", "torch.distributed.run", "--nproc-per-node", "3"], "1"),
    ):
        command = [
            sys.executable, *launcher, script, *shlex.split(line), "--device", "cpu",
            "--devices", devices, "--output", name, "--batch-size", "4",
        ]  # fmt: skip
        with start(command, place) as process:
            process.finish(timeout=300)
        found[name] = json.loads((place / name / "metrics.json").read_text())
    assert [facts["devices"] for facts in found.values()] == [1, 2, 3]
    one, *others = map(values, found.values())
    for other in others:
        assert other == pytest.approx(one, rel=1e-6)


@pytest.mark.slow
def test_two_processes_evaluate_while_training_as_one(place):
    line = (
        "configs/smoke.yml hardware.accelerator=cpu training.max_steps=3 model.dropout=0.0 "
        "evaluation.evaluate_every=3 evaluation.evaluate_images=9 "
        f"'evaluation.extractor={place}/net.pt'"
    )
    for devices in ("1", "2"):
        command = [sys.executable, PROJECT / "train.py", *shlex.split(line)]
        command += [f"hardware.devices={devices}", "--run-name", f"on-{devices}"]
        with start(command, place) as process:
            process.finish(timeout=300)
    one, two = (last_values(place / "lightning_logs" / f"on-{n}") for n in (1, 2))
    assert "evaluation/FID-9 unipc 10" in one
    assert two == pytest.approx(one, rel=1e-3)


def last_values(run):
    events = EventAccumulator(str(run))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("evaluation/")]
    return {tag: events.Scalars(tag)[-1].value for tag in tags}


# ---- Inception


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Random weights in the format that torch-fidelity fetches."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        kind = module.FeatureExtractorInceptionV3
        patch.setattr(kind, "load_state_dict", lambda *_: None)
        torch.save(kind(INCEPTION, ["2048"]).state_dict(), path)
    return path


def test_inception_from_a_file(run, inception):
    output, facts = run(f"low --num-images 2 --metrics is --extractor-weights '{inception}'")
    assert facts["recipe"]["extractor"]["name"] == INCEPTION
    digest = hashlib.sha256(inception.read_bytes()).hexdigest()
    assert f"features: {INCEPTION}, sha256 {digest}" in output
    assert "not of the literature's Inception" in output  # by its digest


@pytest.mark.slow
def test_inception_is_torch_fidelitys(place, run, inception):
    for name in ("low", "high"):
        (place / f"few-{name}").mkdir()
        for path in sorted((place / name).glob("*.png"))[:50]:
            shutil.copy(path, place / f"few-{name}")
    line = "few-low --reference few-high --metrics fid,is,kid,pr --batch-size 25"
    found = values(run(f"{line} --extractor-weights '{inception}'")[1])
    wanted = torch_fidelity.calculate_metrics(
        input1=str(place / "few-low"), input2=str(place / "few-high"), kid_subset_size=50,
        isc=True, fid=True, kid=True, prc=True, cuda=False, cache=False, save_cpu_ram=True,
        verbose=False, batch_size=25, feature_extractor=INCEPTION,
        feature_extractor_weights_path=str(inception),
    )  # fmt: skip
    keys = ["frechet_inception_distance", "inception_score_mean", "kernel_inception_distance_mean",
            "precision", "recall"]  # fmt: skip
    assert list(found.values()) == pytest.approx([wanted[key] for key in keys], rel=1e-5)
