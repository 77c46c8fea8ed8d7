"""Labels and guidance: what a denoiser makes of them, held to closed forms and bit for bit."""

import numpy as np
import pytest
import torch
from helpers import assert_same, invoke, process, steps_of, tiny, wake
from PIL import Image
from torch import Tensor

from dataset import with_facts
from generation import Guidance, Sampling, generate, make_denoiser
from generation.recipe import folder_names, label_vector, parse_labels
from model import Network, at_precision, build_network
from weights import Model, write_checkpoint

ONE, TWO = torch.eye(10)[[3, 7]]


def labelled(*overrides, seed=0) -> Model:
    config = with_facts(tiny("dataset.labels=true", *overrides))
    network = wake(build_network(config), seed).eval().requires_grad_(False)
    return Model(network, config, weights="ema", step=7, notes=[])


@pytest.fixture(scope="module")
def model():
    return labelled()


def denoiser_of(model, **options):
    return make_denoiser(model.network, model.diffusion, times=range(20), **options)


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


TIMES = 0, 7, 19, torch.tensor([0, 7, 19])


@pytest.mark.parametrize("t", TIMES, ids=str)
def test_scales_1_and_0_are_the_conditional_and_the_unconditional_model(model, x, t):
    conditional, unconditional = denoiser_of(model, label=ONE)(x, t), denoiser_of(model)(x, t)
    at = lambda scale: denoiser_of(model, label=ONE, guidance=Guidance(scale))(x, t)
    assert torch.equal(at(1.0), conditional)
    assert not torch.equal(conditional, unconditional)
    if isinstance(t, int):
        assert torch.equal(at(0.0), unconditional)
    else:  # both halves are in one batch
        torch.testing.assert_close(at(0.0), unconditional, rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", TIMES, ids=str)
def test_guidance_extrapolates_eps_and_is_clipped_after(model, x, t):
    eps_1, eps_0 = (model(x, t, label and torch.stack([ONE] * 3)) for label in (True, None))
    a = (model.diffusion.alpha_bar(t) * torch.ones(3)).view(-1, 1, 1, 1)
    eps = eps_0 + 2.5 * (eps_1 - eps_0)
    expected = (x - (1 - a).sqrt() * eps) / a.sqrt()
    for clip in (True, False):
        found = denoiser_of(model, label=ONE, guidance=Guidance(2.5), clip=clip)(x, t)
        torch.testing.assert_close(
            found, expected.clamp(-1, 1).float() if clip else expected.float(), rtol=2e-4, atol=2e-4
        )


def test_an_interval_guides_between_two_noise_levels(model, x):
    level = lambda t: (1 / model.diffusion.alpha_bar(t) - 1) ** 0.5
    guidance = Guidance(3.0, (level(5), level(9)))
    some, always = (denoiser_of(model, label=ONE, guidance=g) for g in (guidance, Guidance(3.0)))
    never = denoiser_of(model, label=ONE)
    for t in range(20):
        assert torch.equal(some(x, t), (always if 5 <= t <= 9 else never)(x, t))
    mixed = some(x, torch.tensor([4, 5, 19]))
    for row, (t, of) in enumerate(((4, never), (5, always), (19, never))):
        torch.testing.assert_close(mixed[row], of(x, t)[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", [None, ONE])
def test_a_guide_is_what_guidance_leads_away_from(model, x, label):
    other = labelled(seed=1)
    guide, plain = denoiser_of(other, label=label, clip=False), denoiser_of(model, label=label)
    at = lambda scale, **options: denoiser_of(
        model, label=label, guidance=Guidance(scale), guide=guide, **options
    )
    better = denoiser_of(model, label=label, clip=False)
    for t in (0, 12):
        assert torch.equal(at(1.0)(x, t), plain(x, t))
        assert torch.equal(at(0.0, clip=False)(x, t), guide(x, t))
        worse = guide(x, t)
        expected = worse + 2 * (better(x, t) - worse)
        assert torch.equal(at(2.0, clip=False)(x, t), expected)
    itself = denoiser_of(model, label=label, guidance=Guidance(4.0), guide=better)
    assert torch.equal(itself(x, 3), plain(x, 3))  # away from itself is nowhere


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_image_is_of_its_seed_and_label_alone(model, precision, scale):
    network, steps = at_precision(model.network, precision), steps_of(model.diffusion)

    def draw(seeds, label, size=64):
        how = {"label": label, "guidance": Guidance(scale)}
        denoiser = make_denoiser(network, model.diffusion, times=range(20), **how)
        found = generate(denoiser, steps, seeds, shape=(1, 8, 8), batch_size=size)
        return torch.cat([images for _, images in found])

    together = draw([0, 1, 2, 3, 4], ONE)
    assert torch.equal(draw([3], ONE), together[3:4])
    assert torch.equal(draw([2, 0, 1], ONE, size=2), together[[2, 0, 1]])
    assert not torch.equal(draw([0], TWO), together[:1])


class OfClasses(Network):
    """The exact x0_hat of Gaussian classes N(mean_k, 0.25) in each pixel."""

    means = torch.linspace(-0.8, 0.8, 10).double()

    def __init__(self, diffusion):
        super().__init__()
        self.diffusion, self.place = diffusion, torch.nn.Parameter(torch.zeros(1))

    def embed(self, t, labels=None):
        mean = self.means.mean() if labels is None else labels.double() @ self.means
        a = self.diffusion.alpha_bar(t).double()
        return torch.stack([a, mean.expand(len(a))], dim=1)

    def predict(self, x: Tensor, embedding: Tensor) -> Tensor:
        a, mean = embedding.view(-1, 2, 1, 1, 1).unbind(1)
        gain = 0.25 * a.sqrt() / (0.25 * a + 1 - a)
        return mean + gain * (x.double() - a.sqrt() * mean)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_guided_gaussian_classes_have_their_closed_form(sampler):
    """Guidance between two Gaussians of one variance is the Gaussian at the extrapolated mean."""
    d = process(T=1000, prediction="x0")
    network, steps, scale = OfClasses(d), steps_of(d, sampler, n=250), 1.75
    how = {"label": ONE, "guidance": Guidance(scale), "clip": False}
    denoiser = make_denoiser(network, d, **how)
    mean = network.means.mean() + scale * (network.means[3] - network.means.mean())
    # the mean obeys the same rows as x: begin at its marginal's, and without noise it stays there
    x = (d.alpha_bar(steps[0].t) ** 0.5 * mean).reshape(1, 1, 1, 1).double()
    for step in steps:
        x0_hat = denoiser(x, step.t)
        assert abs(x0_hat.item() - mean) < 1e-6
        x = step.x[0] * x + step.x0[0] * x0_hat
        if step.s >= 0:
            assert abs(x.item() - d.alpha_bar(step.s) ** 0.5 * mean) < 1e-6
    assert abs(x.item() - mean) < 1e-6


def test_labels_by_name_number_and_together():
    classes = ["hat", "red cape", "a,b", "2"]
    parse = lambda *texts: parse_labels(texts, classes)
    assert parse("all") == classes
    assert parse("red cape", "hat") == ["red cape", "hat"]
    assert parse("a,b") == ["a,b"]
    assert parse("0,1") == ["hat", "red cape"]
    assert parse("2") == ["2"]  # a name before a number
    assert parse("hat+1") == ["hat+red cape"]
    assert label_vector("hat+red cape", classes).tolist() == [1, 1, 0, 0]
    assert parse("1+hat+1") == ["hat+red cape"]  # one label, however it is said
    assert folder_names(["Food & Drink"]) == {"": "Food & Drink"}
    # folders are alike whatever their case on some systems
    folders = {"C++": "C++", "a-b": "a b", "A-b-2": "A-b", "label": "??", "a-b-2-4": "a-b-2"}
    assert folder_names(folders.values()) == folders
    assert parse_labels(["all"], ["all", "b"]) == ["all"]
    with pytest.raises(ValueError, match=r"'4' is no class; .*hat"):
        parse("4")
    with pytest.raises(ValueError, match="knows no classes"):
        parse_labels(["1"], [])


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"guidance_scale": 2.0}, "leads to a --class-label, or away from a --guide"),
        ({"class_label": ["11"]}, "'11' is no class"),
        ({"class_label": ["\u00b2"]}, "is no class"),
        ({"class_label": ["1"], "guidance_scale": float("inf")}, "is not finite"),
        ({"class_label": ["1"], "guidance_interval": [0, 1]}, "does nothing at --guidance-scale 1"),
        ({"class_label": ["1"], "guidance_scale": 2.0, "guidance_interval": [2, 1]}, "LO < HI"),
    ],
)
def test_wrong_steering_ends_in_one_message(model, chosen, says):
    with pytest.raises(ValueError, match=says):
        Sampling(model, chosen, source="x", precision="float32")


