"""Calibration: second moments of the inputs of a dense model's linear layers on a text, streamed.

Inputs are not stored. Layers with the same input (q, k and v; gate and up) share one moment, which one process holds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lrtrain.distributed.world import World


@dataclass
class Moment:
    """Moments of the inputs x (in,) of a linear layer, over `count` tokens."""

    products: Tensor
    """Σ x xᵀ (in, in), float64."""
    total: Tensor
    """Σ x (in,), float64."""
    count: int = 0

    @property
    def mean(self) -> Tensor:
        """(in,)."""
        return self.total / self.count

    def centred(self) -> Tensor:
        """Σ (x − mean)(x − mean)ᵀ (in, in)."""
        return self.products - torch.outer(self.total, self.mean)


@contextmanager
def watching(linears: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the context, each forward pass calls `see(name, x)` with the input x (…, in) of each linear layer."""
    hooks = [linear.register_forward_pre_hook(partial(_tell, see, name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tell(see: Callable[[str, Tensor], None], name: str, linear: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    see(name, arguments[0])


@torch.no_grad()
def input_groups(model: nn.Module, linears: Mapping[str, nn.Module], row: Tensor) -> dict[str, list[str]]:
    """Groups of linear layers with the same input, by the name of the first, from one pass over `row` (1, tokens)."""
    groups: dict[str, list[str]] = {}
    seen: dict[int, tuple[str, Tensor]] = {}  # the tensors stay alive, so that no two have the same id

    def see(name: str, x: Tensor) -> None:
        leader, _ = seen.setdefault(id(x), (name, x))
        groups.setdefault(leader, []).append(name)

    with watching(linears, see):
        model(input_ids=row, use_cache=False)
    return groups


@torch.no_grad()
def second_moments(
    model: nn.Module, linears: Mapping[str, nn.Module], rows: Tensor, batch_size: int, world: World
) -> dict[str, Moment]:
    """The input moments of the `linears` that this process owns (process i mod size owns the i-th).

    A collective. The products of each batch are reduced immediately, so a process holds only its own moments and one
    more.

    Args:
        rows: this process's token ids (sequences, tokens), the same number on each process.
    """
    owners = {name: i % world.size for i, name in enumerate(linears)}
    found: dict[str, Moment] = {}

    def see(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).double()  # in float32 the sum of dependent inputs would have negative eigenvalues
        tokens = len(x) * world.size
        products, total = x.T @ x, x.sum(0)
        for part in (products, total):
            dist.reduce(part, dst=owners[name])
        if owners[name] == world.dist_rank:
            moment = found.setdefault(name, Moment(torch.zeros_like(products), torch.zeros_like(total)))
            moment.products += products
            moment.total += total
            moment.count += tokens

    with watching(linears, see):
        for batch in rows.split(batch_size):
            model(input_ids=batch.to(world.device), use_cache=False)
    return found


def in_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Each name alone."""
    return {name: [name] for name in names}
