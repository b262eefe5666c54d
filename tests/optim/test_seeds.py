"""What optimizers draw at random: another draw for another seed, the same one on any number of processes."""

from pathlib import Path

import pytest
import torch
from crew import together
from odd_model import Factors, stepped
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lrtrain import distributed
from lrtrain.distributed.sharding import whole
from lrtrain.engine.base import ShardedOptimizer

DRAWN = {"galore": "basis", "fira": "basis", "apollo": "bases", "apollo_mini": "bases", "spectron": "vector"}


def drawn(optimizer: ShardedOptimizer) -> list[torch.Tensor]:
    """What the optimizer drew at random."""
    return optimizer.shared() or [s[k] for s in optimizer.state.values() for k in ("basis", "vector") if k in s]


@pytest.mark.parametrize("optim", DRAWN)
def test_each_seed_has_its_own_projections_and_starts(optim: str):
    first, again, other = (drawn(stepped(optim, seed, Factors(), steps=1)) for seed in (0, 0, 1))
    assert first and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_each_seed_rounds_by_its_own_noise():
    first, again, other = (Factors(torch.bfloat16) for _ in range(3))
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        stepped("adamw", seed, model)
    weights = [layer.A.weight for layer in first.layers]
    assert all(torch.equal(p, layer.A.weight) for p, layer in zip(weights, again.layers, strict=True))
    assert not any(torch.equal(p, layer.A.weight) for p, layer in zip(weights, other.layers, strict=True))


def sharded(folder: Path) -> None:
    """Of each optimizer what it drew and the weights, on two processes; AdamW's are bfloat16."""
    world = distributed.start()
    try:
        for optim in ("adamw", *DRAWN):
            model = Factors(torch.bfloat16 if optim == "adamw" else torch.float32)
            fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)))
            optimizer = stepped(optim, 7, model)
            found = [whole(t) for t in (*drawn(optimizer), *model.parameters())]
            if world.main:
                torch.save(found, folder / f"{optim}.pt")
    finally:
        distributed.stop()


def test_one_seed_draws_alike_on_one_process_and_on_two(tmp_path: Path):
    together(sharded, (tmp_path,), tmp_path)
    for optim in ("adamw", *DRAWN):
        model = Factors(torch.bfloat16 if optim == "adamw" else torch.float32)
        optimizer = stepped(optim, 7, model)
        alone = [t.detach() for t in (*drawn(optimizer), *model.parameters())]
        both = torch.load(tmp_path / f"{optim}.pt")
        for here, there in zip(alone, both, strict=True):
            if optim == "adamw":  # nothing is summed over processes: rounding too is the same bit for bit
                assert torch.equal(here, there)
            torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)
