"""Engines on two processes against FSDP2's on one: every parameter after steps with changes between them."""

from pathlib import Path

import pytest
import torch
from crew import together
from launching import SMALL

from lrtrain import distributed
from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.config.dtypes import compute_dtype
from lrtrain.config.schema import Config
from lrtrain.distributed.sharding import twin, whole
from lrtrain.engine.base import Engine
from lrtrain.engine.resize import wanted_ranks
from lrtrain.measure.evaluate import evaluate
from lrtrain.model.build import make_model
from lrtrain.model.rank import RankPlan
from lrtrain.model.structure import factorized_layers

ROWS = torch.randint(128, (4, 17), generator=torch.Generator().manual_seed(0))
STEPS = 5
TOLERANCE = 2e-5
METHODS = {
    "dense": ["param=dense"],
    "relora": ["param=relora", "param.merge_every=2"],
    # No σ comes to 0, where the signs that an SVD gives its vectors are arbitrary.
    "sst": ["param=sst", "param.iteration=2", "param.round=2", "param.warmup=2", "param.init_std=0.3"],
    "rebalanced": ["param=lowrank", "param.rebalance_at=2"],
    "shrinking": ["param=nested", "param.rank=8", "param.shrink_every=2", "param.shrink_threshold=0.3"],
}
ZERO3 = ["engine=deepspeed", "engine.zero_stage=3"]


def made(config: Config, world: distributed.world.World) -> Engine:
    engine = choice(config.engine)(
        world=world,
        dtype=compute_dtype(config, world.device),
        compile=False,
        recompute_every=0,
        recompute_keep="inputs",
    )
    engine.prepare(make_model(config), 0, choice(config.optim))
    return engine


def train(methods: list[list[str]], engine: list[str], out: Path) -> None:
    """Train each method, with an evaluation before each change, and a step that is taken back; rank 0 writes `out`."""
    world = distributed.start()
    found = [
        train_one(compose(*SMALL, "model.config.num_hidden_layers=1", *method, *engine, "train.dtype=fp32"), world)
        for method in methods
    ]
    if world.main:
        torch.save(found, out)
    distributed.stop()


def train_one(config: Config, world: distributed.world.World) -> dict[str, torch.Tensor]:
    engine = made(config, world)
    mine = ROWS.view(world.size, -1, ROWS.shape[1])[world.dist_rank]
    losses = []

    def step(done: int) -> None:
        engine.begin_step(done, 3e-3, 1.0, "global")
        losses.append(engine.forward_backward(mine, 64).cpu())
        torch.distributed.all_reduce(losses[-1])
        assert not engine.clip_and_step(losses[-1].item()).skipped

    for done in range(STEPS):
        step(done)
        if done == 2:
            before = {part: {k: t.clone() for k, t in of.items()} for part, of in engine.state_dict().items()}
            step(done + 1)
            engine.load_state_dict(before)
        evaluate(engine.loss, ROWS, 2, world)
        engine.revise(done + 1)
        layers = factorized_layers(engine.shards)
        ranks = wanted_ranks(layers, done + 1)
        if any(layer.rank != ranks[name] for name, layer in layers.items()):
            engine.resize(make_model(config, RankPlan(config.param["rank"], ranks)), choice(config.optim))
    parameters = {name: whole(p).float().clone() for name, p in engine.shards.named_parameters()}
    for name, layer in factorized_layers(engine.shards).items():
        complete = twin(layer, whole)
        parameters[f"{name} W"] = complete.dense_weight()
        if config.param["name"] == "sst":  # singular vectors have the sign that the last bits gave them
            for key, _ in layer.named_parameters():
                del parameters[f"{name}.{key}"]
    return {"losses": torch.cat(losses) / 64, **parameters}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("one")
    together(train, ([*METHODS.values()], ["engine=fsdp"], folder / "found"), folder, 1)
    return dict(zip(METHODS, torch.load(folder / "found"), strict=True))


@pytest.mark.parametrize(
    "engine",
    [
        ZERO3,
        pytest.param([*ZERO3, "engine.persist_below=0"], marks=pytest.mark.full),
        pytest.param([*ZERO3, "engine.persist_below=1000000"], marks=pytest.mark.full),
        pytest.param(["engine=deepspeed", "engine.zero_stage=2"], marks=pytest.mark.full),
        pytest.param(["engine=fsdp"], marks=pytest.mark.full),
    ],
    ids="-".join,
)
def test_what_changes_between_steps_is_computed_with_on_two_processes(engine: list[str], expected, tmp_path: Path):
    together(train, ([*METHODS.values()], engine, tmp_path / "found"), tmp_path)
    for method, found in zip(METHODS, torch.load(tmp_path / "found"), strict=True):
        assert found.keys() == expected[method].keys()
        for name, value in found.items():
            assert value.shape == expected[method][name].shape, (method, name)
            gap = (value - expected[method][name]).abs().max().item()
            assert gap < TOLERANCE, (method, name, gap)
