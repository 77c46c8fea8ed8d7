#!/usr/bin/env python3
"""Take in weights of other DDPM codes, and give ours to them."""

if __name__ == "__main__":
    import terminal

    terminal.guard()  # before a package that may be missing is imported

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from config import Config, differences, keys_like, to_yaml
from files import atomic_write
from terminal import fail, plain_console

HELP = """
Take in weights of other DDPM codes, and give ours to them.

Examples:

\b
  python convert.py import google/ddpm-cifar10-32 cifar10.ckpt
  python convert.py import ema_cifar10.ckpt cifar10.ckpt dataset.name=cifar10
  python convert.py export lightning_logs/digits digits-diffusers
  python convert.py export lightning_logs/digits digits.safetensors --format safetensors
"""

IMPORT = """
Write a checkpoint of ours from SOURCE.

SOURCE is a diffusers folder or its id on the Hub, official weights (a PyTorch state dict, a
TensorFlow checkpoint, or .npz arrays under its names), or a safetensors file. Sizes, schedule and
variance come from the files; SECTION.KEY=VALUE wins over them. The checkpoint holds weights alone:
sample from it, measure it, or fine-tune it with train.py --checkpoint-path.
"""

EXPORT = """
Write a model for other programs.

diffusers: a folder with a model card that DDPMPipeline and DDIMPipeline load. safetensors: one
file with the config inside, that sample.py takes. onnx: the network, (x, t) -> eps, for any number
of pictures. Each is read back and compared before it is given its name.
"""

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, help=HELP)
console = plain_console()


@app.command("import", help=IMPORT)
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Files or an id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.ckpt", help="The checkpoint to write.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SECTION.KEY=VALUE",
            help="Values that win over the files'.",
            autocompletion=keys_like,
        ),
    ] = None,
):
    guarded(take_in, source, out, overrides or [])


@app.command(help=EXPORT)
def export(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="As sample.py takes.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder; or a new file.")],
    format: Annotated[
        Literal["diffusers", "safetensors", "onnx"], typer.Option(help="What to write.")
    ] = "diffusers",
    weights: Annotated[
        Literal["ema", "raw"], typer.Option(help="The average, or the last training weights.")
    ] = "ema",
    license: Annotated[
        str, typer.Option(help="For the model card: mit, cc-by-4.0, ...")
    ] = "unknown",
):
    guarded(give_out, checkpoint, out, format, weights, license)


def guarded(work: Callable, *arguments) -> None:
    try:
        work(*arguments)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:  # an exporter can raise anything
        raise typer.Exit(fail(error)) from None


def take_in(source: str, out: Path, overrides: list[str]) -> None:
    if out.exists():
        raise ValueError(f"{out} exists; choose another name, or delete it")
    if out.suffix != ".ckpt":
        raise ValueError(f"{out}: a checkpoint's name ends in .ckpt")
    from checkpoint import write_checkpoint
    from pl_utils import DDPM
    from weights import read_source

    found = read_source(source, overrides)
    ddpm = DDPM(found.config)
    ddpm.take(found)
    checkpoint = {
        "hyper_parameters": found.config.model_dump(mode="json"),
        "state_dict": ddpm.state_dict(),
        "global_step": found.step,
    }
    if found.only:
        checkpoint["weights"] = found.only
    write_checkpoint(checkpoint, out)
    for note in found.notes:
        console.print(f"assumed: {note}")
    console.print(f"{summary(ddpm)}\nwritten: {out}\nto sample: python sample.py {out}")


def give_out(checkpoint: str, out: Path, format: str, weights: str, license: str) -> None:
    from pl_utils import load_ddpm

    out, suffix = out.resolve(), f".{format}"
    if out.suffix in {".safetensors", ".onnx"} - {suffix}:
        raise ValueError(f"{out.name} is no name for --format {format}")
    if format != "diffusers" and out.suffix != suffix:
        out = out / f"model{suffix}"
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists; choose another name, or delete it")
    ddpm = load_ddpm(checkpoint, weights)
    ddpm.config = shareable(ddpm.config)
    write = {"diffusers": write_diffusers, "safetensors": write_safetensors, "onnx": write_onnx}
    with atomic_write(out, keep_suffix=True) as temporary:
        write[format](ddpm, temporary, license)
        if out.is_dir():
            out.rmdir()
    console.print(f"{summary(ddpm)}, {ddpm.weights} weights\nwritten and read back: {out}")


def shareable(config: Config) -> Config:
    """Without the folders of this machine."""
    tree = config.model_dump()
    keys = ("dataset", "root"), ("dataset", "cache"), ("training", "results_folder")
    for section, key in (*keys, ("training", "extractor")):
        if Path(tree[section][key]).is_absolute() or tree[section][key].startswith(("..", "~")):
            tree[section][key] = Config.model_fields[section].annotation.model_fields[key].default
    return Config.model_validate(tree)


