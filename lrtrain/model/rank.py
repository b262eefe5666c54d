"""The rank of each layer, from `param.rank`."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers.pytorch_utils import Conv1D

from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.counts import parameter_count, trainable_count
from lrtrain.model.experts import DenseExperts
from lrtrain.model.structure import factorized_layers

RankRule = int | float | str | dict[str, int | float]


@dataclass(frozen=True)
class RankPlan:
    """The rank of each layer of a model, from composition through start and resize to checkpoint and resume."""

    rule: RankRule | None
    """`param.rank`: see `budget_rank` for a string, else `layer_rank`. None only of a model that is dense."""
    exact: Mapping[str, int] = field(default_factory=dict)
    """Ranks by layer name, which come before the rule: allocated at the start, or smaller since a resize."""

    def ranks(
        self, dense: int, found: Mapping[str, nn.Linear | DenseExperts], make_layer: Callable[..., FactorizedLinear]
    ) -> dict[str, int]:
        """The rank of each layer by name.

        Args:
            dense: parameters of the dense model.
            found: the linears that are replaced.

        Raises:
            ConfigError: if the rule gives no rank that fits.
        """
        rule = self.rule
        assert rule is not None
        if isinstance(rule, str):
            rule = budget_rank(rule, dense, found, make_layer)
        return {name: self.exact.get(name) or layer_rank(rule, name, linear) for name, linear in found.items()}


def budget_rank(
    rule: str, dense: int, found: Mapping[str, nn.Linear | DenseExperts], make_layer: Callable[..., FactorizedLinear]
) -> int:
    """The largest rank, the same in all layers, with which the model trains at most a share of its dense parameters.

    Args:
        rule: the share, e.g. `60%`.
        dense: parameters of the dense model.
        found: the linear layers to replace.

    Raises:
        ConfigError: if `rule` is no percentage, or even rank 1 trains more.
    """
    if not re.fullmatch(r"\d+(\.\d+)?%", rule):
        raise ConfigError(f"param.rank={rule} is not a rank, a share such as 0.25, or a percentage such as 60%")
    shapes = Counter(map(kind_of, found.values()))
    examples = {kind_of(linear): linear for linear in found.values()}
    kept = dense - sum(map(parameter_count, found.values()))

    def trained(rank: int) -> int:
        return kept + sum(n * trainable_count(factorized(examples[s], make_layer, rank)) for s, n in shapes.items())

    budget, ranks = float(rule[:-1]) / 100 * dense, range(1, 1 + min(min(out, into) for out, into, *_ in shapes))
    if trained(1) > budget:
        raise ConfigError(f"param.rank={rule} of {dense:,} dense parameters is too few: rank 1 trains {trained(1):,}")
    return bisect_right(ranks, budget, key=trained)


def kind_of(linear: nn.Linear | DenseExperts) -> tuple[int, int, bool, int]:
    """The sizes of a layer, apart from its rank: out, in, whether it has a bias, batch."""
    return linear.out_features, linear.in_features, linear.bias is not None, getattr(linear, "batch", 1)


def layer_rank(rule: int | float | dict[str, int | float], name: str, linear: nn.Linear | DenseExperts) -> int:
    """The rank of one layer: an integer is the rank, a float a share of min(in, out), a mapping from patterns to either
    uses the first pattern that is found in the layer's name.

    Raises:
        ConfigError: if no pattern is found or the rank is not between 1 and min(in, out).
    """
    key = "param.rank"
    if isinstance(rule, dict):
        match = next((pattern for pattern in rule if re.search(pattern, name)), None)
        if match is None:
            raise ConfigError(f"param.rank={rule} has no pattern that matches {name}; add one")
        key, rule = f"param.rank.{match}", rule[match]
    return matrix_rank(rule, key, name, linear.out_features, linear.in_features)


def matrix_rank(rule: int | float, key: str, name: str, m: int, n: int) -> int:
    """A rank for a matrix (m, n): an integer is the rank, a float a share of min(m, n).

    Args:
        key, name: the configuration key and the matrix's name, for the error.

    Raises:
        ConfigError: if the rank is not between 1 and min(m, n).
    """
    largest = min(m, n)
    if isinstance(rule, float):
        if not 0 < rule <= 1:
            raise ConfigError(f"{key}={rule} is not a share of min(in, out): use 0 < share ≤ 1, or an integer rank")
        return max(1, round(rule * largest))
    if not 1 <= rule <= largest:
        raise ConfigError(f"{key}={rule} is not between 1 and min(in, out)={largest} of {name}")
    return rule


def mean_rank(model: nn.Module) -> float | None:
    """The mean rank of the factorized layers; None for a dense model."""
    ranks = [layer.rank for layer in factorized_layers(model).values()]
    return sum(ranks) / len(ranks) if ranks else None


def factorized(
    linear: nn.Linear | DenseExperts, make_layer: Callable[..., FactorizedLinear], rank: int
) -> FactorizedLinear:
    """The factorized layer that replaces a linear layer, on meta."""
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None}
    layer = make_layer(**sizes, rank=rank, device="meta")
    if isinstance(linear, DenseExperts):
        return linear.factorized(layer)
    layer.transposed = isinstance(linear, Conv1D)
    return layer
