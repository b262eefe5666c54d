"""Export a run's model.

python scripts/export.py runs/llama_tiny-sltrain --to hf-dense         a plain transformers checkpoint, factors merged
python scripts/export.py runs/llama_tiny-sltrain --to hf-factorized    with its factors, for lrtrain.load(FOLDER)
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain.checkpoint.export import export_dense, export_factorized
from lrtrain.checkpoint.weights import RunWeights
from lrtrain.config.dtypes import DTYPES
from lrtrain.config.stored import add_trust
from lrtrain.core.streams import never_fail_to_print
from lrtrain.errors import ConfigError

FORMS = {"hf-dense": export_dense, "hf-factorized": export_factorized}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory or one of its checkpoints")
    parser.add_argument("--to", choices=FORMS, required=True, help="merged into dense weights, or with its factors")
    parser.add_argument("--out", type=Path, help="the folder to write; default: RUN/export/<--to>")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights; default: as trained")
    parser.add_argument(
        "--shard", type=float, default=5.0, metavar="GB", help="largest size of a file; default: %(default)s"
    )
    add_trust(parser)
    args = parser.parse_args()
    try:
        run = RunWeights(args.run, args.trust)
        out = args.out or run.run_dir / "export" / args.to
        FORMS[args.to](run, out, DTYPES[args.dtype] if args.dtype else None, int(args.shard * 1e9))
    except ConfigError as error:
        sys.exit(str(error))
    print(f"{run.checkpoint} is exported to {out}")


if __name__ == "__main__":
    never_fail_to_print()
    main()
