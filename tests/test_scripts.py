"""What all scripts have in common."""

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
