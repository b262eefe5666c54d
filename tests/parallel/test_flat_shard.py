"""Ranges of entries as rectangles, and as torch.distributed.checkpoint saves and loads them."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lrtrain import distributed
from lrtrain.checkpoint.reader import TensorPlanner, TensorReader
from lrtrain.distributed.flat_shard import FlatShard, rectangles
from lrtrain.distributed.sharding import local, whole, whole_at

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4)])
def test_rectangles_cover_a_range_once_and_in_order(shape: tuple[int, ...]):
    entries = torch.arange(int(torch.Size(shape).numel())).view(shape)
    for first in range(entries.numel()):
        for last in range(first, entries.numel() + 1):
            found = [*rectangles(shape, first, last)]
            pieces = [entries[tuple(slice(o, o + s) for o, s in zip(*r, strict=True))].flatten() for r in found]
            assert torch.cat([torch.empty(0, dtype=torch.int64), *pieces]).tolist() == [*range(first, last)]
            assert len(found) <= (3 if len(shape) == 2 else 1 if len(shape) < 2 else 5)


@pytest.fixture
def alone():
    yield distributed.start()
    distributed.stop()


def test_it_is_saved_as_the_whole_tensor_and_loaded_from_it(alone, tmp_path: Path):
    value = torch.randn(5, 4)
    flat = FlatShard(value.flatten(), value.shape, (0, 20), CPU)
    dcp.save({"flat": flat, "plain": value}, checkpoint_id=tmp_path)
    plain, other = torch.zeros(5, 4), FlatShard(torch.zeros(20), (5, 4), (0, 20), CPU)
    dcp.load({"flat": plain, "plain": other}, storage_reader=TensorReader(tmp_path), planner=TensorPlanner())
    assert torch.equal(plain, value) and torch.equal(local(other).view(5, 4), value)
    assert torch.equal(whole(flat), value) and torch.equal(whole_at(flat, 0), value)


def test_what_is_offloaded_is_made_whole_where_the_model_computes(alone):
    """The layers' buffers are there. No second device is needed to see it: meta is another one than the CPU."""
    flat = FlatShard(torch.zeros(6), (2, 3), (0, 6), torch.device("meta"))
    for other in (flat, flat.detach(), flat.clone(), torch.empty_like(flat)):
        found = whole_at(other, 0)
        assert found is not None and whole(other).device == found.device == torch.device("meta")
        assert local(other).device == CPU


def test_it_has_no_arithmetic_that_would_silently_be_of_a_part(alone):
    flat = FlatShard(torch.zeros(6), (2, 3), (0, 6), CPU)
    with pytest.raises(NotImplementedError, match="local part or the whole"):
        flat + 1
