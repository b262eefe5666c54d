"""What `pip install lrtrain` gives: a wheel and an sdist that work outside the clone."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from launching import ROOT

import lrtrain

COMPOSE = """
import lrtrain, pathlib
from lrtrain.config.compose import compose
assert pathlib.Path(lrtrain.__file__).is_relative_to({site!r}), lrtrain.__file__
config = compose("experiment=cola_60m")
print(lrtrain.__version__, config.model.config["hidden_size"])
"""


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.full
@pytest.mark.parametrize("form", ["wheel", "sdist"])
def test_what_is_built_composes_in_an_environment_of_its_own(form: str, tmp_path: Path):
    """The dependencies are this environment's; lrtrain is the one that was built."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"
    run("git", "clone", "--quiet", ROOT, source, folder=tmp_path)
    run(*pip, "install", "--target", tmp_path / "tools", "setuptools>=68", "build", folder=tmp_path)
    build = f"import sys; sys.path.insert(0, {str(tmp_path / 'tools')!r}); from setuptools import build_meta as b; "
    made = run(sys.executable, "-c", f"{build}print(b.build_{form}({str(tmp_path)!r}))", folder=source).split()[-1]
    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", site, tmp_path / made, folder=tmp_path)
    script = f"import sys; sys.path.insert(0, {str(site)!r})\n" + COMPOSE.format(site=str(site))
    said = run(sys.executable, "-c", script, folder=tmp_path)
    assert said.split() == [lrtrain.__version__, "512"]


def test_the_version_is_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and project["dynamic"] == ["version"]
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert lrtrain.__version__ in newest
    assert f"version: {lrtrain.__version__}" in (ROOT / "CITATION.cff").read_text()
