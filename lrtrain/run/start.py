"""Building a run: from the configuration, or from the checkpoint that it resumes."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from lrtrain.checkpoint.meta import CheckpointMeta, Window, read_meta
from lrtrain.config.choice import choice
from lrtrain.config.dtypes import compute_dtype
from lrtrain.config.home import home_record
from lrtrain.config.schema import Config, as_dict
from lrtrain.core.metrics import scalars
from lrtrain.data.prepare import check_fits, prepare_data
from lrtrain.distributed.collectives import check_equal_on_all_ranks, run_on_all_ranks, run_on_rank0
from lrtrain.distributed.heartbeat import Heartbeat
from lrtrain.distributed.world import World
from lrtrain.init_from.start import Start
from lrtrain.measure.monitor import check_patterns
from lrtrain.model.autotune import autotune_layers
from lrtrain.model.build import make_model
from lrtrain.model.contract import check_contract
from lrtrain.model.rank import RankPlan
from lrtrain.model.supports import support_hash
from lrtrain.run.batches import Batches
from lrtrain.run.identity import RunIdentity, known_run
from lrtrain.run.lock import RunLock
from lrtrain.run.reading import in_background
from lrtrain.run.report import print_factorization, print_unaligned
from lrtrain.run.rundir import check_compatible, checkpoint_to_resume, claim, sibling_sentence
from lrtrain.run.saver import Saver
from lrtrain.run.state import Run
from lrtrain.run.stop import StopRequest
from lrtrain.tracking import Tracker, open_tracker

COLLECTIVES = "collectives"
"""The folder of a run for the last collectives of each process, where one timed out on GPUs."""


def start_run(
    config: Config,
    world: World,
    stop: StopRequest,
    heartbeat: Heartbeat,
    lock: RunLock,
    left_out: Sequence[Window] = (),
) -> Run:
    """A run that is ready for its next step. A collective.

    Args:
        left_out: the windows of the data that rollbacks have skipped so far.

    Raises:
        ConfigError: on every process, if a value of the configuration is wrong.
    """
    run = Run(config, world, stop, heartbeat, lock)
    if config.train.compile and world.device.type == "cpu":
        ask_for_vector_instructions()
    checkpoint = run_on_rank0(lambda: checkpoint_to_resume(config))
    if world.main and not checkpoint and (told := sibling_sentence(config)):
        print(told, flush=True)
    meta = read_meta(checkpoint) if checkpoint else None
    run.rank_plan = RankPlan(config.param["rank"], meta.ranks if meta else {})
    architecture = meta.architecture if meta else None
    model = make_model(config, run.rank_plan, architecture)
    if not checkpoint:
        check_contract(model, config.train.seed)
    choice(config.optim)(model)  # on meta: raises the optimizer's errors before anything is built
    check_patterns(config, model)
    read_data(run, model, checkpoint, meta)
    start = Start(config, model, world) if config.init_from and not checkpoint else None
    if start and start.rank_plan.exact:
        run.rank_plan = start.rank_plan
        model = make_model(config, run.rank_plan, architecture)
    claim_directory(run, model, meta)
    run.cache_counts(model)
    if world.main:
        print_factorization(model)
        if world.device.type == "cuda" and compute_dtype(config, world.device) == torch.bfloat16:
            print_unaligned(model)
    build_engine(run, model, fresh=not (checkpoint or start))
    ours = meta is not None and config.resume == "auto"  # otherwise it is the checkpoint of another run
    run.saver = Saver(run, saved=meta.step if meta and ours else -1)
    run.batches = Batches(run)
    run.schedule = choice(config.schedule)
    run.tracker = Tracker()
    run.callbacks = {name: choice(node)() for name, node in config.callbacks.items()}
    if checkpoint and meta:
        run.saver.load(run, checkpoint, meta)
    elif start:
        state = run.engine.state_dict()
        start.fill(state["model"])
        run.engine.load_state_dict(state)
    if world.main:
        run.tracker = open_tracker(config.tracking, run.dir, run.identity.id, as_dict(config), config.train.steps)
    if left_out:
        run.progress.left_out = [*left_out]
        run.log(scalars("train", {"rollbacks": len(left_out)}))
    return run


def read_data(run: Run, model: PreTrainedModel, checkpoint: Path | None, meta: CheckpointMeta | None) -> None:
    """Check that the data fits the model, tokenize or open it, and check that it is the checkpoint's data."""
    config, text = run.config, model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    run_on_all_ranks(lambda: check_fits(config.data, text.vocab_size, longest))
    run.data = run_on_all_ranks(lambda: prepare_data(config.data, config.train.seed))
    check_equal_on_all_ranks(run.data.fingerprint, "the data")
    faults = run.data.faults
    if faults.count and run.world.main:
        print(f"data: {faults}")
    if checkpoint and meta:
        check_compatible(config, run.data.fingerprint, checkpoint, meta)


def claim_directory(run: Run, model: PreTrainedModel, meta: CheckpointMeta | None) -> None:
    """Claim the run's directory for its id, and autotune its layers.

    Executions that the run chose before for this dtype and device are kept: another execution rounds differently, and
    resuming would not be exact.
    """
    config, device = run.config, run.world.device
    dtype = compute_dtype(config, device)
    executed = f"{dtype} on {device.type}"
    tokens = config.train.micro_batch_size * config.data.seq_len

    def claimed() -> RunIdentity:
        known = known_run(config, meta)
        before = meta or known
        measured = before.executions if before and before.executed == executed else {}
        found = known or RunIdentity(uuid.uuid4().hex[:12], config.run.name)
        found.executed, found.executions = executed, autotune_layers(model, tokens, dtype, device, measured)
        found.home = home_record()
        claim(config, found, run.data.tokenizer, meta)
        if device.type == "cuda":
            (run.dir / COLLECTIVES).mkdir(exist_ok=True)  # NCCL's watchdog makes no folder
        return found

    run.identity = run_on_rank0(claimed)


def build_engine(run: Run, model: PreTrainedModel, fresh: bool) -> None:
    """Shard the model, give it storage, and initial values if it is `fresh`."""
    config, train = run.config, run.config.train
    run.engine = choice(config.engine)(
        world=run.world,
        dtype=compute_dtype(config, run.world.device),
        compile=train.compile,
        recompute_every=train.recompute_every,
        recompute_keep=train.recompute_keep,
    )
    if config.data.document_mask:
        run.engine.document_end = cast(int, run.data.tokenizer.eos_token_id)
    run.engine.prepare(model, train.seed, choice(config.optim), fresh=fresh)
    run.support_hash = support_hash(run.engine.model)


def ask_for_vector_instructions() -> None:
    """Let torch.compile detect the CPU's vector instructions while the data is prepared: it runs the C++ compiler,
    which takes seconds the first time."""
    import torch._inductor.compile_fx  # noqa: F401  imported here, since concurrent imports of it may fail
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    in_background(pick_vec_isa)
