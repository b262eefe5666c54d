"""Making a config.json of transformers 5 readable by transformers 4: rotary settings under their older names."""

from typing import Any

from transformers import PreTrainedConfig

LOCAL = ("rope_local_base_freq", "local_rope_theta")  # of the sliding layers: Gemma 3, ModernBERT
GLOBAL = ("rope_theta", "rotary_emb_base", "global_rope_theta")  # of the others: GPT-NeoX and ModernBERT have their own
PARTIAL = ("partial_rotary_factor", "rotary_pct")


def readable_by_4(config: PreTrainedConfig, written: dict[str, Any]) -> dict[str, Any]:
    """`written`, the content of config.json for `config`, with the rotary settings also under transformers 4's keys.

    Keys that would change the model in transformers 5 are left out.
    """
    for key, value in rope_of_4(written.get("rope_parameters") or {}).items():
        with_key = type(config).from_dict(written | {key: value})
        if getattr(with_key, "rope_parameters", None) == getattr(config, "rope_parameters", None):
            written = written | {key: value}
    return written


def rope_of_4(rope: dict[str, Any]) -> dict[str, Any]:
    """The older keys of `rope_parameters`, which may be nested by layer type."""
    whole = rope.get("full_attention") or (rope if "rope_theta" in rope else {})
    found: dict[str, Any] = dict.fromkeys(GLOBAL, whole.get("rope_theta"))
    found |= dict.fromkeys(PARTIAL, whole.get("partial_rotary_factor"))
    found |= dict.fromkeys(LOCAL, (rope.get("sliding_attention") or {}).get("rope_theta"))
    if whole.get("rope_type", "default") != "default":
        own = {"rope_theta", "partial_rotary_factor"}
        found["rope_scaling"] = {key: value for key, value in whole.items() if key not in own}
    return {key: value for key, value in found.items() if value is not None}
