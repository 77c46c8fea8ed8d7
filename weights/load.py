"""Read a trained model from files of any dialect: ours, diffusers', the official code's."""

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from config import Config, apply_override, check_config
from weights.checkpoint import is_checkpoint, newest_checkpoint, read_plain, up_to_date
from weights.dialects import infer_tree, same_process, to_our_names, tree_of_diffusers
from weights.hub import download
from weights.improved import split_heads

_ABOUT = {"config", "step", "weights"}  # what tells our own exports
_DATASETS = {"cifar": "cifar10", "celeba": "celebahq", "church": "lsun-church"}
_DATASETS |= {"bedroom": "lsun-bedroom", "cat": "lsun-cat"}


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
            id on the Hub; official weights in PyTorch (.ckpt, .bin, .safetensors), as arrays under
            TensorFlow's names (.npz) or as a TensorFlow checkpoint.
        overrides: `section.key=value` that win over what the files say.

    Raises:
        ValueError: it is damaged, asks to run code, or holds what our network cannot represent.
    """
    chosen: dict[str, dict] = {}
    for override in overrides:
        apply_override(chosen, override)
    path, unet, data, about = _locate(Path(source))
    notes: list[str] = []
    if unet:
        tree, ema, raw, about, notes = _read_diffusers(path, unet)
    elif about.keys() >= _ABOUT:
        tree, ema, raw = json.loads(about["config"]), data, data
    elif is_checkpoint(data):
        about = {"step": data["global_step"], "weights": data.get("weights")}
        tree, state = data["hyper_parameters"], data["state_dict"]
        raw, ema = (
            {name.removeprefix(p): value for name, value in state.items() if name.startswith(p)}
            for p in ("unet.", "ema.")
        )
    else:
        about = {}
        try:
            raw, ema = _raw_and_ema(data)
            asked = (("dataset", "image_size"), ("diffusion", "timesteps"))
            tree, notes = infer_tree(ema, *(chosen.get(s, {}).get(key) for s, key in asked))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    tree = {key: {**(tree.get(key) or {}), **chosen.get(key, {})} for key in tree | chosen}
    step, dataset = int(about.get("step", 0)), tree.setdefault("dataset", {})
    if "name" not in dataset:
        words = path.resolve().as_posix().lower()
        dataset["name"] = next((n for word, n in _DATASETS.items() if word in words), "folder")
        notes = [*notes, f"dataset.name={dataset['name']}"]
    training = tree.setdefault("training", {})
    training.setdefault("max_steps", max(1, step))
    names = dataset.get("classes", [])
    if names and not about and "classes" not in chosen.get("dataset", {}):  # others name none
        how = "each a class; training.label_dropout=0.1 reads the last as no label"
        if training["label_dropout"]:
            dataset["classes"], how = names[:-1], "the last of them no label"
        notes = [*notes, f"{len(names)} labels, {how}; dataset.classes=[...] names the classes"]
    config = check_config(tree, source=f"the config of {path}")
    raw, ema = (split_heads(state, config.model.num_heads) for state in (raw, ema))
    return ModelFiles(path, config, ema, raw, step, notes, about.get("weights"))


def _locate(path: Path) -> tuple[Path, Path | None, Any, dict[str, Any]]:
    """Return a model's path, and diffusers' folder of its network or a file's content, metadata."""
    if path.suffix == ".index" or Path(f"{path}.index").is_file():
        return path, None, _read_tensorflow(path), {}
    path = up_to_date(path)
    if not path.exists():
        path = download(path.as_posix())
    if path.name.startswith("diffusion_pytorch_model") and (path.parent / "config.json").is_file():
        path = path.parent
    if config_json := _find(path, "unet/config.json", "config.json"):
        return path, config_json.parent, None, {}
    if path.is_dir():
        path, data = newest_checkpoint(path)
        return path, None, data, {}
    return path, None, *read_tensors(path)


