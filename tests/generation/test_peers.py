"""The same noise through an independent implementation of the samplers: diffusers."""

import pytest
import torch
from helpers import process, steps_of

from generation import reverse

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("n", [1000, 50])
@pytest.mark.parametrize(
    ("sampler", "variance", "eta"),
    [
        ("ddpm", "large", 0.0),
        ("ddpm", "small", 0.0),
        ("ddpm", "learned", 0.0),
        ("ddim", "large", 0.0),
        ("ddim", "large", 1.0),
    ],
)
def test_the_same_chain(sampler, variance, eta, n):
    """To what their float32 tables allow (alpha_bar is off by up to 3e-5, relative)."""
    common = {"num_train_timesteps": 1000, "clip_sample": True, "timestep_spacing": "trailing"}
    if sampler == "ddpm":
        kind = "learned_range" if variance == "learned" else f"fixed_{variance}"
        scheduler = diffusers.DDPMScheduler(variance_type=kind, **common)
    else:
        scheduler = diffusers.DDIMScheduler(set_alpha_to_one=True, **common)
    scheduler.set_timesteps(n)
    d = process(learned=variance == "learned")
    steps = steps_of(d, sampler, variance=variance, eta=eta, n=n)
    assert scheduler.timesteps.tolist() == [step.t for step in steps]

    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(2, 3, 8, 8, generator=generator)
    weight, x_T = draw(), draw()
    eps_model = lambda x, t: torch.tanh(x + 0.3 * weight)
    v_model = lambda x: torch.sin(3 * x - weight)
    noise = {step.t: draw() for step in steps}

    def denoiser(x, t, with_v=False):
        x0_hat = d.predict_x_0(x, t, eps_model(x, t)).clamp(-1, 1)
        return (x0_hat, v_model(x)) if with_v else x0_hat

    *_, (_, ours, _) = reverse(denoiser, x_T, steps, lambda step: noise[step.t])

    theirs = x_T
    for t in scheduler.timesteps:
        eps = eps_model(theirs, t)
        if variance == "learned":
            eps = torch.cat([eps, v_model(theirs)], dim=1)
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
