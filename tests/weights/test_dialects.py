"""Other codes' names, configs and layouts, and ours."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import CIFAR, HQ, invoke, steps_of, wake
from hub import (
    HUB_SCHEDULER,
    HUB_TINY,
    diffusers,
    same_eps,
    save_hub,
    their_net,
)
from official_keys import official_keys

from config import load_config
from diffusion_utils import GaussianDiffusion
from model import UNet, build_network
from weights import Model, copy_tensors, load_model
from weights.dialects import infer_tree, rename, to_diffusers, tree_of_diffusers
from weights.export import write_diffusers


@pytest.mark.parametrize(
    ("kwargs", "count"), [(CIFAR, 328), (HQ, 450), (CIFAR | {"classes": 10}, 329)]
)
def test_names_are_a_bijection(kwargs, count):
    with torch.device("meta"):
        names = list(UNet(**kwargs).state_dict())
    levels = len(kwargs["channel_multipliers"])
    theirs = [rename(name, levels, to_ours=False) for name in names]
    assert len({*theirs}) == len(names) == count
    assert [rename(name, levels, to_ours=True) for name in theirs] == names


def old_names(state: dict) -> dict:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    rename = lambda name: re.sub("to_q|to_k|to_v|to_out.0", lambda m: old[m[0]], name)
    return {rename(name): value for name, value in state.items()}


def four_dimensional(state: dict) -> dict:
    attention = lambda name: "attentions" in name and name.endswith("weight")
    return {k: v[:, :, None, None] if attention(k) and v.ndim == 2 else v for k, v in state.items()}


def test_every_layout_of_a_diffusers_folder(tmp_path):
    theirs = their_net(HUB_TINY)
    state = theirs.state_dict()
    folders = [save_hub(tmp_path / "new", HUB_TINY, state)]
    folders.append(save_hub(tmp_path / "old", HUB_TINY, old_names(state)))
    folders.append(save_hub(tmp_path / "4d", HUB_TINY, four_dimensional(old_names(state))))
    scheduler = diffusers.DDPMScheduler(**{k: v for k, v in HUB_SCHEDULER.items() if k[0] != "_"})
    pipeline = diffusers.DDPMPipeline(theirs, scheduler)
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.save_pretrained(tmp_path / "bin", safe_serialization=False)
    folders += [tmp_path / "pipeline", tmp_path / "bin", tmp_path / "pipeline" / "unet"]
    folders.append(tmp_path / "pipeline/unet/diffusion_pytorch_model.safetensors")
    reference = load_model(folders[0])
    same_eps(reference, theirs, [0, 500, 999])
    for folder in folders[1:]:
        ours = load_model(folder)
        assert ours.config == reference.config
        for name, value in reference.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), (folder, name)


def tensorflow_name(name: str) -> str:
    """Of an official PyTorch name, by the rules of the conversion that made it."""
    stem, leaf = name.rsplit(".", 1)
    norm = "norm" in stem.rsplit(".", 1)[-1]
    leaf = {"weight": "gamma" if norm else "W", "bias": "beta" if norm else "b"}[leaf]
    stem = re.sub(r"(down|up|block|attn)\.(\d)", r"\1_\2", stem)
    return f"model/{stem.replace('dense.', 'dense').replace('.', '/')}/{leaf}"


def test_official_weights_in_both_their_forms(tmp_path):
    """The paper's tensors; sizes from shapes, and the EMA apart where TensorFlow keeps it."""
    generator = torch.Generator().manual_seed(0)
    shapes = official_keys(ch=32, multipliers=[1, 2], attention_levels={1})
    official, arrays = {}, {}
    for name, shape in shapes.items():
        value = official[name] = torch.randn(shape, generator=generator)
        array = value.numpy()
        if re.search(r"\.(q|k|v|proj_out|nin_shortcut)\.weight", name):
            array = array[:, :, 0, 0].T
        elif array.ndim > 1:
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        arrays[tensorflow_name(name)] = array + 1
        arrays[f"{tensorflow_name(name)}/ExponentialMovingAverage"] = array
        arrays[f"{tensorflow_name(name)}/Adam"] = array * 0
    torch.save(official, tmp_path / "plain.ckpt")
    torch.save(official, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    parallel = {f"module.{name}": value for name, value in official.items()}
    torch.save([parallel, {"lr": 1.0}, 7, 8, official], tmp_path / "ddim.ckpt")
    torch.save({"state_dict": official}, tmp_path / "wrapped.pt")
    np.savez(tmp_path / "tensorflow.npz", **arrays, global_step=np.int64(5))
    names = ("plain.ckpt", "legacy.ckpt", "ddim.ckpt", "wrapped.pt", "tensorflow.npz")
    for file in names:
        model = load_model(tmp_path / file)
        assert model.config.dataset.image_size == 32
        assert model.config.model.channel_multipliers == [1, 2]
        assert model.config.model.attention_resolutions == [16]
        for name, value in official.items():
            assert torch.equal(model.network.state_dict()[name], value), (file, name)
    raw = load_model(tmp_path / file, "raw").network
    assert torch.allclose(raw.conv_in.weight, official["conv_in.weight"] + 1)


REFUSED = {
    "attention_head_dim": 8, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
    "norm_eps": 1e-5, "resnet_time_scale_shift": "scale_shift", "class_embed_type": "timestep",
    "num_class_embeds": 0, "center_input_sample": True, "time_embedding_type": "fourier",
    "mid_block_scale_factor": 2, "act_fn": "mish", "downsample_type": "resnet",
    "upsample_type": "resnet", "out_channels": 5, "norm_num_groups": 16, "add_attention": False,
    "sample_size": [8, 8, 8], "mid_block_type": None, "encoder_hid_dim": 3,
    "block_out_channels": [32, 48], "down_block_types": ["DownBlock2D", "SkipDownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"], "_class_name": "UNet2DConditionModel",
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [*REFUSED.items(), ("class_embed_type", "identity"), ("sample_size", None)],
)
def test_what_the_network_cannot_be_is_refused_by_name(key, value):
    with pytest.raises(ValueError) as error:
        tree_of_diffusers(HUB_TINY | {key: value}, HUB_SCHEDULER)
    message = str(error.value)
    assert f"unet.{key} is {json.dumps(value)}; " in message
    assert "needed: " in message
    assert len(message.splitlines()) == 2  # that one fault and no other


@pytest.mark.parametrize("key", ["attention_head_dim", "freq_shift", "norm_eps", "flip_sin_to_cos"])
def test_an_absent_key_means_their_default(key):
    config = {k: v for k, v in HUB_TINY.items() if k != key}
    with pytest.raises(ValueError, match=f"unet.{key} is absent, which diffusers reads as"):
        tree_of_diffusers(config, HUB_SCHEDULER)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "flow_prediction"),
        ("beta_schedule", "sigmoid"),
        ("variance_type", "learned_range"),
        ("variance_type", "learned"),
        ("rescale_betas_zero_snr", True),
        ("trained_betas", [0.1] * 1000),
        ("_class_name", "ScoreSdeVeScheduler"),
    ],
)
def test_other_processes_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"scheduler.{key} .*needed: "):
        tree_of_diffusers(HUB_TINY, HUB_SCHEDULER | {key: value})


