"""LORO: Adam on factors B and A, with a periodic exact Riemannian step on B A.

Mo et al., "Parameter and Memory Efficient Pretraining via Low-rank Riemannian Optimization" (LORO), ICLR 2025.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, Unpack

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from lrtrain.distributed.per_layer import compute_layers_across_ranks
from lrtrain.distributed.sharding import local
from lrtrain.errors import ConfigError
from lrtrain.layers.rebalance import balanced
from lrtrain.optim.common import Common
from lrtrain.optim.pairs import PairOptimizer
from lrtrain.optim.rows import rows_like
from lrtrain.optim.stacks import Stack


def tangent_step(
    left: Tensor, right: Tensor, left_direction: Tensor, right_direction: Tensor, lr: float
) -> tuple[Tensor, Tensor]:
    """Balanced factors of the best rank-r approximation of W − lr·T, for W = B A and T in the tangent space at W.

    With B = U R_B, Aᵀ = V R_A (QR), ∂B = G Aᵀ and ∂A = Bᵀ G: G V = ∂B R_A⁻¹, Uᵀ G = R_B⁻ᵀ ∂A, and the projection of G
    is T = U (UᵀG) + (I − UUᵀ)(G V) Vᵀ. W − lr·T has rank ≤ 2r; its SVD follows from that of a (2r, 2r) core, in
    O(r²(m + n)) and without an (m, n) matrix. For directions other than true gradients, G V and UᵀG
    belong to two different G, and UᵀG V is taken from ∂A's.

    Args:
        left, right: B (m, r) and A (r, n).
        left_direction, right_direction: ∂B (m, r) and ∂A (r, n).
    """
    rank = len(right)
    u, r_left = torch.linalg.qr(left)
    v, r_right = torch.linalg.qr(right.T)
    gv = left_direction @ torch.linalg.pinv(r_right)  # (m, r)
    utg = torch.linalg.pinv(r_left).T @ right_direction  # (r, n)
    q_left, k_left = torch.linalg.qr(torch.cat([u, gv - u @ (u.T @ gv)], dim=1))  # (m, ≤ 2r), (≤ 2r, 2r)
    q_right, k_right = torch.linalg.qr(torch.cat([v, utg.T], dim=1))
    core = left.new_zeros(2 * rank, 2 * rank)
    core[:rank, :rank] = r_left @ r_right.T
    core[:rank, rank:] = core[rank:, :rank] = -lr * torch.eye(rank, dtype=left.dtype, device=left.device)
    a, sigma, bt = torch.linalg.svd(k_left @ core @ k_right.T, full_matrices=False)
    root = sigma[:rank].sqrt()
    return q_left @ (a[:, :rank] * root), root[:, None] * (bt[:rank] @ q_right.T)


class LORO(PairOptimizer):
    """Adam on factor pairs; each `every`-th step is a `tangent_step` at the full learning rate.

    As published, this large step uses Adam's directions instead of gradients, which makes it a heuristic: they have no
    common G. It is computed in float64 without weight decay, for each pair by one process that broadcasts the new
    factors: each process receives 8r(m + n) bytes of factors and directions and 4r(m + n) bytes of new factors. Other
    steps are local. After a large step all optimizer state is reset, for embeddings, head and norms too
    (`schedule=loro` restarts the learning rate as well).

    State: Adam's, 8r(m + n) bytes for B (m, r) and A (r, n).

    Args:
        every: K, steps between large steps.
        large_step: `exact`: `tangent_step`; `plain`: a step like the others; `balanced`: a plain step, then B ← U√Σ
            and A ← √ΣVᵀ for B A = UΣVᵀ.
        refresh: whether all optimizer state is reset after a large step; otherwise moments belong to the old factors.
        approx_scale: factor on the other steps of the factors; None: r/min(m, n), the published r/hidden.

    Raises:
        ConfigError: if in_backward is set, or for an exact step with two learning rates.
    """

    optim = "loro"
    elementwise = True

    def __init__(
        self,
        model: nn.Module,
        every: PositiveInt,
        large_step: Literal["exact", "balanced", "plain"],
        refresh: bool,
        approx_scale: PositiveFloat | None,
        **common: Unpack[Common],
    ):
        if common["in_backward"]:
            raise ConfigError(
                "optim.in_backward=true has one gradient at a time, but a step of optim=loro needs those of B and A "
                "together; set optim.in_backward=false"
            )
        if large_step == "exact" and common["lr_ratio"] != 1:
            raise ConfigError(
                f"optim.lr_ratio={common['lr_ratio']} gives B and A learning rates of their own, but an exact step on "
                "BA has one; set optim.lr_ratio=1, or optim.large_step=plain or balanced"
            )
        self.every = every
        self.large_step = large_step
        self.refresh = refresh
        self.approx_scale = approx_scale
        super().__init__(model, **common)
        if batched := [pair.name for pair in self.pairs if pair.left.ndim == 3]:
            raise ConfigError(
                f"optim=loro steps pairs of matrices, but {batched[0]} holds a batch of them; set param.pattern so "
                "that it excludes the experts, or use optim=spectron, preconditioned_adamw or adamw"
            )

    def _scale(self, p: Tensor) -> float:
        """The factor on a plain step."""
        if self.approx_scale is not None:
            return self.approx_scale
        _, left, right = self.pair_of[p]
        return len(right) / min(left.shape[0], right.shape[1])

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {key: rows_like(p, p.shape[1]) for key in ("exp_avg", "exp_avg_sq")}

    def direction(self, stack: Stack, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        return self.adamw_direction(stack, gradient, state, step).mul_(self._scale(stack.first))

    # --- large steps -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        large = self._large()
        super().step()
        if large and self.large_step == "balanced":
            self._replace({pair.name: (pair.left, pair.right) for pair in self.pairs}, lambda _, b, a: balanced(b, a))
        if large and self.refresh:
            for state in self.state.values():
                for value in state.values():
                    local(value).zero_()

    def step_jointly(self) -> Collection[Tensor]:
        if not (self.large_step == "exact" and self._large()):
            return ()
        ready = {pair.name: pair for pair in self.pairs if pair.left.grad is not None and pair.right.grad is not None}
        tensors = {
            name: (left, right, self._direction_of(left), self._direction_of(right))
            for name, (_, left, right) in ready.items()
        }
        self._replace(tensors, lambda name, *whole: tangent_step(*whole, lr=self.group_of[ready[name].right]["lr"]))
        return [p for pair in ready.values() for p in (pair.left, pair.right)]

    def _large(self) -> bool:
        """Whether the next step is a large one, by the pairs' steps since the start or the last refresh."""
        return (int(self.state[self.pairs[0].left]["step"]) + 1) % self.every == 0

    def _direction_of(self, p: Tensor) -> Tensor:
        """Adam's direction, sharded like p."""
        assert p.grad is not None
        alone = self.alone(p)
        alone.state["step"] += 1
        found = rows_like(p, p.shape[1])
        step = int(alone.state["step"])
        local(found).copy_(self.adamw_direction(alone, local(p.grad).float(), alone.state, step))
        return found

    def _replace(self, tensors: Mapping[str, Sequence[Tensor]], compute: Callable[..., tuple[Tensor, Tensor]]) -> None:
        """B, A ← compute(layer name, *unsharded float64 tensors) for the pairs of these layers; a collective."""
        pairs = {pair.name: pair for pair in self.pairs}

        def computed(name: str, given: nn.ParameterList) -> dict[str, Tensor]:
            left, right = compute(name, *(t.double() for t in given))
            return {"left": left.float(), "right": right.float()}

        held = {name: nn.ParameterList(given) for name, given in tensors.items()}
        for name, new in compute_layers_across_ranks(held, computed):
            for p, value in ((pairs[name].left, new["left"]), (pairs[name].right, new["right"])):
                self.put(self.alone(p), self.rows[p].cut(value), int(self.state[p]["step"]))
