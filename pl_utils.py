"""Lightning's side of the model: the module, and loading it from files.

Everything random in a step is drawn from (seed, step) for the whole global batch, and each rank
takes its rows; the order of the data is a function of the step too. So a run is a function of its
config: stopping, resuming, validating and looking at samples leave no trace in it.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from config import Config
from diffusion_utils import GaussianDiffusion, Step, from_uint8, reverse, to_uint8
from model import UNet
from weights import Source, copy_tensors, read_source

INITIAL, TRAIN, DROPOUT, VALIDATE = range(4)  # streams of random numbers


def seed_of(*key: int) -> int:
    """A well-mixed seed below 2^63 from a few small integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def seed_device(device: torch.device, seed: int) -> None:
    """As `torch.manual_seed`, for one device: for all of them it takes a millisecond."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class DDPM(pl.LightningModule):
    """The network, its moving average, and one training step (Algorithm 1).

    `unet` is what trains; `ema` is a second network that follows it and is what samples. The two
    are never exchanged.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.automatic_optimization = False  # one batch is one update, micro-batches included
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(config.training.seed, INITIAL))
            unet = UNet(
                image_size=config.dataset.image_size,
                channels=config.dataset.channels,
                **config.model.model_dump(),
            )
        self.unet = unet.to(memory_format=torch.channels_last)  # convolutions are fastest in it
        self.ema = copy.deepcopy(self.unet).requires_grad_(False).eval()
        self.diffusion = GaussianDiffusion(**config.diffusion.model_dump())
        self.weights = "ema"  # which of the two `forward` uses
        self.micro = config.training.micro_batch_size
        self.trained_steps, self.notes = 0, []  # of weights from a file
        self.begun = 0  # the step that training goes on from
        # sums since the last log: loss, gradient norm, steps, skipped steps
        self.register_buffer("tally", torch.zeros(4), persistent=False)
        self.register_buffer("streak", torch.zeros(()), persistent=False)  # of skipped steps
        self.register_buffer("longest_streak", torch.zeros(()), persistent=False)

    def train(self, mode: bool = True):
        """Modes of `unet`; the average never drops out."""
        super().train(mode)
        self.ema.eval()
        return self

    def forward(self, x: Tensor, t: Tensor | int) -> Tensor:
        """Predict eps_hat [B, C, H, W] with the chosen weights, in float32 on every machine.

        Args:
            x: x_t, [B, C, H, W]. t: [B] or one for all, 0-based.
        """
        t = torch.full((1,), t, device=x.device) if isinstance(t, int) else t
        with exact_float32():
            return self.net(x, t)

    @property
    def net(self) -> UNet:
        """The chosen weights."""
        return self.ema if self.weights == "ema" else self.unet

    @property
    def bf16(self) -> bool:
        """Whether training steps and drawn images use bfloat16; auto: where the hardware does."""
        return uses_bf16(self.config, self.device)

    def on_fit_start(self) -> None:
        """Compile, and find micro-batches that fit, before the first step."""
        training = self.config.training
        left = training.max_steps - self.begun
        self.unet.recompute = training.activation_checkpointing
        self.micro = training.micro_batch_size or training.batch_size // self.trainer.world_size
        on_cuda = self.device.type == "cuda"
        if training.compile is True or (training.compile == "auto" and on_cuda and left >= 10_000):
            self.unet.compile()  # in place: no name changes
        elif not on_cuda:
            return
        while not self._fits():
            self.micro //= 2
        mine = torch.tensor(-float(self.micro), device=self.device)
        self.micro = -int(self.trainer.strategy.reduce(mine, reduce_op="max"))  # all ranks' least

    def _fits(self) -> bool:
        """One gradient of a micro-batch: whether memory holds it. Compiles, or gives it up."""
        training, data = self.config.training, self.config.dataset
        parameters = list(self.unet.parameters())
        x = torch.zeros(self.micro, data.channels, *[data.image_size] * 2, device=self.device)
        t = torch.zeros(self.micro, dtype=torch.long, device=self.device)
        try:
            # what Adam's moments and the ranks' gradients will take, which are not there yet
            later = [torch.empty_like(p) for p in parameters * 3 if p.is_cuda]
            loss = self.diffusion.loss(self._train_net, x, t, x).mean()
            torch.autograd.grad(loss, parameters)
            del later
        except torch.OutOfMemoryError:
            if training.micro_batch_size or self.micro % 2:
                raise ValueError(
                    f"micro-batches of {self.micro} do not fit in the memory of {self.device}; try "
                    "a smaller training.micro_batch_size, or training.activation_checkpointing=true"
                ) from None
            print(f"{self.micro} pictures do not fit in memory: micro-batches of {self.micro // 2}")
            return False
        except Exception as error:
            if self.unet._compiled_call_impl is None:
                raise
            self.unet._compiled_call_impl = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"training.compile: cannot be done here, going on without ({reason})")
            return self._fits()
        return True

    # ---- training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # fused: one kernel, and it skips an update on the device when told `found_inf`
        return torch.optim.Adam(
            self.unet.parameters(), lr=self.learning_rate(0), betas=(0.9, 0.999), fused=True
        )

    @cached_property
    def _averages(self) -> list[Tensor]:
        """Of `ema`; walking through the modules for them takes milliseconds of each step."""
        return list(self.ema.parameters())

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant: the first update has 0, as in the official code."""
        rate, warmup = self.config.training.learning_rate, self.config.training.warmup_steps
        return rate * min(1.0, step / warmup) if warmup else rate

    def draw(self, stream: int, index: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """t [count], eps [count, C, H, W] and coin tosses [count] of one whole batch."""
        generator = torch.Generator(self.device)
        generator.manual_seed(seed_of(self.config.training.seed, stream, index))
        random = dict(generator=generator, device=self.device)
        data = self.config.dataset
        t = torch.randint(self.diffusion.timesteps, (count,), **random)
        heads = torch.rand(count, **random) < 0.5
        eps = torch.randn(count, data.channels, data.image_size, data.image_size, **random)
        return t, eps, heads

    def training_step(self, batch: Tensor, _: int) -> None:
        """One update from this rank's share of the global batch, uint8 [B / ranks, C, H, W]."""
        strategy = self.trainer.strategy
        several = isinstance(strategy, DDPStrategy)
        self.update(
            batch,
            self.optimizers().optimizer,
            step=self.global_step,
            rank=self.global_rank,
            backward=self.manual_backward,
            alone=strategy.block_backward_sync if several else nullcontext,
            update=self.optimizers().step,
        )

    def update(
        self,
        batch: Tensor,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        rank: int = 0,
        backward: Callable = Tensor.backward,
        alone: Callable = nullcontext,
        update: Callable | None = None,
    ) -> None:
        """Algorithm 1 on one batch, and all that belongs to a step; nothing waits for the device.

        Args:
            batch: this rank's share, uint8 [B / ranks, C, H, W].
            backward: of a loss. alone: a context in which it does not meet the other ranks.
            update: `optimizer.step`, where a driver has wrapped it.
        """
        config = self.config.training
        share = slice(rank * len(batch), (rank + 1) * len(batch))
        t, eps, heads = (draw[share] for draw in self.draw(TRAIN, step, config.batch_size))
        x_0 = from_uint8(batch)
        if self.config.dataset.random_flip:
            x_0 = torch.where(heads[:, None, None, None], x_0.flip(-1), x_0)

        micro = self.micro or len(batch)
        mean_loss = torch.zeros((), device=self.device)
        for i in range(0, len(batch), micro):
            seed_device(self.device, seed_of(config.seed, DROPOUT, step, rank, i))
            rows = slice(i, i + micro)
            last = i + micro >= len(batch)
            with nullcontext() if last else alone():
                losses = self.diffusion.loss(self._train_net, x_0[rows], t[rows], eps[rows])
                loss = losses.sum() / len(batch)
                # a loss that is not finite makes every gradient so, and by that reaches every rank
                backward(loss * torch.where(loss.isfinite(), 1.0, torch.nan).detach())
            mean_loss += loss.detach()

        limit = config.gradient_clip_norm or math.inf
        weights = optimizer.param_groups[0]["params"]
        norm = torch.nn.utils.clip_grad_norm_(weights, limit)
        fine = norm.isfinite()
        skip = (~fine).float()
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        if skips_on_device(self.device):
            optimizer.found_inf = skip  # 1: weights and moments stay, with no host sync
        elif skip:
            optimizer.zero_grad()  # Adam passes over what has no gradient
        (update or optimizer.step)()
        optimizer.zero_grad()
        get_ema_multi_avg_fn(config.ema_decay)(self._averages, weights, None)

        self.streak.add_(1).mul_(skip)
        torch.maximum(self.longest_streak, self.streak, out=self.longest_streak)
        loss, norm = torch.where(fine, mean_loss, 0.0), torch.where(fine, norm, 0.0)
        self.tally += torch.stack([loss, norm, 1 - skip, skip])

    def _train_net(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.unet(x, t)

    # ---- validation: the same t and noise every time, on the average

    def on_validation_epoch_start(self) -> None:
        self._quarters = torch.zeros(2, 4, device=self.device)  # sums and counts by quarter of t

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if not len(batch):  # a rank with no share
            return
        config, ranks = self.config.training, self.trainer.world_size
        t, eps, _ = self.draw(VALIDATE, batch_idx * ranks + self.global_rank, len(batch))
        micro = self.micro or config.batch_size // ranks
        parts = zip(from_uint8(batch).split(micro), t.split(micro), eps.split(micro), strict=True)
        losses = torch.cat([self.diffusion.loss(self, *part) for part in parts])
        quarter = t * 4 // self.diffusion.timesteps
        self._quarters.index_add_(1, quarter, torch.stack([losses, torch.ones_like(losses)]))

    def on_validation_epoch_end(self) -> None:
        sums, counts = self.trainer.strategy.reduce(self._quarters, reduce_op="sum")
        metrics = {"val/loss": (sums.sum() / counts.sum()).item()}
        for i, mean in enumerate((sums / counts).tolist()):
            metrics[f"val/loss by t/{i + 1} of 4"] = mean
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, self.global_step)

    # ---- sampling

    def sampling_net(self, calls: int = 0, *, bf16: bool | None = None) -> UNet:
        """Return the network that draws images: a copy in bfloat16 where `bf16` asks for it (None:
        as in training), compiled on CUDA for that many `calls` if they repay the minute."""
        net, bf16 = self.net, self.bf16 if bf16 is None else bf16
        compiles = self.device.type == "cuda" and calls >= 5000 and self.config.training.compile
        if bf16 or compiles:
            net = copy.deepcopy(net).eval()
            net._compiled_call_impl = None  # of training
        if bf16:
            net = net.to(torch.bfloat16)
            net.temb = self.net.temb  # in float32: `chain` runs it once for all steps
        if compiles:
            torch._dynamo.config.suppress_errors = True  # where it cannot: slower, with a warning
            net.compile()
        return net

    def chain(
        self,
        steps: list[Step],
        seeds: list[int],
        *,
        image_size: int | None = None,
        net: UNet | None = None,
    ) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """Walk the reverse process: (step, x_s, x0_hat), [B, C, H, W] each, after each step.

        A picture belongs to its seed: neighbours in the batch, and how many, do not touch it.

        Args:
            net: what `sampling_net` gave; None is the chosen weights in float32.
        """
        net = net or self.net
        size = image_size or self.config.dataset.image_size
        noise = SeedNoise(seeds, (self.config.dataset.channels, size, size), self.device)
        with torch.no_grad():
            times = [step.t for step in steps]
            rows = net.embed(torch.tensor(times, device=self.device))
        temb = dict(zip(times, rows.split(1), strict=True))

        def eps_model(x: Tensor, t: int) -> Tensor:
            with exact_float32():
                return net(x, temb[t]).float()

        return reverse(self.diffusion, eps_model, noise(), steps, noise)

    @torch.inference_mode()
    def sample(self, steps: list[Step], seeds: list[int], **options) -> Tensor:
        """Finished pictures, uint8 [B, C, H, W]; options as of `chain`."""
        for _, x, _ in self.chain(steps, seeds, **options):
            pass
        return to_uint8(x)

    # ---- weights from elsewhere

    def take(self, source: Source) -> None:
        """The tensors of `source`; ValueError where they are not of this network."""
        copy_tensors(self.unet, source.raw, source.path)
        copy_tensors(self.ema, source.ema, source.path)

    # ---- checkpoints: plain data that explains itself

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["hyper_parameters"] = self.config.model_dump(mode="json")
        checkpoint["data"] = self.trainer.datamodule.fingerprints()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if checkpoint.get("data", data := self.trainer.datamodule.fingerprints()) != data:
            raise ValueError(
                "the pictures are not those that this run has trained on (dataset.root): "
                "going on would mix what is held out into training; start another run"
            )
        self.begun = checkpoint["global_step"]
        # Lightning saves in the middle of its batch count; ours are steps, so both are one number
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for count in (progress["total"], progress["current"]):
            count.update(dict.fromkeys(count, checkpoint["global_step"]))


