"""The plan's figures against what a real run holds."""

import math

import pytest
import torch
from launching import ROOT

from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.engine.blocks import prepare_blocks
from lrtrain.model.build import make_model
from lrtrain.model.init import materialize
from lrtrain.model.loss import next_token_loss
from lrtrain.planning.plan import memory_per_process, parameters_by_kind
from lrtrain.planning.timeline import timeline

SMALL = (
    "model.vocab_size=512",
    "model.config.hidden_size=64",
    "model.config.intermediate_size=128",
    "model.config.num_hidden_layers=3",
    "model.config.num_attention_heads=4",
    "param.rank=8",
    "train.micro_batch_size=4",
    "data.seq_len=64",
)
CPU = torch.device("cpu")


def plan(*overrides: str, processes: int = 1):
    config = compose(*SMALL, *overrides)
    return config, memory_per_process(config, make_model(config), torch.float32, processes)


@pytest.mark.parametrize("param", ["dense", "lowrank", "sltrain", "sst", "relora"])
def test_bytes_of_weights_supports_and_states_are_exact(param: str):
    config, memory = plan(f"param={param}")
    model = make_model(config)
    materialize(model, 0, CPU)
    optimizer = choice(config.optim)(model)
    next_token_loss(model, torch.randint(512, (1, 65))).backward()
    optimizer.step()
    states = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert memory.optimizer == sum(t.nbytes for t in states) == 2 * memory.gradients
    assert memory.supports == sum(b.nbytes for n, b in model.named_buffers() if n.endswith(("crow", "col", "order")))


OPTIMIZERS = sorted(p.stem for p in (ROOT / "conf" / "optim").glob("*.yaml") if p.stem != "base")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_of_every_optimizer_are_those_that_its_steps_leave(name: str):
    config, memory = plan(f"optim={name}", "param=lowrank")
    model = make_model(config)
    materialize(model, 0, CPU)
    optimizer = choice(config.optim)(model)
    for _ in range(2):
        next_token_loss(model, torch.randint(512, (1, 65))).backward()
        optimizer.step()
    states = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    assert memory.optimizer == sum(t.nbytes for t in [*states, *optimizer.shared()]) > 0


@pytest.mark.parametrize("param", ["dense", "lowrank", "sltrain", "sst", "relora"])
@pytest.mark.parametrize("every", [0, 1])
def test_bytes_of_activations_are_what_autograd_saves(param: str, every: int):
    config = compose(*SMALL, f"param={param}", f"train.recompute_every={every}")
    _, saved = timeline(config, make_model(config), torch.float32)
    model = make_model(config)
    materialize(model, 0, CPU)
    prepare_blocks(model, every, "inputs")
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            alive.append(tensor)  # so that no storage is used again for another
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        next_token_loss(model.train(), torch.randint(512, (4, 65)))
    head = 4 * 64 * 512  # its gradient; and of the hidden states that it saves only a gradient of the same size is kept
    assert saved == pytest.approx(sum(kept.values()) + head, rel=0.02)


@pytest.mark.parametrize("param", ["lowrank", "cola", "lost"])
def test_bottlenecks_that_are_kept_are_planned_for(param: str):
    overrides = (f"param={param}", "train.recompute_every=2")  # blocks 0 and 2 of three
    saved = []
    for keep in ("inputs", "bottleneck"):
        config = compose(*SMALL, *overrides, f"train.recompute_keep={keep}")
        saved.append(timeline(config, make_model(config), torch.float32)[1])
    assert saved[1] - saved[0] == 4 * (4 * 64) * 2 * 7 * 8  # bytes · tokens · blocks · 7r


def test_shards_divide_what_is_sharded():
    (_, one), (_, four) = plan(), plan(processes=4)
    assert four.weights == one.weights // 4 and four.optimizer == one.optimizer // 4
    assert four.supports == one.supports and four.activations == one.activations
    _, replicated = plan("engine.replicas=2", processes=4)
    assert replicated.weights == one.weights // 2


def test_zero_spreads_more_by_every_stage_and_ddp_nothing():
    _, one = plan()
    for overrides, weights, gradients, states in [
        (["engine=ddp"], 1, 1, 1),
        (["engine=deepspeed", "engine.zero_stage=1"], 1 + 1 / 4, 1, 1 / 4),  # whole, and its range of the float32 ones
        (["engine=deepspeed", "engine.zero_stage=2"], 1 + 1 / 4, 1 / 4, 1 / 4),
        (["engine=deepspeed", "engine.zero_stage=3"], 2 / 4, 1 / 4, 1 / 4),
    ]:
        _, memory = plan(*overrides, processes=4)
        assert memory.weights == pytest.approx(weights * one.weights, rel=1e-4)
        assert memory.gradients == pytest.approx(gradients * one.gradients, rel=1e-4)
        assert memory.optimizer == pytest.approx(states * one.optimizer, rel=1e-4)


def test_kinds_add_up():
    config, memory = plan()
    kinds = parameters_by_kind(make_model(config))
    assert 4 * sum(kinds.values()) == memory.weights
    assert kinds["sparse values"] == 3 * (4 * math.floor(0.03 * 64 * 64) + 3 * math.floor(0.03 * 64 * 128))
