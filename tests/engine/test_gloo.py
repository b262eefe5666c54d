"""Sums over processes against the same sums without processes."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from crew import together

from lrtrain import distributed
from lrtrain.engine import shared_memory
from lrtrain.engine.gloo import AllGather, ReduceScatter, by_messages


def numbers(dist_rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(size × 7): what a process has to give."""
    return torch.randn(size * 7, generator=torch.Generator().manual_seed(dist_rank)).to(dtype)


def add_up(dtype: torch.dtype, slot: int | None) -> None:
    """Through shared memory in pieces of `slot` bytes, or by messages."""
    world = distributed.start()
    group = dist.group.WORLD
    assert group is not None and shared_memory.on_one_host(group)
    exchange = partial(by_messages, group)
    if slot is not None:
        shared_memory.SLOT = slot
        exchange = shared_memory.SharedMemory(group).exchange
    given = [numbers(k, world.size, dtype) for k in range(world.size)]
    reduce_scatter, all_gather = ReduceScatter(exchange), AllGather(exchange)
    mine = reduce_scatter.allocate((7,), dtype=dtype, device=world.device)
    reduce_scatter(mine, given[world.dist_rank].clone(), group, dist.ReduceOp.SUM)
    everything = torch.stack(given).double().sum(0)
    # Summed in float32 and rounded once.
    expected = everything.view(world.size, 7)[world.dist_rank]
    torch.testing.assert_close(mine.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)

    gathered = all_gather.allocate((world.size * 7,), dtype=dtype, device=world.device)
    all_gather(gathered, mine, group)
    torch.testing.assert_close(gathered.double(), everything, rtol=torch.finfo(dtype).eps, atol=1e-6)
    own = gathered.view(world.size, 7)[world.dist_rank]
    all_gather(gathered, own, group)  # as FSDP2 does: the input lies within the output
    assert torch.equal(own, mine)
    distributed.stop()


def wait_for_the_other() -> None:
    world = distributed.start(timeout_minutes=5)
    group = dist.group.WORLD
    assert group is not None
    shared, parts = shared_memory.SharedMemory(group), torch.zeros(2, 7)
    (other,) = shared.sockets.values()
    assert other.gettimeout() == 600  # a collective's: twice train.timeout_minutes
    if world.main:
        other.settimeout(0.1)
        with pytest.raises(RuntimeError, match="timed out waiting for process 1 of the group"):
            shared.exchange(parts, parts.clone())
    dist.barrier()
    if not world.main:
        other.close()
    dist.barrier()
    if world.main:
        with pytest.raises(RuntimeError, match="process 1 of the group has ended"):
            shared.exchange(parts, parts.clone())
    distributed.stop()


def test_a_process_that_does_not_come_or_has_ended_is_told(tmp_path: Path):
    together(wait_for_the_other, (), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slot", [None, 16, 2**21])
@pytest.mark.parametrize("processes", [2, 3])
def test_sums_are_cut_and_put_together_again(tmp_path: Path, processes: int, slot: int | None, dtype: torch.dtype):
    together(add_up, (dtype, slot), tmp_path, processes)
