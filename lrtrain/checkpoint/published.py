"""The form in which checkpoints of an architecture are published.

transformers 5 renames and fuses some of their tensors when it reads them, and does the reverse when it writes them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def published(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors, by name, that a checkpoint has for one of the model's state.

    Args:
        model: dense; on any device.
    """
    return revert_weight_conversion(model, {name: tensor})


class PublishedParts:
    """All tensors of a model's checkpoint, made from those of its state one at a time.

    Args:
        model: dense; on any device.
        state: shape and dtype of each tensor of its state that is saved; on meta.
        produce: makes one of the state by its name there.
    """

    def __init__(self, model: PreTrainedModel, state: dict[str, Tensor], produce: Callable[[str], Tensor]):
        self.model = model
        self.produce = produce
        self.shapes: dict[str, Tensor] = {}
        """On meta, by name in the checkpoint; the parts of a tensor one after the other."""
        self.whole: dict[str, str] = {}
        """Name in the checkpoint → name in the state."""
        for name, tensor in state.items():
            parts = published(model, name, tensor)
            self.shapes |= parts
            self.whole |= dict.fromkeys(parts, name)
        self.waiting: dict[str, Tensor] = {}

    def take(self, part: str) -> Tensor:
        """One of the checkpoint's tensors, by its name there, once each; the rest of the same whole is kept for the
        next calls."""
        if part not in self.waiting:
            name = self.whole[part]
            self.waiting = published(self.model, name, self.produce(name))
        return self.waiting.pop(part)


def from_published(model: PreTrainedModel, name: str, like: Tensor, read: Callable[[str], Tensor]) -> Tensor:
    """A tensor of a dense model's state, from those of a checkpoint: the inverse of `published`.

    What transformers does when it writes only moves values, so indices show where each of them goes.

    Args:
        like: of its shape; on meta.
        read: a tensor of the checkpoint; raises KeyError if there is none of this name.
    """
    places = published(model, name, torch.arange(like.numel()).view(like.shape))
    values = {part: read(part) for part in places}
    first = next(iter(values.values()))
    found = torch.empty(like.numel(), dtype=first.dtype)
    for part, index in places.items():
        found[index.reshape(-1)] = values[part].reshape(-1)
    return found.view(like.shape)
