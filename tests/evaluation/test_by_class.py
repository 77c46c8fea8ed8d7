"""evaluate.py of models that know classes, guided ones, and images that are no squares."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from helpers import PROJECT, Net, assert_same, start, tiny, train, values, wake
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from typer.testing import CliRunner

import evaluate
from dataset import Images, with_facts
from evaluation.callback import Evaluation, draw_together
from evaluation.classes import (
    Labelled,
    apportion,
    as_matrix,
    assign_labels,
    class_scores,
    class_table,
    overall_accuracy,
    rows_by_label,
)
from evaluation.likelihood import bits_per_dim
from evaluation.metrics import Tally, compute
from files import to_yaml
from generation import Sampling, generate, make_denoiser
from pl_utils import DDPM
from training.datamodule import open_images
from weights import load_model, write_checkpoint


class Digits(Net):
    """`Net` with logits of ten classes, without a loop or a branch."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.fc = nn.Linear(12, 10)


def save_model(path, *overrides):
    """Write a network that was not trained, but answers labels."""
    ddpm = DDPM(with_facts(tiny(*overrides)))
    wake(ddpm.ema)
    config = ddpm.config.model_dump(mode="json")
    tree = {"hyper_parameters": config, "state_dict": ddpm.state_dict(), "global_step": 7}
    write_checkpoint(tree, path / "checkpoints/step-00000007.ckpt")
    return ddpm.config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    cache = f"dataset.cache={folder / 'cache'}"
    config = save_model(folder / "labelled", "dataset.labels=true", cache)
    (folder / "labelled.yml").write_text(to_yaml(config))
    save_model(folder / "plain", cache)
    save_model(folder / "wide", "dataset.image_size=[8, 16]", cache)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    (folder / "data").mkdir()
    np.savez(folder / "data/one.npz", images=pixels, labels=np.zeros(40, int))
    overrides = "dataset.name=npz", f"dataset.root={folder / 'data/one.npz'}", cache
    save_model(folder / "one", *overrides, "dataset.labels=true", "dataset.validation_fraction=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Digits().eval()).save(folder / "ten.pt")
    return folder


@pytest.fixture
def run(run):
    """Measure in float32, by the extractor of ten classes unless a line names another."""

    def run_in_float32(line, code=0):
        line += "" if "--extractor" in line else " --extractor ten.pt"
        return run(f"{line} --precision float32", code)

    return run_in_float32


# ---- labels and rows


@pytest.mark.parametrize(
    ("count", "weights", "wanted"),
    [
        (10, [1, 1, 1], [4, 3, 3]),
        (10, [1, 2, 3], [2, 3, 5]),  # 1.67, 3.33, 5
        (2, [1, 1, 8], [0, 0, 2]),
        (50_000, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180], None),
        (6, [1, 2, 3], [1, 2, 3]),
    ],
)
def test_labels_are_apportioned_by_largest_remainders(count, weights, wanted):
    found = apportion(count, weights)
    assert found == (wanted or found)
    assert sum(found) == count
    quotas = np.array(weights) * count / sum(weights)
    assert (np.abs(found - quotas) < 1).all()


def test_rows_by_label_and_back():
    pixels, names = np.zeros((5, 1, 4, 4), np.uint8), ["hat", "cape", "wand"]
    one = Images(pixels, labels=np.array([2, 0, 0, 2, 1]), classes=names)
    hot = Images(pixels, labels=np.eye(3, dtype=np.uint8)[[2, 0, 0, 2, 1]], classes=names)
    wanted = {"hat": [1, 2], "cape": [4], "wand": [0, 3]}
    for images in (one, hot):
        assert list(rows_by_label(images, range(5)).items()) == list(wanted.items())
        assert rows_by_label(images, [4, 0, 3]) == {"cape": [0], "wand": [1, 2]}
        assert rows_by_label(images.of(np.array([3, 4])), [0, 1]) == {"wand": [0], "cape": [1]}
        assert np.array_equal(as_matrix(wanted, names), images.labels_of(range(5)))
    several = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 0, 0]], np.uint8)
    images = Images(pixels, labels=several, classes=names)
    found = rows_by_label(images, range(5))
    assert found == {"hat+cape": [0, 2], "hat": [4], "wand": [3], None: [1]}
    assert np.array_equal(as_matrix(found, names), several)
    assert rows_by_label(Images(pixels), [3, 4]) == {None: [0, 1]}
    weights = {label: len(rows) for label, rows in found.items()}
    assert assign_labels(2, weights) == {"hat+cape": [0], "hat": [1]}


