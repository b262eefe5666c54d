"""A model in which each projection is another parameterization, and a callback that records what its steps compute."""

from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from launching import ROOT
from omegaconf import OmegaConf
from torch import Tensor

from lrtrain.config.choice import choice
from lrtrain.distributed.sharding import whole
from lrtrain.layers.base import FactorizedLinear
from lrtrain.run.callbacks.base import Callback

if TYPE_CHECKING:
    from lrtrain.run.state import Run

KINDS = [
    # No σ comes to 0, where the signs that an SVD gives its vectors are arbitrary.
    ("sst", {"iteration": 2, "round": 2, "warmup": 2, "init_std": 0.3}),
    ("relora", {"merge_every": 2, "prune": 0.8, "prune_by": "magnitude"}),
    ("nested", {"shrink_every": 2, "shrink_threshold": 0.3}),
    ("dlr", {}),
    ("sltrain", {"execution": "factored", "init": "spectral"}),
    ("cola", {}),
    ("lost", {"density": 0.1}),
    ("lowrank", {"rebalance_at": 2}),
    ("sltrain", {"execution": "materialize"}),
    ("nested", {"lasso": 1e-2}),
    ("lowrank", {"init": "xavier", "residual": True}),
    ("sltrain", {"execution": "factored", "support": "row_balanced"}),
    ("sltrain", {"execution": "factored", "support": "block", "block": 16}),
    ("lost", {"select": "random", "activation": "none"}),
    ("sst", {"iteration": 3, "warmup": 1, "enhanced": False, "init_std": 0.3}),
]
"""Of the seven projections of two blocks, and the head: name and what is not as in conf/param."""

_made = count()


def layer(in_features: int, out_features: int, bias: bool, rank: int, device: Any = None) -> FactorizedLinear:
    """The next of `KINDS`: a model asks for its layers in order."""
    name, settings = KINDS[next(_made) % len(KINDS)]
    node = {**_conf(name), "init_std": 0.02, **settings}
    return choice(node)(in_features=in_features, out_features=out_features, bias=bias, rank=rank, device=device)


@cache
def _conf(name: str) -> dict[str, Any]:
    """A parameterization's yaml, with what it starts from; interpolations as they stand there."""
    node: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "param" / f"{name}.yaml"))  # pyright: ignore
    base = _conf(node.pop("defaults")[0]) if "defaults" in node else {}
    return base | node


class Record(Callback):
    """Writes the gradients of every step, and what it ends with: parameters and optimizer states, all of them whole."""

    def __init__(self, file: str):
        super().__init__()
        self.file = file
        self.found: dict[str, Tensor] = {}

    def after_backward(self, run: "Run") -> None:
        for name, p in run.engine.shards.named_parameters():
            if p.grad is not None:
                self.found[f"gradient of {name} in step {run.progress.step + 1}"] = whole(p.grad).clone()

    def on_end(self, run: "Run") -> dict[str, Any]:
        for part, values in run.engine.state_dict().items():
            self.found |= {f"{part} {name}": whole(value).clone() for name, value in values.items()}
        if run.world.main:
            torch.save(self.found, self.file)
        return {}
