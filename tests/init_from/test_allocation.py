"""Ranks from spectra: worked scores, the budget, and a file that a run takes."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, TINY
from omegaconf import OmegaConf
from transformers import LlamaConfig

from lrtrain.config.compose import compose, typed
from lrtrain.config.schema import as_dict
from lrtrain.init_from.allocation import allocate, energy_scores, factor_parameters, tail_scores, uniform_ranks
from lrtrain.model.build import make_model
from lrtrain.model.structure import factorized_layers, matrices
from lrtrain.tracking.spectra_files import save_spectra

sys.path.insert(0, str(ROOT / "scripts"))
import suggest_ranks

FLAT, STEEP = torch.linspace(1, 0.5, 40), 0.7 ** torch.arange(40.0)


def test_worked_scores():
    z = tail_scores(torch.tensor([10, 6, 2, 1.5, 1.2, 1]))
    assert z.tolist() == pytest.approx([1, 0.555556, 0.111111, 0.055556, 0.022222, 0], abs=1e-6)
    assert energy_scores(torch.tensor([2.0, 1.0, 1.0])).tolist() == pytest.approx([1, 2 / 6, 1 / 6])
    assert tail_scores(torch.ones(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("by", ["energy", "tail"])
@pytest.mark.parametrize("budget", [0.1, 0.35, 0.6])
def test_the_budget_is_met_to_within_one_value(by: str, budget: float):
    shapes = {"a": (40, 60), "b": (100, 40), "c": (40, 40)}
    spectra = {"a": FLAT, "b": STEEP, "c": FLAT.sqrt()}
    ranks = allocate(spectra, shapes, budget, by)
    most = budget * (2400 + 4000 + 1600)
    assert most - 140 < factor_parameters(ranks, shapes) <= most


@pytest.mark.parametrize("by", ["energy", "tail"])
def test_a_steep_spectrum_gets_less_than_a_flat_one(by: str):
    ranks = allocate({"a": FLAT, "b": STEEP}, dict.fromkeys("ab", (40, 60)), 0.3, by)
    assert ranks["b"] < ranks["a"] / 2


@pytest.mark.parametrize("by", ["energy", "tail"])
def test_alike_matrices_get_alike_ranks(by: str):
    ranks = allocate(dict.fromkeys("abc", FLAT), dict.fromkeys("abc", (40, 60)), 0.5, by)
    assert max(ranks.values()) - min(ranks.values()) <= 1


def test_what_cannot_be_is_said():
    shapes = {"a": (40, 60)}
    with pytest.raises(ValueError, match="too small"):
        allocate({"a": FLAT}, shapes, 0.01, "energy")
    with pytest.raises(ValueError, match="spectrum of a is zero"):
        allocate({"a": torch.zeros(40)}, shapes, 0.5, "energy")
    assert allocate({"a": FLAT[:5]}, shapes, 1.0, "energy") == {"a": 5}


def test_the_uniform_rank_meets_the_budget():
    shapes = {"a": (40, 60), "b": (100, 40)}
    ranks = uniform_ranks(shapes, 0.5)
    assert ranks["a"] == ranks["b"]
    assert (
        factor_parameters(ranks, shapes) <= 0.5 * 6400 < factor_parameters({k: r + 1 for k, r in ranks.items()}, shapes)
    )


def test_a_run_gives_a_file_with_which_a_model_has_these_ranks(tmp_path: Path, monkeypatch, capsys):
    config = compose(*TINY, "param=dense", "data.path=.")
    run = tmp_path / "measured"
    run.mkdir()
    OmegaConf.save(OmegaConf.create(as_dict(config)), run / "config.yaml")
    layers = matrices(make_model(config), config.param["pattern"])
    generator = torch.Generator().manual_seed(0)
    save_spectra(
        run, 7, {k: (8 * torch.rand(48, generator=generator)).sort(descending=True)[0].numpy() for k in layers}
    )
    out = tmp_path / "ranks.yaml"
    monkeypatch.setattr(sys, "argv", ["suggest_ranks.py", str(run), "--budget", "0.4", "--out", str(out)])
    suggest_ranks.main()
    assert "spectra of step 7" in capsys.readouterr().out

    composed = OmegaConf.merge(
        OmegaConf.create(as_dict(compose(*TINY, "param=lowrank", "data.path=."))), {"param": OmegaConf.load(out).param}
    )
    found = factorized_layers(make_model(typed(composed)))
    assert found.keys() == layers.keys()
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in found.items()}
    dense = sum(m * n for m, n in shapes.values())
    assert 0.38 * dense < factor_parameters({name: layer.rank for name, layer in found.items()}, shapes) <= 0.4 * dense
    with pytest.raises(SystemExit):
        suggest_ranks.main()  # it does not overwrite
    assert "exists" in capsys.readouterr().err


OTHERS = {
    "sizes": ["model.vocab_size=384", "model.config.num_hidden_layers=2", "param.pattern=mlp"],
    "an architecture by its path": ["model=hf", "model.path={path}"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_file_makes_the_model_that_was_measured(name: str, tmp_path: Path):
    shape = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1}
    LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2).save_pretrained(tmp_path)
    config = compose("param=dense", *(one.format(path=tmp_path) for one in OTHERS[name]))
    stored = as_dict(config)
    del stored["spectra"]["hidden_by"]  # as of a run from before there was this key
    OmegaConf.save(OmegaConf.create(stored), tmp_path / "config.yaml")
    measured = make_model(config)
    layers = matrices(measured, config.param["pattern"])

    (tmp_path / "experiment").mkdir()
    out = tmp_path / "experiment" / "ranks.yaml"
    args = argparse.Namespace(by="energy", budget=0.4, run=tmp_path)
    found = suggest_ranks.experiment(suggest_ranks.stored_config(tmp_path), "lowrank", dict.fromkeys(layers, 3))
    suggest_ranks.write(out, found, args)
    model = make_model(compose(f"hydra.searchpath=[file://{tmp_path}]", "experiment=ranks"))
    assert model.config.to_dict() == measured.config.to_dict()
    assert {name: layer.rank for name, layer in factorized_layers(model).items()} == dict.fromkeys(layers, 3)


@pytest.mark.parametrize(
    "estimated, sentence",
    [(["down_proj"], "estimated the spectra of its larger matrices"), ([""], "has no exact spectra")],
)
def test_estimated_spectra_are_refused(tmp_path: Path, monkeypatch, capsys, estimated: list[str], sentence: str):
    """Some, or all of a run's: then it has no files."""
    config = compose(*TINY, "param=dense", "data.path=.")
    OmegaConf.save(OmegaConf.create(as_dict(config)), tmp_path / "config.yaml")
    layers = matrices(make_model(config), config.param["pattern"])
    exact = {name: FLAT.numpy() for name in layers if not any(part in name for part in estimated)}
    if exact:
        save_spectra(tmp_path, 7, exact)
    monkeypatch.setattr(sys, "argv", ["suggest_ranks.py", str(tmp_path), "--budget", "0.4", "--out", f"{tmp_path}/o"])
    with pytest.raises(SystemExit):
        suggest_ranks.main()
    said = capsys.readouterr().err
    assert sentence in said and "spectra.exact_up_to=null" in said and not (tmp_path / "o").exists()
