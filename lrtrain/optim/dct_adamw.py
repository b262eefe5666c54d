"""DCT-AdamW: Adam in a few columns of the cosine basis (Modoranu et al., arXiv 2505.17967)."""

from collections.abc import Sequence
from typing import Literal, Unpack

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from lrtrain.distributed.sharding import local
from lrtrain.linalg.dct import dct, lift, selected
from lrtrain.optim.dct_columns import DctOptimizer, DctSettings
from lrtrain.optim.row_codes import decode, encode, pack, unpack
from lrtrain.optim.rows import rows_like
from lrtrain.optim.stacks import Stack

BITS = {"none": None, "full": 32, "8bit": 8, "4bit": 4}


class DctAdamW(DctOptimizer):
    """DCT-AdamW: with A = G + E, W ← W − lr·u Dᵢᵀ, where u (m, r) is Adam's step on A Dᵢ and Dᵢ (n, r) are the columns
    of the cosine basis along which A is largest; E ← A − A Dᵢ Dᵢᵀ with error feedback, else 0.

    State of a matrix: 2mr numbers and r indices; error feedback takes mn numbers, bytes, or half bytes.
    """

    replicated = frozenset({"columns"})
    begins_by_gradient = True

    def __init__(
        self,
        model: nn.Module,
        *,
        gap: PositiveInt,
        rotate: bool,
        error_feedback: Literal["none", "full", "8bit", "4bit"],
        **dct: Unpack[DctSettings],
    ):
        self.gap = gap
        self.rotate = rotate
        self.bits = BITS[error_feedback]
        super().__init__(model, **dct)

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        rank, n = self.rank_for(p), p.shape[1]
        state = {
            "first": rows_like(p, rank),
            "second": rows_like(p, rank),
            "columns": torch.arange(rank, device=local(p).device),
        }
        if self.bits == 32:
            state["error"] = rows_like(p, n)
        elif self.bits is not None:
            state["error"] = rows_like(p, n if self.bits == 8 else -(-n // 2), dtype=torch.uint8)
            state |= {"error_low": rows_like(p), "error_gap": rows_like(p)}
        return state

    def direction(self, stack: Stack, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        n = gradient.shape[-1]
        if self.bits is not None:
            gradient.add_(stored_error(state, self.bits, n))
        spectrum = dct(gradient)
        columns = state["columns"]
        if (step - 1) % self.gap == 0:
            chosen = self.choose(stack, spectrum)
            if self.rotate:
                moments = (state["first"], state["second"])
                for moment, moved in zip(moments, transport(moments, columns, chosen), strict=True):
                    moment.copy_(moved)
            columns.copy_(chosen)
        part = selected(spectrum, columns)  # ([members,] rows, r)
        if self.bits is not None:
            store_error(gradient.sub_(lift(part, columns, n)), state, self.bits)
        update = self.adam_step(part, state["first"], state["second"], step)
        return lift(update, columns, n)


def transport(moments: Sequence[Tensor], old: Tensor, new: Tensor) -> list[Tensor]:
    """M D[:, old]ᵀ D[:, new] for each of the moments M ([members,] rows, r): because the columns of D are
    orthonormal, those that stay keep their moments and new ones have zeros.

    Args:
        old, new: indices ([members,] r), ascending.
    """
    place = torch.searchsorted(old, new).clamp_(max=old.shape[-1] - 1)
    stays = (old.gather(-1, place) == new).unsqueeze(-2)
    return [selected(moment, place) * stays for moment in moments]


def stored_error(state: dict[str, Tensor], bits: int, n: int) -> Tensor:
    """The accumulated error E ([members,] rows, n)."""
    if bits == 32:
        return state["error"]
    codes = state["error"] if bits == 8 else unpack(state["error"], n)
    return decode(codes, state["error_low"], state["error_gap"])


def store_error(error: Tensor, state: dict[str, Tensor], bits: int) -> None:
    """Store the error ([members,] rows, n) for the next step, quantized to `bits`."""
    if bits == 32:
        state["error"].copy_(error)
        return
    codes, low, gap = encode(error, bits)
    state["error"].copy_(codes if bits == 8 else pack(codes))
    state["error_low"].copy_(low)
    state["error_gap"].copy_(gap)
