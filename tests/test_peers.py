"""The same weights and the same noise in an independent implementation: diffusers."""

import re

import pytest
import torch
from test_model import CIFAR, HQ, wake

from diffusion_utils import GaussianDiffusion, make_steps, reverse
from model import UNet

diffusers = pytest.importorskip("diffusers")

RENAMED = [  # ours (the official code's) -> theirs, in order
    (r"^temb\.dense\.0", "time_embedding.linear_1"),
    (r"^temb\.dense\.1", "time_embedding.linear_2"),
    (r"^norm_out", "conv_norm_out"),
    (r"^mid\.block_1", "mid_block.resnets.0"),
    (r"^mid\.block_2", "mid_block.resnets.1"),
    (r"^mid\.attn_1", "mid_block.attentions.0"),
    (r"^(down|up)\.", r"\1_blocks."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"(attentions\.\d)\.norm", r"\1.group_norm"),
    (r"(attentions\.\d)\.([qkv])\.", r"\1.to_\2."),
    (r"proj_out", "to_out.0"),
    (r"temb_proj", "time_emb_proj"),
    (r"nin_shortcut", "conv_shortcut"),
]


def their_name(name: str, levels: int) -> str:
    name = re.sub(r"^up\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    for ours, theirs in RENAMED:
        name = re.sub(ours, theirs, name)
    return name


def their_net(kwargs: dict, net: UNet):
    """diffusers' network of the published configs, with our weights."""
    widths = [kwargs["base_channels"] * m for m in kwargs["channel_multipliers"]]
    attends = [
        kwargs["image_size"] // 2**i in kwargs["attention_resolutions"] for i in range(len(widths))
    ]
    theirs = diffusers.UNet2DModel(
        sample_size=kwargs["image_size"],
        block_out_channels=widths,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        layers_per_block=2,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    shapes = theirs.state_dict()
    state = {their_name(name, len(widths)): value for name, value in net.state_dict().items()}
    theirs.load_state_dict({name: value.view_as(shapes[name]) for name, value in state.items()})
    return theirs.eval()


@pytest.mark.parametrize(
    ("kwargs", "tensors"),
    [(CIFAR, 328), pytest.param(HQ, 450, marks=pytest.mark.slow)],
    ids=["cifar10", "256"],
)
def test_the_same_eps(kwargs, tensors):
    net = wake(UNet(**kwargs)).eval()
    theirs = their_net(kwargs, net)
    assert len(theirs.state_dict()) == tensors
    size = kwargs["image_size"]
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    for t in (0, 1, 10, 500, 999):
        with torch.inference_mode():
            ours, other = net(x, torch.tensor([t])), theirs(x, t).sample
        # of the scale of the output; each is some 2e-6 of it from the same network in float64
        assert (ours - other).abs().max() < 1e-5 * other.abs().max(), t


@pytest.mark.parametrize("n", [1000, 50])
@pytest.mark.parametrize(
    ("sampler", "variance", "eta"),
    [
        ("ddpm", "large", 0.0),
        ("ddpm", "small", 0.0),
        ("ddim", "large", 0.0),
        ("ddim", "large", 1.0),
    ],
)
def test_the_same_chain(sampler, variance, eta, n):
    """To what their float32 tables allow (alpha_bar is off by up to 3e-5, relative)."""
    common = {"num_train_timesteps": 1000, "clip_sample": True, "timestep_spacing": "trailing"}
    if sampler == "ddpm":
        scheduler = diffusers.DDPMScheduler(variance_type=f"fixed_{variance}", **common)
    else:
        scheduler = diffusers.DDIMScheduler(set_alpha_to_one=True, **common)
    scheduler.set_timesteps(n)
    d = GaussianDiffusion(timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    steps = make_steps(
        d, sampler=sampler, variance=variance, eta=eta, timesteps=n, spacing="trailing"
    )
    assert scheduler.timesteps.tolist() == [step.t for step in steps]

    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(2, 3, 8, 8, generator=generator)
    weight, x_T = draw(), draw()
    eps_model = lambda x, t: torch.tanh(x + 0.3 * weight)
    noise = {step.t: draw() for step in steps}
    *_, (_, ours, _) = reverse(d, eps_model, x_T, steps, lambda step: noise[step.t])

    theirs = x_T
    for t in scheduler.timesteps:
        eps = eps_model(theirs, t)
        if sampler == "ddim":
            options = {"eta": eta, "variance_noise": noise[int(t)] if eta else None}
            options["use_clipped_model_output"] = True  # one x_0 in the whole step, as ours
            theirs = scheduler.step(eps, t, theirs, **options).prev_sample
        else:  # it draws its own; hand it ours, and none in the step to the data, where it has some
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    "diffusers.schedulers.scheduling_ddpm.randn_tensor",
                    lambda *_, t=int(t), **__: noise[t] * (t != steps[-1].t),
                )
                theirs = scheduler.step(eps, t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)
    assert (ours - theirs).abs().mean() < 2e-4
