"""Updates in the backward pass are withheld on the device where a gradient is not finite."""

import copy
import math
from typing import Any

import pytest
import torch
from test_batches import NAMES, Factored, optimizer, pairs
from torch import Tensor

from lrtrain.optim.base import ShardedOptimizer

BROKEN = 2
"""The step whose gradients are not finite; others come before and after."""


def grouped(optimizer: ShardedOptimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """The parameters and their groups."""
    return [(p, group) for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("name", [*NAMES, "preconditioned_adamw", "spectron"])
def test_a_withheld_step_changes_nothing_and_others_are_what_they_are_without_it(name: str):
    """Of batches and of single matrices."""
    batched, (single, *_) = pairs()
    for model in (Factored(batched), Factored(single)):
        twin = copy.deepcopy(model)
        ours, theirs = optimizer(name, model), optimizer(name, twin)
        dice = torch.Generator().manual_seed(0)
        for step in range(4):
            finite = torch.tensor(step != BROKEN)
            ours.begin_step()
            theirs.begin_step()
            for (p, group), (q, other) in zip(grouped(ours), grouped(theirs), strict=True):
                gradient = torch.randn(p.shape, generator=dice)
                count = ours.state[p]["step"].clone()
                p.grad = gradient.clone() if finite else torch.full_like(gradient, math.nan)
                ours.step_one(p, group, finite)
                if not finite:
                    ours.state[p]["step"].copy_(count)
                    continue
                q.grad = gradient.clone()
                theirs.step_one(q, other)
        for p, q in zip(ours.parameters, theirs.parameters, strict=True):
            assert torch.equal(p, q)
            for key, value in ours.state[p].items():
                assert torch.equal(value, theirs.state[q][key]), key
