"""Before the first step: compile the network, and find micro-batches that fit into memory."""

from functools import partial

import pytorch_lightning as pl
import torch

from config import Config
from pl_utils import DDPM


class FitIntoMemory(pl.Callback):
    """Compile the network, and halve micro-batches until memory holds one, after step `begun`."""

    def __init__(self, config: Config, begun: int = 0):
        self.config, self.left = config, config.training.max_steps - begun

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, DDPM)
        mine = torch.tensor(-float(self.prepare(module, trainer.world_size)), device=module.device)
        # all ranks take the least of theirs
        module.micro = -int(trainer.strategy.reduce(mine, reduce_op="max"))

    def prepare(self, module: DDPM, ranks: int = 1) -> int:
        """Compile the network in place where that repays; return `module.micro`, which now fits.

        Raises:
            ValueError: the config's micro-batches do not fit, or not even one image does.
        """
        hardware, on_cuda = self.config.hardware, module.device.type == "cuda"
        module.unet.recompute = hardware.activation_checkpointing
        micro = hardware.micro_batch_size or self.config.training.batch_size // ranks
        long = on_cuda and self.left >= 10_000
        compiled = hardware.compile is True or (hardware.compile == "auto" and long)
        if compiled:
            module.unet.compile()  # in place: no name changes
        # on a CPU the system says by itself when memory is short
        while (compiled or on_cuda) and not self._fits(module, micro):
            micro //= 2
        module.micro = micro
        return micro

    def _fits(self, module: DDPM, micro: int) -> bool:
        """Tell whether memory holds the gradient of a micro-batch; give up a failed compilation."""
        hardware = self.config.hardware
        parameters = list(module.unet.parameters())
        x = torch.zeros(micro, *self.config.dataset.shape, device=module.device)
        t = torch.zeros(micro, dtype=torch.long, device=module.device)
        classes = len(self.config.dataset.classes)
        labels = torch.zeros(micro, classes, device=module.device) if classes else None
        try:
            # what Adam's moments and the ranks' gradients will take, which are not there yet
            later = [torch.empty_like(p) for p in parameters * 3 if p.is_cuda]
            network = partial(module.train_network, labels=labels)
            loss = module.diffusion.training_loss(network, x, t, x).mean()
            torch.autograd.grad(loss, parameters)
            del later
        except torch.OutOfMemoryError:
            if hardware.micro_batch_size or micro % 2:
                raise ValueError(
                    f"micro-batches of {micro} do not fit in the memory of {module.device}; try a "
                    "smaller hardware.micro_batch_size, or hardware.activation_checkpointing=true"
                ) from None
            print(f"{micro} images do not fit in memory: micro-batches of {micro // 2}")
            return False
        except Exception as error:
            if module.unet._compiled_call_impl is None:
                raise
            module.unet._compiled_call_impl = None  # private: torch has no way back
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"hardware.compile: cannot be done here, going on without ({reason})")
            return self._fits(module, micro)
        return True
