"""How many threads a process computes with: what the user says, or its share of the cores that it may use."""

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def thread_count(local_size: int) -> tuple[int, str]:
    """Threads of each of `local_size` processes on this host, and why so many."""
    if (asked := threads_asked_for(local_size)) is not None:
        return asked, f"OMP_NUM_THREADS={asked}"
    cores, quota = usable_cores(), cpu_quota()
    share = min(cores, int(quota)) if quota is not None else cores
    limit = f" by a CPU quota of {quota:g}" if quota is not None and quota < cores else ""
    return max(1, share // local_size), f"{max(1, share)} cores{limit} ÷ {local_size} processes"


def threads_asked_for(local_size: int) -> int | None:
    """OMP_NUM_THREADS as the user set it; None if there is none, or it is torchrun's own.

    torchrun sets it to 1 for several processes where it is not set. Where that cannot be told, a 1 is taken for its.
    """
    value = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # a list is for nested regions
    if not value.isdigit() or int(value) < 1:
        return None
    if "TORCHELASTIC_RUN_ID" in os.environ and local_size > 1 and value == "1" and not _torchrun_was_given_it():
        return None
    return int(value)


def _torchrun_was_given_it() -> bool:
    """Whether the environment that torchrun, our parent, was started with has OMP_NUM_THREADS."""
    try:
        given = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    return any(entry.startswith(b"OMP_NUM_THREADS=") for entry in given.split(b"\0"))


def usable_cores() -> int:
    """Cores that the scheduler may give this process."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> float | None:
    """How many cores' time the control groups of this process grant it (Linux, versions 1 and 2); None: no limit."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None
    limits = [limit for line in lines for folder in _folders(line, root) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _folders(line: str, root: Path) -> list[Path]:
    """Where a line `id:controllers:path` of /proc/self/cgroup has its limits: a limit of a parent holds as well."""
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
