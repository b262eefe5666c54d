"""The loss at each rank is the loss of a model that has that rank."""

import pytest
import torch
from launching import SMALL

from lrtrain import distributed
from lrtrain.config.compose import compose
from lrtrain.engine.resize import carry_over
from lrtrain.measure.evaluate import evaluate
from lrtrain.measure.truncation import evaluate_truncated
from lrtrain.model.build import make_model
from lrtrain.model.counts import parameter_count
from lrtrain.model.init import materialize
from lrtrain.model.loss import TokenLoss
from lrtrain.model.rank import RankPlan
from lrtrain.model.structure import factorized_layers

ROWS = torch.randint(128, (4, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def world():
    yield distributed.start()
    distributed.stop()


def materialized(*overrides: str, ranks: dict[str, int] | None = None):
    model = make_model(compose(*overrides, *SMALL, "param.rank=8"), RankPlan(8, ranks or {}))
    materialize(model, 0, torch.device("cpu"))
    return model


def test_each_share_is_evaluated_as_the_model_of_that_rank(world):
    model = materialized("param=nested")
    found = evaluate_truncated(model, parameter_count(model), lambda: evaluate(TokenLoss(model), ROWS, 2, world))
    assert [t.share for t in found] == [0.125, 0.25, 0.5, 0.75, 1.0]
    assert len({t.loss for t in found}) == 5
    for truncation, rank in zip(found, (1, 2, 4, 6, 8), strict=True):
        small = materialized("param=nested", ranks=dict.fromkeys(factorized_layers(model), rank))
        nothing = torch.optim.SGD(model.parameters())
        carry_over(model, nothing, small, torch.optim.SGD(small.parameters()))
        assert truncation.ranks == (rank, rank) and truncation.parameters == parameter_count(small)
        alone = evaluate(TokenLoss(small), ROWS, 2, world)
        assert alone is not None and truncation.loss == pytest.approx(alone.loss, rel=1e-6)


def test_the_model_is_whole_again_afterwards_even_if_it_was_cut_short(world):
    model = materialized("param=nested")
    assert evaluate_truncated(model, 0, lambda: None) == []
    assert all(torch.linalg.matrix_rank(layer.dense_weight()) == 8 for layer in factorized_layers(model).values())


def test_a_model_without_smaller_ranks_is_not_evaluated_again(world):
    assert evaluate_truncated(materialized("param=lowrank"), 0, lambda: pytest.fail("evaluated")) == []
