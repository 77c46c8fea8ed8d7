import math

import numpy as np
import pytest
import torch
from helpers import process, tiny

from diffusion_utils import log_discretised_gaussian
from evaluation.likelihood import ask, bits_per_dim, prior_term
from generation import SeedNoise, make_denoiser
from model import build_network

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def posterior(diffusion, t):
    """Return c_t, c_0, variance of q(x_{t-1} | x_t, x_0), of mean c_t x_t + c_0 x_0 (Eq. 6, 7)."""
    a_t, a_s, beta = diffusion.alpha_bar(t), diffusion.alpha_bar(t - 1), float(diffusion.betas[t])
    c_t = (1 - a_s) * math.sqrt(1 - beta) / (1 - a_t)
    return c_t, beta * math.sqrt(a_s) / (1 - a_t), beta * (1 - a_s) / (1 - a_t)


def model_variance(diffusion, t, variance):
    """Return the variance of p(x_{t-1} | x_t) that a fixed one stands for."""
    t, x = torch.tensor([t]), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    _, v = ask(lambda x, t: x, x, t, variance)
    return diffusion.log_variance(t, v).exp().item()


def denoiser_of(eps_model, diffusion):
    """Return the denoiser of a function (x_t float64, alpha_bar [B, 1, 1, 1]) -> eps_hat."""

    def denoise(x, t):
        eps = eps_model(x.float().double(), diffusion.alpha_bar(t).view(-1, 1, 1, 1))
        return diffusion.predict_x_0(x, t, eps.float().double()).clamp(-1, 1)

    return denoise


def small(T=1000, schedule="linear"):
    """Return a denoiser with weights that matter, untrained, its process and its network."""
    network = build_network(tiny()).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            std = parameter[0].numel() ** -0.5
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    diffusion = process(schedule, T)
    return make_denoiser(network, diffusion), diffusion, network


def bound_of(small, x_0, seeds, **options):
    denoiser, diffusion, *_ = small
    return bits_per_dim(
        denoiser, diffusion, x_0, seeds, **{"variance": "large", "batch_size": 64, **options}
    )


def pixels(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


# ---- the decoder, Eq. 13


@pytest.mark.parametrize("std", [0.001, 0.007385, 0.1, 2.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.2, 0.0, 0.999, 1.0])
def test_the_bins_are_a_distribution(mean, std):
    p = log_discretised_gaussian(LEVELS, torch.tensor(mean, dtype=torch.float64), std).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-9)  # 256 floors of 1e-12
    assert p.min() >= 1e-12 * (1 - 1e-12)
    # the tanh CDF is within 1e-3 of the true one
    edges = [-math.inf, *(LEVELS[:-1] + 1 / 255).tolist(), math.inf]
    true = np.diff([0.5 * (1 + math.erf((e - mean) / std / math.sqrt(2))) for e in edges])
    np.testing.assert_allclose(p.numpy(), true, atol=1e-3)


def test_the_floor():
    far = log_discretised_gaussian(torch.tensor([0.0, 1.0, -1.0]), torch.tensor(0.5), 0.001)
    assert far.tolist() == pytest.approx([math.log(1e-12)] * 3)


# ---- constants of the linear schedule with T = 1000


def test_the_decoder_borrows_the_variance_of_t_1():
    d = process()
    for variance in ("large", "small"):
        assert math.log(model_variance(d, 0, variance)) == pytest.approx(
            -9.81672513529567, rel=1e-12
        )
        assert math.sqrt(model_variance(d, 0, variance)) == pytest.approx(0.00738457, rel=1e-6)
    assert model_variance(d, 1, "small") == pytest.approx(5.4531876613e-05, rel=1e-10)
    assert math.log(model_variance(d, 1, "large")) == pytest.approx(-9.02868637194934, rel=1e-12)
    assert model_variance(d, 999, "large") == pytest.approx(0.02, rel=1e-14)


def test_the_posterior():
    d = process()
    c_t, c_0, variance = posterior(d, 0)
    assert (c_t, variance) == (0, 0)
    assert c_0 == pytest.approx(1, abs=1e-11)
    assert posterior(d, 1) == pytest.approx(
        (0.4547084990, 0.5452914995, 5.4531876613e-05), rel=1e-9
    )
    expected = 0.9899486783, 1.2835148717e-4, 0.01999998352656
    assert posterior(d, 999) == pytest.approx(expected, rel=1e-9)


def test_the_prior():
    d = process()
    x_0 = torch.tensor([1 / 3, 0.0, 1.0], dtype=torch.float64).sqrt()
    bits = prior_term(d, x_0[:, None, None, None].expand(3, 1, 2, 2), 999).tolist()
    assert bits[0] == pytest.approx(9.7e-6, rel=5e-3)
    assert bits[1] == pytest.approx(5.9e-10, rel=5e-3)
    assert bits[2] == pytest.approx(2.91e-5, rel=5e-3)


# ---- the whole bound where it is known


