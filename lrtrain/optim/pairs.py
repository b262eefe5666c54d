"""Factor pairs B, A of one matrix, for optimizers whose step on one factor depends on the other."""

from abc import abstractmethod
from collections.abc import Collection, Hashable, Iterator
from typing import Any, ClassVar, NamedTuple, Unpack

from torch import Tensor, nn

from lrtrain.errors import ConfigError
from lrtrain.model.structure import factorized_layers
from lrtrain.optim.base import ShardedOptimizer
from lrtrain.optim.common import Common
from lrtrain.optim.stacks import Stack, present_stacks


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

    def alike(self, p: Tensor) -> Hashable:
        """The shapes of both factors, so that stacks of left and of right factors hold the same pairs."""
        return (self.pair_of[p].left.shape, self.pair_of[p].right.shape) if p in self.pair_of else None

    def entries(self, item: Tensor) -> int:
        parameter, _ = self.place_in_batch.get(item, (item, 0))
        if parameter not in self.pair_of:
            return super().entries(item)
        _, left, right = self.pair_of[parameter]
        return max(super(PairOptimizer, self).entries(self.items(p)[0]) for p in (left, right))

    def _step_all(self, ready: list[Tensor], group: dict[str, Any]) -> None:
        self._refresh_pairs(ready)
        super()._step_all(ready, group)

    def _refresh_pairs(self, ready: list[Tensor]) -> None:
        for p in ready:
            if p in self.batches and p in self.pair_of:
                for factor in self.pair_of[p][1:]:
                    self.batches[factor].refresh()


class PartnerOptimizer(PairOptimizer):
    """Steps each factor with terms computed from both factors before either was stepped, in any order."""

    def __init__(self, model: nn.Module, **common: Unpack[Common]):
        self.terms: dict[Tensor, Tensor] = {}
        """By the first member of a stack."""
        super().__init__(model, **common)

    @abstractmethod
    def pair_terms(self, left: Stack, right: Stack) -> tuple[Tensor, Tensor]:
        """The terms ([members,] …) that the steps on stacks of B and of A need from the current pairs; a collective."""

    def term_for(self, stack: Stack) -> Tensor:
        """The term for a stack from `pair_terms`, called when the first factors of its pairs are stepped."""
        if stack.first not in self.terms:
            pair = self.pair_of[stack.first]
            left, right = (self.alone(p) if stack.single else self.stacks[p] for p in (pair.left, pair.right))
            self.terms[pair.left], self.terms[pair.right] = self.pair_terms(left, right)
        return self.terms.pop(stack.first)

    def begin_step(self) -> None:
        self.terms.clear()  # a factor with a non-finite gradient has left its term

    def step_jointly(self) -> Collection[Tensor]:
        ready = [p for p in self.pair_of if p.grad is not None]
        self._refresh_pairs(ready)
        for stack in self._paired_stacks([item for p in ready for item in self.items(p)]):
            parameter, _ = self.place_in_batch.get(stack.first, (stack.first, 0))
            self._step_stack(stack, self.group_of[parameter])
        return ready

    def _paired_stacks(self, items: list[Tensor]) -> Iterator[Stack]:
        """The stacks of these factors, that of the right ones after that of their left ones, so that few terms are held
        at a time. Without all of both they are alone."""
        here = set(items)
        lefts = [item for item in items if item is self.pair_of[item].left]
        for stack in present_stacks(self, lefts):
            rights = [self.pair_of[item].right for item in stack.members]
            of_rights = present_stacks(self, [item for item in rights if item in here])
            if len(of_rights) == 1 and [*of_rights[0].members] == rights:
                yield stack
                yield of_rights[0]
            else:
                yield from (self.alone(item) for item in (*stack.members, *rights) if item in here)
        yield from (self.alone(item) for item in items if self.pair_of[item].left not in here)
