"""Tensor parallelism on two and four processes against one process."""

from pathlib import Path

import pytest
import torch
from crew import together
from launching import SMALL, TINY
from runs import gap, losses, run_jobs

from lrtrain import distributed
from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.config.schema import Config
from lrtrain.distributed.sharding import whole
from lrtrain.distributed.world import World
from lrtrain.model.build import make_model
from lrtrain.tracking.jsonl import series

BIASES = ["+model.config.attention_bias=true", "+model.config.mlp_bias=true"]
METHODS = {
    "dense": ["param=dense", "param.rank=null", *BIASES],
    "lowrank": ["param=lowrank", "model.config.tie_word_embeddings=true"],
    "cola": ["param=cola"],
    "dlr": ["param=dlr", "param.rank=7", *BIASES],  # a residual that does not begin anew on the second process
    "nested": ["param=nested", "param.lasso=1e-2"],
    "lost": ["param=lost", "param.density=0.1", "+model.config.num_key_value_heads=2"],
}
TOLERANCE = 2e-5


def gradients_and_states(methods: list[list[str]], out: Path) -> None:
    """The job of a crew: two micro-batches and two steps of each method; rank 0 writes what it finds."""
    world = distributed.start()
    found = [of_one(compose(*SMALL, *method, "train.dtype=fp32"), world) for method in methods]
    if world.main:
        torch.save(found, out)
    distributed.stop()


def of_one(config: Config, world: World) -> dict[str, torch.Tensor]:
    kinds = {"world": world, "dtype": torch.float32, "compile": False}
    engine = choice(config.engine)(**kinds, recompute_every=2, recompute_keep="inputs")
    engine.prepare(make_model(config), 0, choice(config.optim))
    rows = torch.randint(128, (2, 4, 17), generator=torch.Generator().manual_seed(0))
    found = {}
    for step in range(2):
        engine.begin_step(step, 1e-3, 0.5, "global")
        mine = [micro.view(world.size, -1, 17)[world.dist_rank] for micro in rows]
        engine.forward_backward(mine[0], 128, False)
        loss = engine.forward_backward(mine[1], 128)
        found |= {f"{name} gradient": whole(p.grad).clone() for name, p in engine.model.named_parameters()}
        torch.distributed.all_reduce(loss)
        found["grad_norm"] = torch.tensor(engine.clip_and_step(loss.item()).grad_norm)
    states = engine.state_dict()
    return found | {f"{part} {name}": whole(t).clone() for part in states for name, t in states[part].items()}


@pytest.mark.full
def test_gradients_parameters_and_states_are_those_of_one_process(tmp_path: Path):
    jobs = [[*method, *split] for method in METHODS.values() for split in ([], ["engine.tensor=2"])]
    together(gradients_and_states, (jobs[::2], tmp_path / "one"), tmp_path, 1)
    together(gradients_and_states, (jobs[1::2], tmp_path / "two"), tmp_path, 2)
    for name, one, two in zip(METHODS, *(torch.load(tmp_path / n) for n in ("one", "two")), strict=True):
        assert one.keys() == two.keys()
        for key, expected in one.items():
            apart = (two[key] - expected).double().norm().item()
            assert apart < TOLERANCE * max(expected.double().norm().item(), 0.1), (name, key, apart)


VARIANTS = {
    "dense": [*METHODS["dense"], "train.clip=0.1", "train.clip_by=parameter"],
    "lost": [*METHODS["lost"], "train.recompute_every=1", "eval.every=1", "eval.sequences=11"],  # uneven rows
    "shrinking": ["param=nested", "param.shrink_every=2", "param.shrink_threshold=0.2"],
    "rebalanced": ["param=lowrank", "param.rebalance_at=2", "spectra=full", "spectra.hidden=0", "spectra.every=2"],
    "in-backward": ["param=cola", "optim.in_backward=true", "train.clip_by=parameter"],
    "bf16": ["param=dlr", "train.dtype=bf16"],
}
# Processes, and the legs of the journey on them: engine, steps done at the end.
SPLIT, ZERO3 = ["engine.tensor=2"], ["engine=deepspeed", "engine.zero_stage=3", "engine.persist_below=0"]
LEGS = [(4, SPLIT, 2), (3, ["engine=fsdp"], 4), (2, ZERO3, 6), (2, SPLIT, 8), (1, ["engine=fsdp"], 10), (4, SPLIT, 12)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache, corpus) -> Path:
    """Every variant on one process and on four, of which two split each layer; and a run from layout to layout."""
    folder = tmp_path_factory.mktemp("tensor")
    base = [*TINY, f"data.path={corpus}", "train.steps=4", "optim.weight_decay=0.1", "eval.every=4"]

    def jobs(where: str, each: int, *more: str) -> list[list[str]]:
        micro = f"train.micro_batch_size={each}"
        return [[*base, *VARIANTS[name], micro, *more, f"run.dir={folder}/{where}-{name}"] for name in VARIANTS]

    journey = [
        *base,
        "param=cola",
        "train.batch_size=12",
        "train.micro_batch_size=1",
        "schedule=constant",
        "schedule.warmup=0.0",
    ]
    stays = [*journey, "train.steps=12", f"run.dir={folder}/stays"]
    replicas = [*base, "train.micro_batch_size=2", "param=lowrank", *SPLIT]
    run_jobs([*jobs("one", 8), stays, [*replicas[:-1], f"run.dir={folder}/one-replicas"]], 1, folder)
    run_jobs([*jobs("four", 2, *SPLIT), [*replicas, "engine.replicas=2", f"run.dir={folder}/four-replicas"]], 4, folder)
    for processes, engine, steps in LEGS:
        leg = ["resume=auto", f"train.steps={steps}", f"run.dir={folder}/goes"]
        run_jobs([[*journey, *engine, *leg]], processes, folder)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("name", [*VARIANTS, "replicas"])
def test_a_run_that_is_split_has_the_losses_evaluation_and_spectra_of_one_process(runs: Path, name: str):
    one, four = runs / f"one-{name}", runs / f"four-{name}"
    assert gap(losses(one), losses(four)) < (0.02 if name == "bf16" else TOLERANCE)
    measured = ("eval/loss", "train/grad_norm", *["spectra/summary/all/erank_mean"] * (name == "rebalanced"))
    for key in measured:
        (_, first), (_, second) = (series(run / "metrics.jsonl", key) for run in (one, four))
        assert len(first) and first == pytest.approx(second, rel=0.02 if name == "bf16" else 1e-4), key


@pytest.mark.full
def test_a_checkpoint_moves_to_and_from_other_layouts(runs: Path):
    assert gap(losses(runs / "goes"), losses(runs / "stays")) < TOLERANCE
