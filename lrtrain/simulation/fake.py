"""Running lrtrain's code on tensors that have no values."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode  # no public name, though documented
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import _disable_current_modes  # has no public counterpart
from transformers import AttentionInterface

from lrtrain.engine.fsdp import device_mesh, split_mesh
from lrtrain.linalg import dct
from lrtrain.model.attention import CAUSAL
from lrtrain.optim import quantized
from lrtrain.simulation.device import passed_off_as_cuda, waits
from lrtrain.simulation.watch import Watch

T = TypeVar("T")


@contextmanager
def faked(watch: Watch) -> Iterator[None]:
    """Within it tensors are fake, operators are counted, and what needs values is replaced."""
    own = AttentionInterface()[CAUSAL]
    waits.append(lambda: watch.sync("synchronize"))
    AttentionInterface.register(CAUSAL, flash_attention)
    try:
        with ExitStack() as stack:
            for name, stand_in in _stand_ins().items():
                stack.enter_context(patch(name, stand_in))
            for context in (passed_off_as_cuda(), watch.memory.following_resizes()):
                stack.enter_context(context)
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(watch)
            yield
    finally:
        AttentionInterface.register(CAUSAL, own)
        waits.clear()


def _stand_ins() -> dict[str, Callable[..., Any]]:
    """Replacements for functions that look at values, by name."""
    tables = {signed: quantized._tables(signed, torch.device("cpu")) for signed in (True, False)}

    @functools.cache
    def without_values(signed: bool, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(torch.empty(t.shape, dtype=t.dtype, device=device) for t in tables[signed])

    return {
        "lrtrain.engine.fsdp.device_mesh": _outside(device_mesh),  # who talks to whom are values
        "lrtrain.engine.fsdp.split_mesh": _outside(split_mesh),
        "torch.distributed.device_mesh.DeviceMesh.__getitem__": _outside(DeviceMesh.__getitem__),
        "torch.distributed.device_mesh.DeviceMesh._concatenate": staticmethod(_outside(DeviceMesh._concatenate)),
        "torch.distributed.fsdp._fully_shard._fsdp_param._chunk_with_empty": Chunks,
        "lrtrain.model.init.fill": lambda *args: None,  # initial values
        "lrtrain.run.start.support_hash": lambda model: "",
        "lrtrain.optim.quantized._tables": without_values,
        "lrtrain.linalg.dct._turns": functools.cache(dct._turns.__wrapped__),  # none of an earlier simulation
    }


def _outside(call: Callable[..., T]) -> Callable[..., T]:
    """The function, called without fake tensors and uncounted."""

    def called(*args: Any) -> T:
        with _disable_current_modes():
            return call(*args)

    return called


class Chunks:
    """The parts of a tensor that are asked for: FSDP2 cuts each parameter for all processes and keeps one part, which
    takes most of a minute on fake tensors."""

    def __init__(self, tensor: Tensor, count: int, dim: int):
        self.tensor, self.dim = tensor, dim
        self.most = -(-tensor.shape[dim] // count)

    def __getitem__(self, i: int) -> Tensor:
        left = self.tensor.shape[self.dim] - i * self.most
        return (
            self.tensor.narrow(self.dim, i * self.most, min(self.most, left)) if left > 0 else self.tensor.new_empty(0)
        )


def flash_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention by the kernel that torch takes on CUDA; on the simulated GPU it would take unfused products."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (key, value))
    return kernel(query, key, value, 0.0, True, scale=scaling)[0].transpose(1, 2).contiguous(), None
