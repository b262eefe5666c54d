"""Projection and depth of a layer, from its name."""


def projection_of(layer: str) -> str:
    """`model.layers.3.self_attn.q_proj` → `q_proj`."""
    return layer.rpartition(".")[2]


def depth_of(layer: str) -> int | None:
    """`model.layers.3.self_attn.q_proj` → 3; None outside the stack of blocks (`lm_head`)."""
    return next((int(part) for part in layer.split(".") if part.isdecimal()), None)
