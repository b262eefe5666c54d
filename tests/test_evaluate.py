"""The loss is the mean over tokens, whatever the batches; the other codes' number stands beside it."""

import math
from types import SimpleNamespace

import pytest
import torch

from lrtrain import distributed
from lrtrain.evaluate import evaluate, perplexity


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
    found = evaluate(model, ROWS, batch_size, world)
    assert found is not None and found.tokens == 80
    assert found.loss == pytest.approx(-log_p.mean().item(), rel=1e-6)


def test_the_number_of_the_galore_lineage_is_lower_by_n_over_n_plus_1(world):
    found = evaluate(Bigram(), ROWS, 2, world)
    assert found is not None and found.galore_loss == pytest.approx(found.loss * 5 / 6, rel=1e-6)
    assert "eval/perplexity_galore" not in found.metrics(None)
    assert found.metrics("galore")["eval/perplexity_galore"] < found.metrics("galore")["eval/perplexity"]


def test_it_evaluates_in_eval_mode_and_goes_back(world):
    model = Bigram()
    modes = []
    model.register_forward_pre_hook(lambda m, args: modes.append(m.training))
    evaluate(model, ROWS, 4, world)
    assert modes == [False] * 3 and model.training


def test_it_stops_when_asked(world):
    assert evaluate(Bigram(), ROWS, 4, world, stop=lambda: True) is None


def test_perplexity_is_capped():
    assert perplexity(1.0) == math.e and perplexity(1e9) == math.exp(20)
