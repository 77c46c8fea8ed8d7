"""Read a trained model from files of any dialect: ours, diffusers', the official code's."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from config import Config, DatasetConfig, apply_override, check_config
from weights.checkpoint import is_checkpoint, newest_checkpoint, read_plain, up_to_date
from weights.dialects import infer_tree, same_process, to_our_names, tree_of_diffusers


class ModelFiles(NamedTuple):
    """The content of a model's files, under our names."""

    path: Path
    config: Config
    ema: dict[str, Tensor]  # the weights that sample
    raw: dict[str, Tensor]  # the weights that trained; the same where the files hold one set
    step: int  # of training; 0 where the files do not say
    notes: list[str]  # what was assumed where the files are silent
    only: str | None  # "ema" or "raw", where the files say that they hold one of the two


def read_model(source: str | Path, overrides: Iterable[str] = ()) -> ModelFiles:
    """Read a model of any dialect.

    Args:
        source: a run's folder, a checkpoint or safetensors file of ours; a diffusers folder or its
            id on the Hub; official weights as a PyTorch state dict (.ckpt, .bin,
            .safetensors), as arrays under TensorFlow's names (.npz) or as a TensorFlow checkpoint.
        overrides: `section.key=value` that win over what the files say.

    Raises:
        FileNotFoundError: nothing is there. ValueError: it is damaged, asks to run code, or holds
            what our network cannot represent.
    """
    path, overrides, data = Path(source), list(overrides), None
    if path.suffix == ".index" or Path(f"{path}.index").is_file():
        return _from_tensors(path, _read_tensorflow(path), overrides)
    path = up_to_date(path)
    if not path.exists():
        path = _fetch(str(source))
    if path.name.startswith("diffusion_pytorch_model") and (path.parent / "config.json").is_file():
        path = path.parent
    if path.is_dir():
        if unet_json := _find(path, "unet/config.json", "config.json"):
            return _read_diffusers(path, unet_json, overrides)
        path, data = newest_checkpoint(path)
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
        if not {"config", "step", "weights"} <= metadata.keys():  # not ours
            return _from_tensors(path, state, overrides)
        tree, step = json.loads(metadata["config"]), int(metadata["step"])
        return _finish(path, tree, state, state, overrides, step=step, only=metadata["weights"])
    if path.suffix == ".npz":
        return _from_tensors(path, _read_npz(path), overrides)
    data = data or read_plain(path)
    if not is_checkpoint(data):
        return _from_tensors(path, data, overrides)
    raw, ema = (
        {k.removeprefix(p): v for k, v in data["state_dict"].items() if k.startswith(p)}
        for p in ("unet.", "ema.")
    )
    tree, step = data["hyper_parameters"], data["global_step"]
    return _finish(path, tree, ema, raw, overrides, step=step, only=data.get("weights"))


