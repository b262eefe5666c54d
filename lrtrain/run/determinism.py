"""`train.deterministic`: repeating a command gives the same losses bit for bit, or the run is refused."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lrtrain.errors import ConfigError

# torch's messages for an operation (with its name) and for cuBLAS.
WITHOUT = re.compile(r"(\S+) does not have a deterministic|Deterministic behavior was enabled")


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Hold torch to algorithms that give the same bits each time, where that is wanted.

    Attention's backward pass then adds in a fixed order too (flash and memory-efficient kernels heed the switch). To be
    entered before CUDA is first used: cuBLAS reads its workspace setting once.

    Raises:
        ConfigError: where the run meets an operation that has no deterministic algorithm on its device, naming it.
    """
    if not wanted:
        yield
        return
    from torch._inductor import config as inductor  # takes a while to import

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    flags: Any = torch.utils.deterministic  # modules whose attributes are switches
    cudnn: Any = torch.backends.cudnn
    before = (torch.are_deterministic_algorithms_enabled(), flags.fill_uninitialized_memory, cudnn.benchmark)
    torch.use_deterministic_algorithms(True)
    chosen_by_time, inductor.deterministic = inductor.deterministic, True  # else torch.compile times kernels to choose
    # Buffers of collectives would be filled each time, though all that is read was written.
    flags.fill_uninitialized_memory = False
    cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if (found := WITHOUT.search(str(error))) is None:
            raise
        what = found[1] or f"cuBLAS with CUBLAS_WORKSPACE_CONFIG={os.environ['CUBLAS_WORKSPACE_CONFIG']}"
        raise ConfigError(
            f"train.deterministic=true: {what} has no deterministic form on this device; set it to false, "
            f"or a method that does without it"
        ) from error
    finally:
        enabled, flags.fill_uninitialized_memory, cudnn.benchmark = before
        inductor.deterministic = chosen_by_time
        torch.use_deterministic_algorithms(enabled)
