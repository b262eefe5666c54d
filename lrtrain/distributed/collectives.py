"""Small collectives: sums, maxima, and agreements between all processes."""

import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lrtrain.errors import ConfigError

T = TypeVar("T")


def total(*values: float) -> list[float]:
    """The values summed over all processes, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


def largest(*values: float) -> list[float]:
    """The largest of each value over all processes."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on the main process only; its result, or the ConfigError it raised, reaches every process."""
    outcome: tuple[T | None, ConfigError | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = (action(), None)
        except ConfigError as error:
            outcome = (None, error)
    result, error = from_main(outcome)
    if error is not None:
        raise error
    return result


def on_all(action: Callable[[], T]) -> T:
    """Run `action` on every process; its result.

    Raises:
        ConfigError: on every process, if `action` raised one on any; naming these, if it did not on all.
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


def agree(value: str, what: str) -> None:
    """Check that all processes hold the same value.

    Raises:
        ConfigError: on every process, naming those that differ from process 0.
    """
    values: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    others = [rank for rank, other in enumerate(values) if other != values[0]]
    if others:
        raise ConfigError(f"{what} differs between process 0 and {others}; start all with the same files and overrides")
