"""Weights in and out: other codes' files become our models, ours become theirs, bit for bit."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from official_keys import official_keys
from PIL import Image
from safetensors.torch import save_file
from test_commands import invoke
from test_model import CIFAR, HQ, wake
from test_training import Evil

from checkpoint import read_checkpoint, write_checkpoint
from config import differences, load_config
from convert import shareable, write_diffusers
from dialects import DIFFUSERS, OURS, rename, to_diffusers, tree_of_diffusers
from model import UNet
from pl_utils import DDPM, SeedNoise, load_ddpm

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


def same_eps(ours, theirs, size: int, times) -> None:
    x = torch.randn(1, ours.unet.channels, size, size, generator=torch.Generator().manual_seed(0))
    for t in times:
        with torch.inference_mode():
            a, b = ours(x, torch.tensor([t])), theirs(x, t).sample
        # of the scale of the output; each is some 2e-6 of it from the same network in float64
        assert (a - b).abs().max() < 1e-5 * b.abs().max(), t


def export(source: Path, folder: Path, monkeypatch, *options: str) -> str:
    return invoke(
        f"convert.py export {source} {folder} {' '.join(options)}", Path(), monkeypatch, 0
    )


@pytest.mark.parametrize(
    ("config", "yaml", "tensors", "times"),
    [
        (HUB_CIFAR, "configs/cifar10.yml", 328, [0, 10, 500, 999]),
        (HUB_256, "configs/celeba.yml", 450, [10]),
    ],
    ids=["cifar10", "256"],
)
def test_the_published_models(config, yaml, tensors, times, tmp_path, monkeypatch):
    """Theirs -> ours: config and eps; and back: every tensor, bit for bit, under its name."""
    paper = load_config(yaml)
    theirs = their_net(config)
    state = theirs.state_dict()
    scheduler = HUB_SCHEDULER | {"variance_type": f"fixed_{paper.sampling.variance}"}
    ours = load_ddpm(save_hub(tmp_path / "hub", config, state, scheduler))
    assert len(state) == len(ours.ema.state_dict()) == tensors
    for section in ("model", "diffusion", "sampling"):
        found, wanted = getattr(ours.config, section), getattr(paper, section)
        if section == "model":  # the published configs have lost their dropout
            wanted = wanted.model_copy(update={"dropout": 0.0})
        assert found == wanted
    same_eps(ours, theirs, config["sample_size"], times)
    output = export(tmp_path / "hub", tmp_path / "back", monkeypatch)
    assert "written and read back" in output
    back = diffusers.DDPMPipeline.from_pretrained(tmp_path / "back").unet.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(("kwargs", "count"), [(CIFAR, 328), (HQ, 450)])
def test_names_are_a_bijection(kwargs, count):
    with torch.device("meta"):
        names = list(UNet(**kwargs).state_dict())
    levels = len(kwargs["channel_multipliers"])
    theirs = [rename(name, levels, dialect=OURS, to=DIFFUSERS) for name in names]
    assert len({*theirs}) == len(names) == count
    assert [rename(name, levels, dialect=DIFFUSERS, to=OURS) for name in theirs] == names


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
    reference = load_ddpm(folders[0])
    same_eps(reference, theirs, 8, [0, 500, 999])
    for folder in folders[1:]:
        ours = load_ddpm(folder)
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
    """The paper's tensors; sizes from shapes, and the average apart where TensorFlow keeps it."""
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
        ddpm = load_ddpm(tmp_path / file)
        assert ddpm.config.dataset.image_size == 32
        assert ddpm.config.model.channel_multipliers == [1, 2]
        assert ddpm.config.model.attention_resolutions == [16]
        for name, value in official.items():
            assert torch.equal(ddpm.ema.state_dict()[name], value), (file, name)
    assert torch.allclose(ddpm.unet.conv_in.weight, official["conv_in.weight"] + 1)


