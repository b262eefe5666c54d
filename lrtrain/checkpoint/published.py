"""The names and shapes of tensors in published checkpoints of an architecture.

transformers 5 renames and fuses some of these tensors when reading, and reverses this when writing.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lrtrain.errors import ConfigError


def published(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of a published checkpoint, by name, for one tensor of the model's state.

    Args:
        model: dense; on any device.
    """
    return revert_weight_conversion(model, {name: tensor})


class PublishedParts:
    """All tensors of a model's published checkpoint, made from those of its state one at a time.

    Args:
        model: dense; on any device.
        state: the tensors of its state to save, on meta (shapes and dtypes).
        produce: returns a tensor of the state by name.
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
            if shared := parts.keys() & self.shapes.keys():  # HRM's
                raise ConfigError(
                    f"model_type={model.config.model_type} publishes {name} and others as one tensor {min(shared)}, "
                    "which --to hf-dense cannot write; a run of it can be loaded by lrtrain.load"
                )
            self.shapes |= parts
            self.whole |= dict.fromkeys(parts, name)
        self.waiting: dict[str, Tensor] = {}

    def take(self, part: str) -> Tensor:
        """One tensor of the checkpoint, by its name there, once each; other parts of the same state tensor are kept for
        later calls."""
        if part not in self.waiting:
            name = self.whole[part]
            self.waiting = published(self.model, name, self.produce(name))
        return self.waiting.pop(part)


def from_published(model: PreTrainedModel, name: str, like: Tensor, read: Callable[[str], Tensor]) -> Tensor:
    """A tensor of a dense model's state from those of a published checkpoint: the inverse of `published`.

    transformers only moves values when writing, so writing a tensor of indices shows where each value goes.

    Args:
        like: a tensor of its shape; on meta.
        read: returns a tensor of the checkpoint; raises KeyError for an unknown name.
    """
    places = published(model, name, torch.arange(like.numel()).view(like.shape))
    values = {part: read(part) for part in places}
    first = next(iter(values.values()))
    found = torch.empty(like.numel(), dtype=first.dtype)
    for part, index in places.items():
        found[index.reshape(-1)] = values[part].reshape(-1)
    return found.view(like.shape)