def copy_tensors(network: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copy `state` into a network, name by name; 1x1 convolutions may come as matrices.

    A network on the meta device gets copies of the tensors as its own. ValueError lists what is
    missing, surplus or misshapen; then the network is untouched.
    """
    ours = network.state_dict()
    wrong = [f"missing: {name}" for name in ours if name not in state]
    wrong += [f"surplus: {name}" for name in state if name not in ours]
    fitting: dict[str, Tensor] = {}
    for name in [name for name in ours if name in state]:
        there, needed = state[name], ours[name].shape
        is_tensor = isinstance(there, Tensor)
        if is_tensor and _without_1x1(there.shape) == _without_1x1(needed):
            fitting[name] = there.reshape(needed)
        else:
            what = list(there.shape) if is_tensor else f"a {type(there).__name__}"
            wrong.append(f"misshapen: {name} is {what}, not {list(needed)}")
    if wrong:
        wrong[12:] = [f"and {len(wrong) - 12} more"] if len(wrong) > 12 else []
        told = f"{source}: the weights do not fit the network of its config:"
        raise ValueError("\n  ".join([told, *wrong]))
    meta = any(value.is_meta for value in ours.values())
    # copies: those of a mapped file change with it, and lie where vectors round otherwise
    fitting = {name: value.clone() for name, value in fitting.items()} if meta else fitting
    network.load_state_dict(fitting, assign=meta)


def _without_1x1(shape: torch.Size) -> torch.Size:
    return shape[:2] if shape[2:] == (1, 1) else shape


# ---- files


def _find(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_json(folder: Path, *names: str) -> dict:
    """Return the content of the first of the files that is there; {} where none is."""
    if not (path := _find(folder, *names)):
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no keys and values")
    return tree


def _read_diffusers(folder: Path, unet: Path) -> tuple[dict, dict, dict, dict, list[str]]:
    """Read a pipeline or its network alone: (config, EMA, raw weights, ddpm.json, notes)."""
    name = "scheduler_config.json"
    scheduler = _read_json(folder, f"scheduler/{name}", name, f"../scheduler/{name}")
    config = _read_json(unet, "config.json")
    try:
        tree, notes = tree_of_diffusers(config, scheduler)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{folder}: {error}") from None
    ema = raw = _read_diffusers_tensors(unet)
    if (folder / "unet_ema" / "config.json").is_file():  # by diffusers' training script
        ema = _read_diffusers_tensors(folder / "unet_ema")
    about = _read_json(unet, "ddpm.json", "../ddpm.json")  # of our own export
    if not about.keys() >= _ABOUT:
        return tree, ema, raw, {}, notes
    config = check_config(about["config"], source=f"the ddpm.json of {folder}").model_dump()
    tree["dataset"] |= {key: config["dataset"][key] for key in ("labels", "classes")}
    tree["training"] = config["training"]
    if same_process(config["diffusion"], tree["diffusion"]):
        tree["diffusion"] = config["diffusion"]
    if tree["sampling"]["sampler"] == "ddpm":  # the scheduler that we write
        variance = tree["sampling"]["variance"]
        kept = {} if variance == "learned" else {"variance": variance}
        tree["sampling"] = config["sampling"] | kept
    tree = {section: config[section] | tree.get(section, {}) for section in config}
    return tree, ema, raw, about, notes


def _read_diffusers_tensors(folder: Path) -> dict[str, Tensor]:
    stem = "diffusion_pytorch_model"
    for end in ("safetensors", "bin", "*.safetensors", "*.bin"):
        for path in sorted(folder.glob(f"{stem}.{end}")):
            if path.is_file():
                return to_our_names(read_tensors(path)[0])
    raise FileNotFoundError(f"{folder} holds no {stem}.safetensors or .bin")


def read_tensors(path: Path) -> tuple[Any, dict[str, str]]:
    """Return what a file of any kind holds, and the metadata of a safetensors file."""
    if path.suffix not in (".safetensors", ".npz"):
        return read_plain(path), {}
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}, {}
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # a damaged file can raise anything
        # torch's C++ says "unable to open file <...>: Too many open files (24)"
        told = re.match(r"unable to .*\((\d+)\)$", str(error))
        code = int(told[1]) if told else getattr(error, "errno", None)
        if isinstance(error, FileNotFoundError):  # safetensors' word for any failure to open
            code = errno.EIO if path.exists() else errno.ENOENT
        if code not in (None, errno.EINVAL):  # the system's, and no fault of the file
            raise OSError(code, os.strerror(code), str(path)) from None
        kind = path.suffix[1:]
        raise ValueError(f"{path} is damaged or not a plain {kind} file: {error}") from None


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
        if not done.returncode:
            return read_tensors(arrays)[0]
    reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    if "No module named 'tensorflow'" in reason:
        reason = "`pip install tensorflow-cpu` to read it"
    raise ValueError(f"{prefix} is a TensorFlow checkpoint: {reason}")


def _raw_and_ema(data: Any) -> tuple[dict, dict]:
    """Return raw and EMA weights under our names; twice the same where there is one set."""
    suffix, leaves = "/ExponentialMovingAverage", ("/W", "/b", "/gamma", "/beta")
    if isinstance(data, list) and data and isinstance(data[0], dict):  # of the DDIM code
        raw, ema = data[0], data[-1]
        names = {str(name).removeprefix("module.") for name in raw}
        if not (isinstance(ema, dict) and {*ema} == names):
            ema = raw
    elif not isinstance(data, dict):
        raise ValueError("there are no named tensors")
    elif ema := {n.removesuffix(suffix): v for n, v in data.items() if str(n).endswith(suffix)}:
        raw = {name: value for name, value in data.items() if str(name).endswith(leaves)}
    else:
        raw = ema = data.get("state_dict", data)
    ours = to_our_names(raw)
    return ours, ours if ema is raw else to_our_names(ema)
