"""What is fast computes what is slow: kernels, precisions and shortcuts against the plain way."""

import subprocess

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, steps_of, wake
from torch.nn.functional import cosine_similarity

from config import load_config
from dataset import Batch
from generation import generate, make_denoiser, resolve_precision
from kernels import GroupNorm, norm_silu
from model import Dropout, UNet, at_precision, has_bf16
from pl_utils import DDPM
from training.fitting import FitIntoMemory
from weights import load_model

needs_kernel = pytest.mark.skipif(norm_silu.kernel() is None, reason="no C++ compiler here")


def plain(norm: GroupNorm, x: torch.Tensor) -> torch.Tensor:
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y) if norm.silu else y


def norm_and_input(*, dtype, silu: bool, shape=(3, 24, 9, 7)):
    torch.manual_seed(0)
    norm = wake(GroupNorm(6, shape[1], silu=silu)).double()
    x = (torch.randn(shape, dtype=torch.float64) * 3 + 5).to(dtype)
    return norm, x.to(memory_format=torch.channels_last)


@needs_kernel
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_the_kernel_is_group_norm_and_silu(dtype, tolerance, silu):
    """Output and all gradients, against float64 on the same rounded input."""
    norm, x = norm_and_input(dtype=dtype, silu=silu)
    dy = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    exact_x = x.double().requires_grad_()
    exact = plain(norm, exact_x)
    exact.backward(dy.double())
    wanted = [exact, exact_x.grad, norm.weight.grad, norm.bias.grad]
    norm.zero_grad()

    ours = norm.float()
    x.requires_grad_()
    y = ours(x)
    assert type(y.grad_fn).__name__ == "_KernelBackward"
    y.backward(dy)
    for found, exact in zip([y, x.grad, ours.weight.grad, ours.bias.grad], wanted, strict=True):
        assert (found - exact).abs().max() < tolerance * exact.abs().max()


@needs_kernel
def test_threads_share_the_groups_of_one_image():
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 4, 32):  # the last: more than groups
            torch.set_num_threads(count)
            norm, x = norm_and_input(dtype=torch.float32, silu=True, shape=(1, 24, 9, 7))
            y = norm.float()(x.requires_grad_())
            y.square().sum().backward()
            results.append([y, x.grad, norm.weight.grad, norm.bias.grad])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@needs_kernel
def test_an_empty_batch_and_a_second_derivative():
    norm, x = norm_and_input(dtype=torch.float32, silu=True)
    norm = norm.float()
    assert norm(x[:0]).shape == (0, *x.shape[1:])
    loss = norm(x.requires_grad_()).square().sum()
    slopes = torch.autograd.grad(loss, [x, norm.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(slope.square().sum() for slope in slopes).backward()


@needs_kernel
def test_the_kernel_passes_on_what_is_not_finite():
    norm, x = norm_and_input(dtype=torch.float32, silu=True)
    x[0, 0, 0, 0] = torch.nan
    y = norm.float()(x)
    assert y[0].isnan().any() and y[1:].isfinite().all()


def test_without_a_compiler_the_result_is_the_same(monkeypatch, tmp_path):
    net = wake(UNet(**TINY)).to(memory_format=torch.channels_last).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    with_kernel = net(x, t)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    norm_silu.kernel.cache_clear()
    try:
        assert norm_silu.kernel() is None
        torch.testing.assert_close(net(x, t), with_kernel, rtol=1e-4, atol=1e-4)
    finally:
        norm_silu.kernel.cache_clear()


@needs_kernel
def test_the_kernel_is_built_once(monkeypatch):
    run = subprocess.run

    def only_versions(command, **options):
        assert "--version" in command
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", only_versions)
    norm_silu.kernel.cache_clear()
    assert norm_silu.kernel() is not None


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(p):
    dropout = Dropout(p).train()
    x = torch.ones(8, 16, 33, 31).to(memory_format=torch.channels_last).requires_grad_()
    torch.manual_seed(0)
    y = dropout(x)
    y.sum().backward()
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)  # the generator's, and nothing else
    assert torch.equal(x.grad, y)  # the same mask back
    zeros = y.eq(0).double()
    count = y.numel()
    assert abs(zeros.mean() - p) < 5 * (p * (1 - p) / count) ** 0.5
    assert y[y != 0].unique().tolist() == [pytest.approx(1 / (1 - p))]
    # no two neighbours share their fate: the four numbers of a draw are independent
    flat = zeros.permute(0, 2, 3, 1).reshape(-1) - p
    for lag in (1, 2, 3, 4):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 * p * (1 - p) / count**0.5
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_keeps_the_mean_in_bfloat16_and_drops_nearly_all():
    x = torch.ones(4, 64, 32, 32, dtype=torch.bfloat16)
    torch.manual_seed(0)
    kept = Dropout(0.1).train()(x).double()
    share = (kept > 0).double().mean().item()
    assert kept.mean().item() == pytest.approx(share / 0.9, rel=2e-3)
    assert Dropout(0.999995).train()(x.float()).count_nonzero() < 50


def test_one_t_for_all_is_t_of_each():
    net = wake(UNet(**TINY)).eval()
    x = torch.randn(3, 3, 8, 8)
    each = net(x, torch.full((3,), 17))
    torch.testing.assert_close(net(x, torch.tensor([17])), each, rtol=1e-5, atol=1e-5)
    rows = net.embed(torch.tensor([5, 17]))
    torch.testing.assert_close(net.predict(x, rows[1:]), each, rtol=1e-5, atol=1e-5)


def test_recomputing_activations_changes_nothing():
    gradients = []
    for recompute in (False, True):
        net = wake(UNet(**{**TINY, "dropout": 0.3})).train()
        net.recompute = recompute
        torch.manual_seed(0)
        x = torch.randn(2, 3, 8, 8)
        net(x, torch.tensor([3, 900])).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def tiny_ddpm(*overrides: str) -> DDPM:
    size = ["model.base_channels=32", "model.dropout=0", "training.batch_size=8"]
    ddpm = DDPM(load_config("configs/smoke.yml", [*size, *overrides]))
    wake(ddpm.unet), wake(ddpm.ema)
    return ddpm


def test_bfloat16_gradients_point_the_same_way():
    gradients = []
    for precision in ("32-true", "bf16-mixed"):
        ddpm = tiny_ddpm(f"hardware.precision={precision}")
        batch = torch.randint(256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0))
        optimizer = ddpm.configure_optimizers()
        optimizer.zero_grad = lambda: None  # they are looked at
        ddpm.update(Batch(batch.to(torch.uint8)), optimizer, step=0)
        gradients.append(torch.cat([p.grad.flatten() for p in ddpm.unet.parameters()]))
    assert cosine_similarity(*gradients, dim=0) > 0.999
    assert not torch.equal(*gradients)


