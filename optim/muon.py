"""Muon: updates of matrices are made orthogonal (Jordan et al. 2024)."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
RMS = 0.2  # of an update, as large as Adam's are, so that both take the same learning rate
ITERATIONS = ((3.4445, -4.7750, 2.0315),) * 5  # coefficients of Jordan et al. 2024


class Muon(torch.optim.Adam):
    """Muon for matrices and kernels, [out, in, ...] as [out, in * ...]; Adam for vectors.

    For all of them: Jordan et al. leave embeddings, the first and the last layer to Adam.

    An update is the orthogonal matrix nearest to the Nesterov momentum, but for its singular
    values, which lie between about 0.7 and 1.2, times `RMS sqrt(max(rows, columns))` (Liu et al.
    2025). Options are Adam's; of those matrices heed the learning rate alone, and `found_inf`.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        rate = self.param_groups[0]["lr"]
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for group in self.param_groups:
            for w in group["params"]:
                if w.ndim > 1 and w.grad is not None:
                    by_shape[len(w), w[0].numel()].append((w, w.grad))
                    w.grad = None  # Adam passes over what has no gradient
        super().step(closure)
        skip = getattr(self, "found_inf", None)  # 1 leaves weights and momentum as they are
        for shape, pairs in by_shape.items():
            wanted = []
            for w, gradient in pairs:
                state = self.state[w]
                if not state:  # Adam wants each state to have a step
                    state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(w)}
                momentum = state["momentum"] * MOMENTUM + gradient
                if skip is not None:
                    momentum = torch.where(skip.bool(), state["momentum"], momentum)
                state["momentum"].copy_(momentum)
                wanted.append((gradient + MOMENTUM * momentum).flatten(1))
            scale = -rate * RMS * max(shape) ** 0.5
            for (w, _), update in zip(pairs, orthogonal(torch.stack(wanted)), strict=True):
                update = scale * update.view(w.shape)
                w.add_(update if skip is None else torch.where(skip.bool(), 0.0, update))


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices with the same singular vectors, and singular values near 1; [N, R, C]."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    # x becomes q x in each iteration, and x x^T q (x x^T) q: on the small square alone
    one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    gram, turn = x @ x.mT, one
    for a, b, c in ITERATIONS:
        q = a * one + b * gram + c * gram @ gram
        gram, turn = q @ gram @ q, q @ turn
    x = turn @ x
    return x.mT if tall else x
