"""Write models: as checkpoints of ours, and for diffusers, safetensors and ONNX."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from config import Config
from files import atomic_write, differences
from weights.card import model_card
from weights.checkpoint import write_checkpoint
from weights.dialects import rename, to_diffusers
from weights.load import read_model
from weights.model import Model, load_model, model_of


def import_model(source: str | Path, out: Path, overrides: Iterable[str]) -> str:
    """Write a checkpoint of ours, without an optimizer, of a model of any dialect; summarise it."""
    if out.exists():
        raise ValueError(f"{out} exists; choose another name, or delete it")
    if out.suffix != ".ckpt":
        raise ValueError(f"{out}: a checkpoint's name ends in .ckpt")
    found = read_model(source, overrides)
    raw, ema = model_of(found, weights="raw"), model_of(found, weights="ema")
    checkpoint = {
        "hyper_parameters": found.config.model_dump(mode="json"),
        "state_dict": tensors_of(nn.ModuleDict({"unet": raw.network, "ema": ema.network})),
        "global_step": found.step,
    }
    write_checkpoint(checkpoint | ({"weights": found.only} if found.only else {}), out)
    return "\n".join([*(f"assumed: {n}" for n in found.notes), summary(ema), f"written: {out}"])


def export_model(
    source: str | Path, out: Path, format: str, weights: Literal["ema", "raw"], license: str
) -> str:
    """Write a model for other programs, read it back and compare; summarise it.

    Args:
        source: as `load_model` takes, and raises.
        out: a new path; for safetensors and onnx the file, or the folder of a model.FORMAT.
        format: diffusers, safetensors or onnx; ValueError where it cannot hold the model.
        license: of the weights, for diffusers' model card.
    """
    out, suffix = out.resolve(), f".{format}"
    if out.suffix in {".safetensors", ".onnx"} - {suffix}:
        raise ValueError(f"{out.name} is no name for --format {format}")
    if format != "diffusers" and out.suffix != suffix:
        out = out / f"model{suffix}"
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists; choose another name, or delete it")
    model = load_model(source, weights)
    model.config = shareable(model.config)
    note = ""
    with atomic_write(out, keep_suffix=True) as temporary:
        if format == "diffusers":
            write_diffusers(model, temporary, license)
        elif format == "safetensors":
            write_safetensors(model, temporary)
        else:
            note = f"{write_onnx(model, temporary)}\n"
        if out.is_dir():
            out.rmdir()
    return f"{note}{summary(model)}, {model.weights} weights\nwritten and read back: {out}"


def shareable(config: Config) -> Config:
    """Return the config without folders of this machine."""
    tree = config.model_dump()
    places = ("dataset.root", "dataset.cache", "logging.results_folder", "evaluation.extractor")
    for section, key in (place.split(".") for place in places):
        value = tree[section][key]
        if Path(value).is_absolute() or value.startswith(("..", "~")):
            del tree[section][key]
    return Config.model_validate(tree)


def summary(model: Model) -> str:
    """Return one line: parameters, images, process."""
    count = sum(parameter.numel() for parameter in model.parameters())
    process = model.config.diffusion
    classes = len(model.config.dataset.classes)
    labels = f"{classes} classes, " if classes else ""
    return (
        f"{count:,} parameters, images of {'x'.join(map(str, model.shape))}, {labels}"
        f"T = {process.timesteps}, {process.beta_schedule} schedule, predicts {process.prediction}"
    )


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights by name, contiguous."""
    return {name: value.contiguous() for name, value in network.state_dict().items()}


def check_same(model: Model, path: Path) -> None:
    """Raise ValueError where a file does not read back bit for bit."""
    found, ours = read_model(path), tensors_of(model.network)
    wrong = differences(model.config, found.config)
    wrong += list(found.ema.keys() ^ ours.keys())
    wrong = wrong or [k for k in ours if not torch.equal(found.ema[k].view_as(ours[k]), ours[k])]
    if wrong:
        raise ValueError(f"what was written reads back differently: {'; '.join(wrong[:5])}")


def write_safetensors(model: Model, path: Path) -> None:
    """Write one file with the config inside."""
    config = json.dumps(model.config.model_dump(mode="json"))
    told = {"format": "pt", "step": str(model.step), "weights": model.weights, "config": config}
    path.write_bytes(save(tensors_of(model.network), told))
    check_same(model, path)


def write_diffusers(model: Model, folder: Path, license: str) -> None:
    """Write a folder that diffusers' pipelines load; raise as `to_diffusers`."""
    unet, scheduler = to_diffusers(model.config)
    state, levels = {}, len(model.config.model.channel_multipliers)
    for name, value in tensors_of(model.network).items():
        if ".attn" in name and value.ndim == 4:  # 1x1 convolutions here, matrices there
            value = value[:, :, 0, 0].contiguous()
        state[rename(name, levels, to_ours=False)] = value
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": unet["_diffusers_version"]}
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    config = model.config.model_dump(mode="json")
    trees = {
        "unet/config.json": unet,
        "scheduler/scheduler_config.json": scheduler,
        "model_index.json": {**index, **parts},
        "ddpm.json": {"step": model.step, "weights": model.weights, "config": config},
    }
    for name, tree in trees.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(save(state, {"format": "pt"}))
    (folder / "README.md").write_text(model_card(model, license), encoding="utf-8")
    check_same(model, folder)


def write_onnx(model: Model, path: Path) -> str:
    """Write the network: (x [B, C, H, W] float32, t [B] int64) -> its output, for any B.

    One with labels takes them, too: [B, classes] float32, as `Network.embed` does.

    Returns how far onnxruntime's output is from ours; ValueError from 1e-4 of its scale on.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        hint = "pip install -r requirements-extras.txt"
        raise ValueError(f"--format onnx needs {error.name}: {hint}") from None
    x = torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, model.diffusion.timesteps - 1, 3).long()
    inputs = {"x": x, "t": t}
    if classes := len(model.config.dataset.classes):
        inputs["labels"] = torch.zeros(3, classes)
        inputs["labels"][0, 0] = inputs["labels"][2, -1] = 1  # and between them no label
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model.network,
        tuple(value[:2] for value in inputs.values()),
        path,
        input_names=[*inputs],
        output_names=[f"{model.config.diffusion.prediction}_hat"],
        dynamic_shapes={name: {0: batch} for name in inputs},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    errors = []
    for count in (1, 3):
        some = {name: value[:count] for name, value in inputs.items()}
        ours = model.network(**some)
        (other,) = session.run(None, {name: value.numpy() for name, value in some.items()})
        errors.append((ours - torch.from_numpy(other)).abs().max() / ours.abs().max())
    worst = float(torch.stack(errors).max())  # NaN, where one is
    told = f"onnxruntime differs by {worst:.1e} of the output's scale"
    if not worst < 1e-4:
        raise ValueError(told)
    return told
