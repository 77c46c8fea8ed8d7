"""What CUDA asks of the code: one device in a step, and no waiting for it.

Without a GPU the tensors pretend: they have a device and a shape, and no values. A step that mixes
devices, reads a value or copies to the host fails on them as it would be slow or fail on a GPU.
"""

import sys

import pytest
import torch
from helpers import steps_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pl_utils
from config import load_config
from dataset import Batch
from generation import chain, make_denoiser
from pl_utils import DDPM

SAMPLERS = {"ddpm": 0.0, "ddim": 0.5, "dpm++": 0.0, "heun": 0.0}  # and their eta


class Crossings(TorchDispatchMode):
    """Operations whose inputs and outputs are on different devices."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = [
            {v.device.type for v in tree_leaves(side) if isinstance(v, torch.Tensor)}
            for side in ((args, kwargs), result)
        ]
        if all(devices) and devices[0] != devices[1]:
            self.found.append(str(function))
        return result


@pytest.fixture
def pretended(monkeypatch):
    """A model on a GPU that is not there."""
    overrides = ["hardware.precision=bf16-mixed", "dataset.random_flip=true"]
    config = load_config("configs/smoke.yml", overrides)
    ddpm = DDPM(config)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "default_generators", [torch.Generator()])
    monkeypatch.setattr(sys.modules["generation.generate"], "SeedNoise", PretendedNoise)
    with FakeTensorMode():
        for module in ddpm.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(on_gpu(p), p.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = on_gpu(buffer)
        ddpm._device = torch.device("cuda", 0)
        ddpm.draw = pretended_draw
        yield ddpm


def on_gpu(tensor):
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cuda")


def pretended_draw(stream, index, count):
    t = torch.empty(count, dtype=torch.long, device="cuda")
    eps = torch.empty(count, 1, 8, 8, device="cuda")
    coins = torch.empty(2, count, dtype=torch.bool, device="cuda")
    return pl_utils.Draws(t, eps, *coins)


class PretendedNoise:
    def __init__(self, seeds, shape, device):
        self.shape, self.device = (len(seeds), *shape), device

    def __call__(self, _=None):
        return torch.empty(self.shape, device=self.device)


def test_a_step_stays_on_the_device(pretended):
    ddpm = pretended

    def backward(loss):
        assert loss.device.type == "cuda"
        for parameter in ddpm.unet.parameters():
            parameter.grad = torch.empty_like(parameter)

    optimizer = ddpm.configure_optimizers()
    images = torch.empty(ddpm.config.training.batch_size, 1, 8, 8, dtype=torch.uint8, device="cuda")
    for step in range(2):
        with Crossings() as crossings:
            ddpm.update(Batch(images), optimizer, step=step, backward=backward)
        if step == 0:  # five columns over t, once
            assert crossings.found == ["aten._to_copy.default"] * 5
    assert crossings.found == []


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_chain_stays_on_the_device(pretended, sampler):
    counts = []
    for timesteps in (5, 10):
        steps = steps_of(pretended.diffusion, sampler, eta=SAMPLERS[sampler], n=timesteps)
        with Crossings() as crossings, torch.inference_mode():
            times = [step.t for step in steps]
            denoiser = make_denoiser(pretended.ema, pretended.diffusion, times=times)
            *_, (_, x, _) = chain(denoiser, steps, [0, 1], shape=(1, 8, 8), device="cuda")
        assert x.device.type == "cuda"
        counts.append(len(crossings.found))
    assert counts == [1, 1]  # the list of times, however long


def test_a_value_that_is_read_would_be_seen(pretended):
    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        pretended.tally[0].item()
    with Crossings() as crossings:
        pretended.tally.cpu()
    assert crossings.found == ["aten._to_copy.default"]
    with pytest.raises(RuntimeError, match="device"):
        pretended.tally + torch.zeros(5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_and_the_loss_is_the_cpus():
    config = load_config("configs/smoke.yml", ["hardware.precision=32-true", "model.dropout=0"])
    batch = torch.randint(0, 256, (config.training.batch_size, 1, 8, 8), dtype=torch.uint8)
    drawn = DDPM(config).draw(pl_utils.TRAIN, 0, len(batch))
    tallies = []
    for device in ("cpu", "cuda"):
        ddpm, here = DDPM(config).to(device), batch.to(device)
        there = pl_utils.Draws(*(v.to(device) for v in drawn))
        ddpm.draw = lambda *_, there=there: there
        optimizer = ddpm.configure_optimizers()
        ddpm.update(Batch(here), optimizer, step=0)  # builds what is built once; its rate is 0
        torch.cuda.set_sync_debug_mode("error")
        try:
            ddpm.update(Batch(here), optimizer, step=0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        tallies.append(ddpm.tally.cpu())
    torch.testing.assert_close(*tallies, rtol=1e-4, atol=1e-5)
