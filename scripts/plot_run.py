"""Draw runs from their files, and print their final values; scripts/compare.py compares them.

python scripts/plot_run.py runs/a runs/b      writes runs/a/plots/summary.png and the same for b
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain.analysis.plots import load_run, plot_run
from lrtrain.core.streams import never_fail_to_print


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory with metrics.jsonl")
    args = parser.parse_args()
    without = [str(run) for run in args.runs if not (run / "metrics.jsonl").exists()]
    if without:
        parser.error(f"no metrics.jsonl in {', '.join(without)}")
    print_table(args.runs)
    for run in args.runs:
        print(plot_run(run))


def print_table(run_dirs: list[Path]) -> None:
    columns = {
        "steps": lambda run: f"{run.rows[-1]['step']:,}" if run.rows else "0",
        "tokens": lambda run: f"{run.rows[-1]['tokens']:,}" if run.rows else "0",
        "train loss": lambda run: number(run.last("train/loss"), "{:.3f}"),
        "eval loss": lambda run: number(run.last("eval/loss"), "{:.3f}"),
        "mean erank": lambda run: number(run.last("spectra/summary/all/erank_mean"), "{:.1f}"),
    }
    runs = [load_run(run_dir) for run_dir in run_dirs]
    table = [["run", *columns], *([run.name, *(show(run) for show in columns.values())] for run in runs)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *values in table:
        cells = [f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True)]
        print("  ".join([f"{name:<{widths[0]}}", *cells]))


def number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    never_fail_to_print()
    main()
