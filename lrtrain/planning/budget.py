"""Runs at equal FLOPs: the number of steps for a budget. (For equal parameters see `param.rank`.)"""

from dataclasses import replace

from lrtrain.config.schema import Config
from lrtrain.errors import ConfigError
from lrtrain.model.build import make_model
from lrtrain.model.flops import training_flops


def spend(config: Config) -> Config:
    """The configuration with the number of steps that `train.flops` allows, if it is set.

    Raises:
        ConfigError: if it is below one step.
    """
    budget, train = config.train.flops, config.train
    if budget is None:
        return config
    step = training_flops(make_model(config), config.data.seq_len).model * train.batch_size * config.data.seq_len
    if budget < step:
        raise ConfigError(f"train.flops={budget:g} is below the {step:.3g} of one step")
    return replace(config, train=replace(train, steps=int(budget / step)))
