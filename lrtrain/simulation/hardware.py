"""The time that a GPU takes for a kernel or a collective: a roofline."""

from collections.abc import Sequence

import torch

from lrtrain.config.schema import GPUConfig

NARROW = (torch.bfloat16, torch.float16)


def kernel_seconds(gpu: GPUConfig, flops: float, size: float, dtype: torch.dtype) -> float:
    """The time of a kernel: of its arithmetic or of moving its bytes, whichever takes longer.

    Args:
        flops: floating-point operations of its matrix products.
        size: bytes that it reads and writes.
        dtype: of the matrix products.
    """
    peak = gpu.flops.bf16 if dtype in NARROW else gpu.flops.fp32
    moving = size / (gpu.bandwidth * gpu.efficiency.bandwidth)
    return max(flops / (peak * gpu.efficiency.flops), moving, gpu.kernel)


def wire_seconds(gpu: GPUConfig, received: float, members: Sequence[int]) -> float:
    """The time of a collective of these process ranks in which each receives so many bytes, on a ring."""
    nodes = {member // gpu.links.per_node for member in members}
    return received / (gpu.links.node if len(nodes) == 1 else gpu.links.network)
