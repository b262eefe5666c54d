"""Pretraining of low-rank language models."""

from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch
    from transformers import PreTrainedModel


def load(
    path: str,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
    trusted: "Collection[str]" = (),
) -> "PreTrainedModel":
    """The model of a run, a checkpoint, or an export, in eval mode. Its `save_pretrained` writes a folder that this
    function reads.

    Args:
        dtype: of its parameters; None: as they were saved.
        trusted: layers of one's own (`_target_`), or a model.path with code, that the model may run.

    Raises:
        lrtrain.errors.ConfigError: if there is none, or its weights are not all there and finite.
    """
    from lrtrain.checkpoint.loading import load_model  # imports all of lrtrain, which a part of it should not

    return load_model(path, device, dtype, trusted)[0]
