"""Which code a configuration that was read may run: that of the folders that the command names, and no other."""

import os
import sys
from pathlib import Path

import pytest

from lrtrain.config.compose import compose, from_stored
from lrtrain.config.home import CONF, VARIABLE, add_homes, home_of, home_record, homes
from lrtrain.config.schema import as_dict
from lrtrain.config.stored import check_stored_targets
from lrtrain.errors import ConfigError

LAYER = """
from pathlib import Path
from lrtrain.layers.lowrank import LowRankLinear
from os import system
Path(__file__).with_name("imported").touch()
class Mine(LowRankLinear): ...
def function(): ...
"""
PARAM = """
defaults: [lowrank, _self_]
name: mine
_target_: {module}.Mine
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with `param=mine`, of a module of this test's own; what the test imports and names is forgotten."""
    module = f"of_{tmp_path.name}".replace("-", "_")
    (tmp_path / "conf" / "param").mkdir(parents=True)
    (tmp_path / "conf" / "param" / "mine.yaml").write_text(PARAM.format(module=module))
    (tmp_path / f"{module}.py").write_text(LAYER)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def module(home: Path) -> str:
    (file,) = home.glob("of_*.py")
    return file.stem


def test_a_folder_named_conf_belongs_to_its_parent():
    assert home_of("/a/conf") == Path("/a") and home_of("/a/configs") == Path("/a/configs")
    assert home_of("conf") == Path.cwd()


def test_the_variable_gives_configurations_and_modules(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, str(home))
    config = compose("param=mine", "param.rank=4")
    assert config.param["_target_"] == f"{module(home)}.Mine"
    record = home_record()
    assert record.folders == [str(home / "conf")] and record.import_path == [str(home)]
    assert [*record.modules] == [module(home)]


def test_hydra_s_search_path_does_too(home: Path):
    compose(f"hydra.searchpath=[file://{home}/conf]", "param=mine", "param.rank=4")
    assert homes() == [home] and os.environ[VARIABLE] == str(home)


def test_a_configuration_of_a_home_is_composed_and_gives_the_run_its_name(home: Path):
    (home / "conf" / "base.yaml").write_text("defaults: [pretrain, _self_]\ntrain: {seed: 7}")
    add_homes([home])
    config = compose(config_name="base")
    assert config.train.seed == 7 and config.run.name.startswith("base-")


def test_a_folder_that_does_not_exist_is_named(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, f"{home}{os.pathsep}/nowhere")
    with pytest.raises(ConfigError, match="^LRTRAIN_CONF names /nowhere, which is no folder"):
        compose()


def test_a_module_that_is_not_found_asks_for_its_folder(home: Path):
    with pytest.raises(ConfigError, match="there is no module of_no_one; --config-dir=FOLDER names") as raised:
        compose("param=lowrank", "param._target_=of_no_one.Mine")
    assert "\n" not in str(raised.value)


def test_what_was_read_runs_code_of_a_home_only_where_it_is_named(home: Path):
    stored = {"param": {"_target_": f"{module(home)}.Mine"}}
    sys.path.append(str(home))  # it could be imported
    with pytest.raises(ConfigError, match=r"--config-dir=/where/it/was, or itself: --trust of_"):
        check_stored_targets(stored, "meta.json", (), ["/where/it/was"])
    assert not (home / "imported").exists()
    add_homes([home])
    check_stored_targets(stored, "meta.json", ())
    assert (home / "imported").exists()


@pytest.mark.parametrize("name", ["function", "system", "LowRankLinear", "Path.touch", "nothing"])
def test_of_a_home_it_chooses_only_what_is_defined_there_and_of_the_section_s_class(name: str, home: Path):
    add_homes([home])
    with pytest.raises(ConfigError, match="which is no class of lrtrain"):
        check_stored_targets({"param": {"_target_": f"{module(home)}.{name}"}}, "meta.json", ())


def test_a_home_replaces_no_module_of_python(home: Path):
    (home / "colorsys.py").write_text("raise SystemExit('this was run')")
    sys.modules.pop("colorsys", None)
    add_homes([home])
    with pytest.raises(ConfigError, match="which is no class of lrtrain"):
        check_stored_targets({"schedule": {"_target_": "colorsys.rgb_to_hsv"}}, "meta.json", ())


def test_a_stored_name_chooses_no_file_outside_the_groups_folder(tmp_path: Path):
    (tmp_path / "evil.yaml").write_text("_target_: antigravity.fly\n_partial_: true\n")
    stored = as_dict(compose("param=lowrank"))
    up = "../" * len(CONF.parts)
    stored["param"] = {k: v for k, v in stored["param"].items() if k != "_target_"} | {"name": f"{up}{tmp_path}/evil"}
    with pytest.raises(ConfigError) as told:
        from_stored(stored, "a checkpoint")
    assert "antigravity" not in str(told.value) and "antigravity" not in sys.modules
