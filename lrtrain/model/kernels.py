"""The order in which torch tries its kernels for attention."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_kernels(device: torch.device) -> AbstractContextManager[object]:
    """A context in which CUDA's kernels are tried from the fastest on: cuDNN's, FlashAttention's, the memory-efficient
    one, and plain products. With deterministic algorithms torch leaves out those that have none."""
    return sdpa_kernel(ORDER, set_priority=True) if device.type == "cuda" else nullcontext()
