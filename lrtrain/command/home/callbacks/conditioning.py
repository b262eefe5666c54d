"""Condition numbers of the layers' factors."""

from typing import TYPE_CHECKING

import torch

from lrtrain.core.metrics import scalars
from lrtrain.distributed.sharding import whole
from lrtrain.model.structure import factorized_layers
from lrtrain.run.callbacks.base import Callback

if TYPE_CHECKING:
    from lrtrain.run.state import Run


class Conditioning(Callback):
    """Logs `conditioning/largest`, the largest condition number of a left factor."""

    def on_step(self, run: "Run") -> None:
        largest = 0.0
        for layer in factorized_layers(run.engine.shards).values():
            for name, parameter in layer.named_parameters():
                if layer.roles[name] == "factor_left":
                    sigma = torch.linalg.svdvals(whole(parameter).double())  # every process must call `whole`
                    largest = max(largest, (sigma[0] / sigma[-1]).item())
        run.log(scalars("conditioning", {"largest": largest}))
