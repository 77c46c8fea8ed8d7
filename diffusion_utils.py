"""The diffusion process: q, its schedules, what a network predicts of it, and the loss.

| symbol           | name here          | source                                      |
|------------------|--------------------|---------------------------------------------|
| beta_t           | `betas[t]`         | section 2                                   |
| alpha_bar_t      | `alpha_bar(t)`     | after Eq. 4: product of 1 - beta            |
| x_t              | `q_sample`         | Eq. 4                                       |
| F*, F            | `target`, `network`| what the network aims at, and predicts      |
| L_simple         | `loss`             | Eq. 14                                      |
| x0_hat, eps_hat  | `predict_x_0`,     | Eq. 15                                      |
|                  | `predict_eps`      |                                             |

Samplers, p(x_s given x_t), are in `generation/samplers.py`; the bound, L_T, L_{t-1} and L_0 (Eq. 5,
8, 13), is in `evaluation/likelihood.py`.

`t` is 0-based, as in the official code: t = 0 is one step of noise, t = T - 1 the last, and the
data itself is index -1 with `alpha_bar(-1) = 1`. Equations are of Ho et al. 2020 unless named.
What derives from beta is float64. Nothing here draws a random number.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Denoiser = Callable[[Tensor, int | Tensor], Tensor]  # (x_t [B, C, H, W], t) -> x0_hat

# what the network predicts: F* = a x_0 + b eps, with (a, b) of sqrt(alpha_bar), sqrt(1 - alpha_bar)
TARGETS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]] = {
    "eps": lambda s, n: (0 * s, 1 + 0 * s),
    "x0": lambda s, n: (1 + 0 * s, 0 * s),
    "v": lambda s, n: (-n, s),  # Salimans & Ho 2022, section 4
}
# w over t, of SNR and of what some take: the weight of the error of eps, whatever is predicted
LOSS_WEIGHTS: dict[str, Callable[..., np.ndarray]] = {
    "eps": np.ones_like,
    "x0": lambda snr: 1 / at_least(snr),  # makes it the error of x_0
    "v": lambda snr: 1 + 1 / at_least(snr),  # and this that of v
    # Hang et al. 2023, section 3.4: min(SNR, gamma) of the error of x_0
    "min-snr": lambda snr, gamma=5.0: np.minimum(1, gamma / at_least(snr)),
    "soft-min-snr": lambda snr, gamma=5.0: gamma / (snr + gamma),  # Crowson et al. 2024
    "p2": lambda snr, gamma=1.0: (1 + snr) ** -gamma,  # Choi et al. 2022, k = 1
    # Hoogeboom et al. 2024: sigmoid(b - log SNR)
    "sigmoid": lambda snr, gamma=-1.0: 1 / (1 + snr * math.exp(-gamma)),
}
# p over t, of SNR and of what some take, not normalised
T_DENSITIES: dict[str, Callable[..., np.ndarray]] = {
    "uniform": lambda snr, **_: np.ones_like(snr),
    "normal": lambda snr, mean, width: normal_density(np.log(at_least(snr)), mean, width),
}


def at_least(snr: np.ndarray) -> np.ndarray:
    """Return SNR, but nowhere so small that its inverse is of no use."""
    return np.maximum(snr, 1e-12)


def normal_density(log_snr: np.ndarray, mean: float, width: float) -> np.ndarray:
    """Return p over t for which log SNR is normal, as the noise levels of Karras et al. 2022."""
    z = ((log_snr - mean) / width) ** 2 / 2
    # log SNR is not even over t: a step stands for as much of it as lies around it
    around = np.abs(np.gradient(log_snr)) if len(log_snr) > 1 else 1.0
    return np.exp(z.min() - z) * around


def make_betas(schedule: str, timesteps: int, start: float, end: float) -> np.ndarray:
    """Return beta_0 ... beta_{T-1}, float64. Endpoints are not rescaled with T."""
    T = timesteps
    match schedule:
        case "linear":
            betas = np.linspace(start, end, T)
        case "quad":
            betas = np.linspace(math.sqrt(start), math.sqrt(end), T) ** 2
        case "const":
            betas = np.full(T, end)
        case "warmup10" | "warmup50":
            betas = np.full(T, end)
            warm = int(T * int(schedule.removeprefix("warmup")) / 100)
            betas[:warm] = np.linspace(start, end, warm)
        case "jsd":
            betas = 1 / np.linspace(T, 1, T)
        case "cosine":  # Nichol & Dhariwal 2021, Eq. 17
            f = np.cos((np.linspace(0, 1, T + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
        case _:
            raise ValueError(f"beta_schedule {schedule!r} is unknown")
    if not (np.all(betas > 0) and np.all(betas <= 1)):
        raise ValueError(
            f"beta_schedule {schedule} from {start} to {end} over {T} steps leaves (0, 1]"
        )
    return betas


class GaussianDiffusion:
    """The forward process q (Eq. 2), what the network predicts, and what follows in closed form.

    Args:
        timesteps: T.
        beta_schedule: linear (the paper's), quad, const, warmup10, warmup50, jsd, cosine.
        beta_start, beta_end: its ends; `const` reads only the end, `jsd` and `cosine` neither.
        prediction: a row of `TARGETS`: eps (the paper's), x0 or v.
    """

    def __init__(
        self,
        *,
        timesteps: int,
        beta_schedule: str,
        beta_start: float,
        beta_end: float,
        prediction: str,
    ):
        self.timesteps = timesteps
        self.betas = make_betas(beta_schedule, timesteps, beta_start, beta_end)
        # one longer than T: index -1, the data, is the last entry
        self._alpha_bar = np.append(np.cumprod(1 - self.betas), 1.0)
        s, n = np.sqrt(self._alpha_bar), np.sqrt(1 - self._alpha_bar)
        if prediction not in TARGETS:
            raise ValueError(f"prediction {prediction!r} is not one of {', '.join(TARGETS)}")
        a, b = TARGETS[prediction](s, n)
        d = s * b - n * a  # x0_hat = (b x_t - n F) / d; eps_hat = (s F - a x_t) / d
        s_d = np.divide(s, d, out=np.ones_like(s), where=d != 0)  # the limit where s = 0
        a_d = np.divide(a, d, out=np.zeros_like(s), where=d != 0)
        # an error of F times s / d is one of eps: squared 1 for eps, SNR for x0, alpha_bar for v
        self._columns = {"s": s, "n": n, "a": a, "b": b, "d": d}
        self._columns |= {"s/d": s_d, "a/d": a_d, "scale": s_d**2}
        self._cache: dict[tuple, Tensor] = {}

    def alpha_bar(self, t: int | Tensor) -> Any:
        """Return the share of x_0's variance that is left in x_t; 1 at t = -1.

        A float for an int, float64 on the CPU for a tensor; ValueError for t outside -1 ... T - 1.
        """
        index = np.asarray(t.cpu() if isinstance(t, Tensor) else t)
        if np.any(index < -1) or np.any(index >= self.timesteps):
            raise ValueError(f"t = {index} is outside -1 ... {self.timesteps - 1}")
        value = self._alpha_bar[index]
        return torch.from_numpy(value) if isinstance(t, Tensor) else float(value)

    def _at(self, t: int | Tensor, like: Tensor, *names: str) -> list[Any]:
        """Return columns at t, as floats or as [B, 1, 1, 1] of `like`'s type and device."""
        if not isinstance(t, Tensor):
            self.alpha_bar(t)  # raises where t is outside
            return [float(self._columns[name][t]) for name in names]
        return [self._on_device(name, like)[t].view(-1, 1, 1, 1) for name in names]

    def _on_device(self, name: str, like: Tensor) -> Tensor:
        # rounded and moved once: a training step gathers without waiting for the device
        key = name, like.device, like.dtype
        if key not in self._cache:
            column = torch.from_numpy(self._columns[name])
            self._cache[key] = column.to(like.dtype).to(like.device)
        return self._cache[key]

    def column(self, function: Callable[..., np.ndarray], **how: float) -> Tensor:
        """Return a function of SNR over t, [T] float64; rows of `LOSS_WEIGHTS`, `T_DENSITIES`."""
        a = self._alpha_bar[:-1]
        return torch.from_numpy(function(a / (1 - a), **how))

    def q_sample(self, x_0: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """Return x_t of x_0 and noise (Eq. 4). x_0, eps: [B, C, H, W]; t: [B] or one int."""
        s, n = self._at(t, x_0, "s", "n")
        return s * x_0 + n * eps

    def target(self, x_0: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """Return F*, what the network aims at. Shapes as in `q_sample`."""
        a, b = self._at(t, x_0, "a", "b")
        return a * x_0 + b * eps

    def predict_x_0(self, x_t: Tensor, t: int | Tensor, F: Tensor) -> Tensor:
        """Return the x_0 that x_t and a prediction imply (Eq. 15), not clipped."""
        n, b, d = self._at(t, x_t, "n", "b", "d")
        return (b * x_t - n * F) / d

    def predict_eps(self, x_t: Tensor, t: int | Tensor, F: Tensor) -> Tensor:
        """Return the noise that x_t and a prediction imply."""
        s_d, a_d = self._at(t, x_t, "s/d", "a/d")
        return s_d * F - a_d * x_t

    def loss(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        x_0: Tensor,
        t: Tensor,
        eps: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return each image's error of eps, whatever is predicted: L_simple (Eq. 14) by default.

        Args:
            network: (x_t [B, C, H, W], t [B]) -> F [B, C, H, W].
            x_0, eps: [B, C, H, W], x_0 in [-1, 1]; t: [B], 0-based.
            weight: w over t, [T]; None is 1, the paper's.

        Returns:
            [B], float32 or wider: w[t] times the mean over C, H, W of (eps - eps_hat)^2.
        """
        F = network(self.q_sample(x_0, t, eps), t)
        wide = torch.promote_types(F.dtype, torch.float32)
        error = (self.target(x_0, t, eps).to(wide) - F.to(wide)).square().mean(dim=(1, 2, 3))
        error = error * self._on_device("scale", error)[t]
        return error if weight is None else error * weight[t]


CELLS = 1024  # of a step; t is drawn to this precision


def cell_edges(density: Tensor) -> Tensor:
    """Return where each t ends among the CELLS * T equal cells of a uniform draw, int64 [T].

    `torch.searchsorted(edges, cell, right=True)` is the inverse CDF of `density`, p over t, [T],
    which need not sum to 1; in integers, so that every device draws the same t.
    """
    share = density.double().cumsum(0) / density.double().sum()
    return (share * (CELLS * len(density))).round().long()


def from_uint8(pixels: Tensor) -> Tensor:
    """Map 0 ... 255 to -1 ... 1, float32, the ends exact."""
    return pixels.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Map -1 ... 1 to 0 ... 255: clipped, to the nearest, never truncated."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
