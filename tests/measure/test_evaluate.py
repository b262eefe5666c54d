"""The loss is the mean over tokens, whatever the batches; the other codes' number stands beside it. What a run is
evaluated on is its own but for what is overridden."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from launching import ROOT
from omegaconf import OmegaConf

from lrtrain import distributed
from lrtrain.config.compose import compose
from lrtrain.core.metrics import spelled
from lrtrain.measure.evaluate import evaluate, perplexity
from lrtrain.model.loss import TokenLoss

sys.path.insert(0, str(ROOT / "scripts"))
from evaluate import settings


class Bigram(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def world():
    yield distributed.start()
    distributed.stop()


ROWS = torch.randint(16, (10, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_the_loss_does_not_depend_on_the_batches(world, batch_size: int):
    model = Bigram()
    log_p = model.table.log_softmax(-1)[ROWS[:, :-1], ROWS[:, 1:]]
    found = evaluate(TokenLoss(model), ROWS, batch_size, world)
    assert found is not None and found.tokens == 80
    assert found.loss == pytest.approx(-log_p.mean().item(), rel=1e-6)


def test_the_number_of_the_galore_lineage_is_lower_by_n_over_n_plus_1(world):
    found = evaluate(TokenLoss(Bigram()), ROWS, 2, world)
    assert found is not None and found.galore_loss == pytest.approx(found.loss * 5 / 6, rel=1e-6)
    metrics = spelled(found.metrics("galore"))
    assert "eval/perplexity_galore" not in spelled(found.metrics(None))
    assert metrics["eval/perplexity_galore"] < metrics["eval/perplexity"]


def test_it_evaluates_in_eval_mode_and_goes_back(world):
    model = Bigram()
    modes = []
    model.register_forward_pre_hook(lambda m, args: modes.append(m.training))
    evaluate(TokenLoss(model), ROWS, 4, world)
    assert modes == [False] * 3 and model.training


def test_it_stops_when_asked(world):
    assert evaluate(TokenLoss(Bigram()), ROWS, 4, world, stop=lambda: True) is None


def test_perplexity_is_capped():
    assert perplexity(1.0) == math.e and perplexity(1e9) == math.exp(20)


# --- what scripts/evaluate.py evaluates on -------------------------------------------------------------------------


def of_a_run(*overrides: str):
    """The settings of a run, with overrides."""
    own = [
        "data=local",
        "data.path=[a b.txt,c]",
        "data.seq_len=32",
        "data.validation_fraction=0.1",
        "data.streams=null",
    ]
    run = SimpleNamespace(config=compose(*own, "train.seed=3", "train.micro_batch_size=2", "eval.sequences=16"))
    return run.config, settings(run, [*overrides])  # pyright: ignore[reportArgumentType]


def test_without_overrides_all_is_the_run_s():
    own, found = of_a_run()
    assert (found.data, found.eval, found.train) == (own.data, own.eval, own.train)


def test_an_override_leaves_the_rest_of_its_section_as_the_run_had_it():
    own, found = of_a_run("data.validation_fraction=0", "eval.compat=galore", "train.micro_batch_size=8")
    assert (found.data.validation_fraction, found.eval.compat, found.train.micro_batch_size) == (0, "galore", 8)
    found.data.validation_fraction, found.eval.compat, found.train.micro_batch_size = 0.1, None, 2
    assert (found.data, found.eval, found.train) == (own.data, own.eval, own.train)


def test_another_path_is_where_the_source_reads():
    assert of_a_run("data.path=d.txt")[1].data.source["path"] == "d.txt"


def test_another_text_keeps_the_length_of_the_run_s_rows_and_no_more():
    (_, found), standard = of_a_run("data=pystdlib"), compose("data=pystdlib").data
    assert found.data.seq_len == 32 and found.eval.sequences == 16
    found.data.seq_len = standard.seq_len
    assert found.data == standard
    assert of_a_run("data=pystdlib", "data.seq_len=64")[1].data.seq_len == 64


def test_what_a_run_said_of_its_source_alone_is_kept():
    config = compose("data=c4", "data.source.validation=/c4/held-out.json.gz", "data.streams=32")
    run = SimpleNamespace(config=config)
    found = settings(run, ["data.streams=8"])  # pyright: ignore[reportArgumentType]
    assert found.data.source == config.data.source | {"streams": 8}


def test_a_model_of_others_has_the_defaults():
    assert settings(None, ["data.seq_len=64"]) == compose("data.seq_len=64")


def test_what_a_source_leaves_open_in_its_yaml_is_what_the_run_gave(monkeypatch):
    open_path = {"_target_": "lrtrain.data.sources.LocalFiles", "path": "???", "text_field": "text"}
    composed = OmegaConf.create({"data": {"source": open_path}})
    monkeypatch.setattr("evaluate.default_composition", lambda *overrides: composed)
    own, found = of_a_run()
    assert found.data.source == own.data.source and found.data.source["path"] == ["a b.txt", "c"]
