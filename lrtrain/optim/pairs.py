"""Factor pairs B, A of one matrix, for optimizers whose step on one factor depends on the other."""

from abc import abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, Unpack

from torch import Tensor, nn

from lrtrain.errors import ConfigError
from lrtrain.model.structure import factorized_layers
from lrtrain.optim.base import Common, ShardedOptimizer

T = TypeVar("T")


class FactorPair(NamedTuple):
    """The factors of one layer."""

    name: str
    """The layer's."""
    left: Tensor
    """B (out, r)."""
    right: Tensor
    """A (r, in)."""


def factor_pairs(model: nn.Module, optim: str) -> list[FactorPair]:
    """The pairs of all layers that have one (`FactorizedLinear.factor_pair`), in the model's order.

    Args:
        optim: the name of the optimizer, for the error.

    Raises:
        ConfigError: if there is no pair.
    """
    found = []
    for name, layer in factorized_layers(model).items():
        if names := layer.factor_pair():
            found.append(FactorPair(name, *map(layer.get_parameter, names)))
    if not found:
        raise ConfigError(
            f"optim={optim} steps factor pairs B A, and no layer of this model is linear in such a product; "
            "use param=lowrank, sltrain or relora, param.activation=none or param.residual=false, or optim=adamw"
        )
    return found


class PairOptimizer(ShardedOptimizer):
    """An optimizer that steps the factors of all pairs.

    Raises:
        ConfigError: if the model has none.
    """

    optim: ClassVar[str]
    """The method's name in conf/optim."""

    def __init__(self, model: nn.Module, **common: Unpack[Common]):
        self.pairs = factor_pairs(model, self.optim)
        self.pair_of = {p: pair for pair in self.pairs for p in (pair.left, pair.right)}
        super().__init__(model, **common)
        for pair in self.pairs:
            for name, *of_one in self._pairs_in_batch(pair):
                self.pair_of |= dict.fromkeys(of_one, FactorPair(name, *of_one))
        self.group_of: dict[Tensor, dict[str, Any]] = {p: g for g in self.param_groups for p in g["params"]}

    def takes(self, name: str, p: Tensor, role: str) -> bool:
        return p in self.pair_of

    def involved(self, p: Tensor) -> Collection[Tensor]:
        return self.pair_of[p][1:] if p in self.pair_of else (p,)

    def _pairs_in_batch(self, pair: FactorPair) -> list[FactorPair]:
        """The pairs of single matrices on this process, for a pair of batches."""
        if pair.left not in self.batches:
            return []
        left, right = self.batches[pair.left], self.batches[pair.right]
        names = (f"{pair.name}[{left.first + i}]" for i in range(len(left.matrices)))
        return [FactorPair(*found) for found in zip(names, left.matrices, right.matrices, strict=True)]

    def _step_batch(self, p: Tensor, group: dict[str, Any]) -> None:
        for one in (self.pair_of[p].left, self.pair_of[p].right):
            self.batches[one].refresh()
        super()._step_batch(p, group)


class PartnerOptimizer(PairOptimizer, Generic[T]):
    """Steps each factor with terms computed from both factors before either was stepped, in any order."""

    def __init__(self, model: nn.Module, **common: Unpack[Common]):
        self.terms: dict[Tensor, T] = {}
        super().__init__(model, **common)

    @abstractmethod
    def pair_terms(self, pair: FactorPair) -> tuple[T, T]:
        """The terms that the steps on B and on A need from the current pair; a collective."""

    def term_for(self, p: Tensor) -> T:
        """The term for p from `pair_terms`, called when the first factor of a pair is stepped."""
        if p not in self.terms:
            pair = self.pair_of[p]
            self.terms[pair.left], self.terms[pair.right] = self.pair_terms(pair)
        return self.terms.pop(p)

    def begin_step(self) -> None:
        self.terms.clear()  # a factor with a non-finite gradient has left its term

    def step_jointly(self) -> Collection[Tensor]:
        ready = [p for p in self.pair_of if p.grad is not None]
        for p in ready:  # A right after its B, so that the terms of only one pair are held at a time
            self._step_all([p], self.group_of[p])
        return ready
