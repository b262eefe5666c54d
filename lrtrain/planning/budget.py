"""Runs at equal FLOPs: as many steps as a budget pays for. (For equal parameters there is a rule of `param.rank`.)"""

from dataclasses import replace

from lrtrain.config.schema import Config
from lrtrain.errors import ConfigError
from lrtrain.model.build import make_model
from lrtrain.model.flops import training_flops


def spend(config: Config) -> Config:
    """The configuration with as many steps as `train.flops` pays for, if it is set.

    Raises:
        ConfigError: if it does not pay for one.
    """
    budget, train = config.train.flops, config.train
    if budget is None:
        return config
    step = training_flops(make_model(config), config.data.seq_len).model * train.batch_size * config.data.seq_len
    if budget < step:
        raise ConfigError(f"train.flops={budget:g} is below the {step:.3g} of one step")
    return replace(config, train=replace(train, steps=int(budget / step)))