# ---- numbers by class


def tally_of(features, logits, size=8):
    tally = Tally(len(features), features.shape[1], 3, keep=len(features))
    for rows in torch.arange(len(features)).split(size):
        tally.add(rows.tolist(), features[rows], logits[rows])
    return tally


def test_a_class_is_measured_as_its_images_alone():
    generator = torch.Generator().manual_seed(0)
    features, real = torch.randn(2, 60, 4, generator=generator)
    logits = torch.randn(60, 3, generator=generator)
    metrics = "fid", "is", "kid", "pr"
    whole, reference = tally_of(features, logits), tally_of(real, logits).statistics()
    classes = ["a", "b", "c"]
    # all of one class: bitwise what all are
    every = np.eye(3, dtype=np.uint8)[np.zeros(60, int)]
    found, without = class_scores(metrics, whole, reference, Labelled(classes, every, every), 8)
    overall = compute(("fid", "kid", "pr"), whole, reference)
    accuracy = overall_accuracy(whole, every)["accuracy"].value
    assert accuracy == (logits.argmax(1) == 0).double().mean().item()
    assert found["a"] == {
        "images": 60, "real images": 60, "accuracy": accuracy,
        **{name: score.value for name, score in overall.items()},
    }  # fmt: skip
    assert found.keys() == {"a"}  # nobody asked for the others
    assert without == []
    # some of them, and some in two classes
    labels = np.zeros((60, 3), np.uint8)
    labels[:20, 0] = labels[10:50, 1] = labels[58:, 2] = 1
    right = labels[np.arange(60), logits.argmax(1)]  # it tells a class of the image
    known = Labelled(classes, labels, labels[::-1])
    found, without = class_scores(metrics, whole, reference, known, 8)
    for k, rows in enumerate((slice(20), slice(10, 50))):
        others = real[np.flatnonzero(labels[::-1][:, k])]
        alone = compute(
            ("fid", "kid", "pr"),
            tally_of(features[rows], logits[rows]),
            tally_of(others, logits[: len(others)]).statistics(),
        )
        assert {name: found[classes[k]][name] for name in alone} == {
            name: score.value for name, score in alone.items()
        }
        assert found[classes[k]]["accuracy"] == right[rows].mean()
    assert "KID" in found["c"]
    assert [line.split(":")[0] for line in without] == [
        "without FID of c", "without precision, recall of c"
    ]  # fmt: skip
    score = overall_accuracy(whole, labels)["accuracy"].value
    assert score == pytest.approx(right.sum() / 52)  # 8 have no class
    assert not overall_accuracy(whole, labels[:, :2])  # it tells other classes


def test_of_many_classes_the_worst_and_the_mean_are_shown():
    found = {f"c{i}": {"images": 9, "FID-9": float(i), "accuracy": i / 100} for i in range(100)}
    table = class_table(found)
    names, *_, accuracies = ([*column.cells] for column in table.columns)
    assert names == ["c0", "c1", "c2", "c3", "c4", "mean of classes"]
    assert accuracies[-1] == "0.4950"


def test_real_images_are_told_as_the_classifier_tells_them(place, run):
    _, facts = run("labelled.yml --metrics fid,is,kid")
    images, labels = open_images(load_model("labelled").config)["validation"][list(range(180))]
    with torch.inference_mode():
        told = Digits()(images.expand(-1, 3, -1, -1))[1].argmax(1)
    right = told == labels.argmax(1)
    assert values(facts)["accuracy"] == pytest.approx(right.float().mean().item())
    assert list(facts["classes"]) == [str(digit) for digit in range(10)]
    for digit, row in facts["classes"].items():
        mine = labels[:, int(digit)] > 0
        assert row["images"] == mine.sum()
        assert row["accuracy"] == pytest.approx(right[mine].float().mean().item())
        assert {f"FID-{row['images']}", "KID", "real images"} < row.keys()


def test_a_model_of_one_class_has_one_number(place, run):
    line = "one --num-images 20 --timesteps 2 --metrics fid,kid,pr --batch-size 8"
    _, facts = run(f"{line} --output single")
    (row,) = facts["classes"].values()
    assert row == {"images": 20, "real images": 40, **values(facts)}
    assert facts["recipe"]["labels"] == {"0": 20}
    # without the data nobody knows how often training saw a class
    Path("data/one.npz").rename("data/two.npz")
    output, _ = run(f"{line} --reference data", 2)
    assert "or say --class-label all" in output
    Path("data/two.npz").rename("data/one.npz")


