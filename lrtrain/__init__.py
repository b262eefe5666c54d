"""Pretraining of low-rank language models."""

from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load(path: str, device: "torch.device | str" = "cpu", dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
    """The model of a run, one of its checkpoints, or an export, in eval mode.

    Args:
        dtype: of its parameters; None: as they were saved.

    Raises:
        lrtrain.errors.ConfigError: if there is none.
    """
    from lrtrain.checkpoint.loading import load  # imports all of lrtrain, which a part of it should not

    return load(path, device, dtype).model
