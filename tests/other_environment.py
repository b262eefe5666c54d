"""Packages in a folder of their own, for processes that read what is exported with other versions than this one's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lrtrain-tests"


def packages(*requirements: str) -> Path:
    """A folder with exactly these packages, without what they need; installed once. Skips where pip cannot."""
    folder = CACHE / "-".join(sorted(requirement.replace("==", "-") for requirement in requirements))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
            done = subprocess.run([*pip, "--target", partial, *requirements], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"pip cannot install {' '.join(requirements)}: {done.stderr.strip().splitlines()[-1]}")
            partial.rename(folder)
    return folder


def run_with(folder: Path, code: str, *arguments: object) -> str:
    """What a process prints that imports from `folder` first; lrtrain is not to be found there."""
    program = "import sys\nsys.modules['lrtrain'] = None\n" + code
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
