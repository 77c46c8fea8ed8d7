"""EMAs of any length after training, from snapshots of a few (Karras et al. 2024, appendix C).

A power EMA of exponent gamma weighs the history up to step t by p(tau) ~ tau^gamma (Eq. 121). The
profile that is wanted is fitted by those of the snapshots; their tensors add up as their profiles.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from config import check_config, load_config
from files import atomic_write
from optim import exponent
from weights.checkpoint import saved_steps
from weights.export import shareable, summary, write_safetensors
from weights.load import ModelFiles, read_tensors
from weights.model import model_of

SUFFIX = ".safetensors"
ByLength = dict[float, dict[str, Tensor]]  # by relative length: tensors by name


def write_snapshot(averages: ByLength, path: Path) -> None:
    """Write averages in float16, the same bytes each time, or raise OSError and change nothing."""
    halves = {
        f"{length}/{name}": value.to("cpu", torch.float16).contiguous()
        for length, values in averages.items()
        for name, value in values.items()
    }
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(halves, {"format": "pt"}))


def inner_products(
    t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray
) -> np.ndarray:
    """Return the integrals of p_a(tau) p_b(tau) (Eq. 151) of profiles that end at t; broadcasts."""
    a, b, shared = gamma_a + 1, gamma_b + 1, np.minimum(t_a, t_b)
    return a * b / (a + b - 1) * (shared / t_a) ** a * (shared / t_b) ** b / shared


def solve(
    steps: np.ndarray, lengths: np.ndarray, step: int, length: float
) -> tuple[np.ndarray, float]:
    """Return the share of each snapshot in an EMA of `length` at `step`, by least squares.

    Args:
        steps, lengths: of the snapshots, [N] each.

    Returns:
        shares, [N], that sum to 1; and how far the profile is from the wanted one, relative to it.
    """
    t, gamma = steps.astype(float), np.array([exponent(x) for x in lengths])
    end, wanted = np.array([float(step)]), np.array([exponent(length)])
    A = inner_products(t[:, None], gamma[:, None], t, gamma)
    b = inner_products(t, gamma, end, wanted)
    x = np.linalg.solve(A, b)
    rest = 1 - x @ b / inner_products(end, wanted, end, wanted)[0]
    return x / x.sum(), max(0.0, rest) ** 0.5


def rebuild(run: Path, length: float, step: int | None, out: Path | None) -> tuple[str, Path]:
    """Write a run's EMA of a relative length as safetensors; return a summary and its path.

    ValueError, FileNotFoundError: there is no such length, or are no such snapshots.
    """
    if not 0 < length < 0.28:
        raise ValueError(f"--length {length:g} is not between 0 and 0.28; try 0.1")
    run = run.parent.parent if run.suffix == ".ckpt" else run  # RUN/checkpoints/last.ckpt
    folder = run / "ema"
    paths = {int(path.stem[5:]): path for path in saved_steps(folder, SUFFIX)}
    if not paths:
        hint = "train with training.ema_lengths=[0.05,0.1]"
        raise FileNotFoundError(f"{folder} holds no snapshots; {hint}")
    end = max(paths) if step is None else step
    if end not in paths:
        near = min(paths, key=lambda n: abs(n - end))
        raise ValueError(f"{folder} has no snapshot of step {end:,}; the nearest is {near:,}")
    paths = {n: path for n, path in paths.items() if n <= end}
    if len(paths) == 1:
        raise ValueError(
            f"{paths[end]} is the only snapshot up to step {end:,}, and two are needed: give a "
            "later --step, or train with a lower logging.ema_snapshot_every"
        )
    out = out or folder / f"length-{length:g}-step-{end:08d}{SUFFIX}"
    if out.suffix != SUFFIX or out.exists():
        what = "exists" if out.exists() else f"does not end in {SUFFIX}"
        raise ValueError(f"{out} {what}; give another --output")
    config = load_config(run / "config.yml")
    lengths = [*dict.fromkeys(config.training.ema_lengths)]
    pairs = np.array([(n, known) for n in paths for known in lengths])
    shares, error = solve(pairs[:, 0], pairs[:, 1], end, length)
    total: dict[str, Tensor] = {}
    for path, some in zip(paths.values(), shares.reshape(len(paths), -1), strict=True):
        snapshot = read_tensors(path)[0]
        for known, share in zip(lengths, some, strict=True):
            mark = f"{known}/"
            for name in [name for name in snapshot if name.startswith(mark)]:
                value = snapshot[name].double() * share
                name = name.removeprefix(mark)
                total[name] = total[name] + value if name in total else value
    if not all(value.isfinite().all() for value in total.values()):
        raise ValueError(f"{folder} holds numbers that are not finite; give an earlier --step")
    tree = config.model_dump()
    tree["training"] |= {"ema": "power", "ema_lengths": [length]}  # what it is now
    config = shareable(check_config(tree, source=str(run)))
    ema = {name: value.float() for name, value in total.items()}
    model = model_of(ModelFiles(run, config, ema, ema, end, [], "ema"), weights="ema")
    with atomic_write(out, keep_suffix=True) as temporary:
        write_safetensors(model, temporary)
    about = f"EMA of relative length {length:g} at step {end:,} from {len(paths)} snapshots"
    return f"{summary(model)}\n{about}; its profile is met to {error:.2%}\nwritten: {out}", out
