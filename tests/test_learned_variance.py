"""A learned variance, held to the formulas of Nichol & Dhariwal 2021 in NumPy and float64."""

import math

import numpy as np
import pytest
import torch
from helpers import assert_same, invoke, process, steps_of, tiny, train, wake
from torch import Tensor

from config import load_config
from dataset import with_facts
from evaluation.likelihood import bits_per_dim
from generation import Guidance, SeedNoise, make_denoiser, reverse
from model import Network, build_network
from weights import Model, load_model, newest_checkpoint, write_checkpoint
from weights.card import usage
from weights.dialects import infer_tree, tree_of_diffusers
from weights.export import export_model, write_diffusers

LEARNED = "diffusion.learned_variance=true"


class Reference:
    """The chain of given betas, [N] float64, in the terms of the paper and its released code."""

    def __init__(self, betas):
        self.betas, alphas = betas, 1 - betas
        self.bar = np.cumprod(alphas)
        before = np.append(1.0, self.bar[:-1])
        self.variance = betas * (1 - before) / (1 - self.bar)
        self.low = np.log(np.append(self.variance[1], self.variance[1:]))
        self.high = np.log(betas)
        self.of_x_0 = betas * np.sqrt(before) / (1 - self.bar)
        self.of_x_t = (1 - before) * np.sqrt(alphas) / (1 - self.bar)

    @classmethod
    def of_some(cls, betas, times):
        """Only these times, rising, are left: alpha_bar is the same at them."""
        last, new = 1.0, []
        for t, bar in enumerate(np.cumprod(1 - betas)):
            if t in times:
                new.append(1 - bar / last)
                last = bar
        return cls(np.array(new))

    def p_mean_variance(self, x_t, i, eps, v, *, clip):
        x_0 = x_t * np.sqrt(1 / self.bar[i]) - eps * np.sqrt(1 / self.bar[i] - 1)
        x_0 = np.clip(x_0, -1, 1) if clip else x_0
        share = (v + 1) / 2
        log_variance = share * self.high[i] + (1 - share) * self.low[i]
        return self.of_x_0[i] * x_0 + self.of_x_t[i] * x_t, log_variance

    def bound(self, x_0, x_t, i, eps, v, *, clip):
        """One term of the bound in bits per dimension, of one image."""
        mean, log_variance = self.p_mean_variance(x_t, i, eps, v, clip=clip)
        if i == 0:
            cdf = lambda z: (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
            std = np.exp(log_variance / 2)
            above, below = cdf((x_0 - mean + 1 / 255) / std), cdf((x_0 - mean - 1 / 255) / std)
            log = lambda p: np.log(np.maximum(p, 1e-12))
            inside = np.where(x_0 > 0.999, log(1 - below), log(above - below))
            return -np.where(x_0 < -0.999, log(above), inside).mean() / math.log(2)
        true = self.of_x_0[i] * x_0 + self.of_x_t[i] * x_t
        kl = log_variance - self.low[i] - 1 + np.exp(self.low[i] - log_variance)
        kl = (kl + (true - mean) ** 2 * np.exp(-log_variance)) / 2
        return kl.mean() / math.log(2)

    def training_loss(self, x_0, i, noise, F):
        """The simple loss, and the bound with the weight of rescaled sigmas."""
        x_t = np.sqrt(self.bar[i]) * x_0 + np.sqrt(1 - self.bar[i]) * noise
        eps, v = F[: len(x_0)], F[len(x_0) :]
        vb = self.bound(x_0, x_t, i, eps, v, clip=False) * len(self.betas) / 1000
        return ((noise - eps) ** 2).mean() + vb


class Said(Network):
    """An output that is given, and looks at x_t a little."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs, self.place = outputs, torch.nn.Parameter(torch.zeros(1))

    def embed(self, t, labels=None):
        return t.float()[:, None] + (0 if labels is None else labels.sum(1, keepdim=True))

    def predict(self, x: Tensor, embedding: Tensor) -> Tensor:
        like = torch.cat([x, x.flip(-1)], dim=1)
        return self.outputs + 0.1 * torch.sin(like + embedding[..., None, None].view(-1, 1, 1, 1))


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pixels(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(256, shape, generator=generator)
    levels.view(-1)[:4] = torch.tensor([0, 255, 0, 255])  # the open bins
    return levels.float() / 127.5 - 1


CHAINS = [("linear", 1000), ("cosine", 1000), ("cosine", 4000), ("linear", 20)]


@pytest.mark.parametrize(("schedule", "T"), CHAINS)
def test_the_training_loss_is_theirs(schedule, T):
    d = process(schedule, T, learned=True)
    t = torch.tensor([0, 0, 1, 2, T // 4, T // 2, T - 2, T - 1])
    x_0, noise = pixels(8, 3, 8, 8), random(8, 3, 8, 8, seed=1)
    F = torch.cat([noise + 0.2 * random(8, 3, 8, 8, seed=2), random(8, 3, 8, 8, seed=3)], dim=1)
    ours = d.training_loss(lambda x_t, at: F, x_0, t, noise)
    them, arrays = Reference(d.betas), (x_0.double(), t, noise.double(), F.double())
    theirs = [them.training_loss(*(a.numpy() for a in row)) for row in zip(*arrays, strict=True)]
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5)


def test_the_bound_teaches_the_variance_alone_and_weights_the_rest_alone():
    d, t = process(T=100, learned=True), torch.tensor([0, 1, 50, 99])
    x_0, noise = pixels(4, 2, 4, 4), random(4, 2, 4, 4)
    F = torch.cat([noise + 0.3, random(4, 2, 4, 4, seed=1)], dim=1).requires_grad_()
    weight = torch.linspace(0.5, 2, 100)
    simple = lambda w=None: d.loss(lambda *_: F, x_0, t, noise, w)
    hybrid = d.training_loss(lambda *_: F, x_0, t, noise, weight)
    unweighted = d.training_loss(lambda *_: F, x_0, t, noise)
    torch.testing.assert_close(hybrid - simple(weight), unweighted - simple())
    (of_both,), (of_simple,) = (
        torch.autograd.grad(x.sum(), F, retain_graph=True) for x in (hybrid, simple(weight))
    )
    assert torch.equal(of_both[:, :2], of_simple[:, :2])
    assert of_simple[:, 2:].eq(0).all()
    assert of_both[:, 2:].ne(0).all(dim=(1, 2, 3)).tolist() == [True] * 4


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_whatever_is_predicted_has_one_loss(prediction):
    """Each says the same x0_hat; jsd ends without signal, where eps says nothing of it."""
    schedule = "linear" if prediction == "eps" else "jsd"
    d, t = process(schedule, 50, prediction=prediction, learned=True), torch.tensor([0, 1, 25, 49])
    x_0, noise, v = pixels(4, 1, 4, 4), random(4, 1, 4, 4), random(4, 1, 4, 4, seed=1)
    F = torch.cat([d.target(x_0, t, noise) + 0.1, v], dim=1)
    loss = d.training_loss(lambda *_: F, x_0, t, noise)
    assert loss.isfinite().all()
    x0_hat = d.predict_x_0(d.q_sample(x_0, t, noise), t, F)
    bits = d.bound_term(x_0, x0_hat, t, d.log_variance(t, v))
    torch.testing.assert_close(loss, d.loss(lambda *_: F, x_0, t, noise) + 50 / 1000 * bits)


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(ValueError, match="predict x0 or v"):
        process("jsd", 50, learned=True)
    with pytest.raises(ValueError, match="2 timesteps and more"):
        process("linear", 1, learned=True)
    with pytest.raises(ValueError, match="has learned none; take large or small"):
        steps_of(process(), variance="learned")
    with pytest.raises(ValueError, match=r"learned needs diffusion\.learned_variance=true"):
        tiny("sampling.variance=learned")


# ---- the chain


@pytest.mark.parametrize(("schedule", "T"), CHAINS)
@pytest.mark.parametrize("n", [None, 10])
def test_mean_and_variance_are_theirs(schedule, T, n):
    """Of every row, also where steps are left out: the variance is of the steps that are taken."""
    d = process(schedule, T, learned=True)
    steps = steps_of(d, variance="learned", n=n)
    network = Said(torch.cat([0.5 * random(2, 1, 4, 4), 2 * random(2, 1, 4, 4, seed=1)], dim=1))
    denoiser = make_denoiser(network.requires_grad_(False), d)
    them = Reference.of_some(d.betas, {step.t for step in steps})
    assert len(steps) == len(them.betas) == (n or T)
    x_t, z = random(2, 2, 1, 4, 4, seed=2, dtype=torch.float64)
    for i, step in [*enumerate(reversed(steps))][:: max(1, len(steps) // 100)]:
        F = network(x_t.float(), torch.tensor([step.t])).double().numpy()
        mean, log_variance = them.p_mean_variance(x_t.numpy(), i, F[:, :1], F[:, 1:], clip=True)
        ((_, x_s, _),) = reverse(denoiser, x_t, [step], lambda _: z)
        noise = 0 if i == 0 else np.exp(log_variance / 2) * z.numpy()
        np.testing.assert_allclose(x_s.numpy(), mean + noise, rtol=1e-5, atol=1e-9)


def test_its_ends_are_the_fixed_variances():
    d, x_T = process(T=200, learned=True), random(1, 1, 8, 8, dtype=torch.float64)
    for n in (200, 7):
        for v, fixed in ((-1.0, "small"), (1.0, "large")):

            def denoiser(x, t, with_v=False, v=v):
                return (x.tanh(), torch.full_like(x, v)) if with_v else x.tanh()

            chains = []
            for variance in (fixed, "learned"):
                noise = SeedNoise([3], (1, 8, 8))
                steps = steps_of(d, variance=variance, n=n)
                double = lambda _, noise=noise: noise().double()
                *_, (_, x, _) = reverse(denoiser, x_T, steps, double)
                chains.append(x)
            torch.testing.assert_close(*chains, rtol=1e-9, atol=1e-9)


def test_other_samplers_do_not_ask():
    d = process(T=50, learned=True)
    for sampler in ("ddim", "dpm++", "heun"):
        for _ in reverse(lambda x, t: x.tanh(), random(1, 1, 4, 4), steps_of(d, sampler), None):
            pass


def labelled(*overrides, seed=0):
    config = with_facts(tiny("dataset.labels=true", LEARNED, *overrides))
    network = wake(build_network(config), seed).eval().requires_grad_(False)
    return Model(network, config, weights="ema", step=7, notes=[])


@pytest.mark.parametrize("t", [0, 12, torch.tensor([0, 7, 19])], ids=str)
def test_guidance_leaves_the_variance_alone(t):
    model, x, label = labelled(), random(3, 1, 8, 8), torch.eye(10)[3]
    how = {"label": label, "clip": False}
    x0_hat, v = make_denoiser(model.network, model.diffusion, **how)(x, t, True)
    assert v.shape == x.shape
    weak = make_denoiser(labelled(seed=1).network, model.diffusion, **how)
    for scale in (0.0, 3.0):
        for guide in (None, weak):
            options = how | {"guidance": Guidance(scale), "guide": guide}
            guided = make_denoiser(model.network, model.diffusion, **options)
            torch.testing.assert_close(guided(x, t, True)[1], v, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(guided(x, t, True)[0], guided(x, t), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(guided(x, t), x0_hat, atol=1e-5)


# ---- the bound


def test_the_bound_is_theirs():
    d, T = process("cosine", 60, learned=True), 60
    x_0 = ((pixels(2, 1, 4, 4) + 1) * 127.5).round().to(torch.uint8)
    network = Said(random(1, 2, 4, 4)).requires_grad_(False)
    found = bits_per_dim(
        make_denoiser(network, d), d, x_0, [5, 6], variance="learned", batch_size=16
    )
    them, x = Reference(d.betas), x_0.double().numpy() / 127.5 - 1
    noise = SeedNoise([5, 6], (1, 4, 4))
    for t in range(T):
        eps = noise().double().numpy()
        x_t = np.sqrt(them.bar[t]) * x + np.sqrt(1 - them.bar[t]) * eps
        F = network(torch.from_numpy(x_t).float(), torch.tensor([t])).double().numpy()
        for i in range(2):
            bits = them.bound(x[i], x_t[i], t, F[i, :1], F[i, 1:], clip=True)
            assert found.bits[i, t].item() == pytest.approx(bits, rel=1e-5), t


# ---- runs and files


def test_off_is_the_network_without_and_on_begins_between_the_fixed_variances():
    off, on = (build_network(tiny(*flags)).state_dict() for flags in ((), (LEARNED,)))
    for name, value in off.items():
        assert name.startswith("conv_out") or value.shape == on[name].shape
    assert [net["conv_out.weight"].shape[0] for net in (off, on)] == [1, 2]
    assert on["conv_out.weight"].abs().max() < 1e-4  # v is 0
    d = process()
    assert d.training_loss == d.loss
    assert tiny(LEARNED).sampling.variance == "learned"
    assert tiny(LEARNED, "sampling.variance=small").sampling.variance == "small"


def test_stopping_and_resuming_leaves_no_trace(tmp_path):
    straight, adam = train(tmp_path / "a", LEARNED, "training.max_steps=4")
    train(tmp_path / "b", LEARNED, "training.max_steps=2")
    last, _ = newest_checkpoint(tmp_path / "b")
    others = LEARNED, "training.max_steps=4", "evaluation.validate_every=2"
    resumed, resumed_adam = train(tmp_path / "b", *others, resume=last)
    assert_same(dict(straight.state_dict()), dict(resumed.state_dict()))
    assert_same(adam, resumed_adam)
    assert straight.unet.conv_out.weight.shape[0] == 2


def test_the_commands_take_it(tmp_path, monkeypatch):
    train(tmp_path / "run", LEARNED, "logging.preview_every=2", "evaluation.validate_every=2")
    draw = f"sample.py {tmp_path / 'run'} --num-images 2 --timesteps 5 --output-dir"
    for name, option in (("a", ""), ("b", "--variance small"), ("c", "--sampler dpm++")):
        invoke(f"{draw} {tmp_path / name} {option}", tmp_path, monkeypatch)
    told = invoke(f"sample.py {tmp_path / 'run'} --help", tmp_path, monkeypatch)
    assert "learned" in told
    bound = f"evaluate.py {tmp_path / 'run'} --metrics nll --nll-images 2 --output d.json"
    assert "NLL" in invoke(bound, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("format", "variance"),
    [(f, v) for f in ("diffusers", "safetensors") for v in ("learned", "small")]
    + [pytest.param("onnx", "learned", marks=pytest.mark.slow)],
)
def test_it_goes_out_and_comes_back(format, variance, tmp_path):
    if format != "safetensors":
        pytest.importorskip("diffusers" if format == "diffusers" else "onnxscript")
    model, run = labelled(f"sampling.variance={variance}"), tmp_path / "model.ckpt"
    state = torch.nn.ModuleDict({"unet": model.network, "ema": model.network}).state_dict()
    tree = model.config.model_dump(mode="json")
    write_checkpoint({"hyper_parameters": tree, "state_dict": state, "global_step": 7}, run)
    export_model(run, tmp_path / "out", format, "ema", "mit")  # reads back bit for bit
    if format != "onnx":
        back = load_model(tmp_path / "out" / ("model.safetensors" if format != "diffusers" else ""))
        assert back.diffusion.learned_variance
        assert back.config.sampling.variance == variance
        assert back.digest() == model.digest()


def test_diffusers_pipeline_draws_our_image(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = labelled("dataset.labels=false", "dataset.channels=3")
    write_diffusers(model, tmp_path / "out", "mit")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline.unet.config.out_channels == 6
    noise = random(21, 1, 3, 8, 8)
    draws = iter([*noise, torch.zeros_like(noise[0])])
    with pytest.MonkeyPatch.context() as patch:
        for place in ("schedulers.scheduling_ddpm", "pipelines.ddpm.pipeline_ddpm"):
            patch.setattr(f"diffusers.{place}.randn_tensor", lambda *_, **__: next(draws))
        theirs = pipeline(num_inference_steps=20, output_type="np").images[0]
    steps, draws = steps_of(model.diffusion, variance="learned"), iter(noise)
    denoiser = make_denoiser(model.network, model.diffusion)
    *_, (_, ours, _) = reverse(denoiser, next(draws), steps, lambda _: next(draws))
    ours = (ours[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    assert np.abs(ours.numpy() - theirs).max() < 2e-3
    assert "DDIM" not in usage(model.config)
    assert "sample[:, :1]" in usage(labelled().config)


def test_shapes_tell_it():
    config = load_config("configs/smoke.yml", [LEARNED])
    state = build_network(config, "meta").state_dict()
    tree, _ = infer_tree(state, 8)
    assert tree["diffusion"]["learned_variance"]
    assert tree["sampling"]["variance"] == "learned"
    unet = {"in_channels": 3, "out_channels": 5}
    with pytest.raises(ValueError, match="or twice where the variance is learned"):
        tree_of_diffusers(unet, {})
