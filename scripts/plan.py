"""Memory, traffic and expected MFU of a run on many GPUs, computed without a GPU.

    python scripts/plan.py model=llama_7b param=sltrain gpus=64 efficiency=0.45
    python scripts/plan.py model=llama_7b param=sltrain gpus=64 engine.replicas=8 train.batch_size=512 gpu=h100

The script's own arguments are `gpus`, and `efficiency`, the share of the GPU's peak that a step reaches without
communication; all others are those of launch/pretrain.py. The GPU is gpu=h100 unless given; its figures are
overrides too: gpu.flops.bf16, and gpu.links.network, the bytes per second that it receives from other nodes.
docs/scaling.md has the formulas.
"""

import sys
from pathlib import Path

import torch
from hydra.errors import HydraException
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain.config.check import check
from lrtrain.config.compose import compose, composition_sentence
from lrtrain.config.dtypes import compute_dtype
from lrtrain.config.home import config_name_of
from lrtrain.config.schema import Config
from lrtrain.core.streams import never_fail_to_print
from lrtrain.errors import ConfigError
from lrtrain.model.build import make_model
from lrtrain.planning.plan import memory_per_process, share_of
from lrtrain.planning.traffic import Hardware, forecast, traffic

OWN = {"gpus": 8.0, "efficiency": 0.45}


def main() -> None:
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__)
        return
    try:
        name, arguments = config_name_of(sys.argv[1:])
        given = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
        own = OWN | {key: float(given.pop(key)) for key in OWN if key in given}
        overrides = ["gpu=h100", *(f"{key}={value}" for key, value in given.items())]
        print_forecast(compose(*overrides, config_name=name), int(own["gpus"]), own)
    except HydraException as error:
        sys.exit(composition_sentence(error))
    except (ConfigError, ValueError) as error:
        sys.exit(str(error))


def print_forecast(config: Config, gpus: int, own: dict[str, float]) -> None:
    check(config, gpus)
    assert config.gpu is not None
    dtype = compute_dtype(config, torch.device("cuda"))
    model = make_model(config)
    sent = traffic(config, model, dtype, gpus)
    peak = config.gpu.flops.fp32 if dtype == torch.float32 else config.gpu.flops.bf16
    links = config.gpu.links
    in_node = config.engine.get("tensor", 1) <= links.per_node
    hardware = Hardware(peak, own["efficiency"], links.network, links.node if in_node else links.network)
    found = forecast(config, model, sent, hardware, gpus)
    memory = memory_per_process(config, model, dtype, gpus)  # last, because it changes the model

    table = Table(
        title=f"{config.model.name} · {config.param['name']} · {gpus} {config.gpu.name}",
        box=box.SIMPLE,
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_row("[bold]memory per GPU", f"[bold]{memory.total / 2**30:,.2f} GiB")
    for part, size in memory.parts().items():
        table.add_row(f"  {part}", f"{size / 2**30:,.3f} GiB")
    table.add_row(f"  of {config.gpu.memory:g} GiB", share_of(memory, config.gpu))
    table.add_row("[bold]received per GPU and step", f"[bold]{sent.total / 1e9:,.3f} GB")
    for part, size in vars(sent).items():
        table.add_row(f"  {part}", f"{size / 1e9:,.3f} GB")
    table.add_row("[bold]seconds of a step: arithmetic", f"{found.compute_seconds:,.3f}")
    table.add_row("  wire", f"{found.wire_seconds:,.3f}")
    table.add_row("[bold]expected MFU", f"[bold]{found.worst_mfu:.0%} … {found.best_mfu:.0%}")
    table.add_row("  nothing overlaps … all that can", "")
    Console(width=100).print(table)


if __name__ == "__main__":
    never_fail_to_print()
    main()