def copy_tensors(network: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copy `state` into a network, name by name; 1x1 convolutions may come as matrices.

    A network on the meta device gets copies of the tensors as its own.

    Raises:
        ValueError: lists what is missing, surplus or misshapen; the network is untouched.
    """
    ours = network.state_dict()
    wrong = [f"missing: {name}" for name in ours if name not in state]
    wrong += [f"surplus: {name}" for name in state if name not in ours]
    fitting: dict[str, Tensor] = {}
    for name in [name for name in ours if name in state]:
        there, needed = state[name], ours[name].shape
        if not isinstance(there, Tensor):
            wrong.append(f"misshapen: {name} is a {type(there).__name__}, not {list(needed)}")
        elif _without_1x1(there.shape) != _without_1x1(needed):
            wrong.append(f"misshapen: {name} is {list(there.shape)}, not {list(needed)}")
        else:
            fitting[name] = there.reshape(needed)
    if wrong:
        more = [f"and {len(wrong) - 12} more"] if len(wrong) > 12 else []
        lines = "".join(f"\n  {line}" for line in [*wrong[:12], *more])
        raise ValueError(f"{source}: the weights do not fit the network of its config:{lines}")
    meta = any(value.is_meta for value in ours.values())
    # copies: those of a mapped file change with it, and lie where vectors round otherwise
    fitting = {name: value.clone() for name, value in fitting.items()} if meta else fitting
    network.load_state_dict(fitting, assign=meta)


def _without_1x1(shape: torch.Size) -> torch.Size:
    return shape[:2] if shape[2:] == (1, 1) else shape


# ---- files


def _find(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_json(path: Path) -> dict:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no keys and values")
    return tree


def _read_diffusers(folder: Path, unet_json: Path, overrides: list[str]) -> ModelFiles:
    """Read a diffusers folder, of a pipeline or of its network alone."""
    name = "scheduler_config.json"
    scheduler_json = _find(folder, f"scheduler/{name}", name, f"../scheduler/{name}")
    unet, scheduler = _read_json(unet_json), _read_json(scheduler_json) if scheduler_json else None
    try:
        tree, notes = tree_of_diffusers(unet, scheduler)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{folder}: {error}") from None
    ema = raw = to_our_names(_read_diffusers_tensors(unet_json.parent))
    if (folder / "unet_ema" / "config.json").is_file():  # by diffusers' training script
        ema = to_our_names(_read_diffusers_tensors(folder / "unet_ema"))
    export_json = _find(unet_json.parent, "ddpm.json", "../ddpm.json")  # of our own export
    ours = _read_json(export_json) if export_json else {}
    if not {"config", "step", "weights"} <= ours.keys():
        return _finish(folder, tree, ema, raw, overrides, notes=notes)
    config = check_config(ours["config"], source=str(export_json)).model_dump()
    if same_process(config["diffusion"], tree["diffusion"]):
        tree["diffusion"] = config["diffusion"]
    if tree["sampling"]["sampler"] == "ddpm":  # the scheduler that we write
        tree["sampling"] = config["sampling"] | {"variance": tree["sampling"]["variance"]}
    tree = {section: config[section] | tree.get(section, {}) for section in config}
    step, only = ours["step"], ours["weights"]
    return _finish(folder, tree, ema, raw, overrides, step=step, notes=notes, only=only)


def _read_diffusers_tensors(folder: Path) -> dict:
    stem = "diffusion_pytorch_model"
    candidates = [folder / f"{stem}.safetensors", folder / f"{stem}.bin"]
    candidates += [*sorted(folder.glob(f"{stem}.*.safetensors")), *folder.glob(f"{stem}.*.bin")]
    for path in candidates:
        if path.is_file():
            return _read_safetensors(path)[0] if path.suffix == ".safetensors" else read_plain(path)
    raise FileNotFoundError(f"{folder} holds no {stem}.safetensors or .bin")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(f"{path} is damaged or not plain arrays: {error}") from None


_TENSORFLOW_TO_NPZ = """
import sys, numpy, tensorflow
reader = tensorflow.train.load_checkpoint(sys.argv[1])
names = [name for name in reader.get_variable_to_shape_map() if name.startswith("model/")]
numpy.savez(sys.argv[2], **{name: reader.get_tensor(name) for name in names})
"""


def _read_tensorflow(path: Path) -> dict[str, Tensor]:
    """Read a TensorFlow checkpoint: `model.ckpt-790000` for its .index and .data files.

    This takes a process of its own: TensorFlow and PyTorch each bring an LLVM, and they clash.
    """
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "arrays.npz"
        command = [sys.executable, "-c", _TENSORFLOW_TO_NPZ, str(prefix), str(arrays)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            if "No module named 'tensorflow'" in done.stderr:
                hint = "`pip install tensorflow-cpu` to read it"
                raise ValueError(f"{prefix} is a TensorFlow checkpoint: {hint}")
            reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
            raise ValueError(f"{prefix} cannot be read by TensorFlow: {reason}")
        return _read_npz(arrays)


def _fetch(source: str) -> Path:
    """Download a Hub id, `owner/name`; FileNotFoundError where it is none."""
    owner, slash, name = source.partition("/")
    if not (slash and owner and name) or "/" in name or Path(owner).exists() or "." in owner:
        raise FileNotFoundError(f"no checkpoint at {source}")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.bin"]))
    except ImportError:
        reason = "`pip install huggingface_hub` to download it, if it is an id on the Hub"
        raise FileNotFoundError(f"nothing at {source}: {reason}") from None
    except Exception as error:  # a network and a service can raise anything
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"nothing at {source}, and it cannot be downloaded from the Hub: {reason}"
        ) from None


def _from_tensors(path: Path, data: Any, overrides: list[str]) -> ModelFiles:
    """Take bare tensors of any dialect, with the config that their names and shapes imply."""
    raw, ema = _raw_and_ema(path, data)
    chosen: dict = {}
    for override in overrides:
        apply_override(chosen, override)
    try:
        tree, notes = infer_tree(ema, chosen.get("dataset", {}).get("image_size"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _finish(path, tree, ema, raw, overrides, notes=notes)


def _raw_and_ema(path: Path, data: Any) -> tuple[dict, dict]:
    """Return raw and EMA weights under our names; twice the same where there is one set."""
    suffix = "/ExponentialMovingAverage"
    if isinstance(data, list) and data and isinstance(data[0], dict):  # of the DDIM code
        names = {str(name).removeprefix("module.") for name in data[0]}
        last = data[-1] if isinstance(data[-1], dict) and {*data[-1]} == names else data[0]
        sets = data[0], last
    elif isinstance(data, dict) and any(str(name).endswith(suffix) for name in data):
        leaves = ("/W", "/b", "/gamma", "/beta")
        raw = {name: value for name, value in data.items() if name.endswith(leaves)}
        sets = raw, {n.removesuffix(suffix): v for n, v in data.items() if n.endswith(suffix)}
    elif isinstance(data, dict):
        sets = (data.get("state_dict", data),) * 2
    else:
        raise ValueError(f"{path} holds no named tensors")
    raw = to_our_names(sets[0])
    return raw, raw if sets[1] is sets[0] else to_our_names(sets[1])


_DATASETS = {
    "cifar": "cifar10", "celeba": "celebahq", "church": "lsun-church", "bedroom": "lsun-bedroom",
    "cat": "lsun-cat",
}  # fmt: skip


def _finish(
    path: Path,
    tree: dict,
    ema: dict[str, Tensor],
    raw: dict[str, Tensor],
    overrides: list[str],
    *,
    step: int = 0,
    notes: Iterable[str] = (),
    only: str | None = None,
) -> ModelFiles:
    """Fill in what the files do not say, apply overrides, and check the config."""
    notes = list(notes)
    tree = {section: dict(values) for section, values in tree.items()}
    dataset = tree.setdefault("dataset", {})
    if "name" not in dataset:
        known = get_args(DatasetConfig.model_fields["name"].annotation)
        words = path.resolve().as_posix().lower()
        guesses = [name for word, name in _DATASETS.items() if word in words and name in known]
        dataset["name"] = guesses[0] if guesses else "folder"
        notes.append(f"dataset.name={dataset['name']}")
    tree.setdefault("training", {}).setdefault("max_steps", max(1, step))
    for override in overrides:
        apply_override(tree, override)
    config = check_config(tree, source=f"the config of {path}")
    return ModelFiles(path, config, ema, raw, step, notes, only)
