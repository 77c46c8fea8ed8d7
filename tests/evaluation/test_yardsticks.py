"""The yardsticks of a dataset, against their definitions written out."""

import math

import numpy as np
import pytest
import torch
from helpers import random_pixels

import evaluation.yardsticks as yardsticks
from config import load_config
from dataset import Images
from diffusion_utils import TARGETS, GaussianDiffusion
from evaluation.copies import find_pairs, nearest
from evaluation.health import model_loss
from evaluation.yardsticks import (
    Probe,
    bin_edges,
    by_quarter,
    cosine_variances,
    covariance,
    get_yardsticks,
    gram,
    linear_loss,
    make_probe,
    measure_spectrum,
    memoriser_loss,
)
from training.datamodule import open_images

CPU = torch.device("cpu")


def process(prediction="eps", timesteps=1000, schedule="linear"):
    return GaussianDiffusion(
        timesteps=timesteps,
        beta_schedule=schedule,
        beta_start=1e-4,
        beta_end=0.02,
        prediction=prediction,
        learned_variance=False,
    )


def smooth_pixels(count, *shape, seed=0):
    """Images whose pixels are correlated, in one direction more than in the other."""
    x = np.random.default_rng(seed).normal(size=(count, *shape)).cumsum(-1).cumsum(-2)
    return (128 + 20 * x).clip(0, 255).astype(np.uint8)


def mirrored(pixels):
    return np.concatenate([pixels, pixels[..., ::-1]])


# ---- the best linear denoiser


@pytest.mark.parametrize("prediction", TARGETS)
def test_exact_eps_of_gaussian_data_is_the_linear_line(prediction):
    """Noise with exact moments: the mean over images is then an expectation, to all digits."""
    pixels = smooth_pixels(40, 1, 2, 4)
    images, diffusion, D = Images(pixels), process(prediction), 8
    flat = torch.from_numpy(pixels).reshape(40, D).double() / 127.5 - 1
    known = torch.cat([torch.ones(40, 1).double(), flat], 1)
    free = torch.randn(40, D, generator=torch.Generator().manual_seed(0)).double()
    free -= known @ torch.linalg.lstsq(known, free).solution
    eps = math.sqrt(40) * torch.linalg.qr(free).Q  # mean 0, covariance I, and none with images
    mean, C = flat.mean(0), torch.cov(flat.T, correction=0)

    def predict_eps(x_t, t, labels):
        a = diffusion.alpha_bar(int(t[0]))
        s, n = math.sqrt(a), math.sqrt(1 - a)
        x = x_t.flatten(1)
        wiener = s * C @ torch.linalg.inv(a * C + (1 - a) * torch.eye(D).double())
        x_0 = mean + (x - s * mean) @ wiener.T
        target = diffusion.target(x_0, int(t[0]), (x - s * x_0) / n)  # as a network answers
        return diffusion.predict_eps(x, int(t[0]), target).view_as(x_t)

    t = torch.tensor([0, 1, 10, 300, 999])
    probe = Probe(torch.from_numpy(pixels), None, t[:, None].expand(-1, 40), eps.view(40, 1, 2, 4))
    line = model_loss(predict_eps, diffusion, probe, device=CPU, batch_size=16)
    spectrum = measure_spectrum(images, flips=False)
    expected = linear_loss(spectrum.values, diffusion.alpha_bar(t).numpy())
    np.testing.assert_allclose(line, expected, rtol=0, atol=1e-9)
    assert 0 < expected[-1] < expected[0] < 1


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 2, 4)])
def test_spectra_are_those_of_the_covariance(shape, flips):
    pixels = smooth_pixels(30, *shape)
    whole = mirrored(pixels) if flips else pixels
    expected = np.cov(whole.reshape(len(whole), -1).T.astype(float), bias=True)
    rows, images = list(range(30)), Images(pixels)
    np.testing.assert_allclose(covariance(images, rows, flips), expected, rtol=1e-9, atol=1e-6)
    values, width = np.linalg.eigvalsh(expected), math.prod(shape)
    few = min(width, len(whole))
    found = np.linalg.eigvalsh(gram(images, rows, flips))
    np.testing.assert_allclose(found[-few:], values[-few:], atol=1e-6)
    spectrum = measure_spectrum(images, flips)  # takes the smaller of the two
    np.testing.assert_allclose(spectrum.values, values / 127.5**2, atol=1e-9)
    assert spectrum.images == 30