def summary(ddpm) -> str:
    config = ddpm.config
    count = sum(p.numel() for p in ddpm.unet.parameters())
    size = config.dataset.image_size
    return (
        f"{count:,} parameters, pictures of {config.dataset.channels}x{size}x{size}, "
        f"T = {config.diffusion.timesteps}, {config.diffusion.beta_schedule} schedule"
    )


def tensors(ddpm) -> dict:
    """Those that sample, in the order of their names' layers, contiguous."""
    return {name: value.contiguous() for name, value in ddpm.net.state_dict().items()}


def check_same(ddpm, path: Path) -> None:
    """ValueError where the file does not read back bit for bit."""
    import torch

    from weights import read_source

    found, ours = read_source(path), tensors(ddpm)
    wrong = differences(ddpm.config, found.config)
    wrong += list(found.ema.keys() ^ ours.keys())
    wrong = wrong or [k for k in ours if not torch.equal(found.ema[k].view_as(ours[k]), ours[k])]
    if wrong:
        raise ValueError(f"what was written reads back otherwise: {'; '.join(wrong[:5])}")


def write_safetensors(ddpm, path: Path, _: str) -> None:
    from safetensors.torch import save

    metadata = {"format": "pt", "weights": ddpm.weights, "step": str(ddpm.trained_steps)}
    metadata["config"] = json.dumps(ddpm.config.model_dump(mode="json"))
    path.write_bytes(save(tensors(ddpm), metadata))
    check_same(ddpm, path)


def write_diffusers(ddpm, folder: Path, license: str) -> None:
    from safetensors.torch import save

    from dialects import DIFFUSERS, OURS, rename, to_diffusers

    config = ddpm.config
    unet, scheduler = to_diffusers(config)
    levels = len(config.model.channel_multipliers)
    state = {}
    for name, value in tensors(ddpm).items():
        attention = ".attn" in name and value.ndim == 4  # 1x1 convolutions here, matrices there
        value = value[:, :, 0, 0].contiguous() if attention else value
        state[rename(name, levels, dialect=OURS, to=DIFFUSERS)] = value
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(save(state, {"format": "pt"}))
    ours = {"step": ddpm.trained_steps, "weights": ddpm.weights}
    ours["config"] = config.model_dump(mode="json")
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": unet["_diffusers_version"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    trees = {
        "unet/config.json": unet,
        "scheduler/scheduler_config.json": scheduler,
        "model_index.json": index,
        "ddpm.json": ours,
    }
    for name, tree in trees.items():
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    card = model_card(config, ddpm.trained_steps, ddpm.weights, license)
    (folder / "README.md").write_text(card, encoding="utf-8")
    check_same(ddpm, folder)


def model_card(config: Config, step: int, weights: str, license: str) -> str:
    size, T = config.dataset.image_size, config.diffusion.timesteps
    average = f"the average of the weights, decay {config.training.ema_decay}"
    which = average if weights == "ema" else "the last training weights, not averaged"
    return f"""---
license: {license}
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- ddpm
- diffusers
- unconditional-image-generation
datasets:
- {config.dataset.name}
---

# DDPM, {config.dataset.name}, {size}x{size}

A denoising diffusion probabilistic model (Ho et al. 2020, [arXiv 2006.11239](https://arxiv.org/abs/2006.11239))
of {config.dataset.channels}-channel pictures, after {step:,} training steps of
{config.training.batch_size} pictures: {which}.

```python
from diffusers import DDIMPipeline, DDPMPipeline

ddpm = DDPMPipeline.from_pretrained("THIS_FOLDER")
ddpm(num_inference_steps={T}).images[0].save("ddpm.png")
ddim = DDIMPipeline.from_pretrained("THIS_FOLDER")
ddim(num_inference_steps={min(50, T)}).images[0].save("ddim.png")
```

## Settings

```yaml
{to_yaml(config).strip()}
```
"""


def write_onnx(ddpm, path: Path, _: str) -> None:
    """(x [B, C, H, W] float32, t [B] int64) -> eps_hat [B, C, H, W], for any B."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ValueError(
            f"--format onnx needs {error.name}: pip install -r requirements-extras.txt"
        ) from None
    import torch

    shape = (ddpm.config.dataset.channels, *[ddpm.config.dataset.image_size] * 2)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, ddpm.diffusion.timesteps - 1, 3).long()
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        ddpm.net,
        (x[:2], t[:2]),
        path,
        input_names=["x", "t"],
        output_names=["eps_hat"],
        dynamic_shapes={"x": {0: batch}, "t": {0: batch}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        ours = ddpm.net(x[:count], t[:count])
        (other,) = session.run(None, {"x": x[:count].numpy(), "t": t[:count].numpy()})
        error = (ours - torch.from_numpy(other)).abs().max() / ours.abs().max()
        if not error < 1e-4:
            raise ValueError(f"onnxruntime differs by {error:.1e} of the output's scale")
    console.print(f"onnxruntime differs by {error:.1e} of the output's scale")


if __name__ == "__main__":
    app()
