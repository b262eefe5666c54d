"""Which layers hold a factor pair, and that the order of a pair's steps does not matter."""

import re
from typing import Any

import pytest
import torch
from factored import Model, set_gradients
from launching import OPTIM
from shards import Meeting, SimulatedRows, in_threads
from torch import Tensor, nn

from lrtrain.config.compose import compose
from lrtrain.errors import ConfigError
from lrtrain.model.build import make_model
from lrtrain.optim.adamw import AdamW
from lrtrain.optim.loro import LORO
from lrtrain.optim.pairs import factor_pairs
from lrtrain.optim.preconditioned import PreconditionedAdamW
from lrtrain.optim.spectron import Spectron

SMALL = ("model.config.hidden_size=32", "model.config.num_attention_heads=4", "param.rank=4", "model.vocab_size=64")
WITH = ("param=lowrank", "param=sltrain", "param=relora", "param=lost param.activation=none")
WITHOUT = (
    "param=lowrank param.residual=true",
    "param=lost param.activation=silu",
    "param=cola",
    "param=nested",
    "param=sst",
)
PARTNERS = [
    (Spectron, {"momentum": 0.95, "iterations": 2, "orthogonalization": "polar_express"}),
    (PreconditionedAdamW, {"damping": 1e-6, "adam": True}),
]
MADE = [*PARTNERS, (LORO, {"every": 5, "large_step": "exact", "refresh": True, "approx_scale": None})]
every_method = pytest.mark.parametrize(("cls", "own"), MADE, ids=lambda v: getattr(v, "optim", ""))


@pytest.mark.parametrize("param", WITH)
def test_a_pair_is_the_product_that_the_weight_is_linear_in(param: str):
    model = make_model(compose(*SMALL, *param.split()))
    pairs = factor_pairs(model, "loro")
    names = {p: name for name, p in model.named_parameters()}
    assert len(pairs) == 7 * len(model.model.layers)
    for pair in pairs:
        assert (names[pair.left], names[pair.right]) == (f"{pair.name}.B.weight", f"{pair.name}.A.weight")
        assert pair.left.shape[1] == pair.right.shape[0] == 4


@every_method
@pytest.mark.parametrize("param", [*WITHOUT, "param=dense"])
def test_a_model_without_pairs_is_refused(cls: type, own: dict[str, Any], param: str):
    rank = "param.rank=null" if param == "param=dense" else "param.rank=4"
    model = make_model(compose(*SMALL, *param.split(), rank))
    with pytest.raises(ConfigError, match=f"^optim={cls.optim} .*param=lowrank"):
        cls(model, **own, **OPTIM)


@every_method
def test_all_but_the_factors_follow_adamw(cls: type, own: dict[str, Any]):
    ours, plain = Model(), Model()
    optimizer, adamw = cls(ours, **own, **OPTIM), AdamW(plain, **OPTIM)
    for _ in zip(set_gradients(ours, 4), set_gradients(plain, 4), strict=True):
        optimizer.step()
        adamw.step()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q) == ("A.weight" not in name and "B.weight" not in name), name


@pytest.mark.parametrize(("cls", "own"), PARTNERS)
def test_the_order_of_a_pairs_steps_does_not_matter(cls: type, own: dict[str, Any]):
    """Within the backward pass gradients come in the order of the graph."""
    found: list[list[Tensor]] = []
    for order in (1, -1, None):
        model = Model()
        optimizer = cls(model, **own, **OPTIM)
        for _ in set_gradients(model, 6):
            if order is None:
                optimizer.step()
                continue
            optimizer.begin_step()
            for p in [*model.parameters()][::order]:
                optimizer.step_one(p, optimizer.group_of[p] if p in optimizer.pair_of else optimizer.param_groups[-1])
        found.append([p.detach() for pair in optimizer.pairs for p in pair[1:]])
    for same in zip(*found, strict=True):
        assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
        assert not torch.equal(same[0], torch.zeros_like(same[0]))


@pytest.mark.parametrize(("cls", "own"), PARTNERS)
def test_what_a_skipped_factor_left_is_forgotten(cls: type, own: dict[str, Any]):
    model = Model()
    optimizer = cls(model, **own, **OPTIM)
    pair = optimizer.pairs[0]
    for _ in set_gradients(model, 1):
        optimizer.begin_step()
        optimizer.step_one(pair.left, optimizer.group_of[pair.left])
        assert optimizer.terms
        optimizer.begin_step()
        assert not optimizer.terms


@pytest.mark.parametrize(("cls", "own"), PARTNERS)
@pytest.mark.parametrize("processes", [2, 3, 7])
def test_steps_on_shards_are_those_on_the_whole(cls: type, own: dict[str, Any], processes: int):
    """Of rows that are shared unevenly, or are fewer than the processes."""
    model = Model()
    optimizer = cls(model, **own, **OPTIM)
    for _ in set_gradients(model, 5):
        optimizer.step()
    expected = [p.detach() for pair in optimizer.pairs for p in pair[1:]]

    def on_shards(index: int, meeting: Meeting) -> list[Tensor]:
        whole, here = Model(), Model()
        shapes = {}
        for p, full in zip(here.parameters(), whole.parameters(), strict=True):
            rows = SimulatedRows(full.shape, index, meeting)
            p.data = rows.cut(full.detach()).clone()
            shapes[p] = rows
        mine = cls(here, **own, **OPTIM)
        mine.rows = shapes
        for _ in set_gradients(whole, 5):
            for p, full in zip(here.parameters(), whole.parameters(), strict=True):
                assert full.grad is not None
                p.grad = shapes[p].cut(full.grad).clone()
            mine.step()
        return [p.detach() for pair in mine.pairs for p in pair[1:]]

    for parts, p in zip(zip(*in_threads(processes, on_shards), strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts), p, rtol=1e-4, atol=1e-6)


@every_method
def test_state_exists_on_meta_and_is_counted(cls: type, own: dict[str, Any]):
    model = Model()
    held = cls(model, **own, **OPTIM).state_bytes()
    assert held == cls(Model().to("meta"), **own, **OPTIM).state_bytes()
    factors = [p for n, p in model.named_parameters() if re.search("[AB].weight", n)]
    others = 8 * (sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in factors))
    if cls is Spectron:  # a momentum and a vector for the power iteration
        expected = sum(4 * p.numel() + 4 * p.shape[1] for p in factors)
    else:
        expected = sum(8 * p.numel() for p in factors)
    assert held == others + expected


@every_method
def test_bfloat16_factors_follow_float32_ones(cls: type, own: dict[str, Any]):
    exact, rounded = Model(), Model(torch.bfloat16)
    start = [p.detach().clone() for p in exact.parameters()]
    for model in (exact, rounded):
        optimizer = cls(model, **own, **{**OPTIM, "lr": 0.05})
        for _ in set_gradients(model, 4):
            optimizer.step()
    for p, q, before in zip(exact.parameters(), rounded.parameters(), start, strict=True):
        if isinstance(p, nn.Parameter) and p.ndim == 2:
            assert q.dtype == torch.bfloat16
            assert (p - q.float()).norm() < 0.2 * (p - before).norm()


def test_a_learning_rate_ratio_is_for_left_factors_alone():
    optimizer = AdamW(make_model(compose(*SMALL, "param=sltrain")), **{**OPTIM, "lr_ratio": 16.0})
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert {name.split(".")[-2:][0] for name, lr in rates.items() if lr == pytest.approx(0.16)} == {"B"}
    assert all(lr == pytest.approx(0.16 if name.endswith("B.weight") else 0.01) for name, lr in rates.items())
