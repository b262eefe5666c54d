"""Draw the spectra of runs from their files.

python scripts/plot_spectra.py runs/a                  writes runs/a/plots/spectra/: pictures, and report.html with them
python scripts/plot_spectra.py runs/a runs/b --out ab  both, one below the other on the same axes
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain.analysis.spectra_plots import report, spectral_pictures
from lrtrain.core.streams import never_fail_to_print
from lrtrain.tracking.spectra_files import spectra_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--out", type=Path, help="folder; default: plots/spectra in the run, spectra for several")
    args = parser.parse_args()
    for run in args.runs:
        if not (run / "metrics.jsonl").exists() or not spectra_steps(run):
            parser.error(f"{run} has no spectra: not a run directory, or a run with spectra.every=0")
    folder: Path = args.out or (args.runs[0] / "plots" / "spectra" if len(args.runs) == 1 else Path("spectra"))
    folder.mkdir(parents=True, exist_ok=True)
    pictures = spectral_pictures(args.runs)
    for picture in pictures:
        (folder / f"{picture.name}.png").write_bytes(picture.png)
        print(folder / f"{picture.name}.png")
    (folder / "report.html").write_text(report(args.runs, pictures), encoding="utf-8")
    print(folder / "report.html")


if __name__ == "__main__":
    never_fail_to_print()
    main()
