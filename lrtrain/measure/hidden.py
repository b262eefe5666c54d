"""The rank of the hidden states after each block, on a fixed set of tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrtrain.core.metrics import Metric
from lrtrain.distributed.collectives import sum_over_ranks
from lrtrain.distributed.world import World
from lrtrain.measure.representations import SecondMoment, matrix_entropy, matrix_nuclear_norm, rankme
from lrtrain.measure.streaming import LeadingDirection
from lrtrain.model.loss import TokenLoss
from lrtrain.model.structure import blocks


class States:
    """Statistics of the states after one block: their second moment, and sums over sequences."""

    def __init__(self, width: int, device: torch.device):
        self.width, self.device = width, device
        self.begin()

    def begin(self) -> None:
        """Forget all states."""
        self.moment = SecondMoment(self.width, self.device)
        self.nuclear_norm = self.entropy = 0.0
        self.sequences = 0

    def add(self, hidden: Tensor) -> None:
        """Take in states (sequences, tokens, width)."""
        self.moment.add(hidden)
        self.sequences += len(hidden)
        for sequence in hidden:
            self.nuclear_norm += matrix_nuclear_norm(sequence)
            self.entropy += matrix_entropy(sequence)

    def metrics(self) -> dict[str, float]:
        """Over all processes; a collective."""
        self.moment.reduce()
        nuclear_norm, entropy, rows = sum_over_ranks(self.nuclear_norm, self.entropy, self.sequences)
        return {
            "rankme": rankme(self.moment.singular_values(centered=False)),
            "rankme_centered": rankme(self.moment.singular_values(centered=True)),
            "mnn": nuclear_norm / rows,
            "matent": entropy / rows,
        }


class TopStates(LeadingDirection):
    """Cheaper statistics: the leading direction (width,), which improves with each measurement, and sums."""

    def begin(self) -> None:
        super().begin()
        self.nuclear_norm, self.sequences = 0.0, 0

    def add(self, rows: Tensor) -> None:
        """Take in states (sequences, tokens, width); a collective, also for a process that has no sequence."""
        super().add(rows)
        self.sequences += len(rows)
        self.nuclear_norm += sum(map(matrix_nuclear_norm, rows))

    def metrics(self) -> dict[str, float]:
        """Over all processes; a collective."""
        nuclear_norm, rows = sum_over_ranks(self.nuclear_norm, self.sequences)
        return super().metrics() | {"mnn": nuclear_norm / rows}


def whole_states(model: nn.Module, world: World) -> list[States]:
    """New `States` of each block for one measurement of `rankme`, `rankme_centered`, `mnn`, `matent`."""
    return [States(_width(model), world.device) for _ in blocks(model)]


def top_states(model: nn.Module, world: World) -> list[TopStates]:
    """New `TopStates` of each block for all measurements of `top_share`, `mean_share` and `mnn` in a run."""
    return [TopStates(_width(model), world.device) for _ in blocks(model)]


@torch.no_grad()
def hidden_metrics(
    loss_of: TokenLoss, rows: Tensor, batch_size: int, world: World, states: Sequence[States | TopStates]
) -> list[Metric]:
    """`hidden/<metric>/L00`, … for the states after each block, of which `states` say what is kept and measured.

    A collective. Forward hooks process the states, which are not stored. Runs uncompiled and in eval mode.

    Args:
        loss_of: an engine's `loss`.
        rows: token ids (sequences, seq_len + 1), the same on every process; each takes its share of them.
        batch_size: sequences per process and forward pass.
    """
    mine = rows[:0]

    def look(depth: int, hidden: Tensor) -> None:
        states[depth].add(hidden[: len(mine)])

    for found in states:
        found.begin()
    loss_of.eval()
    try:
        with torch.compiler.set_stance("force_eager"), watched(blocks(loss_of.model), look):
            for first in range(0, len(rows), batch_size * world.size):
                mine = rows[first + world.dist_rank * batch_size :][:batch_size]
                # Forward passes are collectives: a process without rows runs one that does not count.
                loss_of((mine if len(mine) else rows[:1]).to(world.device))
    finally:
        loss_of.train()
    return [
        Metric(f"hidden/{metric}", None, f"L{depth:02d}", value)
        for depth, found in enumerate(states)
        for metric, value in found.metrics().items()
    ]


def _width(model: nn.Module) -> int:
    config = model.config.get_text_config()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return config.hidden_size  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def watched(layers: nn.ModuleList, look: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within the context, `look(depth, hidden)` is called with the output of each block."""

    def hook(depth: int) -> Callable[..., None]:
        return lambda module, inputs, output: look(depth, output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(hook(depth)) for depth, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
