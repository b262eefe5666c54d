"""Sequences that are longer than a model's config says."""

from typing import Any

from transformers import PreTrainedConfig

UNSCALED = ("default", "linear", "llama3")
"""Kinds of rotary positions whose angles do not depend on the largest position."""


def rope_of(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The `rope_parameters` of a config, of each kind of layer that has its own; empty without rotary positions."""
    found = getattr(config, "rope_parameters", None) or {}
    return [found] if "rope_type" in found else [kind for kind in found.values() if isinstance(kind, dict)]


def raise_positions(config: PreTrainedConfig, seq_len: int) -> str | None:
    """Raise `max_position_embeddings` to `seq_len` where only the rotary positions' range follows from it.

    Other positions, such as GPT-2's learned ones or angles scaled by the largest position, are left as they are.

    Returns:
        What was raised, for people; None if nothing was.
    """
    text = config.get_text_config()
    longest, kinds = getattr(text, "max_position_embeddings", None), rope_of(text)
    if longest is None or seq_len <= longest or not kinds:
        return None
    if any(kind["rope_type"] not in UNSCALED for kind in kinds):
        return None
    text.max_position_embeddings = seq_len
    scaling = ", ".join(sorted({kind["rope_type"] for kind in kinds}))
    return f"max_position_embeddings raised from {longest} to data.seq_len={seq_len}; rotary positions: {scaling}"
