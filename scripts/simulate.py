"""One training step of one process of many on a simulated GPU: memory, syncs, kernels, traffic, and a roofline time.

    python scripts/simulate.py model=llama_7b param=sltrain gpus=256 rank=131 train.batch_size=512 \
        train.micro_batch_size=2 data.seq_len=2048
    python scripts/simulate.py model=llama_1b optim=muon gpus=64 gpu.links.network=25e9 markdown=true

The script's own arguments are `gpus`, `rank` (the simulated process rank), `picture` (the file to write; none: no
picture) and `markdown` (true: print one row of Markdown instead of tables). All others are those of
launch/pretrain.py; the GPU is gpu=h100 unless given. docs/gpu.md has the assumptions.
"""

import sys
from pathlib import Path

from hydra.errors import HydraException

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain.config.compose import compose, composition_sentence
from lrtrain.config.home import config_name_of
from lrtrain.core.streams import never_fail_to_print
from lrtrain.errors import ConfigError
from lrtrain.simulation.picture import draw
from lrtrain.simulation.report import markdown_row, print_report
from lrtrain.simulation.step import simulate

OWN = {"gpus": "8", "rank": "0", "picture": "simulation.png", "markdown": "false"}


def main() -> None:
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__)
        return
    try:
        name, arguments = config_name_of(sys.argv[1:])
        given = [argument.partition("=") for argument in arguments]
        own = OWN | {key: value for key, _, value in given if key in OWN}
        overrides = ["gpu=h100", *(f"{key}={value}" for key, _, value in given if key not in OWN)]
        step = simulate(compose(*overrides, config_name=name), int(own["gpus"]), int(own["rank"]))
    except (ConfigError, ValueError) as error:
        sys.exit(str(error))
    except HydraException as error:
        sys.exit(composition_sentence(error))
    if own["markdown"] == "true":
        print(markdown_row(step))
        return
    print_report(step)
    if own["picture"] != "none":
        draw(step, Path(own["picture"]))
        print(f"picture: {own['picture']}")


if __name__ == "__main__":
    never_fail_to_print()
    main()
