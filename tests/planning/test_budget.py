"""Comparisons at equal parameters and at equal FLOPs."""

import pytest

from lrtrain.config.compose import compose
from lrtrain.errors import ConfigError
from lrtrain.model.build import make_model
from lrtrain.model.counts import dense_parameter_count, trainable_count
from lrtrain.model.flops import training_flops
from lrtrain.model.structure import factorized_layers
from lrtrain.planning.budget import spend


@pytest.mark.parametrize("param", ["lowrank", "sltrain", "lost", "cola", "nested", "relora"])
def test_a_percentage_as_rank_is_the_largest_rank_within_the_budget(param: str):
    model = make_model(compose(f"param={param}", "param.rank=60%"))
    (rank,) = {layer.rank for layer in factorized_layers(model).values()}
    budget = 0.6 * dense_parameter_count(model)
    more = make_model(compose(f"param={param}", f"param.rank={rank + 1}"))
    assert trainable_count(model) <= budget < trainable_count(more)


@pytest.mark.parametrize(
    "rank,sentence",
    [
        ("half", "param.rank=half is not a rank, a share such as 0.25, or a percentage"),
        ("1%", "param.rank=1% of .* dense parameters is too few: rank 1 trains"),
    ],
)
def test_what_is_no_budget_is_told(rank: str, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        make_model(compose(f"param.rank={rank}"))


def test_flops_buy_steps_and_a_cheaper_model_gets_more_of_them():
    steps = {}
    for param in ("dense", "lowrank"):
        config = spend(compose(f"param={param}", "train.flops=1e13"))
        step = training_flops(make_model(config), config.data.seq_len).model * 8 * config.data.seq_len
        steps[param] = config.train.steps
        assert steps[param] * step <= 1e13 < (steps[param] + 1) * step
    assert steps["lowrank"] > steps["dense"] > 1
    with pytest.raises(ConfigError, match="train.flops=1000 is below the .* of one step"):
        spend(compose("train.flops=1000"))