@pytest.mark.parametrize("variance", ["large", "small"])
def test_a_perfect_model_pays_only_for_its_variance(variance):
    d = process()
    x_0 = pixels(1, 1, 4, 4).clamp(1, 254)  # the open bins aside
    image = x_0.double() / 127.5 - 1
    perfect = denoiser_of(lambda x, a: (x - a.sqrt() * image) / (1 - a).sqrt(), d)
    bound = bits_per_dim(perfect, d, x_0, [0], variance=variance, batch_size=100)
    assert bound.t.tolist() == list(range(1000))
    assert bound.mse.max() < 1e-9
    rate = bound.bits[0, 1:]
    if variance == "large":
        assert rate.sum().item() == pytest.approx(0.4864, abs=5e-5)
        assert rate[0].item() == pytest.approx(0.175, abs=5e-4)
        beta, beta_tilde = d.betas[1:], np.array([posterior(d, t)[2] for t in range(1, 1000)])
        theory = 0.5 * (beta_tilde / beta - 1 - np.log(beta_tilde / beta)) / math.log(2)
        np.testing.assert_allclose(rate, theory, rtol=1e-5, atol=1e-9)
    else:
        assert rate.abs().max() < 1e-8
    # the mass that the decoder, exactly right, leaves in its own bin
    z = 1 / 255 / math.sqrt(5.4531876613e-05)
    mass = math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    assert bound.bits[0, 0].item() == pytest.approx(-math.log2(mass), rel=1e-5)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_gaussian_data(variance):
    """Pixels N(0, 0.04) and the best eps model: the bound is the entropy and a known excess."""
    d, v, T = process(T=200), 0.04, 200
    generator = torch.Generator().manual_seed(0)
    x = 0.2 * torch.randn(1, 3, 128, 128, generator=generator)
    x_0 = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    m2 = (x_0.double() / 127.5 - 1).square().mean().item()  # v, but of these very pixels

    def eps_model(x, a):
        x0_hat = a.sqrt() * v / (a * v + 1 - a) * x
        return (x - a.sqrt() * x0_hat) / (1 - a).sqrt()

    denoiser = denoiser_of(eps_model, d)
    bound = bits_per_dim(denoiser, d, x_0, [1], variance=variance, batch_size=1)
    a = np.array([d.alpha_bar(t) for t in range(T)])
    gain = np.sqrt(a) * v / (a * v + 1 - a)
    mse = (1 - gain * np.sqrt(a)) ** 2 * m2 + gain**2 * (1 - a)
    np.testing.assert_allclose(bound.mse[0], mse, rtol=0.05)
    assert bound.mse.mean().item() == pytest.approx(mse.mean(), rel=3e-3)

    # the true reverse step is Gaussian around p's mean, of variance v_true
    c_0 = np.array([posterior(d, t)[1] for t in range(T)])
    v_q = np.array([posterior(d, t)[2] for t in range(T)])
    v_true = v_q + c_0**2 * v * (1 - a) / (a * v + 1 - a)
    v_p = np.array([model_variance(d, t, variance) for t in range(T)])
    excess = 0.5 * (v_true / v_p - 1 - np.log(v_true / v_p))[1:].sum()
    v_T = a[-1] * v + 1 - a[-1]
    excess = (excess + 0.5 * (v_T - 1 - math.log(v_T))) / math.log(2)  # chains start in N(0, 1)
    # at t = 0 the bin is as wide as the decoder: its mass, averaged over x_0 - x0_hat
    e, s = np.linspace(-0.06, 0.06, 10_001), math.sqrt(v_p[0])
    weight = np.exp(-0.5 * e**2 / v_true[0]) / np.exp(-0.5 * e**2 / v_true[0]).sum()
    mass = [math.erf((x + 1 / 255) / s / 2**0.5) - math.erf((x - 1 / 255) / s / 2**0.5) for x in e]
    decoder = -(weight * np.log2(np.clip(np.array(mass) / 2, 1e-12, 1))).sum()
    entropy_0 = 0.5 * math.log2(2 * math.pi * math.e * v_true[0]) + math.log2(127.5)
    assert bound.bits[0, 0].item() == pytest.approx(decoder, abs=0.03)
    # the chain rule: the entropy of the pixels, and what each step's p is off by
    entropy = 0.5 * (math.log2(2 * math.pi * v) + m2 / v / math.log(2)) + math.log2(127.5)
    bits = (bound.prior + bound.bits.sum(1)).item()
    assert bits == pytest.approx(entropy + excess + decoder - entropy_0, abs=0.03)
    assert bits > entropy


