"""The loss on a fixed set: weighted by tokens, summed over all processes, in eval mode."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrtrain.core.metrics import Metric, scalars
from lrtrain.distributed.collectives import sum_over_ranks
from lrtrain.distributed.world import World
from lrtrain.model.loss import TokenLoss


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    loss: float
    """Mean cross-entropy per target token (nats)."""
    tokens: int
    galore_loss: float
    """The loss as printed by GaLore, SLTrain, CoLA and others: the sum of batch means ÷ (batches + 1), which is
    lower."""

    def metrics(self, compat: str | None) -> list[Metric]:
        """As they are logged; with compat=galore their number beside the true one."""
        values = {"loss": self.loss, "perplexity": perplexity(self.loss)}
        if compat == "galore":
            values |= {"loss_galore": self.galore_loss, "perplexity_galore": perplexity(self.galore_loss)}
        return scalars("eval", values)


def perplexity(loss: float) -> float:
    """exp(loss), with the loss capped at 20 nats."""
    return math.exp(min(loss, 20.0))


@torch.no_grad()
def evaluate(
    loss_of: TokenLoss, rows: Tensor, batch_size: int, world: World, stop: Callable[[], bool] = lambda: False
) -> Evaluation | None:
    """Evaluate on all of `rows`, each process on its share; a collective.

    Args:
        loss_of: an engine's `loss`.
        rows: token ids (sequences, seq_len + 1), the same on every process.
        batch_size: sequences per process and forward pass.
        stop: called before each batch on all processes; if it returns True, the result is None.
    """
    loss_of.eval()
    loss = galore = 0.0
    batches = math.ceil(len(rows) / (batch_size * world.size))
    try:
        for batch in range(batches):
            if stop():
                return None
            first = (batch * world.size + world.dist_rank) * batch_size
            mine = rows[first : first + batch_size]
            # Forward passes are collectives: a process without rows runs one that does not count.
            found = loss_of((mine if len(mine) else rows[:1]).to(world.device)).item()
            if len(mine):
                loss += found
                galore += found / mine[:, 1:].numel()
    finally:
        loss_of.train()
    loss, galore = sum_over_ranks(loss, galore / (batches + 1))
    tokens = rows[:, 1:].numel()
    return Evaluation(loss=loss / tokens, tokens=tokens, galore_loss=galore / world.size)


def evenly_spaced(available: int, wanted: int) -> list[int]:
    """At most `wanted` evenly spaced indices below `available`, always the same ones."""
    count = min(available, wanted)
    return [i * available // count for i in range(count)]
