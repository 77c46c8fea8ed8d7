"""Editing, as identities: what is kept is kept, nothing kept is a sample, and the way is back."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import PROJECT, invoke, noise_image, process, steps_of, tiny, wake
from PIL import Image

from dataset import fit_image
from diffusion_utils import from_uint8, to_uint8
from generation import Sampling, SeedNoise, chain, edit, generate
from generation.edit_options import choose_sampler
from generation.images import fit_mask, psnr
from generation.samplers import ddim_steps, reverse
from model import build_network
from weights import Model

IMAGE = torch.randint(256, (1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
OTHER = IMAGE.flip(2)
HOLE = torch.zeros(8, 8, dtype=torch.bool)
HOLE[2:7, 3:] = True


def plan_of(sampler="ddpm", n=12, **chosen):
    config = tiny("diffusion.timesteps=50", "diffusion.beta_end=0.3")
    model = Model(wake(build_network(config)).eval(), config, weights="ema", step=0, notes=[])
    chosen = {"sampler": sampler, "timesteps": n, "spacing": "trailing", **chosen}
    return Sampling(model, chosen, source="", precision="float32")


def drawn(plan, seeds=(0, 1, 2), batch_size=64):
    how = {"shape": plan.shape, "batch_size": batch_size, "walk": plan.walk}
    batches = generate(plan.denoiser(), plan.steps, list(seeds), **how)
    return torch.cat([images for _, images in batches])


# ---- RePaint


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("resample", [1, 3])
def test_what_is_kept_is_kept_and_nothing_kept_is_a_sample(sampler, resample):
    plan, how = plan_of(sampler), {"resample": resample, "jump": 4}
    all_kept = drawn(edit.inpaint(plan, IMAGE, torch.zeros(8, 8).bool(), **how))
    assert torch.equal(all_kept, IMAGE.expand_as(all_kept))
    some = drawn(edit.inpaint(plan, IMAGE, HOLE, **how))
    assert torch.equal(some[..., ~HOLE], all_kept[..., ~HOLE])
    assert not torch.equal(some[..., HOLE], all_kept[..., HOLE])
    if resample == 1:
        assert torch.equal(drawn(edit.inpaint(plan, IMAGE, ~HOLE | HOLE, **how)), drawn(plan))


def test_the_known_part_has_noise_of_its_own():
    plan = edit.inpaint(plan_of(), IMAGE, HOLE, resample=1)
    x_0, noise = from_uint8(IMAGE), SeedNoise([5], plan.shape)
    noise()
    denoiser = lambda x, t: 0 * x
    for step, x, _ in plan.walk(denoiser, plan.steps, [5], shape=plan.shape):
        a, z = plan.model.diffusion.alpha_bar(step.s), noise()
        if step.s >= 0:
            eps = ((x - math.sqrt(a) * x_0) / math.sqrt(1 - a))[..., ~HOLE]
            assert abs(np.corrcoef(eps.flatten(), z[..., ~HOLE].flatten())[0, 1]) < 0.35
            assert 0.75 < eps.std() < 1.25


def gaussian(d, mu, cov):
    """Return E[x_0 | x_t] where the left and the right half are Gaussian, pixel by pixel."""

    def affine(t):
        a = d.alpha_bar(t)
        A = math.sqrt(a) * cov @ np.linalg.inv(a * cov + (1 - a) * np.eye(2))
        return A, mu - A @ (math.sqrt(a) * mu)

    def denoiser(x, t):
        A, b = (torch.from_numpy(part).to(x) for part in affine(t))
        halves = x.unflatten(-1, (2, -1)).movedim(-2, 1)
        return (
            (torch.tensordot(A, halves.movedim(1, 0), 1).movedim(0, -1) + b)
            .movedim(-1, -2)
            .flatten(-2)
        )

    return affine, denoiser


def moments(d, steps, affine, known):
    """Return the mean and variance of the right half after a table, where the left is known."""
    m, C, one = np.zeros(2), np.eye(2), np.eye(2)
    for step in steps:
        A, b = affine(step.t) if step.x0 else (0 * one, 0)
        c_0 = step.x0[0] if step.x0 else 0.0
        M = step.x[0] * one + c_0 * A
        m, C = M @ m + c_0 * b, M @ C @ M.T + step.sigma**2 * one
        if step.s < step.t:
            a = d.alpha_bar(step.s)
            m[0], C[0], C[:, 0] = math.sqrt(a) * known, 0, 0
            C[0, 0] = 1 - a
    return m[1], C[1, 1]


@pytest.mark.parametrize("c", [0.0, 0.18])  # the covariance of the halves
def test_a_half_follows_its_conditional_distribution(c):
    mu, cov = np.array([0.1, -0.2]), np.array([[0.25, c], [c, 0.2]])
    image, hole = torch.full((1, 48, 48), 200).byte(), torch.zeros(48, 48).bool()
    hole[:, 24:] = True
    known = from_uint8(image).mean().item()

    def edited(d, n, resample):
        model = SimpleNamespace(diffusion=d, device="cpu")
        steps = steps_of(d, "ddpm", variance="large", n=n)
        plan = SimpleNamespace(steps=steps, model=model, facts={})
        return edit.inpaint(plan, image, hole, resample=resample, jump=10)

    d = process(T=100, start=1e-3, end=0.2)
    affine, denoiser = gaussian(d, mu, cov)
    plan = edited(d, 50, 4)
    *_, (_, x, _) = plan.walk(denoiser, plan.steps, [0, 1, 2, 3], shape=(1, 48, 48))
    mean, variance = moments(d, plan.steps, affine, known)
    assert x[..., hole].mean().item() == pytest.approx(mean, abs=4 * math.sqrt(0.2 / 4608))
    assert x[..., hole].var().item() == pytest.approx(variance, rel=0.09)

    d = process()  # all steps of the paper's process
    want, left = mu[1] + c / cov[0, 0] * (known - mu[0]), cov[1, 1] - c**2 / cov[0, 0]
    once, often = (
        moments(d, edited(d, None, count).steps, gaussian(d, mu, cov)[0], known)
        for count in (1, 10)
    )
    assert often[0] == pytest.approx(want, abs=0.012)
    assert often[1] == pytest.approx(left, rel=0.025)
    if c:  # walked once, a half hears too late of the other
        assert abs(once[0] - want) > 0.1 and once[1] > 1.3 * left


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_same_chain_as_diffusers_repaint(eta, monkeypatch):
    """All T of a process: with fewer steps theirs goes up to another t than it came from."""
    diffusers = pytest.importorskip("diffusers")
    d = process(T=23, start=0.002, end=0.4)
    theirs = diffusers.RePaintScheduler(
        num_train_timesteps=23, beta_start=0.002, beta_end=0.4, eta=eta, clip_sample=False
    )
    theirs.set_timesteps(23, jump_length=5, jump_n_sample=3)
    model = SimpleNamespace(diffusion=d, device="cpu")
    steps = steps_of(d, "ddim", eta=eta)
    plan = SimpleNamespace(steps=steps, model=model, facts={})
    plan = edit.inpaint(plan, IMAGE, HOLE, resample=3, jump=5)
    times = [[s.t] if s.s < s.t else range(s.t + 2, s.s + 2) for s in plan.steps]
    assert theirs.timesteps.tolist() == [t for part in times for t in part]

    eps_model = lambda x, t: torch.tanh(x + 0.1 * t)
    denoiser = lambda x, t: d.predict_x_0(x, t, eps_model(x, t))
    *_, (_, ours, _) = plan.walk(denoiser, plan.steps, [7], shape=IMAGE.shape)

    noise, own, queue = SeedNoise([7], IMAGE.shape), SeedNoise([~7], IMAGE.shape), []
    name = "diffusers.schedulers.scheduling_repaint.randn_tensor"
    monkeypatch.setattr(name, lambda *_, **__: queue.pop(0))
    x, x_0, kept = noise(), from_uint8(IMAGE), (~HOLE).float()
    for step in plan.steps:
        if step.s < step.t:
            z = noise() if step.sigma else torch.zeros_like(x)
            queue.append(torch.where(HOLE, z, own()))  # theirs has one for both
            x = theirs.step(eps_model(x, step.t), step.t, x, x_0, kept).prev_sample
        else:  # theirs goes up one by one: all the noise in the last
            for t in range(step.t + 1, step.s + 1):
                scale = step.sigma / theirs.betas[t].sqrt() if t == step.s else 0.0
                queue.append(scale * noise() if scale else torch.zeros_like(x))
                x = theirs.undo_step(x, t)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


# ---- SDEdit


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "heun"])
def test_a_strength_is_a_suffix_of_the_table(sampler):
    plan = plan_of(sampler, 10)
    T, d = 50, plan.model.diffusion
    whole = edit.from_image(plan, IMAGE, 1.0)
    assert whole.steps == plan.steps and whole.steps[0].t == T - 1
    for strength in (0.99, 0.6, 0.2):
        part = edit.from_image(plan, IMAGE, strength)
        assert part.steps[1:] == plan.steps[-len(part.steps) + 1 :]
        assert strength * T - 5 < part.steps[0].t <= strength * T
        assert len(part.steps[0].x) == len(part.steps[0].x0) == 1
    noise = SeedNoise([3], plan.shape)
    x = d.q_sample(from_uint8(IMAGE)[None], part.steps[0].t, noise())
    with torch.inference_mode():
        *_, (_, x, _) = reverse(plan.denoiser(), x, part.steps, noise)
    assert torch.equal(drawn(part, [3]), to_uint8(x))


# ---- there and back


def test_the_same_way_up_as_diffusers_inverse():
    diffusers = pytest.importorskip("diffusers")
    d = process()
    theirs = diffusers.DDIMInverseScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True
    )
    theirs.set_timesteps(50)
    steps = edit.inversion(d, theirs.timesteps.tolist())
    assert [step.s for step in steps] == theirs.timesteps.tolist()
    assert [step.t for step in steps] == [0, *theirs.timesteps[:-1].tolist()]  # of the state
    eps_model = lambda x, t: torch.tanh(x + 0.001 * t)
    denoiser = lambda x, t: d.predict_x_0(x, t, eps_model(x, t))
    x = from_uint8(IMAGE)[None].double()
    for step, ours, _ in reverse(denoiser, x, steps, None):
        x = theirs.step(eps_model(x, step.t), step.s, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)


def test_the_way_back_is_better_with_more_steps():
    d, x_0 = process(), from_uint8(torch.stack([IMAGE, OTHER]))
    mu, cov = np.array([0.1, -0.2]), np.array([[0.25, 0.18], [0.18, 0.2]])
    _, denoiser = gaussian(d, mu, cov)
    errors = []
    for n in (10, 20, 40, 80, 160):
        times = [0, *range(999 // n, 950, 950 // n)]
        *_, (_, z, _) = reverse(denoiser, x_0.double(), edit.inversion(d, times), None)
        down = ddim_steps(d, [*times[::-1], -1], eta=0.0)
        *_, (_, x, _) = reverse(denoiser, z, down, None)
        errors.append((x - x_0).square().mean().sqrt().item())
    assert all(fine < 0.75 * coarse for coarse, fine in itertools.pairwise(errors))
    assert errors[-1] < 0.03


def test_inversion_clips_on_neither_way_and_ends_where_something_is_seen():
    plan = plan_of("ddim", 20, eta=0.0)
    x = 3 * SeedNoise([0], plan.shape)()
    there = edit.encode(plan, [IMAGE])
    with torch.inference_mode():
        assert plan.denoiser()(x, 30).abs().max() <= 1 < there.denoiser()(x, 30).abs().max()
    d = process("cosine")
    model = SimpleNamespace(diffusion=d, device="cpu")
    plan = SimpleNamespace(steps=steps_of(d, "ddim", n=50), model=model, facts={})
    a = d.alpha_bar(edit.encode(plan, [IMAGE]).steps[0].t)
    assert 20 < math.sqrt((1 - a) / a) <= edit.FARTHEST  # of 24,000


def test_between_two_images_are_their_reconstructions_and_an_arc():
    plan = plan_of("ddim", 20, eta=0.0)
    one, other = (drawn(edit.encode(plan, [i]), [0])[0] for i in (IMAGE, OTHER))
    row = drawn(edit.encode(plan, [IMAGE, OTHER], 5), range(5))
    torch.testing.assert_close(row[[0, -1]].int(), torch.stack([one, other]).int(), atol=1, rtol=0)
    same = drawn(edit.encode(plan, [IMAGE, IMAGE], 3), range(3))
    torch.testing.assert_close(same.int(), one.expand_as(same).int(), atol=1, rtol=0)
    z = SeedNoise([0, 1], (1, 8, 8))()
    z = z / z.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    arc = edit.slerp(z, torch.linspace(0, 1, 7))
    assert torch.equal(arc[[0, -1]], z)
    torch.testing.assert_close(arc.flatten(1).norm(dim=1), torch.ones(7))
    angles = (arc[1:] * arc[:-1]).flatten(1).sum(1)
    torch.testing.assert_close(angles, angles[:1].expand(6))


# ---- all of them


EDITED = {
    "image": lambda: edit.from_image(plan_of("dpm++"), IMAGE, 0.6),
    "inpaint": lambda: edit.inpaint(plan_of("ddpm"), IMAGE, HOLE, resample=3, jump=4),
    "between": lambda: edit.encode(plan_of("ddim", eta=0.0), [IMAGE, OTHER], 4),
}


@pytest.mark.parametrize("kind", EDITED)
def test_an_image_belongs_to_its_seed(kind):
    plan = EDITED[kind]()
    together = drawn(plan, range(4))
    assert len({image.numpy().tobytes() for image in together}) == 4
    alone = torch.cat([drawn(plan, range(4), batch_size=3)[1:], drawn(plan, [0])])
    torch.testing.assert_close(alone.int(), together[[1, 2, 3, 0]].int(), atol=1, rtol=0)
    states = plan.walk(plan.denoiser(), plan.steps, [0, 1], shape=plan.shape)
    assert len([*states]) == len(plan.steps)
    assert plan_of().walk is chain  # a plan is not changed by another's edit


def test_a_mask_is_cut_as_its_image_is():
    for size in ((480, 640), (640, 480), (80, 80)):
        blocks = np.random.default_rng(0).integers(0, 2, (size[0] // 80, size[1] // 80))
        mask = np.kron(blocks, np.ones((80, 80))).astype(np.uint8) * 255
        for fit in ("crop", "pad"):
            form = {"image_size": (8, 8), "channels": 1, "fit": fit}
            fitted = fit_image(Image.fromarray(mask), **form)[0]
            sure = abs(fitted - 127.5) > 64
            assert (fit_mask(mask, (8, 8), fit).numpy() == (fitted > 127))[sure].all()


def test_psnr():
    assert psnr(IMAGE, IMAGE) == math.inf
    one = torch.full_like(IMAGE, 100)
    assert psnr(one, one + 10) == pytest.approx(20 * math.log10(25.5))


def test_a_sampler_is_chosen_where_the_model_s_own_cannot():
    assert choose_sampler("inpaint", {}, "ddim") == {}
    assert choose_sampler("inpaint", {}, "dpm++") == {"sampler": "ddpm", "variance": "small"}
    assert choose_sampler("encode", {}, "dpm++") == {"sampler": "ddim", "eta": 0.0}
    assert choose_sampler("image", {"sampler": "heun"}, "ddpm") == {"sampler": "heun"}


# ---- sample.py


@pytest.fixture
def place(tmp_path):
    for i, name in enumerate(("a.png", "b.png")):
        noise_image(i, (16, 16)).save(tmp_path / name)
    half = Image.new("L", (16, 16))
    half.paste(255, (0, 8, 16, 16))
    half.save(tmp_path / "mask.png")
    half.resize((16, 8)).save(tmp_path / "small.png")
    Image.merge("LA", (half, half)).save(tmp_path / "glass.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "whole.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    return tmp_path


DIGITS = f"sample.py '{PROJECT}/pretrained/digits.safetensors' --device cpu --timesteps 6"


@pytest.mark.parametrize(
    "line",
    [
        "--image a.png --strength 0.6",
        "--inpaint a.png --mask mask.png --resample 2 --jump 2",
        "--between a.png b.png",
        "--encode a.png",
    ],
)
def test_an_edit_is_resumed_and_another_goes_elsewhere(line, place, monkeypatch):
    line = f"{DIGITS} {line}" + " --num-images 3" * ("encode" not in line)
    first = invoke(line, place, monkeypatch, 0)
    written = {p.name: p.read_bytes() for p in (place / "samples").glob("0*.png")}
    assert len(written) == (1 if "encode" in line else 3)
    assert ("PSNR" in first) == ("encode" in line or "between" in line)
    if len(written) > 1:
        (place / "samples/000001.png").unlink()
    made = len(written) // 2
    again = f"{made} images written to samples, {len(written) - made} were there already"
    assert again in invoke(line, place, monkeypatch, 0)
    assert written == {p.name: p.read_bytes() for p in (place / "samples").glob("0*.png")}
    other = line.replace(" a.png", " b.png", 1)
    assert "written to samples-2" in invoke(other, place, monkeypatch, 0)
    assert "written to samples-3" in invoke(DIGITS, place, monkeypatch, 0)
    assert (place / "samples/original.png").exists()


def test_half_of_the_image_stays_and_seeds_vary_the_rest(place, monkeypatch):
    line = f"{DIGITS} --inpaint a.png --mask mask.png --resample 2 --jump 2 --seeds 4,9"
    assert "filled, on 50.0%" in invoke(line, place, monkeypatch, 0)
    names = ("original", "000004", "000009")
    original, *images = (np.array(Image.open(place / f"samples/{n}.png")) for n in names)
    form = {"image_size": 8, "channels": 1}
    assert (original == fit_image(Image.open(place / "a.png"), **form)[0]).all()
    assert all((image[:4] == original[:4]).all() for image in images)
    assert (images[0] != images[1]).any()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--image a.png --encode a.png", "--image and --encode are two ways of editing"),
        ("--strength 0.5", "--strength belongs to --image"),
        ("--image a.png --mask mask.png", "--mask belongs to --inpaint"),
        ("--encode a.png --jump 2", "--jump belongs to --inpaint"),
        ("--image a.png --strength 0", "--strength 0 is outside (0, 1]"),
        ("--image a.png --strength nan", "--strength nan is outside (0, 1]"),
        ("--image a.png --strength 0.01", "--strength 0.01 is less than the last of 6 steps"),
        ("--image none.png", "none.png: No such file"),
        ("--image text.png", "text.png is not an image"),
        ("--image whole.png", "whole.png cannot be read"),
        ("--inpaint a.png", "--inpaint needs a --mask"),
        ("--inpaint a.png --mask small.png", "--mask is 16x8 and the image 16x16"),
        ("--inpaint a.png --mask glass.png", "--mask is transparent in parts"),
        ("--inpaint a.png --mask mask.png", "--jump 10 goes back further than 6 steps"),
        ("--inpaint a.png --mask mask.png --sampler dpm++", "choose --sampler ddpm or ddim"),
        ("--encode a.png --sampler ddpm", "ddim with eta 0; leave --sampler and --eta out"),
        ("--between a.png b.png --eta 0.5", "ddim with eta 0; leave --sampler and --eta out"),
        ("--encode a.png --seed 3", "no seed matters"),
        ("--between a.png b.png --seeds 3", "no seed matters"),
        ("--encode a.png --num-images 2", "one image of one"),
        ("--between a.png b.png --num-images 1", "both ends are among them"),
    ],
)
def test_mistakes_end_in_one_message(line, says, place, monkeypatch):
    output = invoke(f"{DIGITS} {line}", place, monkeypatch, 2)
    assert says in output and len(output.strip().splitlines()) == 1
    assert not (place / "samples").exists()