class SeedNoise:
    """Standard normal [B, *shape] at each call; row i is a function of seeds[i] and the call."""

    def __init__(self, seeds: list[int], shape: tuple[int, ...], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        # several calls' worth at once, fewer launches; how many depends on the shape alone
        ahead = min(64, max(1, 2**17 // math.prod(shape)))
        self.random = dict(size=(ahead, *shape), device=device)
        self.queue: list[Tensor] = []

    def __call__(self, _: Step | None = None) -> Tensor:
        if not self.queue:
            drawn = [torch.randn(generator=g, **self.random) for g in self.generators]
            self.queue = list(torch.stack(drawn, dim=1).flip(0))
        return self.queue.pop()


def skips_on_device(device: torch.device) -> bool:
    """Whether fused Adam obeys `found_inf` there; on MPS it takes it and drops it."""
    return device.type in ("cpu", "cuda")


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep TF32, whose mantissa has 10 bits, out of what is float32 on CUDA."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)  # of training


def uses_bf16(config: Config, device: torch.device) -> bool:
    """Whether training steps and drawn images use bfloat16 on a device."""
    precision = config.training.precision
    return precision == "bf16-mixed" or (precision == "auto" and has_bf16(device))


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16; the environment's DDPM_BF16, 0 or 1, overrides."""
    forced = os.environ.get("DDPM_BF16")
    if forced in ("0", "1"):
        return forced == "1"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def load_ddpm(source: str | Path, weights: str = "ema") -> DDPM:
    """A trained model, on the CPU, ready to call.

    Args:
        source: a checkpoint, a run's folder, or any other that `read_source` knows.
        weights: `ema`, the average that the paper samples, or `raw`, the last training weights.

    Raises:
        FileNotFoundError, ValueError: as `read_source`.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights {weights!r} is not ema or raw")
    found = read_source(source)
    if found.only == "ema" and weights == "raw":
        raise ValueError(f"{source} holds the averaged weights alone: leave raw out")
    weights = found.only or weights
    ddpm = DDPM(found.config)
    ddpm.take(found)
    ddpm.weights, ddpm.trained_steps, ddpm.notes = weights, found.step, found.notes
    return ddpm.eval().requires_grad_(False)