def test_a_guide_must_fit(model):
    plan = lambda guide, **chosen: Sampling(
        model, {"guidance_scale": 2.0, **chosen}, source="x", precision="float32", guide=guide
    )
    for change, says in (
        (["dataset.image_size=16", "model.attention_resolutions=[8]"], "images of .1, 16, 16"),
        (["diffusion.timesteps=30"], "T of 30"),
        (["diffusion.beta_end=0.03"], "noise schedule"),
    ):
        with pytest.raises(ValueError, match=says):
            plan(labelled(*change))
    with pytest.raises(ValueError, match="does nothing at --guidance-scale 1"):
        plan(labelled(), guidance_scale=1.0)
    with pytest.raises(ValueError, match="--guide knows images with a label alone"):
        plan(labelled("training.label_dropout=0"))
    assert plan(labelled(seed=1)).recipe()["guide"] == labelled(seed=1).digest()


def test_a_model_of_labels_alone_asks_for_one():
    model = labelled("training.label_dropout=0")
    plan = lambda **chosen: Sampling(model, chosen, source="x", precision="float32")
    with pytest.raises(ValueError, match="say --class-label"):
        plan()
    with pytest.raises(ValueError, match="give a --guide"):
        plan(class_label=["1"], guidance_scale=2.0)
    assert plan(class_label=["1"]).labels == ["1"]


