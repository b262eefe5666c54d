"""Factor pairs B, A of one matrix, for optimizers whose step on one depends on the other."""

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
    """The pairs of all layers that hold one (`FactorizedLinear.factor_pair`), in the model's order.

    Args:
        optim: the name of the optimizer that cannot do without.

    Raises:
        ConfigError: if there is none.
    """
    found = []
    for name, layer in factorized_layers(model).items():
        if names := layer.factor_pair():
            found.append(FactorPair(name, *map(layer.get_parameter, names)))
    if not found:
        raise ConfigError(
            f"optim={optim} steps on pairs of factors B A, and no layer of this model is linear in such a product; "
            "use param=lowrank, sltrain or relora, param.activation=none or param.residual=false, or optim=adamw"
        )
    return found


class PairOptimizer(ShardedOptimizer):
    """Takes the factors of all pairs.

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

    def _pairs_in_batch(self, pair: FactorPair) -> list[FactorPair]:
        """The pairs of single matrices that are here, of a pair of batches."""
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
    """Steps on factors by what both of a pair were before either stepped, whichever comes first."""

    def __init__(self, model: nn.Module, **common: Unpack[Common]):
        self.seen: dict[Tensor, T] = {}
        super().__init__(model, **common)

    @abstractmethod
    def look(self, pair: FactorPair) -> tuple[T, T]:
        """What the steps on B and on A need to know of the pair as it is now; a collective."""

    def known(self, p: Tensor) -> T:
        """That of `look` which is for p, from before this step: the first of a pair looks for both."""
        if p not in self.seen:
            pair = self.pair_of[p]
            self.seen[pair.left], self.seen[pair.right] = self.look(pair)
        return self.seen.pop(p)

    def begin_step(self) -> None:
        self.seen.clear()  # of what a factor whose gradient was not finite left there

    def step_jointly(self) -> Collection[Tensor]:
        ready = [p for p in self.pair_of if p.grad is not None]
        for p in ready:  # A right after its B, so that what was seen is kept for one pair at a time
            self._step_all([p], self.group_of[p])
        return ready
