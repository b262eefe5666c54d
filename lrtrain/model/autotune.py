"""Autotuning the execution of layers that have several."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

from lrtrain.model.structure import factorized_layers


def autotune_layers(
    model: nn.Module,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    measured: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """Autotune each layer that has several executions, once per shape.

    Args:
        tokens: tokens per process and forward pass.
        measured: earlier choices by layer name, which are kept.

    Returns:
        The execution of each of these layers by name.
    """
    chosen: dict[str, str | None] = {}
    executions: dict[str, str] = {}
    for name, layer in factorized_layers(model).items():
        if layer.execution == "auto" and name in measured:
            executions[name] = measured[name]
            continue
        kind = repr(layer)
        if kind not in chosen:
            chosen[kind] = layer.autotune(tokens, dtype, device)
        if (execution := chosen[kind]) is not None:
            executions[name] = execution
    return executions
