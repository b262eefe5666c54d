"""ZeRO on one process against FSDP2's engine, what a step that is not finite leaves alone, and what is refused."""

import math

import pytest
import torch
from launching import SMALL

from lrtrain import distributed
from lrtrain.config.check import check
from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.distributed.sharding import local
from lrtrain.engine.fsdp import FSDPEngine
from lrtrain.errors import ConfigError
from lrtrain.model import loss
from lrtrain.model.build import make_model
from lrtrain.planning.kept import kept_bytes

ROWS = torch.randint(128, (4, 17), generator=torch.Generator().manual_seed(0))
DEEPSPEED = (*SMALL, "param=lowrank", "engine=deepspeed", "resume=auto")


@pytest.fixture
def world():
    yield distributed.start()
    distributed.stop()


def engine(world, *overrides: str, dtype: torch.dtype = torch.float32):
    config = compose(*DEEPSPEED, *overrides)
    made = choice(config.engine)(world=world, dtype=dtype, compile=False, recompute_every=0, recompute_keep="inputs")
    made.prepare(make_model(config), 0, choice(config.optim))
    return made


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("poison", ["gradient", "loss"])
def test_a_step_that_is_not_finite_touches_nothing(world, stage: int, poison: str):
    ours = engine(world, f"engine.zero_stage={stage}")

    def step(of_step: float):
        ours.begin_step(0, 1e-2, 1.0, "global")
        for half, last in zip(ROWS.split(2), (False, True), strict=True):
            ours.forward_backward(half, 64, last)
        if poison == "gradient" and not math.isfinite(of_step):
            of_step = 1.0
            local(ours.shards.get_parameter("model.layers.1.mlp.up_proj.B.weight").grad)[0] = math.nan
        return ours.clip_and_step(of_step)

    def snapshot():
        return {k: local(v).clone() for part in ours.state_dict().values() for k, v in part.items()}

    first = step(1.0)
    before = snapshot()
    assert step(math.inf).skipped
    after = snapshot()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    again = step(1.0)
    assert not again.skipped and again.grad_norm == pytest.approx(first.grad_norm, rel=0.1)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["engine.zero_stage=4"], "engine.zero_stage=4 must be 1, 2 or 3"),
        (["optim=galore"], "optim=galore needs whole rows .* use engine=fsdp or engine=ddp, or optim=adamw"),
        (["optim.in_backward=true", "train.clip=null"], "optim.in_backward=true steps before engine=deepspeed"),
        (["train.dtype=bf16_sr"], "train.dtype=bf16_sr keeps no float32 parameters"),
        (["train.dtype=bf16", "engine.zero_stage=1"], "engine.zero_stage=1 does not .* use engine.zero_stage=2"),
        (["train.dtype=bf16", "param=sst"], "param=sst has frozen parameters"),
        (["engine.offload_parameters=true"], "engine.offload_parameters=true is for engine.zero_stage=3, not 2"),
        (["engine.reduce_dtype=fp8"], "engine.reduce_dtype=fp8 must be 'fp32' or 'bf16'"),
    ],
)
def test_what_zero_cannot_do_is_refused_in_a_sentence(overrides: list[str], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        config = compose(*DEEPSPEED, *overrides)
        config.train.micro_batch_size = config.train.batch_size
        check(config, 1)


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_computes_in_bf16_and_steps_float32(world, stage: int):
    """The loss differs from float32's: a dtype that is ignored would give the same. It is FSDP2's to 1e-4."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        ours = engine(world, f"engine.zero_stage={stage}", dtype=dtype)
        seen = []
        head = ours.loss.head
        head.register_forward_hook(lambda m, args, out, seen=seen: seen.append((args[0].dtype, m.head.weight.dtype)))
        ours.begin_step(0, 1e-2, 1.0, "global")
        found = ours.forward_backward(ROWS, 64).item()
        ours.clip_and_step(found)
        assert set(seen) == {(dtype, dtype)}
        assert {p.dtype for p in ours.model.parameters()} == {dtype}
        assert {p.dtype for p in ours.shards.parameters()} == {torch.float32}
        losses.append(found / 64)
    assert 1e-5 < abs(losses[0] - losses[1]) < 0.02
    config = compose(*SMALL, "param=lowrank")
    fsdp = FSDPEngine(world, torch.bfloat16, False, 0, "inputs", replicas=1, tensor=1, reduce_dtype="fp32")
    fsdp.prepare(make_model(config), 0, choice(config.optim))
    assert fsdp.forward_backward(ROWS, 64).item() / 64 == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_no_logits_of_all_tokens_wait_for_the_backward_pass(world, stage: int, monkeypatch):
    """512 tokens and a vocabulary of 1,000: whole logits would keep as many numbers as both have together."""
    monkeypatch.setattr(loss, "CHUNK", 64)
    ours = engine(world, f"engine.zero_stage={stage}", "model.vocab_size=1000", "model.config.num_hidden_layers=1")
    rows, sizes = torch.randint(1000, (8, 65)), []
    cross_entropy = loss._cross_entropy
    monkeypatch.setattr(loss, "_cross_entropy", lambda x, *more: sizes.append(x.shape) or cross_entropy(x, *more))
    ours.begin_step(0, 1e-2, 1.0, "global")
    kept = kept_bytes(lambda: ours.deepspeed(rows))
    assert sizes == [(64, 1000)] * 8
    assert kept < 4 * 512 * 1000 + 4 * 1000 * 32
