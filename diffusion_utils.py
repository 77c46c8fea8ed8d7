"""The diffusion process: q, the loss, its bound, samplers as step tables, and their loop.

| symbol          | name here         | source                                    |
|-----------------|-------------------|-------------------------------------------|
| beta_t          | `betas[t]`        | section 2                                 |
| alpha_bar_t     | `alpha_bar(t)`    | after Eq. 4: product of 1 - beta          |
| x_t             | `q_sample`        | Eq. 4                                     |
| L_simple        | `loss`            | Eq. 14                                    |
| x_0 from eps    | `predict_x_0`     | Eq. 15                                    |
| p(x_s \\| x_t)   | `make_steps`      | Eq. 6, 7 and Algorithm 2; DDIM Eq. 12, 16; |
|                 | and `reverse`     | DPM-Solver++ (Lu et al. 2022) Algorithm 2 |
| L_T             | `prior_term`      | Eq. 5                                     |
| L_{t-1}, L_0    | `bound_term`      | Eq. 5, 8 and 13                           |

`t` is 0-based, as in the official code: t = 0 is one step of noise, t = T - 1 the last, and the
data itself is index -1 with `alpha_bar(-1) = 1`. Equations are of Ho et al. 2020 unless named.
What derives from beta is float64. Nothing here draws a random number.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def make_betas(schedule: str, timesteps: int, start: float, end: float) -> np.ndarray:
    """beta_0 ... beta_{T-1}, float64. Endpoints are not rescaled with T."""
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
    """The forward process q (Eq. 2) and what follows from it in closed form.

    Args:
        timesteps: T.
        beta_schedule: linear (the paper's), quad, const, warmup10, warmup50, jsd, cosine.
        beta_start, beta_end: its ends; `const` reads only the end, `jsd` and `cosine` neither.
    """

    def __init__(self, *, timesteps: int, beta_schedule: str, beta_start: float, beta_end: float):
        self.timesteps = timesteps
        self.betas = make_betas(beta_schedule, timesteps, beta_start, beta_end)
        # one longer than T: index -1, the data, is the last entry
        self._alpha_bar = np.append(np.cumprod(1 - self.betas), 1.0)
        self._tables: dict = {}

    def alpha_bar(self, t: int | Tensor) -> float | Tensor:
        """The share of x_0's variance left in x_t; 1 at t = -1.

        Args:
            t: an int, or integers of any shape.

        Returns:
            A float, or float64 of t's shape on the CPU.

        Raises:
            ValueError: t outside -1 ... T - 1.
        """
        index = np.asarray(t.cpu() if isinstance(t, Tensor) else t)
        if np.any(index < -1) or np.any(index >= self.timesteps):
            raise ValueError(f"t = {index} is outside -1 ... {self.timesteps - 1}")
        value = self._alpha_bar[index]
        return torch.from_numpy(value) if isinstance(t, Tensor) else float(value)

    def _signal_and_noise(self, t: int | Tensor, like: Tensor):
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar), as floats or [B, 1, 1, 1].

        The float64 tables are rounded once to `like`'s type and kept on its device, so that a
        training step gathers without waiting for the device.
        """
        if not isinstance(t, Tensor):
            a = self.alpha_bar(t)
            return math.sqrt(a), math.sqrt(1 - a)
        key = like.device, like.dtype
        if key not in self._tables:
            a = self._alpha_bar[:-1]
            self._tables[key] = [
                torch.from_numpy(np.sqrt(v)).to(like.dtype).to(like.device) for v in (a, 1 - a)
            ]
        return [table[t].view(-1, 1, 1, 1) for table in self._tables[key]]

    def q_sample(self, x_0: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """x_t from x_0 and noise (Eq. 4). x_0, eps: [B, C, H, W]; t: [B] or one int."""
        signal, noise = self._signal_and_noise(t, x_0)
        return signal * x_0 + noise * eps

    def predict_x_0(self, x_t: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """The x_0 that x_t and eps imply (Eq. 15), not clipped. Shapes as in `q_sample`."""
        signal, noise = self._signal_and_noise(t, x_t)
        return (x_t - noise * eps) / signal

    def loss(self, eps_model: Callable, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """L_simple (Eq. 14) of each picture: the mean over C, H, W of (eps - eps_hat)^2.

        Args:
            eps_model: (x_t [B, C, H, W], t [B]) -> eps_hat [B, C, H, W].
            x_0, eps: [B, C, H, W], x_0 in [-1, 1]; t: [B], 0-based.

        Returns:
            [B], float32 or wider.
        """
        eps_hat = eps_model(self.q_sample(x_0, t, eps), t)
        return (eps.float() - eps_hat.float()).square().mean(dim=(1, 2, 3))

    # ---- the variational bound (Eq. 5), in bits per dimension

    def posterior(self, t: int) -> tuple[float, float, float]:
        """q(x_{t-1} | x_t, x_0), Eq. 6 and 7: of mean c_t x_t + c_0 x_0: c_t, c_0, variance."""
        a_t, a_s, beta = self.alpha_bar(t), self.alpha_bar(t - 1), float(self.betas[t])
        c_t = (1 - a_s) * math.sqrt(1 - beta) / (1 - a_t)
        return c_t, beta * math.sqrt(a_s) / (1 - a_t), beta * (1 - a_s) / (1 - a_t)

    def model_variance(self, t: int, variance: str) -> float:
        """Of p(x_{t-1} | x_t): beta_t where `variance` is large, the posterior's where small.

        The posterior has none at t = 0; both take that of t = 1 there, as the official code does.
        """
        if t == 0 or variance == "small":
            return self.posterior(max(t, 1))[2]
        return float(self.betas[t])

    def prior_term(self, x_0: Tensor, t: int) -> Tensor:
        """L_T: KL(q(x_t | x_0) || N(0, I)) at the t where sampling starts; x_0: [B, ...] -> [B]."""
        a = self.alpha_bar(t)
        # KL of N(m, v) from N(0, 1) is (m^2 + v - 1 - log v) / 2, here with v = 1 - a
        nats = 0.5 * (a * x_0.double().square() - a - math.log1p(-a))
        return nats.flatten(1).mean(1) / math.log(2)

    def bound_term(self, x_0: Tensor, x0_hat: Tensor, t: int, variance: str) -> Tensor:
        """One term of Eq. 5: KL(q || p) of x_{t-1} given x_t; at t = 0 the decoder's L_0.

        Args:
            x_0: [B, ...], of 256 levels in [-1, 1]. x0_hat: the model's estimate of it from x_t.
            variance: of p: `large` (fixedlarge) or `small` (fixedsmall).

        Returns:
            [B] float64.
        """
        x_0, x0_hat = x_0.double(), x0_hat.double()
        v_p = self.model_variance(t, variance)
        if t == 0:
            nats = -log_discretised_gaussian(x_0, x0_hat, math.sqrt(v_p))
        else:  # both means hold the same c_t x_t, Eq. 8
            _, c_0, v_q = self.posterior(t)
            nats = 0.5 * (v_q / v_p - 1 - math.log(v_q / v_p))
            nats = nats + 0.5 * c_0**2 / v_p * (x_0 - x0_hat).square()
        return nats.flatten(1).mean(1) / math.log(2)


def log_discretised_gaussian(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """log p(x), Eq. 13: a Gaussian's mass in x's bin of 2 / 255, in nats, of x's shape.

    As in the official code: the CDF by its tanh approximation, never less than 1e-12, the bins of
    -1 and 1 open to the outside.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = torch.where(x > 0.999, 1.0, cdf((x - mean + 1 / 255) / std))
    lower = torch.where(x < -0.999, 0.0, cdf((x - mean - 1 / 255) / std))
    return torch.log(torch.clamp(upper - lower, min=1e-12))


class Step(NamedTuple):
    """One step of a sampler: x_s = c_t x_t + c_0 x0_hat + c_1 x0_hat_previous + sigma z."""

    t: int
    s: int  # -1 is the data
    c_t: float
    c_0: float
    c_1: float
    sigma: float


def make_steps(
    diffusion: GaussianDiffusion,
    *,
    sampler: str,
    variance: str,
    eta: float,
    timesteps: int | None,
    spacing: str,
) -> list[Step]:
    """A sampler as a table, from t = T - 1 (or where the spacing starts) down to the data.

    Args:
        sampler: `ddpm` (Algorithm 2), `ddim` (Song et al. 2020) or `dpm++`, the second-order
            multistep DPM-Solver++(2M).
        variance: of `ddpm`: `large` (fixedlarge, beta; the paper's CIFAR-10) or `small`
            (fixedsmall, the posterior's; the paper's 256x256).
        eta: of `ddim`: 0 is deterministic, 1 equals `ddpm` with small variance.
        timesteps: how many steps; None is all T. Rounding can merge a few: the length counts.
        spacing: see `spaced_timesteps`.

    Raises:
        ValueError: unknown names, or a number of steps that the spacing cannot have.
    """
    if sampler not in ("ddpm", "ddim", "dpm++"):
        raise ValueError(f"sampler {sampler!r} is not ddpm, ddim or dpm++")
    if variance not in ("large", "small"):
        raise ValueError(f"variance {variance!r} is not large or small")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} is outside 0 ... 1")
    eta = {"ddpm": 1.0, "ddim": eta, "dpm++": 0.0}[sampler]

    times = [*spaced_timesteps(diffusion, timesteps, spacing), -1]
    steps: list[Step] = []
    h_last = None  # of lambda, the half log SNR
    for t, s in itertools.pairwise(times):
        a_t, a_s = diffusion.alpha_bar(t), diffusion.alpha_bar(s)
        sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))  # DDIM Eq. 16
        c_t = math.sqrt(max(0.0, 1 - a_s - sigma**2) / (1 - a_t))  # DDIM Eq. 12; eta = 1 is Eq. 7
        c_0 = math.sqrt(a_s) - c_t * math.sqrt(a_t)
        c_1 = 0.0
        if s >= 0:
            if sampler == "ddpm" and variance == "large":
                sigma = math.sqrt(1 - a_t / a_s)
            h = half_log_snr(a_s) - half_log_snr(a_t)
            if sampler == "dpm++" and h_last is not None:
                c_1 = -c_0 * h / (2 * h_last)
                c_0 = c_0 * (1 + h / (2 * h_last))
            h_last = h
        steps.append(Step(t, s, c_t, c_0, c_1, sigma))
    return steps


def half_log_snr(alpha_bar: float) -> float:
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def spaced_timesteps(diffusion: GaussianDiffusion, count: int | None, spacing: str) -> list[int]:
    """The t that a sampler visits, falling.

    `trailing` ends the strides at T - 1; `uniform` begins them at 0 and `quadratic` squares them
    up to 0.8 T, as the DDIM paper and code; `logsnr` spaces the half log SNR evenly from T - 1 to
    0. Where alpha_bar is 0 (the last t of `jsd`) x_t holds nothing of x_0 and the step is left out.
    """
    T = diffusion.timesteps
    count = T if count is None else count
    if not 1 <= count <= T:
        raise ValueError(f"timesteps {count} is outside 1 ... {T}, the steps of this model")
    if count == 1 < T and spacing != "trailing":
        raise ValueError(f"spacing {spacing} with 1 step would not start in noise; use trailing")
    visible = int(np.count_nonzero(diffusion._alpha_bar[:-1]))
    match spacing:
        case "trailing":
            times = [round(T - i * T / count) - 1 for i in range(count)]
        case "uniform":
            times = [i * T // count for i in range(count)]
        case "quadratic":
            times = [int(x) for x in np.linspace(0, math.sqrt(0.8 * T), count) ** 2]
        case "logsnr":
            known = [half_log_snr(diffusion.alpha_bar(t)) for t in range(visible)]
            wanted = np.linspace(known[-1], known[0], count)
            times = [int(np.abs(np.subtract(known, w)).argmin()) for w in wanted]
        case _:
            raise ValueError(f"spacing {spacing!r} is not trailing, uniform, quadratic or logsnr")
    return sorted({t for t in times if t < visible}, reverse=True)


def reverse(
    diffusion: GaussianDiffusion,
    eps_model: Callable,
    x_T: Tensor,
    steps: list[Step],
    noise: Callable[[Step], Tensor],
    *,
    clip: bool = True,
) -> Iterator[tuple[Step, Tensor, Tensor]]:
    """Walk a step table from x_T to the data (Algorithm 2 for `ddpm` over all T).

    Args:
        eps_model: (x_t [B, C, H, W], t: int) -> eps_hat [B, C, H, W].
        x_T: [B, C, H, W], standard normal.
        noise: step -> z [B, C, H, W]; asked once for each step whose sigma is not 0, in order.
        clip: x0_hat to [-1, 1] before it is used, as the official code does.

    Yields:
        (step, x_s, x0_hat) after each step; the last x_s is the last x0_hat.
    """
    x, previous = x_T, None
    for step in steps:
        x0_hat = diffusion.predict_x_0(x, step.t, eps_model(x, step.t))
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        x = step.c_t * x + step.c_0 * x0_hat
        if step.c_1:
            x = x + step.c_1 * previous
        if step.sigma:
            x = x + step.sigma * noise(step)
        previous = x0_hat
        yield step, x, x0_hat


def from_uint8(pixels: Tensor) -> Tensor:
    """0 ... 255 -> -1 ... 1, float32, the ends exact."""
    return pixels.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """-1 ... 1 -> 0 ... 255: clipped, to the nearest, never truncated."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
