"""Steps that are withheld on the device, so that the CPU need not know whether they were."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def unchanged_unless(taken: Tensor, parts: Sequence[Tensor]) -> Iterator[None]:
    """Give `parts` the values from before the context if `taken`, a truth value on the device, is false."""
    before = [part.clone() for part in parts]
    yield
    for part, old in zip(parts, before, strict=True):
        part.copy_(torch.where(taken, part, old))
