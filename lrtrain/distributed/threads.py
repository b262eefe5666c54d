"""The number of threads of a process: the user's setting, or its share of the available cores."""

import os
from collections.abc import Iterable
from pathlib import Path

from lrtrain.core.words import processes

CGROUPS = Path("/sys/fs/cgroup")


def thread_count(local_size: int) -> tuple[int, str]:
    """Threads per process for `local_size` processes on this host, and the reason for the number."""
    if (asked := threads_asked_for(local_size)) is not None:
        return asked, f"OMP_NUM_THREADS={asked}"
    cores, quota = len(usable_cores()), cpu_quota()
    share = min(cores, int(quota)) if quota is not None else cores
    limit = f" by a CPU quota of {quota:g}" if quota is not None and quota < cores else ""
    return max(1, share // local_size), f"{max(1, share)} cores{limit} ÷ {processes(local_size)}"


def threads_asked_for(local_size: int) -> int | None:
    """OMP_NUM_THREADS as set by the user; None if it is not set, or was set by torchrun.

    torchrun sets it to 1 for several processes if it is unset. If that cannot be determined, 1 counts as torchrun's.
    """
    value = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # may be a list, for nested regions
    if not value.isdigit() or int(value) < 1:
        return None
    if "TORCHELASTIC_RUN_ID" in os.environ and local_size > 1 and value == "1" and not _torchrun_was_given_it():
        return None
    return int(value)


def _torchrun_was_given_it() -> bool:
    """Whether torchrun (the parent process) was started with OMP_NUM_THREADS in its environment."""
    try:
        given = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    return any(entry.startswith(b"OMP_NUM_THREADS=") for entry in given.split(b"\0"))


def usable_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return sorted(os.sched_getaffinity(0))
    return [*range(os.cpu_count() or 1)]


def keep_to(cores: Iterable[int]) -> None:
    """Pin this process to cores, on systems that can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> float | None:
    """The CPU quota of this process's control groups in cores (Linux, versions 1 and 2); None: no limit."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None
    limits = [limit for line in lines for folder in _folders(line, root) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _folders(line: str, root: Path) -> list[Path]:
    """The control group folders for a line `id:controllers:path` of /proc/self/cgroup, with parents, whose limits
    apply too."""
    _, controllers, path = line.split(":", 2)
    if controllers and "cpu" not in controllers.split(","):
        return []
    top = root / controllers if controllers else root
    own = Path(path.lstrip("/"))
    return [top / part for part in (own, *own.parents)]


def _limit(folder: Path) -> float | None:
    """quota ÷ period of one control group."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return None
