"""AdamW with eight-bit moments against AdamW, and against itself in parts."""

import pytest
import torch
from launching import OPTIM
from torch import nn

from lrtrain.optim.adamw import AdamW
from lrtrain.optim.adamw8bit import AdamW8bit

COMMON = OPTIM | {"weight_decay": 0.1}


class Model(nn.Module):
    """One block of an odd and an even matrix, a long vector and a short one."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(331, 64, bias=False), nn.Linear(256, 32, bias=False)])
        self.long = nn.Parameter(torch.randn(5000))
        self.short = nn.Parameter(torch.randn(100))
        self.to(dtype)


def run(cls, steps: int, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = Model(dtype)
    optimizer = cls(model, **COMMON)
    start = [p.detach().clone() for p in model.parameters()]
    dice = torch.Generator().manual_seed(1)
    drift = [torch.randn(p.shape, generator=dice) for p in model.parameters()]
    for _ in range(steps):
        for p, mean in zip(model.parameters(), drift, strict=True):
            p.grad = (mean + 0.3 * torch.randn(p.shape, generator=dice)).to(dtype)
        optimizer.step()
    return model, optimizer, start


def test_it_follows_adamw():
    """Within a few percent of the way that AdamW goes; exactly where moments are kept whole."""
    exact, _, start = run(AdamW, 20)
    model, _, _ = run(AdamW8bit, 20)
    names = [name for name, _ in model.named_parameters()]
    for name, found, expected, before in zip(names, model.parameters(), exact.parameters(), start, strict=True):
        error = (found - expected).norm() / (expected - before).norm()
        assert error < (1e-6 if name == "short" else 0.02), name
        assert (error > 0) == (name != "short"), name


def test_moments_take_two_bytes_and_a_scale_per_block():
    _, optimizer, _ = run(AdamW8bit, 1)
    matrices = 2 * (64 * 331 + 4 * 64 * 2) + 2 * (32 * 256 + 4 * 32)
    vector = 2 * (5000 + 4 * 20)
    assert optimizer.state_bytes() == matrices + vector + 8 * 100
    held = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
    assert held == optimizer.state_bytes()


def test_a_vector_in_parts_is_the_vector_as_a_whole():
    """Shards of 1,667 entries cut through blocks; the maxima are agreed on."""
    torch.manual_seed(0)
    model = Model()
    p = model.long
    whole = AdamW8bit(model, **COMMON)
    gradients = torch.randn(4, 5000)

    class Part:
        """The rows of one of three processes, whose maxima are those of all."""

        def __init__(self, first: int, agreed: list[torch.Tensor]):
            self.shape, self.first, self.agreed = p.shape, first, agreed

        def max(self, scale: torch.Tensor) -> torch.Tensor:
            mine, theirs = scale, self.agreed.pop(0)
            assert torch.equal(torch.maximum(mine, theirs[None]), theirs[None])
            return theirs[None]

    state = {k: v for k, v in whole.state[p].items() if k != "step"}
    parts = [
        {k: v.clone() if "scale" in k else v[i * 1667 : (i + 1) * 1667].clone() for k, v in state.items()}
        for i in range(3)
    ]
    for step, gradient in enumerate(gradients, 1):
        expected = whole.direction(whole.alone(p), gradient.clone(), state, step)
        for i, mine in enumerate(parts):
            agreed = [state["exp_avg_vector_scale"], state["exp_avg_sq_vector_scale"]]
            rows = Part(i * 1667, agreed)
            found = whole._of_vectors(rows, gradient[i * 1667 : (i + 1) * 1667].clone(), mine, step)  # pyright: ignore
            assert torch.equal(found, expected[i * 1667 : (i + 1) * 1667])
            assert torch.equal(mine["exp_avg"], state["exp_avg"][i * 1667 : (i + 1) * 1667])


@pytest.mark.parametrize("cls", [AdamW, AdamW8bit])
def test_bfloat16_parameters_follow_float32_ones_and_steps_repeat(cls):
    """Unbiased rounding: the error does not grow with the steps; its noise is a function of step and name."""
    exact, _, start = run(cls, 40)
    rounded, optimizer, _ = run(cls, 40, torch.bfloat16)
    again, _, _ = run(cls, 40, torch.bfloat16)
    for p, q, same, before in zip(exact.parameters(), rounded.parameters(), again.parameters(), start, strict=True):
        assert q.dtype == torch.bfloat16 and torch.equal(q, same)
        assert (p - q.float()).norm() / (p - before).norm() < 0.06
    assert all(t.dtype != torch.bfloat16 for s in optimizer.state.values() for t in s.values())
