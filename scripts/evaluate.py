"""Perplexity on a text, or lm-eval tasks, for a run, a checkpoint, an export, or any transformers folder.

python scripts/evaluate.py runs/llama_tiny-sltrain                               the run's held-out text
python scripts/evaluate.py runs/llama_tiny-sltrain data=local data.path=FOLDER   the held-out share of another text
python scripts/evaluate.py PATH data=local data.path=FILE data.validation_fraction=0 eval.sequences=100000    all of it
torchrun --nproc_per_node=2 scripts/evaluate.py PATH data=c4                     shared out over processes
python scripts/evaluate.py PATH --tasks NAME --include_path DIR                  tasks of lm-eval

Overrides are those of launch/pretrain.py for data and evaluation, and replace the run's values; the tokenizer is always
the model's.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain import distributed
from lrtrain.checkpoint.loading import Loaded, load
from lrtrain.checkpoint.weights import RunWeights
from lrtrain.config.compose import compose, composition_sentence, default_composition
from lrtrain.config.dtypes import DTYPES
from lrtrain.config.naming import flat
from lrtrain.config.schema import Config, as_dict
from lrtrain.config.stored import add_trust
from lrtrain.core.streams import never_fail_to_print
from lrtrain.data.prepare import Data, check_data, prepare_data
from lrtrain.distributed.world import World, environment_rank, environment_world_size
from lrtrain.errors import ConfigError
from lrtrain.measure.evaluate import evaluate, evenly_spaced, perplexity
from lrtrain.model.attention import separate_attention
from lrtrain.model.loss import TokenLoss
from lrtrain.sweeps.jobs import quoted
from lrtrain.tracking.console import print_summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="RUN|PATH", help="a run, a checkpoint, or a folder with a model")
    parser.add_argument(
        "overrides", nargs="*", help="data=…, data.seq_len=…, eval.sequences=…, train.micro_batch_size=…"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the model; default: as saved")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="lm-eval tasks to run instead of the perplexity")
    parser.add_argument("--include_path", type=Path, metavar="DIR", help="a folder with more tasks")
    parser.add_argument("--limit", type=int, help="largest number of samples per task")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    add_trust(parser)
    args = parser.parse_intermixed_args()
    try:
        world = distributed.start()
        loaded = load(args.path, world.device, DTYPES[args.dtype] if args.dtype else None, args.trust)
        results = run_tasks(loaded, args, world) if args.tasks else measure(loaded, args.overrides, world)
    except (ConfigError, HydraException) as error:
        told = composition_sentence(error) if isinstance(error, HydraException) else str(error)
        sys.exit(told if environment_rank() == 0 else 1)
    finally:
        distributed.stop()
    if world.main:
        print_summary({k: f"{v:.4f}" if isinstance(v, float) else str(v) for k, v in results.items()}, sys.stdout)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))


def measure(loaded: Loaded, overrides: list[str], world: World) -> dict[str, Any]:
    """Loss and perplexity on the text selected by `overrides`, or on the run's held-out text; a collective."""
    config = settings(loaded.run, overrides)
    tokenizer = dataclasses.replace(config.data.tokenizer, path=str(loaded.tokenizer.name_or_path))
    chosen = dataclasses.replace(config.data, tokenizer=tokenizer)
    check_data(chosen)
    text = prepare_data(chosen, config.train.seed)
    rows = rows_of(text, config.eval.sequences, chosen.seq_len)
    if chosen.document_mask:
        loaded.model.set_attn_implementation(separate_attention(loaded.model.config))
    end: Any = loaded.tokenizer.eos_token_id if chosen.document_mask else None
    loss_of = TokenLoss(loaded.model, end)
    found = evaluate(loss_of, rows, config.train.micro_batch_size, world)
    assert found is not None
    return {
        "text": chosen.name,
        "sequences": len(rows),
        "tokens": found.tokens,
        "loss": found.loss,
        "perplexity": perplexity(found.loss),
    }


def rows_of(text: Data, most: int, seq_len: int) -> torch.Tensor:
    """At most `most` evenly spaced held-out sequences; sequences of the whole text if none are held out."""
    if len(text.validation):
        return text.validation.rows(evenly_spaced(len(text.validation), most))
    return text.train.batch(0, min(most, text.train_tokens // seq_len) if text.train_tokens else most, 0, 1)


def settings(run: RunWeights | None, overrides: list[str]) -> Config:
    """The configuration of these overrides on top of the run's values; with a new `data=` only `data.seq_len` of the
    run's data is kept."""
    if run is None:
        return compose(*overrides)
    own = as_dict(run.config)
    common = said("eval", own["eval"]) + said("train", own["train"])
    if any(override.startswith("data=") for override in overrides):
        return compose(*common, f"data.seq_len={run.config.data.seq_len}", *overrides)
    text = {key: value for key, value in own["data"].items() if key not in ("name", "source")}
    base = [*common, f"data={run.config.data.name}", *said("data", text)]
    # As `source` refers to the other keys, which an override may change; what it leaves open (???) the run gave.
    follows: Any = OmegaConf.to_container(default_composition(*base).data.source, resolve=True)
    source = {key: value for key, value in own["data"]["source"].items() if value != follows.get(key)}
    return compose(*base, *said("data.source", source), *overrides)


def said(section: str, values: dict[str, Any]) -> list[str]:
    """The values of a section as overrides."""
    return [f"{key}={literal(value)}" for key, value in flat(values, section).items()]


def literal(value: Any) -> str:
    """A value in Hydra's grammar."""
    return quoted(value) if isinstance(value, str | list) else json.dumps(value)


def run_tasks(loaded: Loaded, args: argparse.Namespace, world: World) -> dict[str, Any]:
    """The metrics of lm-eval's tasks."""
    if environment_world_size() > 1:
        raise ConfigError("--tasks runs on one process: start it without torchrun")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError('--tasks needs lm-eval: pip install -e ".[eval]"') from error
    # decorators hide the arguments of both from the type checker
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=8)  # pyright: ignore[reportCallIssue]
    folder = None if args.include_path is None else str(args.include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)  # lm-eval's own are 14,000 files to read
    if not {*args.tasks} <= {*manager.all_subtasks}:
        manager = TaskManager(include_path=folder)
    if unknown := [task for task in args.tasks if task not in manager.all_tasks]:
        raise ConfigError(f"--tasks {' '.join(unknown)}: lm-eval has no such task; give its folder as --include_path")
    settings = {"tasks": args.tasks, "limit": args.limit, "task_manager": manager, "log_samples": False}
    found = simple_evaluate(model, **settings)  # pyright: ignore
    assert found is not None and "results" in found
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


if __name__ == "__main__":
    never_fail_to_print()
    main()
