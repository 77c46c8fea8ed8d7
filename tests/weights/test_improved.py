"""Weights of improved-diffusion: the same output, and the same chain, as a network written anew."""

import itertools
import re

import numpy as np
import pytest
import torch
from helpers import invoke, steps_of, tiny, wake
from improved import Improved

from generation import make_denoiser, reverse
from model import UNet, build_network
from weights import load_model
from weights.export import export_model, import_model
from weights.improved import names_of_improved
from weights.load import read_model

TINY = {
    "size": 32, "base": 32, "multipliers": [1, 2, 2], "blocks": 1, "attends": [16, 8], "heads": 4,
    "scales": True, "outputs": 6, "classes": 0, "scale_t": 0.25,
}  # fmt: skip
PLAIN = {"heads": 1, "scales": False, "scale_t": 1.0}
KINDS = {
    "as cifar10": {},
    "three blocks": {"blocks": 3, "multipliers": [1, 2]},
    "as lsun": PLAIN | {"multipliers": [1, 1, 2], "attends": [16], "blocks": 2},
    "a fixed variance": {"outputs": 3},
    "as imagenet64_cond": {"classes": 7, "scale_t": 1.0, "size": 64, "multipliers": [1, 1, 2]},
}


def save(path, **kind):
    theirs = wake(Improved(**TINY | kind)).eval().requires_grad_(False)
    torch.save(theirs.state_dict(), path)
    return theirs


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_the_output_is_theirs(kind, tmp_path, monkeypatch):
    theirs = save(tmp_path / "ema.pt", **kind)
    said = invoke("convert.py import ema.pt ours.ckpt", tmp_path, monkeypatch)
    heads, scale = theirs.middle_block[1].heads, theirs.scale_t
    assert f"num_heads {heads}, time_scale {scale:g}" in said.replace("\n", " ")
    ours, kind = load_model(tmp_path / "ours.ckpt"), TINY | kind
    learned, T = kind["outputs"] == 6, 1000 if heads == 1 else 4000
    assert ours.config.diffusion.learned_variance == learned
    assert ours.config.sampling.variance == ("learned" if learned else "large")
    assert (ours.diffusion.timesteps, ours.config.dataset.image_size) == (T, kind["size"])
    assert ours.config.diffusion.beta_schedule == ("linear" if heads == 1 else "cosine")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = torch.randn(3, 3, kind["size"], kind["size"], generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0, T // 3, T - 1]), torch.tensor([0, 2, 6]) if kind["classes"] else None
    labels = None if y is None else torch.eye(7)[y]
    with torch.inference_mode():
        expected, found = theirs(x, t, y), ours.network(x, t, labels)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert found.shape == (3, kind["outputs"], kind["size"], kind["size"])
        # one row of an embedding for the whole batch
        row = ours.network.embed(t[1:2], None if y is None else labels[1:2])[0]
        alone = theirs(x, t[1].expand(3), None if y is None else y[1].expand(3))
        assert (ours.network.predict(x, row) - alone).abs().max() < 1e-5 * alone.abs().max()


@pytest.mark.parametrize("n", [4000, 20])
def test_the_chain_is_theirs(n, tmp_path):
    """Steps of p_sample, written out, from the same noise: some of all T, and few for all."""
    theirs = save(tmp_path / "ema.pt", multipliers=[1, 2], size=16, attends=[16])
    chosen = ["dataset.image_size=16"]
    import_model(tmp_path / "ema.pt", tmp_path / "ours.ckpt", chosen)
    ours = load_model(tmp_path / "ours.ckpt")
    steps = steps_of(ours.diffusion, variance="learned", n=n)
    some = steps[:10] + steps[-10:] if n == 4000 else steps
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(1, 3, 16, 16, generator=generator)
    x_T, noise = draw(), {step.t: draw() for step in some}
    denoiser = make_denoiser(ours.network, ours.diffusion)
    *_, (_, found, _) = reverse(denoiser, x_T, some, lambda step: noise[step.t])

    f = np.cos((np.linspace(0, 1, 4001) + 0.008) / 1.008 * np.pi / 2) ** 2
    bar = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))
    times = [step.t for step in steps]
    before = {t: bar[s] for t, s in itertools.pairwise(times)} | {times[-1]: 1.0}
    x = x_T.double()
    for step in some:
        t, last = step.t, before[step.t]
        beta = 1 - bar[t] / last
        with torch.inference_mode():
            eps, v = theirs(x.float(), torch.tensor([t])).double().chunk(2, dim=1)
        x_0 = ((x - (1 - bar[t]) ** 0.5 * eps) / bar[t] ** 0.5).clamp(-1, 1)
        mean = beta * last**0.5 / (1 - bar[t]) * x_0
        mean += (1 - last) * (1 - beta) ** 0.5 / (1 - bar[t]) * x
        if t == times[-1]:
            x = mean
            continue
        low, high = np.log(beta * (1 - last) / (1 - bar[t])), np.log(beta)
        share = (v + 1) / 2
        x = mean + (0.5 * (share * high + (1 - share) * low)).exp() * noise[t]
    assert (found - x).abs().max() < 1e-4


