"""The settings of all optimizers."""

from typing import TypedDict

from pydantic import NonNegativeFloat, PositiveFloat

from lrtrain.config.ranges import Betas
from lrtrain.optim.adam import EpsConvention
from lrtrain.optim.groups import Decay


class Common(TypedDict):
    """The settings of all optimizers: keys of `optim`, explained in conf/common/optim.yaml."""

    lr: PositiveFloat
    other_lr: NonNegativeFloat | None
    lr_ratio: PositiveFloat
    betas: Betas
    eps: PositiveFloat
    eps_convention: EpsConvention
    weight_decay: NonNegativeFloat
    decay: Decay
    in_backward: bool
    seed: int
