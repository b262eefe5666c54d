"""Parameters of one shape that are stepped at once move as each would alone, by as few kernels as one of them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import together
from factored import lowrank
from launching import ROOT, SMALL
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrtrain import distributed
from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.distributed.sharding import local, whole
from lrtrain.optim import orthogonal, stacks
from lrtrain.optim.base import ShardedOptimizer
from lrtrain.optim.deal import Deal
from lrtrain.optim.rows import Rows
from lrtrain.simulation.operators import launches

NAMES = sorted(path.stem for path in (ROOT / "conf" / "optim").glob("*.yaml") if path.stem not in ("base", "torch"))
SETTINGS = {
    **dict.fromkeys(("galore", "fira", "apollo", "apollo_mini"), ["optim.gap=3"]),
    "dct_adamw": ["optim.gap=2", "optim.error_feedback=8bit"],
    "loro": ["optim.every=4"],
}
LARGE = ("adamw8bit", "dct_adamw", "fira")
"""Where a difference in the last bits may round to another code, or is divided by a small norm."""
EXACT = ("adamw", "adamw8bit", "loro")
SIZES = (90, 70, 60)  # in, out, rank: factors large enough for eight bits


class Layers(nn.Module):
    """A block of equal low-rank layers and norms, large enough to be quantized."""

    layers: Any
    norms: Any

    def __init__(self, count: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.layers = nn.ModuleList([lowrank(*SIZES, bias=False) for _ in range(count)])
        self.norms = nn.ModuleList([nn.LayerNorm(5000) for _ in range(count)])
        for i, layer in enumerate(self.layers):
            layer.load_state_dict(layer.init_parameters(torch.Generator().manual_seed(i)))
        self.to(dtype)


@functools.cache
def maker(optim: str, *overrides: str) -> Callable[[nn.Module], ShardedOptimizer]:
    return choice(compose(*SMALL, "param=lowrank", f"optim={optim}", *overrides).optim)


def taken(optim: str, count: int, at_once: int, dtype: torch.dtype = torch.float32) -> tuple[Layers, ShardedOptimizer]:
    """The model and its optimizer after five steps, in which `at_once` layers are stepped together.

    A factor's first gradient is zero, and another one has none once.
    """
    model = Layers(count, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacks, "entries_at_once", lambda device: at_once * SIZES[0] * SIZES[2])
        optimizer = maker(optim, "optim.weight_decay=0.1", *SETTINGS.get(optim, []))(model)
    for step in range(5):
        set_gradients(model, step)
        if step == 0:
            model.layers[1].A.weight.grad.zero_()
        if step == 3:
            model.layers[0].B.weight.grad = None
        optimizer.step()
    return model, optimizer


def set_gradients(model: nn.Module, step: int) -> None:
    dice = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=dice).to(p)


@pytest.mark.parametrize("optim", NAMES)
def test_steps_at_once_are_those_of_each_alone(optim: str):
    (model, together), (other, alone) = (taken(optim, 4, at_once) for at_once in (3, 1))
    assert not alone.stacks and (together.stacks or optim == "adamw")
    rtol, atol = (0.0, 0.0) if optim in EXACT else (1e-4, 1e-5)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=name)
    assert together.state_bytes() == alone.state_bytes()
    ours, theirs = together.named_state(), alone.named_state()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    for key in ours:
        if "step" in key or optim in EXACT:
            assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
def test_rounding_at_once_is_that_of_each_alone(optim: str):
    (model, together), (other, _) = (taken(optim, 4, at_once, torch.bfloat16) for at_once in (3, 1))
    assert together.stacks
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_reset_state_stays_in_its_stack():
    model, optimizer = taken("galore", 3, 3)
    p = model.layers[1].B.weight
    optimizer.initialize_state(p)
    assert optimizer.state[p]["step"] == 0 and not optimizer.stacks[p].state["first"][1].any()
    assert optimizer.stacks[p].state["first"][0].any()


class Launches(TorchDispatchMode):
    """Counts kernels."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.count += launches(func, given or [t for t in tree_leaves(out) if isinstance(t, Tensor)])
        return out


def launched(optim: str, count: int) -> int:
    """Kernels of the second step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacks, "entries_at_once", lambda device: 2**30)
        patch.setattr("lrtrain.optim.muon.orthogonalize", orthogonal._orthogonalize_bfloat16)
        model = Layers(count)
        optimizer = maker(optim)(model)
        set_gradients(model, 0)
        optimizer.step()
        with Launches() as counted:
            optimizer.step()
    return counted.count


@pytest.mark.parametrize("optim", NAMES)
def test_a_step_launches_as_many_kernels_for_many_layers_as_for_few(optim: str):
    assert launched(optim, 2) == launched(optim, 5)


def trained(out: Path) -> None:
    """The weights of each optimizer after four steps in stacks, and matrices that were dealt out and came back."""
    world = distributed.start()
    stacks.entries_at_once = lambda device: 2**30
    found: dict[str, list[Tensor]] = {}
    model = Layers(4)
    for optim in NAMES:
        model = Layers(4)
        if world.size > 1:
            fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)))
        optimizer = maker(optim, *SETTINGS.get(optim, []))(model)
        for step in range(4):
            dice = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
                assert p.grad is not None
                local(p.grad).copy_(optimizer.rows[p].cut(torch.randn(p.shape, generator=dice)))
            optimizer.step()
        found[optim] = [whole(p) for p in model.parameters()]
    rows = Rows(model.layers[0].B.weight)
    given = torch.randn(4, *rows.shape, generator=torch.Generator().manual_seed(0))
    deal = Deal(rows, rows.cut(given))
    mine = deal.out(rows.cut(given))
    expected = given.split(deal.each)[world.dist_rank] if world.dist_rank * deal.each < 4 else given[:0]
    assert torch.equal(mine[: len(expected)], expected) and not mine[len(expected) :].any()
    assert torch.equal(deal.back(mine), rows.cut(given))
    here = orthogonal._orthogonalize_bfloat16(rows.cut(given), rows, orthogonal.ITERATIONS["quintic"])
    found["dealt"] = [rows.gather(here)]
    if world.main:
        torch.save(found, out)
    distributed.stop()


@pytest.mark.full
def test_stacks_on_three_processes_move_as_on_one(tmp_path: Path):
    for size in (1, 3):
        together(trained, (tmp_path / f"{size}.pt",), tmp_path, size)
    one, three = (torch.load(tmp_path / f"{size}.pt") for size in (1, 3))
    for name, expected in one.items():
        for p, q in zip(expected, three[name], strict=True):
            torch.testing.assert_close(q, p, rtol=0, atol=1e-3 if name in LARGE else 2e-5, msg=name)