def test_what_is_too_large_lies_between_two_bounds(monkeypatch):
    images, alpha_bar = Images(smooth_pixels(400, 3, 4, 8)), np.array([0.999, 0.5, 0.01])
    exact = linear_loss(measure_spectrum(images, False).values, alpha_bar)
    monkeypatch.setattr(yardsticks, "WIDEST", 64)
    spectrum = measure_spectrum(images, False)
    most, least = (linear_loss(v, alpha_bar) for v in (spectrum.values, spectrum.least))
    assert (least < 1.1 * exact).all()  # in expectation below; it is of 64 images
    assert (exact < most).all()
    assert (most < 3 * exact).all()
    diagonal = Images(random_pixels(3000, 3, 4, 8))  # no basis knows more of white noise
    waves = cosine_variances(diagonal, list(range(3000)), True)
    assert np.sort(waves)[::-1] == pytest.approx(255**2 / 12, rel=0.1)


def test_the_digits_have_the_known_yardsticks(tmp_path):
    config = load_config("configs/digits.yml", [f"dataset.cache={tmp_path}"])
    diffusion, said = GaussianDiffusion(**config.diffusion.model_dump()), []
    images = open_images(config)
    get = lambda: get_yardsticks(images, diffusion, flips=False, cache=tmp_path, say=said.append)
    known = get()
    linear = known.linear(diffusion.alpha_bar(torch.arange(1000)).numpy())
    assert linear.mean() == pytest.approx(0.222, abs=5e-4)
    quarters = linear.reshape(4, -1).mean(1)
    np.testing.assert_allclose(quarters, [0.556, 0.231, 0.087, 0.014], atol=5e-4)
    assert by_quarter(known.memoriser[0], 1000)[0] == pytest.approx(0.031, abs=1e-3)
    assert 5 < by_quarter(known.memoriser[1], 1000)[0] < 12
    assert known.validation_copies.tolist() == [0, 180]
    assert len(known.distinct) == 1617
    again = get()
    for one, two in zip(known, again, strict=True):
        assert np.array_equal(one, two)
    (path,) = tmp_path.glob("yardsticks-*.npz")
    path.write_bytes(path.read_bytes()[:1000])  # damaged: measured once more
    assert np.array_equal(get().spectrum, known.spectrum)
    assert len(said) == 2


# ---- the memoriser


@pytest.mark.parametrize("flips", [False, True])
def test_the_memoriser_is_the_posterior_mean(flips):
    pixels, diffusion = smooth_pixels(12, 1, 3, 4), process(timesteps=10, schedule="jsd")
    probe = make_probe(Images(smooth_pixels(5, 1, 3, 4, seed=1)), 10)
    line = memoriser_loss(pixels, probe, diffusion, flips)
    x = torch.from_numpy(mirrored(pixels) if flips else pixels).flatten(1).double() / 127.5 - 1
    x_0, eps = probe.images.flatten(1).double() / 127.5 - 1, probe.eps.flatten(1).double()
    for k, t in enumerate(probe.t):
        a = diffusion.alpha_bar(t)[:, None]
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
        far = (x_t[:, None] - a.sqrt()[:, :, None] * x).square().sum(-1)
        posterior = (-far / (2 * (1 - a))).softmax(1) @ x
        eps_hat = (x_t - a.sqrt() * posterior) / (1 - a).sqrt()
        assert line[k] == pytest.approx((eps - eps_hat).square().mean().item(), abs=1e-6)
    assert line[-1] == 0  # where nothing of the image is left, x_t is the noise


