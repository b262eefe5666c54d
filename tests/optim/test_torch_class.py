"""Classes of torch.optim on sharded parameters against themselves on a plain model."""

import copy
from typing import Any

import pytest
import torch
from factored import Model, set_gradients
from launching import SMALL

from lrtrain.config.check import check
from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.errors import ConfigError
from lrtrain.optim.torch_class import is_elementwise

CLASSES: dict[str, dict[str, Any]] = {
    "Adadelta": {},
    "Adagrad": {"initial_accumulator_value": 0.1},
    "Adam": {"amsgrad": True},
    "Adamax": {},
    "AdamW": {},
    "ASGD": {"t0": 1.0},
    "NAdam": {"momentum_decay": 0.01},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True},
}


def settings(name: str) -> list[str]:
    args = ",".join(f"{key}:{str(value).lower()}" for key, value in CLASSES.get(name, {}).items())
    return ["optim=torch", f"optim.of=torch.optim.{name}", f"optim.args={{{args}}}", "optim.lr=1e-2"]


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_takes_the_steps_that_it_takes_by_itself(name: str):
    """With a learning rate for each group, and weight decay of the matrices where the class has one."""
    decay = [] if name == "Rprop" else ["optim.weight_decay=0.1"]
    config = compose(*SMALL, "param=lowrank", *settings(name), "optim.other_lr=3e-3", "optim.lr_ratio=2", *decay)
    check(config, 1)
    model = Model()
    twin = copy.deepcopy(model)
    ours = choice(config.optim)(model)
    theirs = dict(twin.named_parameters())
    groups = [
        {"params": [theirs[n] for n in group["names"]], "lr": group["lr"], "weight_decay": group["weight_decay"]}
        for group in ours.param_groups
    ]
    wanted = getattr(torch.optim, name)(groups, **CLASSES[name])
    for _ in zip(set_gradients(model, 4), set_gradients(twin, 4), strict=True):
        ours.step()
        wanted.step()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p, theirs[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CLASSES)
def test_a_run_that_loads_its_state_goes_on_alike(name: str):
    config = compose(*SMALL, "param=lowrank", *settings(name))
    model = Model()
    first = choice(config.optim)(model)
    for _ in set_gradients(model, 2):
        first.step()
    other = copy.deepcopy(model)
    second = choice(config.optim)(other)
    saved = first.named_state()
    for key, value in second.named_state().items():
        value.copy_(saved[key])
    for _ in zip(set_gradients(model, 2, seed=2), set_gradients(other, 2, seed=2), strict=True):
        first.step()
        second.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_looks_at_one_entry_at_a_time_is_told_from_what_does_not():
    assert all(is_elementwise(f"torch.optim.{name}", tuple(args.items())) for name, args in CLASSES.items())
    assert not is_elementwise("torch.optim.Adafactor", ())
    assert not is_elementwise("torch.optim.Muon", ())


REFUSED = {
    "optim.of=torch.optim.Adafactor": "torch.optim.Adafactor looks at more than one entry .* use engine=ddp",
    "optim.of=torch.optim.LBFGS": "optim.of=torch.optim.LBFGS with optim.args={} cannot take a step",
    "optim.of=torch.optim.SparseAdam": "SparseAdam .* cannot take a step: SparseAdam does not support dense",
    "optim.of=torch.optim.Nothing": "optim.of=torch.optim.Nothing cannot be imported",
    "optim.of=torch.nn.Linear": "optim.of=torch.nn.Linear is no subclass of torch.optim.Optimizer",
    "optim.args={momentum:0.9}": "optim.args={'momentum': 0.9} cannot take a step: .*unexpected keyword",
    "optim.of=torch.optim.Rprop optim.weight_decay=0.1": "optim.weight_decay=0.1 has no effect",
    "train.dtype=bf16_sr": "train.dtype=bf16_sr rounds stochastically",
    "optim.of=torch.optim.Adafactor engine=deepspeed": "engine=deepspeed shards by entries",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_be_is_refused_by_name_before_data_is_read(overrides: str):
    config = compose(*SMALL, "param=lowrank", "optim=torch", *overrides.split())
    with pytest.raises(ConfigError, match=REFUSED[overrides]) as raised:
        check(config, 2)
    assert "\n" not in str(raised.value)


def test_whole_matrices_are_stepped_where_each_process_holds_them():
    check(compose(*SMALL, "param=lowrank", "optim=torch", "optim.of=torch.optim.Adafactor", "engine=ddp"), 2)
