"""The additions that CONTRIBUTING.md shows train together in a clone of their own, and resume."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, TINY

from lrtrain.tracking.jsonl import series

FILE = re.compile(r"`((?:lrtrain|conf)/[\w/]+\.(?:py|yaml))`:\n\n```(?:python|yaml)\n(.*?)```", re.DOTALL)
CALLBACK = re.compile(r"^    '(\+callbacks\..*)'$", re.MULTILINE)


@pytest.mark.full
def test_the_examples_train_together_and_resume(corpus: Path, cache: Path, tmp_path: Path):
    page = (ROOT / "CONTRIBUTING.md").read_text()
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    files = dict(FILE.findall(page))
    assert len(files) == 7
    for name, text in files.items():
        (clone / name).write_text(text)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(path.read_text() for path in sorted(corpus.iterdir())))
    (callback,) = CALLBACK.findall(page)
    base = [o for o in TINY if o != "data=local"]
    overrides = [*base, "param=gated", "optim=lion", "data=paragraphs", f"data.path={text}", callback, "resume=auto"]
    for steps in (3, 4):
        command = [sys.executable, "launch/pretrain.py", *overrides, f"run.dir={tmp_path}/run", f"train.steps={steps}"]
        done = subprocess.run(
            command, cwd=clone, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(clone)}
        )
        assert done.returncode == 0, done.stdout + done.stderr
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert series(metrics, "train/loss")[0].tolist() == [1, 2, 3, 4]
    assert series(metrics, "conditioning/largest")[0].tolist() == [0, 2, 4]
