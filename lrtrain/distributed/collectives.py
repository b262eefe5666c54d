"""Small collectives over all ranks: sums, maxima, broadcasts, and checks whose outcome reaches every rank."""

import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lrtrain.errors import ConfigError

T = TypeVar("T")


def sum_over_ranks(*values: float) -> list[float]:
    """Each value summed over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


def max_over_ranks(*values: float) -> list[float]:
    """The maximum of each value over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def broadcast_from_rank0(value: Any) -> Any:
    """Rank 0's `value`, on every rank; it is pickled."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def run_on_rank0(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only; its result, or the ConfigError it raised, reaches every rank."""
    outcome: tuple[T | None, ConfigError | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = (action(), None)
        except ConfigError as error:
            outcome = (None, error)
    result, error = broadcast_from_rank0(outcome)
    if error is not None:
        raise error
    return result


def run_on_all_ranks(action: Callable[[], T]) -> T:
    """Run `action` on every rank; its result here.

    Raises:
        ConfigError: on every rank, if `action` raised one on any; it names those ranks unless all failed.
    """
    result, error = None, None
    try:
        result = action()
    except ConfigError as raised:
        error = raised
    mine = None if error is None else (dist.get_rank(), socket.gethostname(), str(error))
    told: list[tuple[int, str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    failed = [one for one in told if one is not None]
    if not failed:
        return result  # type: ignore[return-value]
    rank, host, sentence = failed[0]
    where = "" if len(failed) == len(told) else f"on process {rank} (host {host}) alone: "
    if 1 < len(failed) < len(told):
        where = f"on {len(failed)} of {len(told)} processes, the first is {rank} (host {host}): "
    raise ConfigError(f"{where}{sentence}") from error


def check_equal_on_all_ranks(value: str, what: str) -> None:
    """Check that `value` is the same on all ranks.

    Raises:
        ConfigError: on every rank, naming `what` and the ranks that differ from rank 0.
    """
    values: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    others = [rank for rank, other in enumerate(values) if other != values[0]]
    if others:
        raise ConfigError(f"{what} differs between process 0 and {others}; start all with the same files and overrides")
