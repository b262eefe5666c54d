"""The published recipes: each one composes, fits its model, and has the published or computed number of parameters."""

import pytest
from launching import ROOT

from lrtrain.config.check import check
from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.errors import ConfigError
from lrtrain.model.build import make_model
from lrtrain.model.counts import parameter_count

FOLDER = ROOT / "conf" / "experiment"
SIZES = ("60m", "130m", "350m", "1b", "7b")

# Millions of parameters: P of the architecture and, per layer, r(11d + 3f) for rank r, ⌊δmn⌋ sparse values of SLTrain,
# ⌊δn⌋ whole columns of LOST.
FACTORS = (42.77, 94.00, 185.22, 609.31, 2820.94)
MILLIONS = {
    "dense": (58.07, 134.11, 367.97, 1339.08),
    "lowrank": FACTORS,
    "sltrain": (43.53, 96.55, 194.29, 645.55, 3144.74),
    "lost": (43.02, 94.78, 188.18, 621.14),
    "cola": FACTORS,
    "dlr": FACTORS,
    "loro": FACTORS,
}
PARAM = {"loro": "lowrank"}  # an optimizer's recipe


def experiments() -> list[str]:
    """Those whose method is there."""
    names = sorted(path.stem for path in FOLDER.glob("*_*.yaml"))
    there = {path.stem for path in (ROOT / "conf" / "param").glob("*.yaml")}
    return [name for name in names if PARAM.get(method := name.split("_")[0], method) in there]


@pytest.mark.parametrize("name", experiments())
def test_an_experiment_fits_its_model_and_has_its_size(name: str):
    method, size = name.split("_")
    config = compose(f"experiment={name}")
    check(config, world_size=8)
    assert config.param["name"] == PARAM.get(method, method)  # what tables show
    model = make_model(config)
    if method in MILLIONS:
        assert round(parameter_count(model) / 1e6, 2) == MILLIONS[method][SIZES.index(size)]


@pytest.mark.parametrize("name", experiments())
def test_an_experiment_follows_the_protocol(name: str):
    config = compose(f"experiment={name}")
    assert (config.data.name, config.data.seq_len, config.data.tokenizer.path) == ("c4", 256, "t5-base")
    assert (config.train.batch_size, config.train.dtype) == (512, "bf16")
    assert config.schedule["floor"] == 0.1 and config.optim["betas"] == [0.9, 0.999]
    assert config.run.name == name


def test_recipes_differ_where_the_papers_do():
    sltrain, cola = compose("experiment=sltrain_1b"), FOLDER / "cola_350m.yaml"
    assert sltrain.train.steps * sltrain.schedule["warmup"] == pytest.approx(10_000, abs=0.01)
    assert choice(sltrain.schedule)(9_999, 140_000) == 1 > choice(sltrain.schedule)(9_998, 140_000)
    assert sltrain.train.clip is None and sltrain.optim["weight_decay"] == 0
    assert compose("experiment=sltrain_7b").train.clip == 1.0
    assert "hidden_act: linear" in cola.read_text()
    assert {compose(f"experiment=dlr_{size}").model.config["hidden_act"] for size in ("350m", "1b")} == {"silu"}
    assert {compose(f"experiment=relora_{size}").train.clip for size in SIZES[:-1]} == {1.0}


@pytest.mark.parametrize("name", [name for name in experiments() if name.startswith(("cola", "dlr"))])
def test_cola_and_dlr_decay_all_parameters_as_published(name: str):
    config = compose(f"experiment={name}", "model.config.num_hidden_layers=1")
    assert {group["weight_decay"] for group in choice(config.optim)(make_model(config)).param_groups} == {0.01}


def test_loro_is_trained_as_by_its_scripts():
    small, large = compose("experiment=loro_60m"), compose("experiment=loro_1b")
    assert (small.optim["eps"], small.optim["eps_convention"], small.optim["weight_decay"]) == (1e-6, "galore", 0.0)
    assert (small.schedule["restart_every"], small.schedule["restart_warmup"], large.schedule["restart_every"]) == (
        500,
        5,
        200,
    )
    assert compose("experiment=loro_350m").schedule["warmup"] * 60_000 == pytest.approx(2_000)
    assert choice(small.schedule)(5_005, 10_000) == pytest.approx(0.774, abs=5e-4)


def test_the_command_line_has_the_last_word():
    config = compose("experiment=sltrain_60m", "train.steps=7", "data=pystdlib", "model=llama_tiny")
    assert (config.train.steps, config.data.name, config.model.name) == (7, "pystdlib", "llama_tiny")
    assert config.param["rank"] == 128
    with pytest.raises(ConfigError, match="param.densty"):
        compose("experiment=sltrain_60m", "+param.densty=1")
