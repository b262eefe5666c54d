"""Printing never ends a program: each stream that fails is tried on a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

SAYS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from lrtrain.core.streams import never_fail_to_print
never_fail_to_print()
for _ in range(3):
    print("a → b \\udcff" * 3000, flush=True)
    print("c → d \\udcff" * 3000, file=sys.stderr, flush=True)
sys.stdout.isatty(), sys.stderr.isatty()
open("the end", "w").write("reached")
"""


def says(folder: Path, **streams) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONIOENCODING": streams.pop("encoding", "utf-8")}
    return subprocess.run([sys.executable, "-c", SAYS], cwd=folder, env=environment, timeout=60, **streams)


def ended_well(folder: Path, done: subprocess.CompletedProcess) -> bool:
    return done.returncode == 0 and (folder / "the end").read_text() == "reached"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_device_ends_nothing(tmp_path: Path, stream: str):
    with open("/dev/full", "wb", buffering=0) as full:
        assert ended_well(tmp_path, says(tmp_path, **{stream: full}))


def test_a_pipe_that_nobody_reads_ends_nothing(tmp_path: Path):
    read, write = os.pipe()
    os.close(read)
    assert ended_well(tmp_path, says(tmp_path, stdout=write, stderr=write))
    os.close(write)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_stream_has_no_character_for_is_escaped(tmp_path: Path, encoding: str):
    done = says(tmp_path, encoding=encoding, capture_output=True)
    assert ended_well(tmp_path, done)
    assert done.stdout.startswith(rb"a \u2192 b \udcff") and done.stderr.startswith(rb"c \u2192 d \udcff")


def test_closed_streams_end_nothing_and_no_file_gets_their_place(tmp_path: Path):
    line = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, SAYS]
    done = subprocess.run(line, cwd=tmp_path, timeout=60)
    assert ended_well(tmp_path, done)
