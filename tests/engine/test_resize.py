"""A model that goes on with smaller ranks: its tensors are smaller, and what they keep is what they were."""

import copy
import math

import pytest
import torch
from launching import SMALL

from lrtrain import distributed
from lrtrain.checkpoint.meta import CheckpointMeta, DataState, Progress
from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.config.schema import as_dict
from lrtrain.engine.fsdp import FSDPEngine
from lrtrain.engine.resize import carry_over, wanted_ranks
from lrtrain.errors import ConfigError
from lrtrain.model.build import make_model
from lrtrain.model.rank import RankPlan
from lrtrain.model.structure import factorized_layers
from lrtrain.run.rundir import check_compatible

THRESHOLD = 0.3
CONFIG = compose("param=nested", *SMALL, "param.rank=8", "param.shrink_every=2", f"param.shrink_threshold={THRESHOLD}")
ROWS = torch.randint(128, (4, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def engine():
    """After two steps, when all layers are due."""
    made = FSDPEngine(
        distributed.start(),
        torch.float32,
        compile=False,
        recompute_every=0,
        recompute_keep="inputs",
        replicas=1,
        tensor=1,
        reduce_dtype="fp32",
    )
    made.prepare(make_model(CONFIG), 0, choice(CONFIG.optim))
    for step in range(2):
        train(made, step)
    yield made
    distributed.stop()


def train(engine: FSDPEngine, step: int) -> float:
    engine.begin_step(step, 1e-2, 1.0, "global")
    loss = engine.forward_backward(ROWS, 64).item() / 64
    engine.clip_and_step(loss)
    return loss


def planned(ranks: dict[str, int]) -> RankPlan:
    return RankPlan(CONFIG.param["rank"], ranks)


def resize(engine: FSDPEngine, step: int = 2) -> dict[str, int]:
    ranks = wanted_ranks(factorized_layers(engine.model), step)
    engine.resize(make_model(CONFIG, planned(ranks)), choice(CONFIG.optim))
    return ranks


def nbytes(engine: FSDPEngine) -> int:
    """Storage of parameters and moments."""
    tensors = [*engine.model.parameters(), *(t for s in engine.optimizer.state.values() for t in s.values())]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_tensors_get_smaller_by_what_was_cut(engine: FSDPEngine):
    before, layers = nbytes(engine), factorized_layers(engine.model)
    sizes = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    ranks = resize(engine)
    cut = sum((8 - ranks[name]) * size for name, size in sizes.items())
    assert cut > 0 and before - nbytes(engine) == 4 * 3 * cut  # float32; the parameter and two moments


def test_the_maps_change_by_no_more_than_the_threshold(engine: FSDPEngine):
    before = {name: layer.dense_weight().detach() for name, layer in factorized_layers(engine.model).items()}
    ranks = resize(engine)
    for name, layer in factorized_layers(engine.model).items():
        assert layer.rank == ranks[name] == layer.B.weight.shape[1] == layer.A.weight.shape[0] < 8
        dropped = (before[name] - layer.dense_weight()).norm() / before[name].norm()
        assert 0 < dropped <= math.sqrt(THRESHOLD)


def test_parameters_moments_and_step_counters_are_the_leading_parts_of_what_they_were(engine: FSDPEngine):
    old = {name: (p.detach(), engine.optimizer.state[p]) for name, p in engine.model.named_parameters()}
    resize(engine)
    for name, p in engine.model.named_parameters():
        before, state = old[name]
        leading = tuple(map(slice, p.shape))
        assert torch.equal(p, before[leading])
        assert engine.optimizer.state[p].keys() == state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in engine.optimizer.state[p].items():
            expected = state[key] if key == "step" else state[key][leading]
            assert torch.equal(value, expected) and expected.any()


def test_training_goes_on_and_the_smaller_model_is_saved_and_loaded(engine: FSDPEngine):
    ranks = resize(engine)
    losses = [train(engine, step) for step in range(2, 12)]
    assert losses[-1] < losses[0]
    other = FSDPEngine(
        engine.world,
        torch.float32,
        compile=False,
        recompute_every=0,
        recompute_keep="inputs",
        replicas=1,
        tensor=1,
        reduce_dtype="fp32",
    )
    other.prepare(make_model(CONFIG, planned(ranks)), 1, choice(CONFIG.optim))
    other.load_state_dict(copy.deepcopy(engine.state_dict()))
    assert [train(other, step) for step in range(12, 15)] == [train(engine, step) for step in range(12, 15)]


def test_ranks_are_wanted_only_when_due_and_only_smaller_within_the_threshold(engine: FSDPEngine):
    layers = factorized_layers(engine.model)
    assert set(wanted_ranks(layers, 3).values()) == {8}
    for layer in layers.values():
        layer.shrink_threshold = 0.0
    assert set(wanted_ranks(layers, 2).values()) == {8}


def test_a_state_of_another_shape_than_its_parameter_begins_anew_where_it_is_cut(engine: FSDPEngine):
    for p in engine.model.parameters():
        engine.optimizer.state[p]["exp_avg"] = torch.ones(3)  # as a quantized one might be
    model = make_model(CONFIG, planned(wanted_ranks(factorized_layers(engine.model), 2))).to_empty(device="cpu")
    optimizer = choice(CONFIG.optim)(model)
    carry_over(engine.model, engine.optimizer, model, optimizer)
    kept = {name for name, p in model.named_parameters() if optimizer.state[p]["exp_avg"].shape == (3,)}
    assert kept == {name for name, p in model.named_parameters() if p.shape == engine.model.get_parameter(name).shape}


def test_a_resized_checkpoint_fits_any_rank_but_no_other_method(tmp_path):
    here = compose("param=nested", *SMALL, "resume=never")
    data = DataState(fingerprint="", state=None)
    meta = CheckpointMeta(0, Progress(), data, as_dict(here), "", "", {}, 1)
    meta.config["param"]["rank"] = {"mlp": 3}
    with pytest.raises(ConfigError, match="param.rank"):
        check_compatible(here, "", tmp_path, meta)
    meta.ranks = {"model.layers.0.mlp.up_proj": 3}
    check_compatible(here, "", tmp_path, meta)
    meta.config["param"]["ranks"] = [1.0]
    with pytest.raises(ConfigError, match="param.ranks"):
        check_compatible(here, "", tmp_path, meta)
