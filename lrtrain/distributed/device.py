"""The device of a process: its GPU, or the CPU where there is none or it is asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import torch

from lrtrain.errors import ConfigError

DRIVER = Path("/proc/driver/nvidia/version")


def choose_device(local_rank: int, local_size: int) -> torch.device:
    """The GPU of this process, made current, or the CPU on a host without GPUs or with CUDA_VISIBLE_DEVICES="".

    A process that sees one GPU has that one, whatever its local rank: schedulers may give each process its own.

    Raises:
        ConfigError: if torch cannot use the host's NVIDIA GPU, or processes of this host would share a GPU.
    """
    if not torch.cuda.is_available():
        refuse_unusable_gpu()
        return torch.device("cpu")
    seen, given = torch.cuda.device_count(), "CUDA_VISIBLE_DEVICES" in os.environ
    if local_rank >= seen and not (seen == 1 and given):
        raise ConfigError(
            f"{local_size} processes on this host see {seen} GPU{'s' * (seen > 1)}; start at most one process for each "
            f"(torchrun --nproc_per_node={seen}), or set CUDA_VISIBLE_DEVICES for each process"
        )
    device = torch.device("cuda", 0 if seen == 1 else local_rank)
    torch.cuda.set_device(device)
    return device


def refuse_unusable_gpu() -> None:
    """Check that no GPU lies idle because torch cannot use it: a run on the CPU would be hundreds of times slower.

    Raises:
        ConfigError: if the host has an NVIDIA GPU that is not hidden by CUDA_VISIBLE_DEVICES="".
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    if found := driver():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs alone"
        raise ConfigError(
            f"this host has an NVIDIA GPU ({found}), but torch {torch.__version__}, {built}, cannot use it; install a "
            f'newer driver, or a torch for the driver\'s CUDA, or set CUDA_VISIBLE_DEVICES="" to train on the CPU'
        )


def driver() -> str | None:
    """The NVIDIA driver of a host with a GPU, as the kernel or nvidia-smi tells it; None if there is none."""
    if DRIVER.exists():
        return DRIVER.read_text().partition("\n")[0].removeprefix("NVRM version:").strip() or "unknown driver"
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.partition("\n")[0].strip() or None if told.returncode == 0 else None


def named(device: torch.device) -> str:
    """The kind of a device for people, such as `cuda (NVIDIA H100 80GB HBM3)`."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def let_segments_grow() -> None:
    """Let CUDA's allocator grow its segments, so that blocks of other sizes fragment memory less, unless the user has
    set the allocator. To be called before CUDA is first used."""
    if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
