"""AdamW with moments of one byte per entry."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lrtrain.distributed.sharding import local
from lrtrain.optim.base import ShardedOptimizer
from lrtrain.optim.quantized import BLOCK, block_maxima, blocks_of, dequantize, quantize
from lrtrain.optim.rows import Rows, rows_like
from lrtrain.optim.stacks import Stack

SMALL = 4096
MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))  # (moment, whether it is signed)


class AdamW8bit(ShardedOptimizer):
    """AdamW with quantized moments (Dettmers et al., ICLR 2022): 2.03 bytes per entry instead of 8.

    The step uses the new moments before they are quantized. Parameters of fewer than 4,096 entries keep float32
    moments. Blocks lie within rows, and the unsharded shape decides which parameters are small, so that precision,
    steps and checkpoints do not depend on the number of processes. (torchao's optimizer decides by the shard.) The
    blocks of a vector may span two shards, so its scales are replicated.
    """

    elementwise = True
    replicated = frozenset({"exp_avg_vector_scale", "exp_avg_sq_vector_scale"})

    def takes(self, name: str, p: Tensor, role: str) -> bool:
        return math.prod(p.shape[-2:]) >= SMALL

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        state = {}
        for moment, _ in MOMENTS:
            state[moment] = rows_like(p, *p.shape[1:], dtype=torch.uint8)
            if p.ndim == 1:
                state[f"{moment}_vector_scale"] = torch.zeros(blocks_of(p.shape[0]), device=local(p).device)
            else:
                state[f"{moment}_scale"] = rows_like(p, blocks_of(p.shape[1]))
        return state

    def direction(self, stack: Stack, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        if len(stack.shape) == 1:
            return self._of_vectors(stack.rows, gradient, state, step)
        first, second = (dequantize(state[m], state[f"{m}_scale"], signed) for m, signed in MOMENTS)
        update = self.adam_step(gradient, first, second, step)
        for (moment, signed), new in zip(MOMENTS, (first, second), strict=True):
            state[f"{moment}_scale"].copy_(block_maxima(new))
            state[moment].copy_(quantize(new, state[f"{moment}_scale"], signed))
        return update

    def _of_vectors(self, rows: Rows, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """`direction` for shards of vectors: blocks are those of the whole vectors, their maxima are all-reduced."""
        before = rows.first % BLOCK
        start = rows.first // BLOCK
        here = slice(start, start + blocks_of(before + gradient.shape[-1]))

        def placed(part: Tensor) -> Tensor:
            return F.pad(part.view(-1, part.shape[-1]), (before, 0))

        def scales(moment: str) -> Tensor:
            return state[f"{moment}_vector_scale"].view(-1, blocks_of(rows.shape[0]))

        first, second = (
            dequantize(placed(state[m]), scales(m)[:, here], signed)[:, before:].view_as(gradient)
            for m, signed in MOMENTS
        )
        update = self.adam_step(gradient, first, second, step)
        for (moment, signed), new in zip(MOMENTS, (first, second), strict=True):
            largest = torch.zeros_like(scales(moment))
            largest[:, here] = block_maxima(placed(new))
            scales(moment).copy_(rows.max(largest))
            codes = quantize(placed(new), scales(moment)[:, here], signed)[:, before:]
            state[moment].copy_(codes.view_as(gradient))
        return update