def test_a_set_of_one_image_is_known_exactly():
    one, diffusion = random_pixels(1, 3, 4, 4), process()
    assert (memoriser_loss(one, make_probe(Images(one), 1000), diffusion, False) == 0).all()
    spectrum = measure_spectrum(Images(one), False)
    assert (linear_loss(spectrum.values, np.array([0.5, 0.9])) == 0).all()


# ---- what is looked at


@pytest.mark.parametrize("timesteps", [1, 3, 20, 1000, 1003])
def test_probes_see_all_of_t_evenly(timesteps):
    images = Images(random_pixels(200, 1, 4, 4))
    probe, edges = make_probe(images, timesteps), bin_edges(timesteps)
    assert probe.t.shape == (len(edges) - 1, 200)
    assert (probe.t >= torch.from_numpy(edges[:-1, None])).all()
    assert (probe.t < torch.from_numpy(edges[1:, None])).all()
    assert probe.t.unique().numel() == timesteps
    means = probe.t.double().mean(1) - torch.from_numpy((edges[:-1] + edges[1:] - 1) / 2)
    assert means.abs().max() < 0.5
    mean, *quarters = by_quarter(np.arange(len(edges) - 1.0), timesteps)
    assert mean == pytest.approx((len(edges) - 2) / 2, rel=0.01)
    if timesteps >= 20:
        assert quarters == pytest.approx([2, 7, 12, 17], rel=0.01)


# ---- copies


def test_nearest_is_the_sorted_distance_and_an_image_is_nearest_to_itself():
    others = torch.from_numpy(random_pixels(50, 64)).double()
    queries = torch.cat([others[[7, 33]], torch.from_numpy(random_pixels(3, 64, seed=1)).double()])
    distance, rows = nearest([queries], others.split(8), 5)
    expected = (queries[:, None] - others).square().sum(-1).sqrt()
    assert torch.equal(distance, expected.sort(dim=1).values[:, :5])
    assert rows[:, 0].tolist() == [7, 33, *expected[2:].argmin(1).tolist()]
    distance, rows = nearest([queries], others[:3].split(2), 5)
    assert distance.shape == rows.shape == (5, 3)


def test_copies_are_found_beside_duplicates_and_mirror_images(tmp_path):
    pixels = random_pixels(40, 3, 8, 8)
    twice = np.concatenate([pixels, pixels[:5], pixels[5:8, ..., ::-1]])
    train, validation = Images(twice), Images(random_pixels(30, 3, 8, 8, seed=1))
    images = {"train": train, "validation": validation}
    how = {"cache": tmp_path, "say": print}
    known = get_yardsticks(images, process(), flips=True, **how)
    assert known.distinct.tolist() == list(range(40))
    assert known.validation_copies.tolist() == [0, 30]
    plain = get_yardsticks(images, process(), flips=False, **how)  # a mirror image is another one
    assert plain.distinct.tolist() == [*range(40), 45, 46, 47]
    noisy = twice[[0, 1, 40]].astype(int) + np.random.default_rng(2).integers(-9, 9, (3, 3, 8, 8))
    noisy = torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))
    queries = torch.cat([noisy, noisy.flip(-1), validation[[0, 1]].images])
    pairs = find_pairs(queries, train, known.distinct, True, CPU)
    assert pairs.copies == 6
    assert pairs.rows[:6, 0].tolist() == [0, 1, 0] * 2
    assert find_pairs(queries, train, plain.distinct, False, CPU).copies == 3
    # with its duplicate beside it no copy stands out, which is why those are left out
    assert find_pairs(queries[:1], train, np.arange(48), True, CPU).copies == 0


def test_files_that_are_dark_or_flat_are_seen(tmp_path):
    pixels = (random_pixels(40, 1, 4, 4) // 16).astype(np.uint8)
    pixels[:10] = 3
    images = {"train": Images(pixels), "validation": Images(pixels[:0])}
    known = get_yardsticks(images, process(), flips=False, cache=tmp_path, say=print)
    assert known.levels.tolist() == [0, 15]
    assert known.flat == 0.25
    assert np.isnan(known.memoriser[1]).all()
    assert known.validation_copies.tolist() == [0, 0]
