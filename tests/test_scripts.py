"""What all scripts have in common."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

OWN_CLONE = "\nsys.path.insert(0, str("


TEXTS = {path: path.read_text() for path in sorted((ROOT / "scripts").glob("*.py"))}
SCRIPTS = [path for path, text in TEXTS.items() if "from lrtrain" in text and "\ndef main" in text]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_imports_the_lrtrain_that_it_lies_beside(script: Path):
    """And not another clone's that is installed."""
    before, _, after = script.read_text().partition(OWN_CLONE)
    assert "from lrtrain" not in before and "from lrtrain" in after


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_outlives_what_it_prints_on(script: Path):
    assert '__name__ == "__main__":\n    never_fail_to_print()\n' in script.read_text()


@pytest.mark.full
def test_a_script_whose_stream_has_no_character_for_a_word_or_is_closed_ends_well(tmp_path: Path):
    line = [sys.executable, str(ROOT / "scripts" / "plan.py"), "model=llama_tiny", "gpus=2"]
    done = subprocess.run(line, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *line]
    assert subprocess.run(closed, cwd=tmp_path).returncode == 0
