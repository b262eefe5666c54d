"""Each layer's execution, where a layer can compute its map in several ways."""

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
    """Let each layer that can be executed in several ways choose one by measurement, once per shape.

    Args:
        tokens: of one process's forward pass.
        measured: what was chosen before, which stays.

    Returns:
        The execution of each such layer by name.
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
