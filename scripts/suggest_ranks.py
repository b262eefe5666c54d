"""Choose each layer's rank from the spectra of a run, within a budget of parameters.

python scripts/suggest_ranks.py runs/llama_tiny-dense --budget 0.5              one threshold on the dropped energy
python scripts/suggest_ranks.py runs/llama_tiny-dense --budget 0.5 --by tail    one on WeLore's normalized values

Writes conf/experiment/<run>-<by>.yaml (or --out) with a `param.rank` for each layer, and prints the command to train
with it. The budget is Σ rank·(out + in) over the measured layers, as a share of their dense Σ out·in.
"""

import argparse
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain.config.compose import default_composition, from_stored
from lrtrain.config.naming import differing
from lrtrain.config.schema import Config, as_dict
from lrtrain.config.stored import add_trust
from lrtrain.core.names import projection_of
from lrtrain.core.streams import never_fail_to_print
from lrtrain.errors import ConfigError
from lrtrain.init_from.allocation import SCORES, Shape, allocate, factor_parameters, kept_energy, uniform_ranks
from lrtrain.model.build import make_model
from lrtrain.model.structure import matrices
from lrtrain.tracking.spectra_files import load_spectra, spectra_steps

EXPERIMENTS = Path(__file__).resolve().parent.parent / "conf" / "experiment"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory with spectra/step-*.npz in it")
    parser.add_argument("--budget", type=float, required=True, help="share of the dense parameters, such as 0.5")
    parser.add_argument("--by", choices=SCORES, default="energy", help="score of a singular value")
    parser.add_argument("--param", default="lowrank", help="the parameterization in the file")
    parser.add_argument("--out", type=Path, help="output file")
    add_trust(parser)
    args = parser.parse_args()
    out = args.out or EXPERIMENTS / f"{args.run.resolve().name}-{args.by}.yaml"
    if not 0 < args.budget <= 1:
        parser.error(f"--budget {args.budget} is not a share above 0 and at most 1")
    if out.exists():
        parser.error(f"{out} exists; choose another --out")
    steps = spectra_steps(args.run)
    if not steps or not (args.run / "config.yaml").exists():
        parser.error(f"{args.run} has no exact spectra: train it with spectra=light spectra.exact_up_to=null")
    spectra = {name: torch.from_numpy(sigma) for name, sigma in load_spectra(args.run, steps[-1]).items()}
    try:
        config = stored_config(args.run, args.trust)
    except ConfigError as error:
        parser.error(str(error))
    shapes = shapes_of(config)
    if shapes.keys() - spectra.keys():
        parser.error(f"{args.run} estimated the spectra of its larger matrices: train it with spectra.exact_up_to=null")
    try:
        ranks = allocate(spectra, shapes, args.budget, args.by)
    except ValueError as error:
        parser.error(str(error))
    print_ranks(spectra, shapes, ranks, uniform_ranks(shapes, args.budget), steps[-1])
    limited = sum(rank == len(spectra[name]) < min(shapes[name]) for name, rank in ranks.items())
    if limited:
        print(f"{limited} layers got all of the rank that they were measured at: a dense run can tell of larger ones")
    write(out, experiment(config, args.param, ranks), args)
    print(f"written: {out}\nuse it:  torchrun launch/pretrain.py experiment={out.stem}   (from conf/experiment/)")


def stored_config(run: Path, trusted: Collection[str] = ()) -> Config:
    """The run's configuration; for `trusted` see `from_stored`."""
    return from_stored(plain(OmegaConf.load(run / "config.yaml")), run, trusted)


def plain(node: Any) -> dict[str, Any]:
    """As plain containers, interpolations resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))


def shapes_of(config: Config) -> dict[str, Shape]:
    """(out, in) of the layers that the run measured."""
    layers = matrices(make_model(config), config.param["pattern"])
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def print_ranks(
    spectra: dict[str, Tensor], shapes: dict[str, Shape], ranks: dict[str, int], uniform: dict[str, int], step: int
) -> None:
    """Print one line per projection: ranks by depth, and the energy kept by them and by the uniform rank."""
    table = Table("projection", "out×in", "uniform", "ranks by depth", "energy kept", "uniform's", box=box.SIMPLE)
    for projection in dict.fromkeys(map(projection_of, spectra)):
        names = [name for name in spectra if projection_of(name) == projection]
        kept, even = (
            sum(kept_energy(spectra[name], chosen[name]) for name in names) / len(names) for chosen in (ranks, uniform)
        )
        m, n = shapes[names[0]]
        by_depth = " ".join(str(ranks[name]) for name in names)
        table.add_row(projection, f"{m}×{n}", str(uniform[names[0]]), by_depth, f"{kept:.1%}", f"{even:.1%}")
    Console().print(table)
    dense = sum(m * n for m, n in shapes.values())
    total, even = factor_parameters(ranks, shapes), factor_parameters(uniform, shapes)
    print(f"spectra of step {step}: {total:,} parameters, {total / dense:.1%} of the dense (uniform: {even:,})")


def experiment(config: Config, param: str, ranks: dict[str, int]) -> DictConfig:
    """The experiment with these ranks for the run's model, including its changes to the model's yaml."""
    default = default_composition(f"model={config.model.name}", f"param={param}")
    chosen: dict[str, Any] = {"rank": {f"^{re.escape(name)}$": rank for name, rank in ranks.items()}}
    if config.param["pattern"] != default.param.pattern:
        chosen["pattern"] = config.param["pattern"]
    head = [{"override /model": config.model.name}, {"override /param": param}, "_self_"]
    made = OmegaConf.create({"defaults": head, "param": chosen})
    for key, (_, own) in differing(plain(default.model), as_dict(config)["model"]).items():
        OmegaConf.update(made, f"model.{key}", own)
    return made


def write(out: Path, chosen: DictConfig, args: argparse.Namespace) -> None:
    head = (
        f"# @package _global_\n# Ranks by {args.by} at {args.budget:g} of the dense parameters, from {args.run.name}.\n"
    )
    out.write_text(head + OmegaConf.to_yaml(chosen))


if __name__ == "__main__":
    never_fail_to_print()
    main()
