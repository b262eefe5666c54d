"""Compare methods on real text at equal tokens: every arm tunes its learning rate with the same sweep; several seeds.

python scripts/compare_methods.py                         the study of compare_methods.yaml → runs/compare/llama_tiny
python scripts/compare_methods.py --arms dense sltrain    two of its arms
python scripts/compare_methods.py --report                table and picture of what is finished

Each run is a separate process with one thread on its own core. It can be stopped at any time and restarted with the
same command: finished runs are kept, interrupted ones resume. The seed of the sweep is one of an arm's seeds, which
favours all arms equally. Finished runs keep their files but not their checkpoints.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain.analysis.compare_methods import (
    COLUMNS,
    Study,
    Trial,
    caption,
    diverged_file,
    left_to_run,
    markdown,
    plot_outcomes,
    read_outcome,
    read_results,
    runs_ahead,
    table_rows,
)
from lrtrain.core.files import read_object, write_durably
from lrtrain.core.streams import never_fail_to_print
from lrtrain.distributed.threads import usable_cores
from lrtrain.sweeps.jobs import quoted
from lrtrain.sweeps.processes import PRETRAIN, Running, failure_file, reason, run_parallel, start


def main() -> None:
    args = arguments()
    study = read_study(args)
    failed = {} if args.report else run(study, args.parallel)
    report(study)
    for arm, why in failed.items():
        print(f"{arm} could not be run: {why}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--study",
        type=Path,
        default=Path(__file__).with_suffix(".yaml"),
        help="a study's yaml file; default: %(default)s",
    )
    parser.add_argument("--out", type=Path, help="folder of the runs; default: runs/compare/<the study's name>")
    parser.add_argument("--arms", nargs="+", help="some of the study's arms")
    parser.add_argument("--lrs", nargs="+", type=float, help="learning rates of the sweep")
    parser.add_argument("--seeds", nargs="+", type=int, help="the first one also runs the sweep")
    parser.add_argument(
        "--overrides", nargs="+", default=[], help="further overrides for all arms, such as train.steps=1000"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=len(usable_cores()),
        help="runs at a time; default: %(default)s, the cores",
    )
    parser.add_argument("--report", action="store_true", help="only report, run nothing")
    return parser.parse_args()


def read_study(args: argparse.Namespace) -> Study:
    """The study of the yaml file with the changes of the command line."""
    keys = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(args.study)))
    study = Study(**keys, folder=args.out or Path("runs", "compare", keys["name"]))
    if unknown := [arm for arm in args.arms or [] if arm not in study.arms]:
        sys.exit(f"--arms {' '.join(unknown)}: not in {args.study}, which has {', '.join(study.arms)}")
    return replace(
        study,
        common=study.common + args.overrides,
        arms={arm: study.arms[arm] for arm in args.arms or study.arms},
        lrs=[float(f"{lr:g}") for lr in args.lrs or study.lrs],  # as run directories are named
        seeds=args.seeds or study.seeds,
    )


# Running -----------------------------------------------------------------------------------------------------------


def run(study: Study, parallel: int) -> dict[str, str]:
    """Run the study's missing runs, `parallel` at a time; returns failed arms with the reason."""
    claim(study)
    failed: dict[str, str] = {}
    seconds: list[float] = []

    def ended(trial: Trial, one: Running) -> None:
        if why := conclude(study, trial, one.process.returncode):
            failed[trial.arm] = why
        seconds.append(time.monotonic() - one.started)
        print_progress(study, trial, seconds, parallel, failed)

    def waiting() -> list[Trial]:
        return [trial for trial in lacking(study) if trial.arm not in failed]

    if not run_parallel(parallel, waiting, partial(begin, study), ended):
        sys.exit("stopped; the same command goes on")
    return failed


def claim(study: Study) -> None:
    """Check that a folder holds runs of this study only."""
    path = study.folder / "study.json"
    known = read_object(path) or {"common": study.common, "arms": {}}
    changed = [arm for arm in study.arms if known["arms"].get(arm, study.arms[arm]) != study.arms[arm]]
    if known["common"] != study.common or changed:
        sys.exit(
            f"{study.folder} holds runs of other overrides "
            f"({' '.join(known['common'])}{''.join(f'; {arm}: ' + ' '.join(known['arms'][arm]) for arm in changed)}); "
            "choose another --out"
        )
    (study.folder / "logs").mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps({"common": study.common, "arms": known["arms"] | study.arms}, indent=1))


def lacking(study: Study) -> list[Trial]:
    """All runs that can start now."""
    return [trial for arm in study.arms for trial in left_to_run(arm, read_results(study, arm), study)]


def begin(study: Study, trial: Trial, slot: int) -> Running:
    """Start or resume a run on one core."""
    arguments = [
        *("tracking=none", "checkpoint.every=0", "checkpoint.minutes=5", "checkpoint.keep=1"),
        *study.common,
        *study.arms[trial.arm],
        *(f"optim.lr={trial.lr}", f"train.seed={trial.seed}", "resume=auto"),
        *(f"run.name={trial.name}", f"run.dir={quoted(str(study.folder / trial.name))}"),
    ]
    arguments.sort(key=lambda word: not word.startswith("--"))  # Hydra reads its options first
    command = [sys.executable, str(PRETRAIN), *arguments]
    cores = usable_cores()
    return start(command, log_file(study, trial), slot, [cores[slot % len(cores)]])


def conclude(study: Study, trial: Trial, code: int) -> str | None:
    """Record how a run ended; returns the reason if its arm cannot be run."""
    run_dir, log = study.folder / trial.name, log_file(study, trial)
    if code and "train.max_skipped" in (why := reason(failure_file(log), log)):
        write_durably(diverged_file(run_dir), why + "\n")
    elif (trial.lr, trial.seed) not in read_results(study, trial.arm):
        return f"{reason(failure_file(log), log)} (exit code {code}, {log})"
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    return None


def log_file(study: Study, trial: Trial) -> Path:
    return study.folder / "logs" / f"{trial.name}.log"


def print_progress(study: Study, trial: Trial, seconds: list[float], parallel: int, failed: dict[str, str]) -> None:
    """`[12/84] dense-lr0.002-seed0: perplexity 50.12 in 61 s; about 34 min left`"""
    results = {arm: read_results(study, arm) for arm in study.arms}
    done = sum(len(found) for found in results.values())
    ahead = sum(runs_ahead(found, study) for arm, found in results.items() if arm not in failed)
    perplexity = results[trial.arm].get((trial.lr, trial.seed))
    how = "failed" if perplexity is None else f"perplexity {perplexity:.2f} in {seconds[-1]:.0f} s"
    minutes = ahead * sum(seconds) / len(seconds) / parallel / 60
    print(f"[{done}/{done + ahead}] {trial.name}: {how}; about {minutes:.0f} min left", flush=True)


# Reporting ---------------------------------------------------------------------------------------------------------


def report(study: Study) -> None:
    """Print the table, and write it and the picture into the study's folder."""
    outcomes = [read_outcome(study, arm) for arm in study.arms]
    rows = table_rows(outcomes)
    if not rows:
        sys.exit(f"{study.folder} has no finished run yet")
    text = caption(study, outcomes)
    table = Table(box=box.SIMPLE_HEAD, caption=text, caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("arm", "remarks") else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
    (study.folder / "comparison.md").write_text(markdown(rows, text))
    print(study.folder / "comparison.md")
    print(plot_outcomes(outcomes, study.name, study.folder / "comparison.png"))


if __name__ == "__main__":
    never_fail_to_print()
    main()
