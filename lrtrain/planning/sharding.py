"""What FSDP2 holds besides shards and activations, at each stage of the passes.

A unit's parameters are gathered into one buffer, then copied out of it. In the forward pass the buffer stays until the
next unit's parameters are copied out; in the backward pass the next unit is gathered while one is at work. Gradients
are copied into a buffer in the dtype of the reduction, which stays until the next unit's gradients are reduced.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lrtrain.config.dtypes import DTYPES
from lrtrain.config.schema import Config
from lrtrain.engine.base import Spread
from lrtrain.engine.fsdp import sharded_units
from lrtrain.planning.timeline import Moment, parameter_counts


@dataclass(frozen=True)
class Sharding:
    """The bytes of a step's buffers. Units are those of `timeline`."""

    parameters: list[int]
    """Of each unit and of the rest."""
    trained: list[int]
    complete: list[int]
    """As `trained`, before they are cut by tensor parallelism."""
    shards: int
    """Processes that share a gradient."""
    own: int
    """Bytes of a stored parameter, and of its gradient."""
    used: int
    """Bytes of a parameter in use, and of its gradient."""
    unsharded: int
    """`used`, or 0 if it is the stored parameter itself."""
    buffer: int
    """Bytes of a parameter on its way."""
    reduced: int
    """Bytes of a gradient on its way."""
    accumulates: bool
    """Whether the gradients of an earlier micro-batch are there."""
    in_backward: bool
    embedding: int | None
    """The unit whose gradient needs no parameters."""

    @classmethod
    def of(
        cls,
        config: Config,
        model: PreTrainedModel,
        dtype: torch.dtype,
        own: int,
        world_size: int,
        spread: Spread,
        complete: list[int],
    ) -> "Sharding":
        """`complete`: of the model before `timeline` changed it."""
        units = sharded_units(model)
        parameters, trained = parameter_counts(model, units)
        wrapped = world_size > 1 or dtype.itemsize != own
        embedding = next((i for i, unit in enumerate(units) if unit is model.get_input_embeddings()), None)
        return cls(
            parameters,
            trained,
            complete,
            shards=spread.gradients,
            own=own,
            used=dtype.itemsize,
            unsharded=dtype.itemsize if spread.parameters > 1 or dtype.itemsize != own else 0,
            buffer=dtype.itemsize if spread.parameters > 1 else 0,
            reduced=DTYPES[config.engine.get("reduce_dtype", "fp32")].itemsize if wrapped else 0,
            accumulates=config.train.batch_size > config.train.micro_batch_size * world_size,
            in_backward=config.optim["in_backward"],
            embedding=embedding,
        )

    def bytes(self, moment: Moment) -> int:
        """Gathered parameters and buffers."""
        unit, rest = moment.unit, len(self.parameters) - 1
        found = self.unsharded * self.parameters[rest]
        if moment.when == "forward":
            return found + (self.unsharded + self.buffer) * self.parameters[unit]
        if unit != rest and (ahead := self._next(moment)) is not None:
            found += self.buffer * self.parameters[ahead]
        if moment.when == "reduced":
            return found + self._reducing(self.trained[unit])
        if unit != self.embedding:
            found += self.unsharded * self.parameters[unit]
        return found + (self.reduced * self.trained[moment.before] if moment.before is not None else 0)

    def _reducing(self, entries: int) -> int:
        """Bytes for a unit's gradients, beside the unsharded ones: a buffer, and when it is filled, and they are freed,
        the new shard (on a process that shares with none it is copied by a division)."""
        copies = 1 / self.shards + (self.shards == 1)
        freed = self.used if self.reduced else 0
        return int(entries * (self.reduced + max(0, self.reduced * copies - freed)))

    def _next(self, moment: Moment) -> int | None:
        """The unit that is gathered while this one is at work in the backward pass."""
        blocks = len(self.parameters) - (1 if self.embedding is None else 3)
        ahead = blocks - 1 if moment.unit >= blocks else moment.unit - 1
        return None if ahead < 0 or moment.unit == self.embedding else ahead

    def gradients(self, moment: Moment) -> int:
        """Bytes of this process's part of complete gradients."""
        complete = self.complete if self.accumulates else [self.complete[i] for i in moment.done]
        return 0 if self.in_backward else self.own * sum(complete) // self.shards
