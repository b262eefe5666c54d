"""The dtypes of `train.dtype`: of the arithmetic, and of stored parameters."""

from typing import Literal

import torch

from lrtrain.config.schema import Config

Dtype = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic; `auto` and `bf16_sr`: bf16 on GPUs and fp32 on CPU, where bfloat16 has few fast
    kernels."""
    if config.train.dtype in DTYPES:
        return DTYPES[config.train.dtype]
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def parameter_dtype(config: Config) -> torch.dtype:
    """The dtype of stored parameters and gradients: bfloat16 with `train.dtype=bf16_sr`, else float32."""
    return torch.bfloat16 if config.train.dtype == "bf16_sr" else torch.float32
