"""A trained model, ready to call."""

import hashlib
import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from config import Config
from diffusion_utils import GaussianDiffusion
from model import Network, at_precision, build_network, exact_float32, has_bf16
from weights.dialects import LABELS
from weights.load import ModelFiles, copy_tensors, read_model


class Model(nn.Module):
    """A network (x_t, t) -> F with trained weights, and its process; it answers in float32.

    `config` is the whole run's; `weights` is "ema" or "raw"; `step`, `notes` are as in ModelFiles.
    """

    def __init__(self, network: Network, config: Config, *, weights: str, step: int, notes: list):
        super().__init__()
        self.network, self.config = network, config
        self.diffusion = GaussianDiffusion(**config.diffusion.model_dump())
        self.weights, self.step, self.notes = weights, step, notes

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its images."""
        return self.config.dataset.shape

    def forward(self, x_t: Tensor, t: Tensor | int, labels: Tensor | None = None) -> Tensor:
        """Return eps_hat [B, C, H, W] of x_t; t, 0-based, is [B] or one for all.

        `labels`: [B, classes], with a 1 for each class of an image, or [B] numbers of classes.
        """
        return self.diffusion.predict_eps(x_t, t, self._predict(x_t, t, labels))

    def predict_x_0(self, x_t: Tensor, t: Tensor | int, labels: Tensor | None = None) -> Tensor:
        """Return x0_hat [B, C, H, W], not clipped."""
        return self.diffusion.predict_x_0(x_t, t, self._predict(x_t, t, labels))

    def _predict(self, x_t: Tensor, t: Tensor | int, labels: Tensor | None) -> Tensor:
        times = torch.tensor([t], device=x_t.device) if isinstance(t, int) else t
        if labels is not None and labels.ndim == 1:
            labels = one_hot(labels, len(self.config.dataset.classes)).float()
        with exact_float32():
            return self.network(x_t, times, labels)

    def digest(self) -> str:
        """Return 16 hexadecimal digits of the weights and the process."""
        process = self.config.diffusion.model_dump()
        for key, old in (("prediction", "eps"), ("learned_variance", False)):
            if process[key] == old:
                del process[key]  # digests are older than the key
        # neither shows in the weights
        unseen = {"num_heads", "time_scale", "variant"}
        process |= self.config.model.model_dump(include=unseen, exclude_defaults=True)
        digest = hashlib.sha256(json.dumps(process).encode())
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_model(
    source: str | Path,
    weights: Literal["ema", "raw"] = "ema",
    precision: Literal["float32", "bfloat16", "auto"] = "float32",
) -> Model:
    """Load a trained model, on the CPU, ready to call.

    Args:
        source: as `read_model` takes, and raises.
        weights: the EMA, which the paper samples, or the raw weights.
        precision: float32 answers the same on every machine; bfloat16 is faster where the hardware
            multiplies it, which auto finds out.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights {weights!r} is not ema or raw")
    found = read_model(source)
    if found.only == "ema" and weights == "raw":
        raise ValueError(f"{source} holds the EMA alone: leave raw out")
    model = model_of(found, weights=found.only or weights)
    if precision == "auto":
        precision = "bfloat16" if has_bf16(model.device) else "float32"
    model.network = at_precision(model.network, precision)
    return model


def starting_weights(found: ModelFiles, config: Config) -> dict[str, Tensor]:
    """Return the EMA for a network of `config`, whose labels may be others.

    Then it begins as what the EMA is without a label: the row for none joins the bias that it was
    added to, and the new labels are zeros.
    """
    theirs, ours = (
        (c.dataset.classes, bool(c.dataset.classes) and c.training.label_dropout > 0)
        for c in (found.config, config)
    )
    if theirs == ours:
        return found.ema
    state = model_of(found, weights="ema").network.state_dict()
    table = state.pop(LABELS, None)
    if table is not None and found.config.training.label_dropout:
        state["temb.dense.1.bias"] = state["temb.dense.1.bias"] + table[-1]
    if LABELS in (needed := build_network(config, "meta").state_dict()):
        state[LABELS] = torch.zeros(needed[LABELS].shape)
    return state


def model_of(found: ModelFiles, *, weights: str) -> Model:
    """Build the model of files that have been read; no random weights are drawn."""
    network = build_network(found.config, "meta")
    copy_tensors(network, found.ema if weights == "ema" else found.raw, found.path)
    network = network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return Model(network, found.config, weights=weights, step=found.step, notes=found.notes)