def test_every_term_is_the_literal_one():
    """1,000 steps, written out from the paper and in the official code's order."""
    model, x_0 = small(), pixels(1, 1, 8, 8)
    ours = {
        variance: bound_of(model, x_0, [7], batch_size=500, variance=variance)
        for variance in ("large", "small")
    }

    betas = np.linspace(1e-4, 0.02, 1000)
    alphas = 1 - betas
    bar = np.cumprod(alphas)
    bar_prev = np.append(1.0, bar[:-1])
    posterior_variance = betas * (1 - bar_prev) / (1 - bar)
    log_posterior = np.log(np.append(posterior_variance[1], posterior_variance[1:]))
    log_variance = {
        "small": log_posterior,
        "large": np.log(np.append(posterior_variance[1], betas[1:])),
    }
    cdf = lambda x: 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    x = x_0.numpy().astype(np.float64) / 127.5 - 1
    noise = SeedNoise([7], (1, 8, 8), torch.device("cpu"))
    eps = np.concatenate([noise().numpy() for _ in range(1000)]).astype(np.float64)
    shape = 1000, 1, 1, 1
    chain = np.sqrt(bar).reshape(shape) * x + np.sqrt(1 - bar).reshape(shape) * eps
    with torch.inference_mode():
        guess = model[2](torch.from_numpy(chain).float(), torch.arange(1000)).double().numpy()
    for t in range(1000):
        x_t, eps_hat = chain[t], guess[t]
        x0_hat = np.sqrt(1 / bar[t]) * x_t - np.sqrt(1 / bar[t] - 1) * eps_hat
        x0_hat = np.clip(x0_hat, -1, 1)
        coef_0 = betas[t] * np.sqrt(bar_prev[t]) / (1 - bar[t])
        coef_t = (1 - bar_prev[t]) * np.sqrt(alphas[t]) / (1 - bar[t])
        true_mean, mean = coef_0 * x + coef_t * x_t, coef_0 * x0_hat + coef_t * x_t
        for variance, bound in ours.items():
            log_1, log_2 = log_posterior[t], log_variance[variance][t]
            if t == 0:
                plus = cdf(np.exp(-0.5 * log_2) * (x - mean + 1 / 255))
                minus = cdf(np.exp(-0.5 * log_2) * (x - mean - 1 / 255))
                mass = np.where(x < -0.999, plus, np.where(x > 0.999, 1 - minus, plus - minus))
                nats = -np.log(np.maximum(mass, 1e-12))
            else:
                nats = 0.5 * (
                    -1 + log_2 - log_1 + np.exp(log_1 - log_2)
                    + (true_mean - mean) ** 2 * np.exp(-log_2)
                )  # fmt: skip
            bits = nats.mean() / np.log(2)
            assert bound.bits[0, t].item() == pytest.approx(bits, rel=1e-5), t
            assert bound.mse[0, t].item() == pytest.approx(((x - x0_hat) ** 2).mean(), rel=1e-5)
    log_last = np.log(1 - bar[-1])
    prior = 0.5 * (-1 - log_last + np.exp(log_last) + bar[-1] * x**2).mean() / np.log(2)
    assert ours["large"].prior.item() == pytest.approx(prior, rel=1e-6)


# ---- batches


def test_an_image_belongs_to_its_seed():
    model, x_0 = small(T=30), pixels(5, 1, 8, 8)
    whole = bound_of(model, x_0, [3, 4, 5, 6, 7], batch_size=64)
    assert whole.bits.shape == whole.mse.shape == (5, 30)
    for batch_size in (1, 2, 5):
        other = bound_of(model, x_0, [3, 4, 5, 6, 7], batch_size=batch_size)
        torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-5)
    alone = bound_of(model, x_0[[4, 2]], [7, 5], batch_size=7)
    torch.testing.assert_close(alone.bits, whole.bits[[4, 2]], rtol=1e-4, atol=1e-5)
    other = bound_of(model, x_0[[4, 2]], [5, 7], batch_size=7)
    assert not torch.allclose(other.bits, whole.bits[[4, 2]], rtol=1e-2)
    some = bound_of(model, x_0, [3, 4, 5, 6, 7], batch_size=8, stride=7)
    assert some.t.tolist() == [0, 7, 14, 21, 28]
    torch.testing.assert_close(some.bits, whole.bits[:, ::7], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(some.prior, whole.prior)


def test_progress_counts_network_calls():
    seen = []

    def progress(batches, *, total):
        for batch in batches:
            seen.append(total)
            yield batch

    bound_of(small(T=10), pixels(3, 1, 8, 8), [0, 1, 2], batch_size=2, progress=progress)
    assert seen == [10 + 5] * 15  # two images a t at a time; then one image, two t at a time


def test_where_alpha_bar_ends_at_0_the_bound_starts_below():
    bound = bound_of(small(T=20, schedule="jsd"), pixels(2, 1, 8, 8), [0, 1], batch_size=8)
    assert bound.t.tolist() == list(range(19))
    assert all(part.isfinite().all() for part in bound)
    assert bound.prior.min() > 1e-3  # alpha_bar is 1 / 20 there


@pytest.mark.parametrize(
    ("T", "x_0", "seeds", "stride", "says"),
    [
        (10, pixels(2, 1, 8, 8), [0], 1, "N seeds"),
        (10, pixels(2, 1, 8, 8).float(), [0, 1], 1, "uint8"),
        (10, pixels(2, 1, 8, 8), [0, 1], 0, "stride 0"),
        (1, pixels(2, 1, 8, 8), [0, 1], 1, "single step"),
    ],
)
def test_mistakes(T, x_0, seeds, stride, says):
    with pytest.raises(ValueError, match=says):
        bound_of(small(T=T), x_0, seeds, batch_size=4, stride=stride)