def test_bfloat16_samples_are_near():
    images = []
    ddpm = tiny_ddpm().eval()
    steps = steps_of(ddpm.diffusion, "dpm++", n=10)
    for precision in ("float32", "bfloat16"):
        before = ddpm.ema.conv_in.weight.clone()
        denoiser = make_denoiser(at_precision(ddpm.ema, precision), ddpm.diffusion)
        images += [x.float() for _, x in generate(denoiser, steps, [0, 1], shape=(1, 8, 8))]
        assert ddpm.ema.conv_in.weight.dtype == torch.float32
        assert torch.equal(ddpm.ema.conv_in.weight, before)
    assert 0 < (images[0] - images[1]).abs().mean() < 6


def test_micro_batches_shrink_until_they_fit(monkeypatch, capsys):
    def limited(x, t, labels=None):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ddpm.unet(x, t)

    ddpm = tiny_ddpm("hardware.compile=true")
    monkeypatch.setattr(ddpm.unet, "compile", lambda: None)
    monkeypatch.setattr(ddpm, "train_network", limited)
    assert FitIntoMemory(ddpm.config).prepare(ddpm) == 2
    assert "8 images do not fit in memory: micro-batches of 4" in capsys.readouterr().out
    assert all(p.grad is None for p in ddpm.parameters())

    config = tiny_ddpm("hardware.compile=true", "hardware.micro_batch_size=4").config
    with pytest.raises(ValueError, match="micro-batches of 4 do not fit in the memory"):
        FitIntoMemory(config).prepare(ddpm)


def test_where_nothing_can_be_compiled_training_goes_on(monkeypatch, capsys):
    ddpm = tiny_ddpm("hardware.compile=true")

    def broken(*_, **__):
        raise RuntimeError("no compiler was found\nand much more")

    monkeypatch.setattr(ddpm.unet, "compile", lambda: setattr(
        ddpm.unet, "_compiled_call_impl", broken
    ))  # fmt: skip
    assert FitIntoMemory(ddpm.config).prepare(ddpm) == 8
    assert capsys.readouterr().out == (
        "hardware.compile: cannot be done here, going on without (no compiler was found)\n"
    )
    optimizer = ddpm.configure_optimizers()
    ddpm.update(Batch(torch.zeros(8, 1, 8, 8, dtype=torch.uint8)), optimizer, step=0)


@pytest.mark.parametrize("forced", [False, True])
def test_a_loaded_model_answers_in_float32_wherever_it_is(forced, monkeypatch):
    """To the bit what it answers on a machine without bfloat16; images may differ, and say so."""
    monkeypatch.setenv("DDPM_BF16", str(int(forced)))
    assert has_bf16(torch.device("cpu")) == forced
    model = load_model("pretrained/digits.safetensors")
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    exact = load_model("pretrained/digits.safetensors").network.double()
    error = (model(x, t) - exact(x.double(), t)).abs().max()
    assert error < 1e-5
    precision = resolve_precision(model.config, torch.device("cpu"))
    assert precision == ("bfloat16" if forced else "float32")