# ---- a model that knows classes


def test_labels_are_drawn_as_training_saw_them(place, run):
    line = "labelled --num-images 21 --timesteps 3 --metrics fid,is --batch-size 4"
    output, facts = run(f"{line} --save-images --output kept")
    train = open_images(load_model("labelled").config)["train"]
    counts = apportion(21, train.labels_of(range(len(train))).sum(0).tolist())
    assert facts["recipe"]["labels"] == {str(i): n for i, n in enumerate(counts)}
    assert {k: row["images"] for k, row in facts["classes"].items()} == facts["recipe"]["labels"]
    assert "images of chosen classes, and the paper's model knows none" in output
    files = sorted(Path("kept/images").rglob("*.png"), key=lambda path: path.name)
    assert [path.stem for path in files] == [f"{i:06d}" for i in range(21)]
    assert [path.parent.name for path in files] == [
        str(i) for i, n in enumerate(counts) for _ in range(n)
    ]
    # each is the image of its seed and label, and says so
    model = load_model("labelled")
    plan = Sampling(model, {"timesteps": 3}, source="labelled", precision="float32")
    for seed in (0, 9, 20):
        image, label = Image.open(files[seed]), files[seed].parent.name
        told = json.loads(image.text["recipe"])
        assert (told["class_label"], told["seed"]) == (label, seed)
        [(_, alone)] = generate(plan.denoiser(label), plan.steps, [seed], shape=model.shape)
        assert np.abs(np.array(image).astype(int) - alone[0, 0].numpy()).max() <= 1
    # a stopped one makes what is missing
    files[5].unlink()
    times = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    assert values(run(f"{line} --save-images --output kept")[1]) == values(facts)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert files[5].exists()
    # one class alone: its images are those of the same seeds
    _, facts = run("labelled --class-label 9 --seed 19 --num-images 2 --timesteps 3 "
                   "--metrics is --save-images --output nine")  # fmt: skip
    assert facts["recipe"]["labels"] == {"9": 2}
    nine = np.array(Image.open("nine/images/000020.png")).astype(int)
    assert np.abs(nine - np.array(Image.open(files[20]))).max() <= 1
    _, facts = run("labelled --class-label 4,2 --num-images 5 --timesteps 3 --metrics is")
    assert facts["recipe"]["labels"] == {"4": 3, "2": 2}  # as many of each


def test_likelihood_is_given_each_images_own_label(place, run):
    facts = run("labelled --metrics nll --nll-images 9 --seed 5 --output some")[1]
    model = load_model("labelled")
    rows = np.linspace(0, 179, 9).round().astype(int).tolist()
    images, labels = open_images(model.config)["validation"][rows]
    wanted = []
    for i in range(9):
        denoiser = make_denoiser(model.network, model.diffusion, label=labels[i])
        options = dict(variance="large", batch_size=9)
        bound = bits_per_dim(denoiser, model.diffusion, images[i : i + 1], [5 + i], **options)
        wanted.append(bound.bits[0])
    np.testing.assert_allclose(np.load("some/nll.npz")["bits"], torch.stack(wanted), rtol=1e-4)
    assert facts["recipe"]["nll"]["labels"] == "each image's own"
    assert not {"labels", "images", "guidance_scale"} & facts["recipe"].keys()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("labelled --class-label 12", "--class-label '12' is no class"),
        ("plain --class-label 3", "--class-label: this model knows no classes"),
        ("labelled.yml --class-label 3", "--class-label is of a model"),
        ("plain --guide wide --guidance-scale 2", "--guide has images of (1, 8, 16)"),
        ("plain --guide labelled --guidance-scale 2", "--guide has classes"),
        ("labelled --guide nowhere --guidance-scale 2", "no checkpoint at nowhere"),
    ],
)
def test_mistakes_end_in_one_message(run, line, says):
    output, _ = run(line, 2)
    assert says in " ".join(output.split())
    assert len(output.splitlines()) < 5


