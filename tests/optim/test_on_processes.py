"""Every optimizer on three processes against one, and from its saved state on: no engine, no training loop."""

from pathlib import Path

import pytest
import torch
from crew import together
from launching import ROOT
from odd_model import Factors, made, step_along
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lrtrain import distributed
from lrtrain.distributed.sharding import local, whole
from lrtrain.distributed.world import World

NAMES = sorted(path.stem for path in (ROOT / "conf" / "optim").glob("*.yaml") if path.stem != "base")
# Refreshes, between the second step and the fourth.
SETTINGS = {
    **dict.fromkeys(("galore", "fira", "apollo", "apollo_mini"), ["optim.gap=3"]),
    "dct_adamw": ["optim.gap=3", "optim.error_feedback=8bit"],
    "loro": ["optim.every=3"],
}
LARGE = {"adamw8bit": 1e-3, "dct_adamw": 1e-3, "fira": 1e-3}
"""Where a difference in the last bits may round to another code, or is divided by the norm of a row's projection, which
is small for some rows; else 2e-5."""


def sharded(world: World) -> Factors:
    model = Factors()
    if world.size > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)))
    return model


def train(out: Path) -> None:
    """Each optimizer for four steps, and the last two of them again from its state: the weights are the same."""
    world = distributed.start()
    found: dict[str, list[Tensor]] = {}
    for name in NAMES:
        model, again = sharded(world), sharded(world)
        optimizer = made(name, 0, model, *SETTINGS.get(name, []))
        step_along(optimizer, range(2))
        with torch.no_grad():
            for p, q in zip(model.parameters(), again.parameters(), strict=True):
                local(q).copy_(local(p))
        resumed = made(name, 0, again, *SETTINGS.get(name, []))
        for key, value in resumed.named_state().items():
            local(value).copy_(local(optimizer.named_state()[key]))
        step_along(optimizer, (2, 3))
        step_along(resumed, (2, 3))
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(local(p), local(q)), name
        found[name] = [whole(p) for p in model.parameters()]
    if world.main:
        torch.save(found, out)
    distributed.stop()


@pytest.fixture(scope="module")
def weights(tmp_path_factory, cache: Path) -> list[dict[str, list[Tensor]]]:
    folder = tmp_path_factory.mktemp("optimizers")
    for size in (1, 3):
        together(train, (folder / f"{size}.pt",), folder, size)
    return [torch.load(folder / f"{size}.pt") for size in (1, 3)]


@pytest.mark.parametrize("name", NAMES)
def test_three_processes_give_the_weights_of_one(weights: list[dict[str, list[Tensor]]], name: str):
    one, three = (found[name] for found in weights)
    for before, p, q in zip(Factors().parameters(), one, three, strict=True):
        assert not torch.equal(before, p)
        torch.testing.assert_close(q, p, rtol=0, atol=LARGE.get(name, 2e-5))
