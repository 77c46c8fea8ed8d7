"""The diffusion process: q, its schedules, what a network predicts of it, and the loss.

| symbol           | name here          | source                                      |
|------------------|--------------------|---------------------------------------------|
| beta_t           | `betas[t]`         | section 2                                   |
| alpha_bar_t      | `alpha_bar(t)`     | after Eq. 4: product of 1 - beta            |
| x_t              | `q_sample`         | Eq. 4                                       |
| F*, F            | `target`, `network`| what the network aims at, and predicts      |
| L_simple         | `loss`             | Eq. 14                                      |
| L_{t-1}, L_0     | `bound_term`       | Eq. 5, 8, 13                                |
| Sigma, L_hybrid  | `log_variance`,    | Nichol & Dhariwal 2021, Eq. 15, 16          |
|                  | `hybrid_loss`      |                                             |
| x0_hat, eps_hat  | `predict_x_0`,     | Eq. 15                                      |
|                  | `predict_eps`      |                                             |

Samplers, p(x_s given x_t), are in `generation/samplers.py`; the whole bound, with L_T, is in
`evaluation/likelihood.py`.

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

# (x_t [B, C, H, W], t) -> x0_hat; where the variance is learned also (x_t, t, True) -> (x0_hat, v)
Denoiser = Callable[..., Any]

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
    "sigmoid": lambda snr, gamma=-1.0: np.exp(-np.logaddexp(0, np.log(at_least(snr)) - gamma)),
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
    """Return p over t for which log SNR is normal, as the noise levels of Karras et al. 2022.

    No t is drawn less often than a hundredth of the mean: sampling visits all of them.
    """
    z = ((log_snr - mean) / width) ** 2 / 2
    # log SNR is not even over t: a step stands for as much of it as lies around it
    around = np.abs(np.gradient(log_snr)) if len(log_snr) > 1 else 1.0
    p = np.exp(z.min() - z) * around
    return np.maximum(p, p.mean() / 100)


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
        learned_variance: the network's output F has 2C channels; the last C are v, which places
            the variance, see `log_variance`. All else here takes F with or without them.
    """

    def __init__(
        self,
        *,
        timesteps: int,
        beta_schedule: str,
        beta_start: float,
        beta_end: float,
        prediction: str,
        learned_variance: bool,
    ):
        self.timesteps, self.learned_variance = timesteps, learned_variance
        self.betas = make_betas(beta_schedule, timesteps, beta_start, beta_end)
        # one longer than T: index -1, the data, is the last entry
        self._alpha_bar = np.append(np.cumprod(1 - self.betas), 1.0)
        s, n = np.sqrt(self._alpha_bar), np.sqrt(1 - self._alpha_bar)
        if prediction not in TARGETS:
            raise ValueError(f"prediction {prediction!r} is not one of {', '.join(TARGETS)}")
        a, b = TARGETS[prediction](s, n)
        d = s * b - n * a  # x0_hat = (b x_t - n F) / d; eps_hat = (s F - a x_t) / d
        if learned_variance and (timesteps < 2 or np.abs(d[:-1]).min() < 1e-30):  # in float32
            raise ValueError(
                "learned_variance needs 2 timesteps and more, and an x_0 that each prediction "
                "implies: where a schedule ends without signal, as jsd, predict x0 or v"
            )
        s_d = np.divide(s, d, out=np.ones_like(s), where=d != 0)  # the limit where s = 0
        a_d = np.divide(a, d, out=np.zeros_like(s), where=d != 0)
        # an error of F times s / d is one of eps: squared 1 for eps, SNR for x0, alpha_bar for v
        self._columns = {"s": s, "n": n, "a": a, "b": b, "d": d}
        self._columns |= {"s/d": s_d, "a/d": a_d, "scale": s_d**2}
        # q(x_{t-1} | x_t, x_0), Eq. 6, 7; at t = 0 its variance is 0, and that of t = 1 is taken
        a_t, a_s = self._alpha_bar[:-1], np.roll(self._alpha_bar, 1)[:-1]
        small = self.betas * (1 - a_s) / (1 - a_t)
        of_x_0 = self.betas * np.sqrt(a_s) / (1 - a_t)
        logs = np.log(np.append(small[1:2], small[1:])), np.log(self.betas)
        for name, column in zip(("x_0", "log small", "log beta"), (of_x_0, *logs), strict=True):
            self._columns[name] = np.append(column, 0.0)
        self.training_loss = self.hybrid_loss if learned_variance else self.loss
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

    @property
    def visible(self) -> int:
        """How many t, from 0 on, leave something of x_0 in x_t; all but the last of `jsd`."""
        return int(np.count_nonzero(self._alpha_bar[:-1]))

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
        return (b * x_t - n * F[:, : x_t.shape[1]]) / d

    def predict_eps(self, x_t: Tensor, t: int | Tensor, F: Tensor) -> Tensor:
        """Return the noise that x_t and a prediction imply."""
        s_d, a_d = self._at(t, x_t, "s/d", "a/d")
        return s_d * F[:, : x_t.shape[1]] - a_d * x_t

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
            network: (x_t [B, C, H, W], t [B]) -> F [B, C or 2C, H, W].
            x_0, eps: [B, C, H, W], x_0 in [-1, 1]; t: [B], 0-based.
            weight: w over t, [T]; None is 1, the paper's.

        Returns:
            [B], float32 or wider: w[t] times the mean over C, H, W of (eps - eps_hat)^2.
        """
        F = network(self.q_sample(x_0, t, eps), t)[:, : x_0.shape[1]]
        wide = torch.promote_types(F.dtype, torch.float32)
        error = (self.target(x_0, t, eps).to(wide) - F.to(wide)).square().mean(dim=(1, 2, 3))
        error = error * self._on_device("scale", error)[t]
        return error if weight is None else error * weight[t]

    def hybrid_loss(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        x_0: Tensor,
        t: Tensor,
        eps: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return L_hybrid (Nichol & Dhariwal 2021, Eq. 16): `loss`, and lambda T = T / 1000 bounds.

        The bound's term teaches v alone: to it the estimate of x_0, which is not clipped, is a
        constant. `weight` is that of `loss`.
        """
        x_t = self.q_sample(x_0, t, eps)
        F = network(x_t, t)
        x0_hat, v = self.predict_x_0(x_t, t, F).detach(), F[:, x_0.shape[1] :]
        bits = self.bound_term(x_0, x0_hat, t, self.log_variance(t, v))
        return self.loss(lambda *_: F, x_0, t, eps, weight) + self.timesteps / 1000 * bits

    def log_variance(self, t: int | Tensor, v: Tensor) -> Tensor:
        """Return log Sigma of p(x_{t-1} | x_t) (Nichol & Dhariwal 2021, Eq. 15), of v's shape.

        At v = -1 it is that of the posterior (fixedsmall), at v = 1 that of beta (fixedlarge).
        """
        small, beta = self._at(t, v, "log small", "log beta")
        return small + (v + 1) / 2 * (beta - small)

    def bound_term(self, x_0: Tensor, x0_hat: Tensor, t: Tensor, log_variance: Tensor) -> Tensor:
        """Return one term of Eq. 5: KL(q || p) of x_{t-1} given x_t; at t = 0 the decoder's L_0.

        Args:
            x_0: [B, C, H, W], of 256 levels in [-1, 1].
            x0_hat: the model's estimate of it from x_t.
            t: [B]. log_variance: of p, [B, C or 1, H or 1, W or 1].

        Returns:
            [B], bits/dim, of x_0's type.
        """
        c_0, log_q = self._at(t, x_0, "x_0", "log small")
        gap = log_q - log_variance
        # both means hold the same c_t x_t, Eq. 8
        rate = gap.exp() - 1 - gap + (c_0 * (x_0 - x0_hat)).square() * (-log_variance).exp()
        distortion = -log_discretised_gaussian(x_0, x0_hat, (log_variance / 2).exp())
        nats = torch.where(t.view(-1, 1, 1, 1) == 0, distortion, rate / 2)
        return nats.flatten(1).mean(1) / math.log(2)


def log_discretised_gaussian(x: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """Return log p(x), Eq. 13: a Gaussian's mass in x's bin of 2 / 255, in nats, of x's shape.

    As in the official code: the CDF by its tanh approximation, never less than 1e-12, the bins of
    -1 and 1 open to the outside.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = torch.where(x > 0.999, 1.0, cdf((x - mean + 1 / 255) / std))
    lower = torch.where(x < -0.999, 0.0, cdf((x - mean - 1 / 255) / std))
    return torch.log(torch.clamp(upper - lower, min=1e-12))


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
