"""What is random in a step."""

from types import SimpleNamespace
from typing import Any, cast

import torch

from lrtrain.run.step import seed_step


def drawn(step: int, dist_rank: int, seed: int = 0) -> tuple[torch.Tensor, list[float]]:
    """A dropout mask of a step on a process, and what its layers draw."""
    draws: list[float] = []
    layer = SimpleNamespace(draw=lambda generator: draws.append(torch.rand((), generator=generator).item()))
    run = {
        "config": SimpleNamespace(train=SimpleNamespace(seed=seed)),
        "progress": SimpleNamespace(step=step),
        "world": SimpleNamespace(dist_rank=dist_rank),
        "layers": {"a": layer, "b": layer},
    }
    seed_step(cast(Any, SimpleNamespace(**run)))
    return torch.nn.functional.dropout(torch.ones(100)), draws


def test_dropout_differs_between_processes_and_steps_and_seeds_and_repeats():
    mask, _ = drawn(3, 0)
    assert torch.equal(mask, drawn(3, 0)[0])
    for other in (drawn(3, 1), drawn(4, 0), drawn(3, 0, seed=1)):
        assert not torch.equal(mask, other[0])


def test_layers_draw_alike_on_all_processes_and_anew_at_each_step():
    _, draws = drawn(3, 0)
    assert draws == drawn(3, 1)[1] and draws[0] == draws[1]
    assert draws != drawn(4, 0)[1] and draws != drawn(3, 0, seed=1)[1]
