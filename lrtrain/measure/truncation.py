"""Evaluating a model at smaller ranks, with its layers truncated to shares of their rank."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lrtrain.core.metrics import Metric, scalars
from lrtrain.layers.base import FactorizedLinear
from lrtrain.measure.evaluate import Evaluation, perplexity
from lrtrain.model.structure import factorized_layers


@dataclass(frozen=True)
class Truncation:
    """The evaluation of a model truncated to a share of its layers' ranks."""

    share: float
    ranks: tuple[int, int]
    """The smallest and the largest of its layers' ranks."""
    parameters: int
    loss: float

    def metrics(self) -> list[Metric]:
        """As they are logged."""
        at = f"at_rank_share_{self.share:g}"
        return scalars("eval", {f"loss_{at}": self.loss, f"perplexity_{at}": perplexity(self.loss)})


def evaluate_truncated(
    model: nn.Module, parameters: int, evaluate: Callable[[], Evaluation | None]
) -> list[Truncation]:
    """Evaluate at every share that the model's layers offer, ascending; a collective. Empty if they offer none.

    Runs uncompiled: each rank would be compiled for a single pass. Ends early where `evaluate` gives None.

    Args:
        parameters: of the whole model; an engine may have let go of those that `model` computes with.
    """
    layers = [layer for layer in factorized_layers(model).values() if layer.ranks_to_evaluate()]
    found = []
    try:
        for share in sorted({share for layer in layers for share in layer.ranks_to_evaluate()}):
            ranks = [layer.ranks_to_evaluate().get(share, layer.rank) for layer in layers]
            for layer, rank in zip(layers, ranks, strict=True):
                layer.truncate(rank)
            with torch.compiler.set_stance("force_eager"):
                evaluation = evaluate()
            if evaluation is None:
                break
            left = parameters - sum(map(dropped_parameters, layers, ranks))
            found.append(Truncation(share, (min(ranks), max(ranks)), left, evaluation.loss))
    finally:
        for layer in layers:
            layer.truncate(layer.rank)
    return found


def dropped_parameters(layer: FactorizedLinear, rank: int) -> int:
    """The number of parameters that truncating a layer to `rank` removes from its factors."""
    return (layer.rank - rank) * (layer.in_features + layer.out_features)
