"""The published diffusers folders in miniature: their configs, their networks, their files."""

import json
from pathlib import Path

import pytest
import torch
from helpers import wake

diffusers = pytest.importorskip("diffusers")

# The published config.json files, key for key
HUB_UNET = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu",
    "attention_head_dim": None, "center_input_sample": False, "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3,
    "time_embedding_type": "positional",
}  # fmt: skip
HUB_CIFAR = HUB_UNET | {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
HUB_256 = HUB_UNET | {
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
HUB_TINY = HUB_UNET | {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
HUB_SCHEDULER = {
    "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02,
    "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": True,
    "num_train_timesteps": 1000, "trained_betas": None, "variance_type": "fixed_large",
}  # fmt: skip


def their_net(config: dict, seed: int = 0):
    arguments = {key: value for key, value in config.items() if key[0] != "_"}
    return wake(diffusers.UNet2DModel(**arguments), seed).eval()


def save_hub(folder: Path, config: dict, state: dict, scheduler: dict = HUB_SCHEDULER) -> Path:
    """The layout of the published repositories: all at the root, weights as .bin."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    return folder


def same_eps(ours, theirs, times, our_label=None, their_label=None) -> None:
    x = torch.randn(1, *ours.shape, generator=torch.Generator().manual_seed(0))
    as_batch = lambda label: None if label is None else torch.tensor([label])
    for t in times:
        with torch.inference_mode():
            a = ours(x, torch.tensor([t]), as_batch(our_label))
            b = theirs(x, t, as_batch(their_label)).sample
        # of the scale of the output; each is some 2e-6 of it from the same network in float64
        assert (a - b).abs().max() < 1e-5 * b.abs().max(), (t, their_label)