REFUSED = {
    "attention_head_dim": 8, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
    "norm_eps": 1e-5, "resnet_time_scale_shift": "scale_shift", "class_embed_type": "timestep",
    "num_class_embeds": 10, "center_input_sample": True, "time_embedding_type": "fourier",
    "mid_block_scale_factor": 2, "act_fn": "mish", "downsample_type": "resnet",
    "upsample_type": "resnet", "out_channels": 6, "norm_num_groups": 16, "add_attention": False,
    "sample_size": None, "mid_block_type": None, "encoder_hid_dim": 3,
    "block_out_channels": [32, 48], "down_block_types": ["DownBlock2D", "SkipDownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"], "_class_name": "UNet2DConditionModel",
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_the_network_cannot_be_is_refused_by_name(key):
    with pytest.raises(ValueError) as error:
        tree_of_diffusers(HUB_TINY | {key: REFUSED[key]}, HUB_SCHEDULER)
    message = str(error.value)
    assert f"unet.{key} is {REFUSED[key] if REFUSED[key] != [] else ''}"[:12] in message
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
        ("prediction_type", "v_prediction"),
        ("beta_schedule", "sigmoid"),
        ("variance_type", "learned_range"),
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
    from diffusion_utils import GaussianDiffusion

    ours = GaussianDiffusion(**tree.diffusion.model_dump())
    np.testing.assert_allclose(theirs.betas.numpy(), ours.betas, rtol=2e-4, atol=1e-9)
    back, notes = tree_of_diffusers(unet, json.loads(json.dumps(scheduler)))
    assert not notes
    assert back["diffusion"] == tree.diffusion.model_dump()
    assert back["model"] == tree.model.model_dump()


def test_wrong_tensors_are_listed(tmp_path, monkeypatch):
    state = their_net(HUB_TINY).state_dict()
    state["conv_out.extra"] = torch.zeros(1)
    state["conv_in.weight"] = torch.zeros(32, 3, 5, 5)
    del state["mid_block.resnets.0.conv1.bias"]
    folder = save_hub(tmp_path / "hub", HUB_TINY, state)
    output = invoke(f"convert.py import {folder} out.ckpt", tmp_path, monkeypatch, 2)
    assert "missing: mid.block_1.conv1.bias" in output
    assert "surplus: conv_out.extra" in output
    assert "misshapen: conv_in.weight is [32, 3, 5, 5], not [32, 3, 3, 3]" in output
    assert not (tmp_path / "out.ckpt").exists()


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    folder = save_hub(tmp_path / "hub", HUB_TINY, {"conv_in.weight": Evil()})
    torch.save({"conv_in.weight": Evil()}, tmp_path / "evil.ckpt")
    np.savez(tmp_path / "evil.npz", x=np.array([Evil()], dtype=object))
    (tmp_path / "evil.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    for source in (folder, "evil.ckpt", "evil.npz", "evil.safetensors"):
        output = invoke(f"convert.py import {source} out.ckpt", tmp_path, monkeypatch, 2)
        assert "refused" in output or "damaged" in output
    assert not (tmp_path / "pwned").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of a tiny model whose average is not its raw weights."""
    torch.manual_seed(0)
    ddpm = DDPM(load_config("configs/smoke.yml", ["diffusion.beta_schedule=jsd"]))
    wake(ddpm.unet, 1), wake(ddpm.ema, 2)
    path = tmp_path_factory.mktemp("small") / "small.ckpt"
    tree = ddpm.config.model_dump(mode="json")
    state = ddpm.state_dict()
    write_checkpoint({"hyper_parameters": tree, "state_dict": state, "global_step": 6}, path)
    return path


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_import_of_export_is_the_same(small, weights, tmp_path, monkeypatch):
    before = load_ddpm(small, weights)
    net = before.ema if weights == "ema" else before.unet
    for format, out in (("diffusers", "folder"), ("safetensors", "one.safetensors")):
        options = ("--format", format, "--weights", weights)
        export(small, tmp_path / out, monkeypatch, *options)
        command = f"convert.py import {tmp_path / out} {tmp_path / out}.ckpt"
        invoke(command, Path(), monkeypatch, 0)
        for source in (tmp_path / out, tmp_path / f"{out}.ckpt"):
            after = load_ddpm(source)
            assert after.config == before.config and after.trained_steps == 6
            for name, value in net.state_dict().items():
                assert torch.equal(after.ema.state_dict()[name], value)
        invoke(command, Path(), monkeypatch, 2)  # nothing is overwritten
    card = (tmp_path / "folder" / "README.md").read_text()
    header = card.split("---")[1]
    assert "license: unknown" in header and "library_name: diffusers" in header
    assert "after 6 training steps" in card
    assert diffusers.DDIMPipeline.from_pretrained(tmp_path / "folder")


def test_the_folders_of_this_machine_are_not_shared():
    private = ["dataset.root=/home/me/private", "training.extractor=../mine.pt"]
    config = load_config("configs/smoke.yml", [*private, "dataset.cache=c"])
    shared = shareable(config)
    assert shared.training.extractor == "inception-v3-compat"
    assert (shared.dataset.root, shared.dataset.cache) == ("data", "c")
    assert not differences(config, shared, ignore={"dataset.root", "training.extractor"})


def test_what_differs_only_in_its_process_is_another_recipe(small, tmp_path, monkeypatch):
    command = f"convert.py import {small} other.ckpt diffusion.beta_schedule=linear"
    invoke(command, tmp_path, monkeypatch, 0)
    options = "--num-images 1 --timesteps 2 --output-dir o"
    invoke(f"sample.py {small} {options}", tmp_path, monkeypatch, 0)
    assert "another recipe" in invoke(f"sample.py other.ckpt {options}", tmp_path, monkeypatch, 2)


def test_raw_weights_stay_raw(small, tmp_path, monkeypatch):
    for out, format in (("raw", "diffusers"), ("raw.safetensors", "safetensors")):
        export(small, tmp_path / out, monkeypatch, "--weights", "raw", "--format", format)
        assert load_ddpm(tmp_path / out).weights == "raw"
    invoke("convert.py import raw.safetensors raw.ckpt", tmp_path, monkeypatch, 0)
    assert load_ddpm("raw.ckpt").weights == "raw"
    with pytest.raises(ValueError, match="averaged weights alone"):
        load_ddpm(Path(__file__).parent.parent / "pretrained/digits.safetensors", "raw")


def test_an_edited_scheduler_is_obeyed(small, tmp_path, monkeypatch):
    export(small, tmp_path / "out", monkeypatch)
    path = tmp_path / "out/scheduler/scheduler_config.json"
    edits = {"beta_end": 0.03, "variance_type": "fixed_small", "beta_schedule": "linear"}
    path.write_text(json.dumps(json.loads(path.read_text()) | edits | {"trained_betas": None}))
    config = load_ddpm(tmp_path / "out").config
    assert (config.diffusion.beta_schedule, config.diffusion.beta_end) == ("linear", 0.03)
    assert config.sampling.variance == "small"


@pytest.mark.parametrize(
    "override",
    [
        "model.attention_resolutions=[4,8]",
        "diffusion.beta_start=0.02 diffusion.beta_schedule=const",
    ],
)
def test_configs_that_can_be_said_in_two_ways(override, tmp_path):
    ddpm = DDPM(load_config("configs/smoke.yml", override.split()))
    write_diffusers(ddpm, tmp_path / "out", "mit")  # it reads back, and compares
    assert load_ddpm(tmp_path / "out").config == ddpm.config


def test_odd_files_are_one_message(tmp_path, monkeypatch):
    torch.save({0: torch.zeros(1), "x": 3}, tmp_path / "keys.ckpt")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors", {"config": "{}"})
    torch.save({"model/conv_in/W": 3, "model/conv_in/b": torch.zeros(1)}, tmp_path / "number.pt")
    empty = save_hub(tmp_path / "empty", HUB_TINY | {"block_out_channels": []}, {})
    assert "error: " in invoke(f"sample.py {empty}", tmp_path, monkeypatch, 2)
    for name in ("keys.ckpt", "foreign.safetensors", "number.pt"):
        output = invoke(f"sample.py {name}", tmp_path, monkeypatch, 2)
        assert "not the weights of a DDPM network" in output


def test_onnx_is_the_network(small, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export(small, tmp_path, monkeypatch, "--format", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    ddpm = load_ddpm(small)
    x, t = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 9])
    (eps,) = session.run(None, {"x": x.numpy(), "t": t.numpy()})
    torch.testing.assert_close(torch.from_numpy(eps), ddpm(x, t), rtol=0, atol=1e-5)


def test_a_pipeline_draws_our_picture(tmp_path, monkeypatch):
    """The CIFAR-10 model: `DDPMPipeline` of the export and sample.py, from the same noise."""
    state = their_net(HUB_CIFAR).state_dict()
    state["conv_out.weight"] *= 0.3  # so that not every pixel ends clipped
    folder = save_hub(tmp_path / "hub", HUB_CIFAR, state)
    export(folder, tmp_path / "out", monkeypatch)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    # no noise in its last step only where that is t = 0
    pipeline.scheduler = diffusers.DDPMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="leading"
    )
    noise = SeedNoise([7], (3, 32, 32), torch.device("cpu"))
    for module in ("pipelines.ddpm.pipeline_ddpm", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *_, **__: noise())
    pipeline.set_progress_bar_config(disable=True)
    theirs = np.asarray(pipeline(num_inference_steps=8).images[0])
    options = "--num-images 1 --seed 7 --timesteps 8 --spacing uniform --output-dir pictures"
    invoke(f"sample.py {tmp_path / 'out'} {options}", tmp_path, monkeypatch, 0)
    ours = np.asarray(Image.open(tmp_path / "pictures" / "000007.png"))
    assert ours.std() > 20
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_fine_tuning_starts_from_the_average_at_step_0(small, tmp_path, monkeypatch):
    export(small, tmp_path / "folder", monkeypatch)
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    command = "train.py configs/smoke.yml training.max_steps=1 training.learning_rate=1e-30"
    command += " training.warmup_steps=0 --checkpoint-path folder --run-name tuned"
    output = invoke(command, tmp_path, monkeypatch, 0)
    assert "weights from folder, after 6 steps; a fresh optimizer, step 0" in output
    assert 'diffusion.beta_schedule: "jsd" -> "linear"' in output
    checkpoint = read_checkpoint(tmp_path / "lightning_logs/tuned/checkpoints/last.ckpt")
    assert checkpoint["global_step"] == 1
    for name, value in load_ddpm(small).ema.state_dict().items():
        torch.testing.assert_close(checkpoint["state_dict"][f"unet.{name}"], value)
    again = invoke(command, tmp_path, monkeypatch, 2)
    assert "holds a run" in again
    again = invoke(f"{command} --continue-training", tmp_path, monkeypatch, 0)  # as a restart does
    assert "has all 1 steps" in again


def test_a_failing_exporter_leaves_one_message_and_no_file(small, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    def broken(*_, **__):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", broken)
    command = f"convert.py export {small} out.onnx --format onnx"
    assert "error: RuntimeError: no such operator" in invoke(command, tmp_path, monkeypatch, 1)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_one_message(small, tmp_path, monkeypatch):
    cases = {
        "import nowhere.ckpt out.ckpt": "no checkpoint at nowhere.ckpt",
        f"import {small} out.bin": "ends in .ckpt",
        f"import {small} out.ckpt model.depth=3": "model.depth: no such key",
        f"export {small} {small.parent}": "exists",
        f"export {small.parent} out": "holds no checkpoint",
    }
    for arguments, message in cases.items():
        assert message in invoke(f"convert.py {arguments}", tmp_path, monkeypatch, 2), arguments
    assert [p.name for p in tmp_path.iterdir()] == []


def test_a_first_multiplier_of_2_is_not_diffusers():
    config = load_config("configs/smoke.yml", ["model.channel_multipliers=[2,2]"])
    with pytest.raises(ValueError, match=r"model.channel_multipliers is \[2, 2\]"):
        to_diffusers(config)


# first values of eps, channel 0, row 0, of seed 0's noise at t = 10
PUBLISHED = {
    "ddpm-cifar10-32": [
        -0.7515, -1.6883, 0.2420, 0.0300, 0.6347, 1.3433, -1.1743, -3.7467, 1.2342, -2.2485,
        0.4636, 0.8076, -0.7991, 0.3969, 0.8498, 0.9189, -1.8887, -3.3522, 0.7639, 0.2040,
        0.6271, -2.7148, -1.6316, 3.0839, 0.3186, 0.2721, -0.9759, -1.2461, 2.6257, 1.3557,
    ],
    "ddpm-celebahq-256": [-1.3690, -1.9720, -0.4090, -0.6966, 1.4660, 0.9938, -0.1385, -2.7324],
    "ddpm-ema-celebahq-256": [-1.3525, -1.9628, -0.3956, -0.6860, 1.4664, 1.0014, -0.1259, -2.7212],
    "ddpm-church-256": [-2.0585, -2.7897, -0.2850, -0.8940, 1.9052, 0.5702, 0.6345, -3.8959],
    "ddpm-ema-church-256": [-2.0628, -2.7667, -0.2089, -0.8263, 2.0539, 0.5992, 0.6495, -3.8336],
    "ddpm-bedroom-256": [-2.3139, -2.5594, -0.0197, -0.6785, 1.7001, 1.1606, 0.3075, -2.1740],
    "ddpm-ema-bedroom-256": [-2.3639, -2.5344, 0.0054, -0.6674, 1.5990, 1.0158, 0.3124, -2.1436],
    "ddpm-cat-256": [-1.4572, -2.0481, -0.0414, -0.6005, 1.4136, 0.5848, 0.4028, -2.7330],
    "ddpm-ema-cat-256": [-1.4574, -2.0569, -0.0473, -0.6117, 1.4018, 0.5769, 0.4129, -2.7344],
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_real_weights(name):
    """DDPM_WEIGHTS is a folder of clones of google/ddpm-... from the Hub."""
    folder = Path(os.environ.get("DDPM_WEIGHTS", "")) / name
    if "DDPM_WEIGHTS" not in os.environ or not folder.is_dir():
        pytest.skip(f"DDPM_WEIGHTS does not name a folder with {name}, which has to be downloaded")
    ddpm = load_ddpm(folder)
    size = ddpm.config.dataset.image_size
    torch.manual_seed(0)
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        eps = ddpm(x, torch.tensor([10]))[0, 0, 0]
    expected = torch.tensor(PUBLISHED[name])
    torch.testing.assert_close(eps[: len(expected)], expected, rtol=0, atol=1e-3)