def test_a_model_guided_by_itself_is_itself(run):
    line = "labelled --num-images 10 --timesteps 3 --metrics fid,is"
    _, plain = run(line)
    output, guided = run(f"{line} --guide labelled --guidance-scale 2")
    assert values(guided) == values(plain)
    assert guided["recipe"]["guide"] == guided["recipe"]["digest"]
    assert guided["recipe"]["guidance_scale"] == 2
    assert "not as in the paper: guidance 2" in output
    _, free = run(f"{line} --guidance-scale 2 --guidance-interval 0.1,3")
    assert values(free) != values(plain)
    assert free["recipe"]["guidance_interval"] == [0.1, 3]


def test_all_that_draws_goes_to_each_device(place, monkeypatch):
    from evaluation.run import Measurement

    monkeypatch.chdir(place)
    found = {}
    monkeypatch.setattr(Measurement, "work", lambda self, ranks: found.update(run=self))
    monkeypatch.setattr(Measurement, "report", lambda self, devices: None)
    line = "plain --guide plain --guidance-scale 2 --precision bfloat16 --device cpu"
    line += " --num-images 4 --extractor ten.pt"
    assert CliRunner().invoke(evaluate.app, line.split()).exit_code == 0
    moved = {id(p) for net in found["run"].networks() for p in net.parameters()}
    plan = found["run"].sampling
    for net in (plan.network, plan.guide_network, found["run"].guide, found["run"].extractor):
        assert {id(p) for p in net.parameters()} <= moved


# ---- any shape


def test_images_that_are_no_squares(place, run):
    from test_evaluate import Registered

    torch_fidelity.register_feature_extractor("stretching", Registered)
    line = "wide --num-images 9 --timesteps 3 --extractor stretching"
    _, facts = run(f"{line} --save-images --output wide-kept")
    assert "stretching stretches images of 16x8 to a square" in facts["not as in the paper"]
    assert Image.open("wide-kept/images/000003.png").size == (16, 8)
    # a folder of images of another shape is cut to the model's
    Image.new("L", (30, 30)).save(place / "data/a.png")
    Image.new("L", (9, 20), 255).save(place / "data/b.png")
    _, facts = run("wide --num-images 9 --timesteps 3 --reference data --metrics fid")
    assert facts["reference"]["images"] == 2
    assert not any("stretches" in line for line in facts["not as in the paper"])  # nobody knows


# ---- while training, and on several ranks


def test_evaluation_while_training_draws_labels(place, tmp_path):
    overrides = [
        "dataset.labels=true", f"dataset.cache={tmp_path / 'cache'}",
        f"evaluation.extractor={place / 'ten.pt'}", "evaluation.evaluate_every=3",
        "evaluation.evaluate_images=21",
    ]  # fmt: skip
    one = train(tmp_path / "one", *overrides)
    evaluation = Evaluation(tiny(*overrides), Console(quiet=True))
    other = train(tmp_path / "two", *overrides, callbacks=[evaluation])
    assert_same(dict(one[0].state_dict()), dict(other[0].state_dict()))
    events = EventAccumulator(str(tmp_path / "two"))
    events.Reload()
    tag = "evaluation/accuracy-21 unipc 10"
    assert [event.step for event in events.Scalars(tag)] == [3, 6]
    # as evaluate.py measures the same images
    model, told = other[0], 0
    for seeds, images in draw_together(model.trainer, model, evaluation.ranks, evaluation.by_label):
        label = next(label for label, rows in evaluation.by_label.items() if seeds[0] in rows)
        told += (evaluation.extractor(images)[1].argmax(1) == int(label)).sum().item()
    assert events.Scalars(tag)[-1].value == pytest.approx(told / 21)


@pytest.mark.slow
def test_two_processes_are_one(place):
    line = "labelled --extractor ten.pt --num-images 33 --timesteps 3 --nll-images 7 --stride 5"
    found = []
    for devices in ("1", "2"):
        command = [
            sys.executable, str(PROJECT / "evaluate.py"), *line.split(), "--device", "cpu",
            "--devices", devices, "--output", f"on-{devices}", "--batch-size", "4",
        ]  # fmt: skip
        with start(command, place) as process:
            process.finish(timeout=300)
        found.append(json.loads((place / f"on-{devices}" / "metrics.json").read_text()))
    assert values(found[1]) == pytest.approx(values(found[0]), rel=1e-5)
    for name, row in found[0]["classes"].items():
        assert found[1]["classes"][name] == pytest.approx(row, rel=1e-5)
