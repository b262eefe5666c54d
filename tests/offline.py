"""Offline W&B runs, read back with its own command-line reader."""

import json
import time
from pathlib import Path

import wandb
from crew import Command

STEP = "train/step"
LAST = ("exit", "footer")
"""The types of the last record of a run that has finished."""


def of_type(folder: Path, kind: str) -> list[dict]:
    """The records of a kind in an offline run's folder, also in one whose file is not complete."""
    reader = Path(wandb.__file__).with_name("__main__.py")
    deadline = time.monotonic() + 30  # W&B's service may go on writing after it has said that the run is finished
    records, before = list[dict](), list[dict]()
    while not records or (records != before and records[-1]["type"] not in LAST):
        time.sleep(1.0 if before else 0.0)
        before = records
        shown = Command(reader, ["leet", "inspect", "--json", str(folder)], folder).result()
        assert shown.returncode == 0 and time.monotonic() < deadline, shown
        records = [json.loads(line) for line in shown.stdout.splitlines()]
    return [record[kind] for record in records if record["type"] == kind]


def history(folder: Path, key: str) -> list[tuple]:
    """(step, value) of the rows that have the key."""
    items = [record["item"] for record in of_type(folder, "history")]
    return [(item[STEP], item[key]) for item in items if key in item]


def segments(run_dir: Path) -> list[Path]:
    """The folders of a run's parts: one for each time it was started."""
    return sorted(run_dir.glob("wandb/offline-run-*"))