def test_a_recipe_names_label_and_guidance_where_they_are_used(model):
    plan = lambda **chosen: Sampling(model, chosen, source="x", precision="float32")
    plain, told = plan().recipe(), plan(class_label=["1"])
    assert not {"class_label", "guidance_scale", "guidance_interval", "guide"} & plain.keys()
    assert_same(told.recipe("1"), plain | {"class_label": "1"})
    guided = plan(class_label=["1"], guidance_scale=2.0, guidance_interval=[0.1, 5.0])
    more = {"guidance_scale": 2.0, "guidance_interval": [0.1, 5.0]}
    assert_same(guided.recipe("1"), plain | more | {"class_label": "1"})


# ---- sample.py


@pytest.fixture
def place(model, tmp_path):
    write_checkpoint(
        {
            "hyper_parameters": model.config.model_dump(mode="json"),
            "state_dict": {
                f"{which}.{name}": value
                for which in ("unet", "ema")
                for name, value in model.network.state_dict().items()
            },
            "global_step": 7,
        },
        tmp_path / "a.ckpt",
    )
    return tmp_path


def pixels_of(folder):
    return {p.name: np.array(Image.open(p)).tobytes() for p in folder.glob("0*.png")}


def test_sampling_classes_fills_a_folder_for_each(place, monkeypatch):
    sample = lambda text, code=0: invoke(f"sample.py a.ckpt {text}", place, monkeypatch, code)
    sample("--class-label all --num-images 3 --batch-size 2 --output-dir out")
    assert {p.name for p in (place / "out").iterdir()} == {*map(str, range(10)), "grid.png"}
    grid = Image.open(place / "out/grid.png")
    assert grid.size == (3 * 66 + 2, 10 * 66 + 2)  # a row of three for each class
    alone = "--class-label 4 --seeds 1 --output-dir one"
    sample(alone)
    assert pixels_of(place / "one").items() <= pixels_of(place / "out/4").items()
    assert Image.open(place / "one/000001.png").info["recipe"] != ""
    (place / "out/7/000002.png").unlink()
    again = sample("--class-label all --num-images 3 --output-dir out")
    assert "1 images written to out, 29 were there already" in again
    # another scale, no label, other labels: never into the same folder
    for other in ("--class-label 4 --guidance-scale 2", "", "--class-label 5"):
        assert "in the way" in sample(f"{other} --num-images 2 --output-dir out", 2)
        assert "another recipe" in sample(f"{other} --num-images 2 --output-dir one", 2)
    assert "'12' is no class" in sample("--class-label 12", 2)
