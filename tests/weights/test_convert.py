"""Weights in and out: other codes' files become our models, ours become theirs, bit for bit."""

import errno
import json
import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import PROJECT, Evil, invoke, wake
from hub import (
    HUB_256,
    HUB_CIFAR,
    HUB_SCHEDULER,
    HUB_TINY,
    diffusers,
    same_eps,
    save_hub,
    their_net,
)
from PIL import Image
from safetensors.torch import save_file

from config import load_config
from files import differences
from generation import SeedNoise
from model import build_network
from weights import load_model, newest_checkpoint, read_checkpoint, write_checkpoint
from weights.export import shareable


def export(source: Path, folder: Path, monkeypatch, *options: str) -> str:
    return invoke(
        f"convert.py export '{source}' '{folder}' {' '.join(options)}", Path(), monkeypatch, 0
    )


@pytest.mark.parametrize(
    ("config", "yaml", "tensors", "times"),
    [
        (HUB_CIFAR, "configs/cifar10.yml", 328, [0, 10, 500, 999]),
        pytest.param(HUB_256, "configs/celeba.yml", 450, [10], marks=pytest.mark.slow),
    ],
    ids=["cifar10", "256"],
)
def test_the_published_models(config, yaml, tensors, times, tmp_path, monkeypatch):
    """Theirs -> ours: config and eps; and back: every tensor, bit for bit, under its name."""
    paper = load_config(yaml)
    theirs = their_net(config)
    state = theirs.state_dict()
    scheduler = HUB_SCHEDULER | {"variance_type": f"fixed_{paper.sampling.variance}"}
    ours = load_model(save_hub(tmp_path / "hub", config, state, scheduler))
    assert len(state) == len(ours.network.state_dict()) == tensors
    for section in ("model", "diffusion", "sampling"):
        found, wanted = getattr(ours.config, section), getattr(paper, section)
        if section == "model":  # the published configs have lost their dropout
            wanted = wanted.model_copy(update={"dropout": 0.0})
        assert found == wanted
    same_eps(ours, theirs, times)
    output = export(tmp_path / "hub", tmp_path / "back", monkeypatch)
    assert "written and read back" in output
    back = diffusers.DDPMPipeline.from_pretrained(tmp_path / "back").unet.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    folder = save_hub(tmp_path / "hub", HUB_TINY, {"conv_in.weight": Evil()})
    torch.save({"conv_in.weight": Evil()}, tmp_path / "evil.ckpt")
    np.savez(tmp_path / "evil.npz", x=np.array([Evil()], dtype=object))
    (tmp_path / "evil.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    for source in (folder, "evil.ckpt", "evil.npz", "evil.safetensors"):
        output = invoke(f"convert.py import '{source}' out.ckpt", tmp_path, monkeypatch, 2)
        assert "refused" in output or "damaged" in output
    assert not (tmp_path / "pwned").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of a tiny model whose EMA is not its raw weights."""
    config = load_config("configs/smoke.yml", ["diffusion.beta_schedule=jsd"])
    networks = {"unet": wake(build_network(config), 1), "ema": wake(build_network(config), 2)}
    path = tmp_path_factory.mktemp("small") / "small.ckpt"
    tree = config.model_dump(mode="json")
    state = torch.nn.ModuleDict(networks).state_dict()
    write_checkpoint({"hyper_parameters": tree, "state_dict": state, "global_step": 6}, path)
    return path


def test_a_run_is_read_once_and_what_the_system_says_passes(small, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step-00000006.ckpt", "last.ckpt"):
        os.link(small, folder / name)
    load, whole = torch.load, []
    count = lambda *a, **k: (whole.append(k) if not k.get("mmap") else None, load(*a, **k))[1]
    monkeypatch.setattr(torch, "load", count)
    assert load_model(tmp_path).step == 6 and len(whole) == 1
    path, checkpoint = newest_checkpoint(tmp_path)
    assert path.name == "step-00000006.ckpt" and checkpoint["global_step"] == 6
    for code, kind in ((errno.EIO, OSError), (errno.EACCES, PermissionError)):
        monkeypatch.setattr(torch, "load", Mock(side_effect=OSError(code, os.strerror(code))))
        with pytest.raises(kind) as error:
            read_checkpoint(small)
        assert error.value.filename == str(small)
    monkeypatch.setattr(torch, "load", Mock(side_effect=RuntimeError("use torch.load(...)")))
    with pytest.raises(ValueError, match=r"small.ckpt is damaged or not a checkpoint$"):
        read_checkpoint(small)


def test_what_was_written_before_the_sections_moved_loads(small, tmp_path, capsys):
    checkpoint = read_checkpoint(small)
    tree = checkpoint["hyper_parameters"]
    for section in ("hardware", "logging", "evaluation"):
        tree["training"] |= tree.pop(section)
    del tree["diffusion"]["prediction"]
    write_checkpoint(checkpoint, tmp_path / "old.ckpt")
    old = load_model(tmp_path / "old.ckpt")
    assert capsys.readouterr().err.count("\n") == 1
    assert old.config == load_model(small).config
    assert load_model(PROJECT / "pretrained/digits.safetensors").config.diffusion.prediction
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_import_of_export_is_the_same(small, weights, tmp_path, monkeypatch):
    before = load_model(small, weights)
    for format, out in (("diffusers", "folder"), ("safetensors", "one.safetensors")):
        options = ("--format", format, "--weights", weights)
        export(small, tmp_path / out, monkeypatch, *options)
        command = f"convert.py import '{tmp_path / out}' '{tmp_path / out}.ckpt'"
        invoke(command, Path(), monkeypatch, 0)
        for source in (tmp_path / out, tmp_path / f"{out}.ckpt"):
            after = load_model(source)
            assert after.config == before.config and after.step == 6
            for name, value in before.network.state_dict().items():
                assert torch.equal(after.network.state_dict()[name], value)
        invoke(command, Path(), monkeypatch, 2)  # nothing is overwritten
    card = (tmp_path / "folder" / "README.md").read_text()
    header = card.split("---")[1]
    assert "license: unknown" in header and "library_name: diffusers" in header
    assert "after 6 training steps" in card
    assert diffusers.DDIMPipeline.from_pretrained(tmp_path / "folder")


def test_the_folders_of_this_machine_are_not_shared():
    private = ["dataset.root=/home/me/private", "evaluation.extractor=../mine.pt"]
    config = load_config("configs/smoke.yml", [*private, "dataset.cache=c"])
    shared = shareable(config)
    assert shared.evaluation.extractor == "inception-v3-compat"
    assert (shared.dataset.root, shared.dataset.cache) == ("data", "c")
    changed = [line.partition(":")[0] for line in differences(config, shared)]
    assert changed == ["dataset.root", "evaluation.extractor"]


def test_what_differs_only_in_its_process_is_another_recipe(small, tmp_path, monkeypatch):
    command = f"convert.py import '{small}' other.ckpt diffusion.beta_schedule=linear"
    invoke(command, tmp_path, monkeypatch, 0)
    options = "--num-images 1 --timesteps 2 --output-dir o"
    invoke(f"sample.py '{small}' {options}", tmp_path, monkeypatch, 0)
    assert "another recipe" in invoke(f"sample.py other.ckpt {options}", tmp_path, monkeypatch, 2)


def test_raw_weights_stay_raw(small, tmp_path, monkeypatch):
    for out, format in (("raw", "diffusers"), ("raw.safetensors", "safetensors")):
        export(small, tmp_path / out, monkeypatch, "--weights", "raw", "--format", format)
        assert load_model(tmp_path / out).weights == "raw"
    invoke("convert.py import raw.safetensors raw.ckpt", tmp_path, monkeypatch, 0)
    assert load_model("raw.ckpt").weights == "raw"
    with pytest.raises(ValueError, match="EMA alone"):
        load_model(PROJECT / "pretrained/digits.safetensors", "raw")


def test_an_edited_scheduler_is_obeyed(small, tmp_path, monkeypatch):
    export(small, tmp_path / "out", monkeypatch)
    path = tmp_path / "out/scheduler/scheduler_config.json"
    edits = {"beta_end": 0.03, "variance_type": "fixed_small", "beta_schedule": "linear"}
    path.write_text(json.dumps(json.loads(path.read_text()) | edits | {"trained_betas": None}))
    config = load_model(tmp_path / "out").config
    assert (config.diffusion.beta_schedule, config.diffusion.beta_end) == ("linear", 0.03)
    assert config.sampling.variance == "small"


def test_odd_files_are_one_message(tmp_path, monkeypatch):
    torch.save({0: torch.zeros(1), "x": 3}, tmp_path / "keys.ckpt")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors", {"config": "{}"})
    torch.save({"model/conv_in/W": 3, "model/conv_in/b": torch.zeros(1)}, tmp_path / "number.pt")
    empty = save_hub(tmp_path / "empty", HUB_TINY | {"block_out_channels": []}, {})
    assert "error: " in invoke(f"sample.py '{empty}'", tmp_path, monkeypatch, 2)
    for name in ("keys.ckpt", "foreign.safetensors", "number.pt"):
        output = invoke(f"sample.py {name}", tmp_path, monkeypatch, 2)
        assert "not the weights of a DDPM network" in output


def test_onnx_is_the_network(small, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export(small, tmp_path, monkeypatch, "--format", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    model = load_model(small)
    x, t = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 9])
    (eps,) = session.run(None, {"x": x.numpy(), "t": t.numpy()})
    torch.testing.assert_close(torch.from_numpy(eps), model(x, t), rtol=0, atol=1e-5)


def test_a_pipeline_draws_our_image(tmp_path, monkeypatch):
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
    options = "--num-images 1 --seed 7 --timesteps 8 --spacing uniform --output-dir images"
    options += " --precision float32"
    invoke(f"sample.py '{tmp_path}/out' {options}", tmp_path, monkeypatch, 0)
    ours = np.asarray(Image.open(tmp_path / "images" / "000007.png"))
    assert ours.std() > 20
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_fine_tuning_starts_from_the_ema_at_step_0(small, tmp_path, monkeypatch):
    export(small, tmp_path / "folder", monkeypatch)
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    command = "train.py configs/smoke.yml training.max_steps=1 training.learning_rate=1e-30"
    command += " training.warmup_steps=0 --checkpoint-path folder --run-name tuned"
    output = invoke(command, tmp_path, monkeypatch, 0)
    assert "weights from folder, after 6 steps; a fresh optimizer, step 0" in output
    assert 'diffusion.beta_schedule: "jsd" -> "linear"' in output
    checkpoint = read_checkpoint(tmp_path / "lightning_logs/tuned/checkpoints/last.ckpt")
    assert checkpoint["global_step"] == 1
    for name, value in load_model(small).network.state_dict().items():
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
    command = f"convert.py export '{small}' out.onnx --format onnx"
    assert "error: RuntimeError: no such operator" in invoke(command, tmp_path, monkeypatch, 1)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_one_message(small, tmp_path, monkeypatch):
    cases = {
        "import nowhere.ckpt out.ckpt": "no checkpoint at nowhere.ckpt",
        f"import '{small}' out.bin": "ends in .ckpt",
        f"import '{small}' out.ckpt model.depth=3": "model.depth: no such key",
        f"export '{small}' '{small.parent}'": "exists",
        f"export '{small.parent}' out": "holds no checkpoint",
    }
    for arguments, message in cases.items():
        assert message in invoke(f"convert.py {arguments}", tmp_path, monkeypatch, 2), arguments
    assert [p.name for p in tmp_path.iterdir()] == []


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
    model = load_model(folder)
    size = model.config.dataset.image_size
    torch.manual_seed(0)
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        eps = model(x, torch.tensor([10]))[0, 0, 0]
    expected = torch.tensor(PUBLISHED[name])
    torch.testing.assert_close(eps[: len(expected)], expected, rtol=0, atol=1e-3)
