"""The engine's step against plain PyTorch, and what a non-finite gradient must not touch."""

import math
from collections import Counter

import pytest
import torch
from launching import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from lrtrain import distributed
from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.distributed.sharding import whole
from lrtrain.engine.fsdp import FSDPEngine, sharded_units
from lrtrain.errors import ConfigError
from lrtrain.layers.lowrank import LowRankLinear
from lrtrain.model.build import make_model
from lrtrain.model.counts import parameter_count
from lrtrain.model.init import materialize
from lrtrain.model.loss import next_token_loss
from lrtrain.planning.kept import kept_bytes

FACTORED = (*SMALL, "param.execution=factored")
LOWRANK = (*SMALL, "param=lowrank")  # whose gradients are none zero
ROWS = torch.randint(128, (4, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def world():
    yield distributed.start()
    distributed.stop()


def engine(world, dtype=torch.float32, recompute_every=0, recompute_keep="inputs", overrides=FACTORED) -> FSDPEngine:
    config = compose(*overrides)
    made = FSDPEngine(world, dtype, False, recompute_every, recompute_keep, replicas=1, tensor=1, reduce_dtype="fp32")
    made.prepare(make_model(config), 0, choice(config.optim))
    return made


def test_steps_equal_those_of_a_plain_loop(world):
    """Accumulation over two micro-batches, clipping, AdamW."""
    ours, config = engine(world), compose(*FACTORED)
    plain = make_model(config)
    materialize(plain, 0, torch.device("cpu"))
    plain.train()
    for layer in plain.modules():
        if hasattr(layer, "execution"):
            layer.execution = "factored"
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    for _ in range(3):
        ours.begin_step(0, 1e-2, 0.5, "global")
        losses = [ours.forward_backward(half, ROWS[:, 1:].numel()) for half in ROWS.split(2)]
        result = ours.clip_and_step(sum(losses).item())
        loss = next_token_loss(plain, ROWS) / ROWS[:, 1:].numel()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert sum(losses).item() / ROWS[:, 1:].numel() == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4) and not result.skipped
    for name, value in plain.named_parameters():
        found = whole(ours.model.get_parameter(name))
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("poison", ["gradient", "loss"])
def test_a_step_that_is_not_finite_touches_nothing(world, poison: str):
    ours = engine(world)
    ours.begin_step(0, 1e-2, 1.0, "global")
    ours.forward_backward(ROWS, 64)
    ours.clip_and_step(1.0)

    def snapshot():
        state = ours.state_dict()
        return {k: v.full_tensor().clone() if hasattr(v, "full_tensor") else v
                for part in state.values() for k, v in part.items() if isinstance(v, torch.Tensor)}  # fmt: skip

    before = snapshot()
    ours.forward_backward(ROWS, 64)
    if poison == "gradient":
        parameter = ours.model.get_parameter("model.layers.1.mlp.up_proj.B.weight")
        parameter.grad[0, 0] = math.nan
    assert ours.clip_and_step(math.inf if poison == "loss" else 1.0).skipped
    after = snapshot()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    ours.forward_backward(ROWS, 64)
    assert not ours.clip_and_step(1.0).skipped  # the poisoned gradient is gone


class CountedReads(TorchDispatchMode):
    """Counts the values that the host reads, for each of which it would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_a_step_reads_no_single_value_from_the_device_whether_it_clips_or_not(world, clip: float):
    """What it reads it reads at once: `test_simulated_step.py` counts that."""
    ours = engine(world)
    ours.begin_step(0, 1e-2, clip, "global")
    ours.forward_backward(ROWS, 64)
    with CountedReads() as reads:
        result = ours.clip_and_step(1.0)
    assert reads.count == 0 and not result.skipped and (result.grad_norm > clip) == (clip < 1)


@pytest.mark.parametrize("share", [0.5, 0.9995, 1.0, 1.0005, 2.0])
def test_gradients_are_clipped_as_torch_clips_them_also_near_the_limit(world, share: float):
    ours = engine(world)
    ours.begin_step(0, 0.0, None, "global")
    ours.forward_backward(ROWS, 64)
    before = {p: p.grad.clone() for p in ours.model.parameters()}
    norm = ours._sum(torch.zeros(0, dtype=torch.float64))[-1].float()
    ours.clip = share * norm.item()
    ours._clip(norm, norm.item())
    found = [p.grad.clone() for p in ours.model.parameters()]
    for p, gradient in before.items():
        p.grad = gradient
    torch.nn.utils.clip_grads_with_norm_(ours.model.parameters(), ours.clip, norm)
    assert all(torch.equal(clipped, p.grad) for clipped, p in zip(found, before, strict=True))


def test_bf16_computes_in_bf16_and_keeps_float32(world):
    ours = engine(world, torch.bfloat16)
    for layer in ours.model.modules():
        if hasattr(layer, "execution"):
            layer.execution = "materialize"
    seen = []
    ours.loss.head.register_forward_pre_hook(lambda m, args: seen.append((args[0].dtype, m.head.weight.dtype)))
    ours.begin_step(0, 1e-2, 1.0, "global")
    loss = ours.forward_backward(ROWS, 64)
    ours.clip_and_step(1.0)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)} and loss.item() / 64 == pytest.approx(math.log(128), rel=0.1)
    assert 1e-5 < abs(loss.item() - engine(world).forward_backward(ROWS, 64).item()) / 64 < 0.02
    assert {p.dtype for p in ours.model.parameters()} == {torch.float32}
    assert all(t.dtype == torch.float32 for s in ours.optimizer.state.values() for t in s.values())


def test_recomputation_keeps_fewer_activations(world):
    def kept(recompute_every: int) -> int:
        made = engine(world, recompute_every=recompute_every)
        return kept_bytes(lambda: next_token_loss(made.model, ROWS))

    assert kept(1) < kept(2) < kept(0)


class CountedProducts(TorchDispatchMode):
    """Counts the matrix products by the shapes of their factors."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.counts[(tuple(args[0].shape), tuple(args[1].shape))] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("param,dtype", [("lowrank", torch.float32), ("lost", torch.float32), ("dlr", torch.bfloat16)])
def test_keeping_bottlenecks_is_exact_and_repeats_no_product_with_a(world, param: str, dtype: torch.dtype):
    def run(every: int, keep: str):
        made = engine(world, dtype, every, keep, (*SMALL, f"param={param}", "param.rank=5"))
        losses = []
        with CountedProducts() as products:
            for step in range(2):
                made.begin_step(step, 1e-2, 1.0, "global")
                losses.append(made.forward_backward(ROWS, 64).item())
                made.clip_and_step(losses[-1])
        by_a = sum(n for (_, shape), n in products.counts.items() if shape in ((32, 5), (48, 5)))
        return losses, by_a

    losses, products = run(0, "inputs")
    full, repeated = run(1, "inputs")
    kept, once = run(1, "bottleneck")
    assert losses == full == kept
    assert once == products < repeated


@pytest.mark.parametrize("param", ["lowrank", "cola", "lost"])
def test_a_block_keeps_its_input_and_seven_bottlenecks(world, param: str):
    """Per token 4·(7r + d) bytes in float32, against those of the block's whole inside."""
    tokens, d, r, layers = 4 * 16, 32, 5, 4

    def kept(every: int, keep: str) -> int:
        made = engine(world, torch.float32, every, keep, (*SMALL, f"param={param}", f"param.rank={r}"))
        return kept_bytes(lambda: next_token_loss(made.model, ROWS))

    nothing, inputs, bottleneck = kept(0, "inputs"), kept(1, "inputs"), kept(1, "bottleneck")
    assert bottleneck - inputs == 4 * tokens * 7 * r * layers
    assert nothing - inputs > 4 * tokens * layers * (7 * r + 9 * d)


@pytest.mark.parametrize("dtype", ["fp32", "bf16_sr"])
def test_updates_in_the_backward_pass_hold_the_gradients_of_one_block_at_most(world, dtype: str, monkeypatch):
    """In bfloat16 the engine is wrapped by FSDP, which reduces a block at a time."""
    made = engine(world, overrides=(*LOWRANK, "optim.in_backward=true", f"train.dtype={dtype}"))
    alive: list[int] = []
    step_one = made.optimizer.step_one

    def counted(p, *others):
        alive.append(sum(q.numel() for q in made.model.parameters() if q.grad is not None))
        step_one(p, *others)

    monkeypatch.setattr(made.optimizer, "step_one", counted)
    before = [whole(p).clone() for p in made.model.parameters()]
    made.begin_step(0, 1e-2, 1.0, "parameter")
    result = made.clip_and_step(made.forward_backward(ROWS, 64).item())
    units = [parameter_count(unit) for unit in sharded_units(made.model)]
    norm = parameter_count(made.model) - sum(units)  # the last one, which is in no unit
    assert norm == 32 and len(alive) == len(before) and 0 < max(alive) <= max(units) + norm
    assert not result.skipped and result.grad_norm > 0
    assert all(not torch.equal(old, whole(p)) for old, p in zip(before, made.model.parameters(), strict=True))
    assert all(p.grad is None for p in made.model.parameters())


def test_a_gradient_that_is_not_finite_skips_its_parameter_alone_in_the_backward_pass(world):
    made = engine(world, overrides=(*LOWRANK, "optim.in_backward=true"))
    spoiled = made.model.get_parameter("model.layers.1.mlp.up_proj.B.weight")
    spoiled.register_hook(lambda gradient: gradient * math.nan)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.begin_step(0, 1e-2, 1.0, "parameter")
    result = made.clip_and_step(made.forward_backward(ROWS, 64).item())
    kept = {name for name, p in made.model.named_parameters() if torch.equal(p, before[name])}
    assert result.skipped and kept == {"model.layers.1.mlp.up_proj.B.weight"}
    assert made.optimizer.state[spoiled]["step"] == 0


@pytest.mark.parametrize("param", ["nested", "lowrank"])
def test_a_penalty_is_refused_in_the_backward_pass_whoever_has_it(param: str, monkeypatch):
    """`add_penalty` comes after the backward pass: it would change nothing."""
    more = ["param.lasso=1e-3"] if param == "nested" else monkeypatch.setattr(LowRankLinear, "penalized", True) or []
    with pytest.raises(ConfigError, match="has a penalty.*optim.in_backward=false"):
        make_model(compose(*SMALL, f"param={param}", "optim.in_backward=true", *more))


def test_clipping_by_parameter_bounds_each_and_all(world):
    made = engine(world)
    made.begin_step(0, 0.0, 0.01, "parameter")
    made.forward_backward(ROWS, 64)
    seen = {}
    step = made.optimizer.step
    made.optimizer.step = lambda: (seen.update({n: p.grad.norm() for n, p in made.model.named_parameters()}), step())
    assert made.clip_and_step(1.0).grad_norm > 0.01
    most = 0.01 / math.sqrt(len(seen))
    assert max(seen.values()) == pytest.approx(most, rel=1e-4)
    assert torch.stack([*seen.values()]).norm() <= 0.01 * (1 + 1e-4)
