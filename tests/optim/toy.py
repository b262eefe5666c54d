"""Matrices of several shapes with gradients as a test wants them, and row parts of a matrix that work together."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from launching import OPTIM
from shards import in_threads
from torch import Tensor, nn

SHAPES = [(24, 24), (37, 20), (18, 41)]
COMMON: dict[str, Any] = OPTIM | {"eps": 1e-6, "weight_decay": 0.1}


class Matrices(nn.Module):
    """One block of plain linears with weights (m, n)."""

    def __init__(self, shapes: Sequence[tuple[int, int]] = SHAPES, device: str = "cpu"):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(n, m, bias=False, device=device) for m, n in shapes])


def gradients(m: int, n: int, steps: int, seed: int = 0) -> list[Tensor]:
    """Random gradients whose singular values fall by a third each, in directions that drift, with norms that jump."""
    dice = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    k = min(m, n)
    left, right = normal(m, k), normal(n, k)
    found = []
    for step in range(steps):
        left, right = left + 0.2 * normal(m, k), right + 0.2 * normal(n, k)
        u, v = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
        found.append((u * 0.67 ** torch.arange(k)) @ v.T * (10.0 if step % 4 == 2 else 1.0))
    return found


def stepped(make: Callable[[nn.Module], torch.optim.Optimizer], steps: int) -> list[list[Tensor]]:
    """The weights of `Matrices` before each step and after the last, in float64; each has its own `gradients`."""
    torch.manual_seed(0)
    model = Matrices()
    optimizer = make(model)
    given = [gradients(*shape, steps, seed) for seed, shape in enumerate(SHAPES)]
    found = [[p.detach().double() for p in model.parameters()]]
    for step in range(steps):
        for p, sequence in zip(model.parameters(), given, strict=True):
            p.grad = sequence[step].float()
        optimizer.step()
        found.append([p.detach().double() for p in model.parameters()])
    return found


def adam(g: Tensor, m: Tensor, v: Tensor, t: int, eps_convention: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """Adam by the book: (M, V, M / (√V + ε'), bias correction), where ε' is what the convention makes of ε."""
    b1, b2 = COMMON["betas"]
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    eps = COMMON["eps"] * ((1 - b2**t) ** 0.5 if eps_convention == "corrected" else 1.0)
    return m, v, m / (v**0.5 + eps), (1 - b2**t) ** 0.5 / (1 - b1**t)


def decayed(w: Tensor, update: Tensor) -> Tensor:
    return w - COMMON["lr"] * COMMON["weight_decay"] * w - COMMON["lr"] * update


def in_parts(
    work: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor], rows: Tensor, cuts: list[int]
) -> list[Tensor]:
    """`work(part, total)` for row parts of the given lengths, at once; `total` sums over the parts."""
    parts = rows.split(cuts)
    return in_threads(
        len(cuts), lambda i, meeting: work(parts[i], lambda part: torch.stack(meeting.all(i, part)).sum(0))
    )
