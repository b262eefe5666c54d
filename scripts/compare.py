"""Compare runs: one table, and pictures of losses, spectra, and perplexity against cost.

python scripts/compare.py runs/a runs/b             → comparison/ (or --out)
python scripts/compare.py runs/SWEEP                all runs of a sweep → runs/SWEEP/comparison/
"""

import argparse
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain.analysis.compare import Row, cells, find_runs, headings, plot_tradeoffs, read_row, write_tables
from lrtrain.analysis.plots import plot_runs
from lrtrain.core.streams import never_fail_to_print


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="RUN|SWEEP", help="run directories, or folders with runs"
    )
    parser.add_argument("--out", type=Path, help="output folder")
    args = parser.parse_args()
    runs = find_runs(args.paths)
    if not runs:
        parser.error(f"no run, with a metrics.jsonl in it, in {', '.join(map(str, args.paths))}")
    one = args.paths[0] if len(args.paths) == 1 else Path()
    out = args.out or one / "comparison"
    out.mkdir(parents=True, exist_ok=True)
    rows = sorted(map(read_row, runs), key=lambda row: (row.eval_perplexity is None, row.eval_perplexity))
    print_table(rows)
    title = f"{one.resolve().name if one != Path() else 'Comparison'}: {len(rows)} runs"
    pictures = [plot_tradeoffs(rows, title, out / "tradeoffs.png"), plot_runs(runs, out / "curves.png")]
    for path in (*write_tables(rows, out), *pictures):
        print(path)


def print_table(rows: list[Row]) -> None:
    """The table, the best run first."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in headings():
        words = heading in ("run", "method", "state")
        table.add_column(heading, justify="left" if words else "right", overflow="fold")
    for row in rows:
        table.add_row(*cells(row))
    Console(width=160).print(table)


if __name__ == "__main__":
    never_fail_to_print()
    main()
