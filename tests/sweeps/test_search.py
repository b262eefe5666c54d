"""A search by Optuna."""

import pytest
from launching import ROOT

from lrtrain.config.compose import default_composition
from lrtrain.errors import ConfigError
from lrtrain.sweeps.search import refuse_nothing_held_out


def test_a_search_for_the_lowest_evaluation_loss_is_refused_where_nothing_is_held_out():
    nothing = default_composition("data=local", f"data.path={ROOT}", "data.validation_fraction=0")
    with pytest.raises(ConfigError, match="objectives asks for eval_loss, which data.validation_fraction=0 leaves"):
        refuse_nothing_held_out({"parameters": "minimize", "eval_loss": "minimize"}, nothing)
    refuse_nothing_held_out({"loss": "minimize"}, nothing)
    refuse_nothing_held_out({"eval_loss": "minimize"}, default_composition("data.validation_fraction=0.1"))
    refuse_nothing_held_out({"eval_loss": "minimize"}, default_composition("data=c4"))  # has a validation split
