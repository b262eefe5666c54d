"""Compress a trained dense run to a budget in several ways, train each further, and print a table of perplexities.

python scripts/compress.py runs/llama_tiny-dense --budget 0.5 --steps 80

Each way is a run of launch/pretrain.py with init_from=RUN, under RUN/compressed/; the same command resumes them.
Perplexities are on the run's held-out text, which is not used for calibration or healing (the further training).
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lrtrain.checkpoint.weights import RunWeights
from lrtrain.config.naming import flat
from lrtrain.config.schema import Config, as_dict
from lrtrain.config.stored import add_trust
from lrtrain.core.files import read_object
from lrtrain.core.streams import never_fail_to_print
from lrtrain.errors import ConfigError
from lrtrain.measure.evaluate import perplexity
from lrtrain.sweeps.jobs import quoted
from lrtrain.tracking.jsonl import series

OUTPUTS = "compress.by=outputs"
CHOSEN = "param.select=residual"
WAYS = {
    "dense, trained on": ["param=dense"],
    "lowrank, uniform ranks": ["param=lowrank", "compress.ranks=uniform"],
    "lowrank": ["param=lowrank"],
    "lowrank, WeLore's ranks": ["param=lowrank", "compress.ranks=tail"],
    "lowrank, outputs": ["param=lowrank", OUTPUTS],
    "sltrain, random support": ["param=sltrain"],
    "sltrain, random support, outputs": ["param=sltrain", OUTPUTS],
    "sltrain, chosen support": ["param=sltrain", CHOSEN],
    "sltrain, chosen support, outputs": ["param=sltrain", CHOSEN, OUTPUTS],
}
COLUMNS = ("start", "parameters", "compressed", "healed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a dense run or one of its checkpoints")
    parser.add_argument("overrides", nargs="*", help="overrides for all ways, such as optim.lr=1e-3")
    parser.add_argument(
        "--budget", type=float, required=True, help="share of the dense layers' parameters, such as 0.5"
    )
    parser.add_argument("--steps", type=int, required=True, help="healing steps")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=[*WAYS], metavar="WAY", help="rows of the table; default: all"
    )
    add_trust(parser)
    args = parser.parse_intermixed_args()
    try:
        run = RunWeights(args.run, args.trust)
    except ConfigError as error:
        sys.exit(str(error))
    folder = run.run_dir / "compressed" / f"{args.budget:g}-{args.steps}"
    before = read_object(run.run_dir / "summary.json")
    if before is None:
        sys.exit(f"{run.run_dir} has no summary.json: finish the run first")
    rows = [("the dense run", f"{before['parameters']:,}", "", f"{before['eval_perplexity']:.2f}")]
    for way in args.ways:
        rows.append(result(way, heal(run, way, args, folder / re.sub(r"\W+", "-", way))))
    report(rows, folder)


def heal(run: RunWeights, way: str, args: argparse.Namespace, out: Path) -> Path:
    """Run one way and return its run directory."""
    if read_object(out / "summary.json") is None:
        budget = [] if "param=dense" in WAYS[way] else [f"compress.budget={args.budget}"]
        settings = ["tracking=none", "spectra.every=0", *WAYS[way], *budget, f"train.steps={args.steps}"]
        where = [f"init_from={quoted(str(run.checkpoint))}", f"run.dir={quoted(str(out))}", f"run.name={out.name}"]
        command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *of_the_run(run.config), "eval.every=0"]
        if subprocess.run([*command, *settings, *where, "resume=auto", *args.overrides], stdout=sys.stderr).returncode:
            sys.exit(f"{way} could not be run")
    return out


def of_the_run(config: Config) -> list[str]:
    """Overrides for the run's data, batch sizes and evaluation."""
    path = [] if config.data.path is None else [f"data.path={quoted(config.data.path)}"]
    keys = ("data.seq_len", "data.validation_fraction", "train.batch_size", "train.micro_batch_size", "eval.sequences")
    values = flat(as_dict(config))
    return [f"model={config.model.name}", f"data={config.data.name}", *path, *(f"{key}={values[key]}" for key in keys)]


def result(way: str, run: Path) -> tuple[str, str, str, str]:
    """A row of the table."""
    steps, losses = series(run / "metrics.jsonl", "eval/loss")
    parameters = json.loads((run / "summary.json").read_text())["parameters"]
    assert steps[0] == 0
    return way, f"{parameters:,}", f"{perplexity(losses[0]):.2f}", f"{perplexity(losses[-1]):.2f}"


def report(rows: list[tuple[str, str, str, str]], folder: Path) -> None:
    """Print the table, and write it as Markdown."""
    table = Table(*COLUMNS, box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compress.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
    print(folder / "compress.md")


if __name__ == "__main__":
    never_fail_to_print()
    main()