@pytest.mark.parametrize(
    "schedule", ["linear", "quad", "const", "warmup10", "warmup50", "jsd", "cosine"]
)
def test_schedules_are_theirs_and_come_back(schedule):
    tree = load_config("configs/smoke.yml", [f"diffusion.beta_schedule={schedule}"])
    unet, scheduler = to_diffusers(tree)
    theirs = diffusers.DDPMScheduler.from_config(scheduler)
    ours = GaussianDiffusion(**tree.diffusion.model_dump())
    np.testing.assert_allclose(theirs.betas.numpy(), ours.betas, rtol=2e-4, atol=1e-9)
    back, notes = tree_of_diffusers(unet, json.loads(json.dumps(scheduler)))
    assert not notes
    assert back["diffusion"] == tree.diffusion.model_dump()
    assert back["model"] == tree.model.model_dump()


@pytest.mark.parametrize(
    ("prediction", "theirs"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")]
)
def test_predictions_are_theirs_and_come_back(prediction, theirs, tmp_path):
    """One DDIM step of diffusers, from the exported folder: x0_hat to 1e-5, and x_s."""
    config = load_config("configs/smoke.yml", [f"diffusion.prediction={prediction}"])
    network = wake(build_network(config)).eval()
    model = Model(network, config, weights="ema", step=3, notes=[])
    write_diffusers(model, tmp_path / "out", "mit")
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.prediction_type == theirs
    back = load_model(tmp_path / "out")
    assert back.config == config
    diffusion, T = back.diffusion, config.diffusion.timesteps
    pipeline.scheduler.set_timesteps(T)
    x_t = torch.randn(2, *back.shape, generator=torch.Generator().manual_seed(1)) / 4
    for t in (1, T // 2):
        with torch.no_grad():
            F = pipeline.unet(x_t, t).sample
            step = pipeline.scheduler.step(F, t, x_t, use_clipped_model_output=True)
            x0_hat = back.predict_x_0(x_t, t).clamp(-1, 1)
        torch.testing.assert_close(x0_hat, step.pred_original_sample, rtol=0, atol=1e-5)
        (row,) = (row for row in steps_of(diffusion, "ddim") if row.t == t)
        x_s = row.x[0] * x_t + row.x0[0] * x0_hat
        # their alpha_bar is float32, and 1 - alpha_bar small
        torch.testing.assert_close(x_s, step.prev_sample, rtol=0, atol=1e-4)


def test_tensors_are_copied_into_a_network_and_taken_by_one_without_numbers():
    config = load_config("configs/smoke.yml")
    source = wake(build_network(config)).state_dict()
    state = {k: v[:, :, 0, 0] if v.shape[2:] == (1, 1) else v for k, v in source.items()}
    for device, taken in (("cpu", False), ("meta", True)):
        network = build_network(config, device)
        copy_tensors(network, state, "here")
        for name, value in network.state_dict().items():
            assert torch.equal(value, source[name])
            assert taken or value.data_ptr() != source[name].data_ptr()
        before = network.conv_in.bias.clone()
        wrong = {**state, "conv_in.bias": torch.ones(3), "temb.dense.0.bias": 3, "more": before}
        del wrong["conv_out.bias"]
        with pytest.raises(ValueError, match="here: the weights do not fit") as error:
            copy_tensors(network, wrong, "here")
        assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
            "missing: conv_out.bias",
            "surplus: more",
            f"misshapen: temb.dense.0.bias is a int, not {list(network.temb.dense[0].bias.shape)}",
            f"misshapen: conv_in.bias is [3], not {list(before.shape)}",
        ]
        assert torch.equal(network.conv_in.bias, before)


def test_wrong_tensors_are_listed(tmp_path, monkeypatch):
    state = their_net(HUB_TINY).state_dict()
    state["conv_out.extra"] = torch.zeros(1)
    state["conv_in.weight"] = torch.zeros(32, 3, 5, 5)
    del state["mid_block.resnets.0.conv1.bias"]
    folder = save_hub(tmp_path / "hub", HUB_TINY, state)
    output = invoke(f"convert.py import '{folder}' out.ckpt", tmp_path, monkeypatch, 2)
    assert "missing: mid.block_1.conv1.bias" in output
    assert "surplus: conv_out.extra" in output
    assert "misshapen: conv_in.weight is [32, 3, 5, 5], not [32, 3, 3, 3]" in output
    assert not (tmp_path / "out.ckpt").exists()


@pytest.mark.parametrize(
    "override",
    [
        "model.attention_resolutions=[4,8]",
        "diffusion.beta_start=0.02 diffusion.beta_schedule=const",
    ],
)
def test_configs_that_can_be_said_in_two_ways(override, tmp_path):
    config = load_config("configs/smoke.yml", override.split())
    model = Model(build_network(config), config, weights="ema", step=0, notes=[])
    write_diffusers(model, tmp_path / "out", "mit")  # it reads back, and compares
    assert load_model(tmp_path / "out").config == config


def test_a_first_multiplier_of_2_shows_in_shapes_and_is_not_diffusers():
    config = load_config("configs/smoke.yml", ["model.channel_multipliers=[2,2]"])
    tree, _ = infer_tree(build_network(config).state_dict(), config.dataset.image_size)
    assert tree["model"] | {"dropout": config.model.dropout} == config.model.model_dump()
    with pytest.raises(ValueError, match=r"model.channel_multipliers is \[2, 2\]"):
        to_diffusers(config)
