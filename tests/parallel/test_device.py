"""Which device a process gets, and the GPU that torch cannot use."""

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lrtrain.distributed import device, world
from lrtrain.distributed.device import choose_device, driver, let_segments_grow
from lrtrain.distributed.heartbeat import Heartbeat
from lrtrain.distributed.world import World, limit_nccl, record_collectives
from lrtrain.errors import ConfigError


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A host with a driver that torch cannot use."""
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02\nGCC version: 9\n")
    monkeypatch.setattr(device, "DRIVER", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return version


def gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: None)


def test_a_gpu_that_torch_cannot_use_is_an_error_that_names_the_driver(host: Path):
    with pytest.raises(ConfigError, match=r"470\.57\.02.*torch .* cannot use it; install a newer driver"):
        choose_device(0, 1)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_asks_for_the_cpu(host: Path, hidden: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert choose_device(0, 1) == torch.device("cpu")


@pytest.mark.parametrize(("says", "code"), [("NVIDIA A100, 470.57.02", 0), ("", 0), ("no devices were found", 6)])
def test_a_host_without_the_kernels_word_asks_nvidia_smi(says: str, code: int, host: Path, monkeypatch):
    host.unlink()
    bin = host.parent / "bin"
    bin.mkdir()
    (bin / "nvidia-smi").write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    (bin / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    assert driver() == (says if says and not code else None)


def test_a_process_that_sees_one_gpu_has_it_whatever_its_local_rank(monkeypatch: pytest.MonkeyPatch):
    gpus(1, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert choose_device(3, 4) == torch.device("cuda", 0)
    gpus(4, monkeypatch)
    assert choose_device(3, 4) == torch.device("cuda", 3)


@pytest.mark.parametrize(("visible", "seen"), [(None, 1), ("0,1", 2)])
def test_more_processes_than_gpus_are_refused(visible: str | None, seen: int, monkeypatch: pytest.MonkeyPatch):
    gpus(seen, monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=rf"4 processes on this host see {seen} GPUs?; .*--nproc_per_node={seen}"):
        choose_device(2, 4)


def test_segments_grow_unless_the_user_has_set_the_allocator(monkeypatch: pytest.MonkeyPatch):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment: dict[str, str] = {}
    monkeypatch.setattr(device.os, "environ", environment)
    let_segments_grow()
    assert environment == {names[0]: "expandable_segments:True"}
    for name in names:
        environment.clear()
        environment[name] = "max_split_size_mb:64"
        let_segments_grow()
        assert environment == {name: "max_split_size_mb:64"}


def test_nccl_alone_gets_the_short_timeouts(monkeypatch: pytest.MonkeyPatch):
    given: list[Any] = []

    def group(backends: str) -> Any:
        backend = SimpleNamespace(_set_default_timeout=lambda timeout: given.append((backends, timeout)))
        return SimpleNamespace(backends=backends, _get_backend=lambda device: backend)

    both = [group("cpu:gloo,cuda:nccl"), group("cpu:gloo,cuda:gloo")]
    monkeypatch.setattr(dist.distributed_c10d, "_world", SimpleNamespace(pg_map=both))
    monkeypatch.setattr(dist, "get_backend_config", lambda group: group.backends)
    limit_nccl(world.AFTER_STEP_1)
    assert given == [("cpu:gloo,cuda:nccl", timedelta(seconds=100))]


def test_nccl_writes_its_last_collectives_where_the_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    environment = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}  # the user's
    monkeypatch.setattr(world.os, "environ", environment)
    record_collectives(tmp_path)
    assert environment["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{tmp_path}/process-"
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0" and int(environment["TORCH_NCCL_TRACE_BUFFER_SIZE"]) > 0


@pytest.mark.parametrize(("kind", "minutes", "until"), [("cuda", 30, 80), ("cuda", 1, 60), ("cpu", 30, 1800)])
def test_a_silent_process_is_named_before_nccls_watchdog_speaks(kind: str, minutes: float, until: float):
    heartbeat = Heartbeat(World(0, 0, 2, torch.device(kind)), minutes)
    assert 60 * heartbeat.minutes == pytest.approx(until)
    assert kind == "cpu" or 60 * heartbeat.minutes + heartbeat.every <= world.AFTER_STEP_1.total_seconds()