def test_what_shapes_do_not_show_can_be_said(tmp_path):
    theirs = save(tmp_path / "ema.pt", heads=2, scale_t=1.0)
    chosen = ["model.num_heads=2", "diffusion.timesteps=1000", "diffusion.beta_schedule=linear"]
    import_model(tmp_path / "ema.pt", tmp_path / "ours.ckpt", [*chosen, "dataset.name=cifar10"])
    ours = load_model(tmp_path / "ours.ckpt")
    assert ours.config.model.time_scale == 1 and ours.config.diffusion.beta_end == 0.02
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([500])
    torch.testing.assert_close(ours.network(x, t), theirs(x, t), rtol=1e-4, atol=1e-5)
    other = read_model(tmp_path / "ema.pt", ["model.num_heads=4"])
    name = "mid.attn_1.q.weight"
    assert other.ema[name].shape == ours.network.state_dict()[name].shape[:2]
    assert not torch.equal(other.ema[name], ours.network.state_dict()[name][:, :, 0, 0])
    with pytest.raises(ValueError, match="num_heads 3 does not divide 64 channels"):
        read_model(tmp_path / "ema.pt", ["model.num_heads=3"])


PUBLISHED = {
    "cifar10_uncond_50M_500K": {"multipliers": [1, 2, 2, 2]},
    "imagenet64_uncond_100M_1500K": {"size": 64, "multipliers": [1, 2, 3, 4]},
    "imagenet64_cond_270M_250K": {
        "size": 64, "base": 192, "multipliers": [1, 2, 3, 4], "classes": 1000,
    },
    "lsun_uncond_100M": PLAIN | {
        "size": 256, "blocks": 2, "attends": [16], "multipliers": [1, 1, 2, 2, 4, 4],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_of_the_published_models_are_a_bijection(name):
    """And the count of weights is the one in the file's name, in millions."""
    kind = TINY | {"base": 128, "blocks": 3} | PUBLISHED[name]
    with torch.device("meta"):
        theirs = Improved(**kind).state_dict()
        ours = UNet(
            image_size=kind["size"], channels=3, out_channels=6, classes=kind["classes"],
            null_label=False, base_channels=kind["base"], channel_multipliers=kind["multipliers"],
            num_res_blocks=kind["blocks"], attention_resolutions=kind["attends"], dropout=0.0,
            num_heads=kind["heads"], scale_shift_norm=kind["scales"], time_scale=1.0,
            variant="improved",
        ).state_dict()  # fmt: skip
    names = names_of_improved(theirs)
    apart = {re.sub("qkv", letter, name) for name in names.values() for letter in "qkv"}
    assert apart == ours.keys()
    assert len({*names.values()}) == len(theirs)
    size = lambda state: sum(value.numel() for value in state.values())
    assert size(theirs) == size(ours)
    assert round(size(ours) / 1e6) == pytest.approx(int(re.search(r"(\d+)M", name)[1]), rel=0.25)


def test_guided_diffusion_is_refused_in_one_message(tmp_path, monkeypatch):
    state = Improved(**TINY).state_dict()
    state["output_blocks.2.1.in_layers.0.weight"] = torch.zeros(8)
    torch.save(state, tmp_path / "guided.pt")
    output = invoke("convert.py import guided.pt out.ckpt", tmp_path, monkeypatch, 2)
    assert "guided.pt: these are the weights of guided-diffusion's U-Net" in output
    assert "missing" not in output and len(output) < 400


def test_it_goes_on_from_here(tmp_path, monkeypatch):
    save(tmp_path / "ema.pt", multipliers=[1, 2], size=32, attends=[16])
    import_model(tmp_path / "ema.pt", tmp_path / "a.ckpt", [])
    export_model(tmp_path / "a.ckpt", tmp_path / "a.safetensors", "safetensors", "ema", "mit")
    one, two = (load_model(tmp_path / name) for name in ("a.ckpt", "a.safetensors"))
    assert one.digest() == two.digest() and one.config.model == two.config.model
    with pytest.raises(ValueError, match="not for diffusers: a network with"):
        export_model(tmp_path / "a.ckpt", tmp_path / "b", "diffusers", "ema", "mit")
    invoke("sample.py a.ckpt --num-images 1 --timesteps 2 --output-dir c", tmp_path, monkeypatch)


def test_every_option_learns():
    options = ["model.num_heads=4", "model.scale_shift_norm=true", "model.variant=improved"]
    network = build_network(tiny(*options)).train()
    network(torch.randn(2, 1, 8, 8), torch.tensor([3, 9])).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    with pytest.raises(ValueError, match=r"model\.num_heads 3 does not divide 16 channels"):
        tiny("model.num_heads=3")
