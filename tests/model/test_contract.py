"""What is wrong with a layer or an optimizer of one's own is one sentence, before anything is allocated."""

from pathlib import Path

import pytest
from launching import SMALL

from lrtrain.config.check import check
from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.errors import ConfigError
from lrtrain.model.build import make_model
from lrtrain.model.contract import check_contract

YAML = "name: own\n_target_: flawed.{name}\n_partial_: true\npattern: \\.\\d+\\.\nrank: 4\n"
Q = "of model.layers.0.self_attn.q_proj"
MATRICES = ("adamw8bit", "muon", "galore", "fira", "apollo", "apollo_mini", "dct_adamw", "trion")

SENTENCES = {  # class of flawed.py, overrides → the sentence
    "Missing": "param._target_=flawed.Missing cannot be imported: module 'flawed' has no attribute 'Missing'",
    "NotAnnotated": "param.alpha has no value: flawed.NotAnnotated needs one, and the yaml of param=own has none",
    "OneOfTwo +param.kind=c": "param.kind=c must be 'a' or 'b'",
    "Good +param.omega=1": "param.omega is not a key of the configuration",
    "Good ~param.name": "param.name has no value: the yaml of param=None has to give one",
    "Good ~param._target_": "param._target_ has no value: the yaml of param=own has to give one",
    "Good ~param.pattern": "param.pattern has no value: the yaml of param=own has to give one",
    "Good ~param.rank": "param.rank has no value: the yaml of param=own has to give one",
    "Unresolved": "param: an annotation of Unresolved cannot be resolved: name 'Nowhere' is not defined",
    "WithoutDevice": "param._target_=flawed.WithoutDevice takes no device, which lrtrain gives to every param",
    "OnlyLinear": "param._target_=flawed.OnlyLinear is not a subclass of lrtrain.layers.base.FactorizedLinear",
    "Unfinished": "param._target_=flawed.Unfinished cannot be made: it lacks dense_weight, flops, init_parameters,",
    "Forgets": f"Forgets gives no initial value to A.weight {Q}",
    "TooMany": f"TooMany gives an initial value to C {Q}, which has none of that name",
    "Turned": f"Turned gives A.weight {Q} an initial value of shape [32, 4] instead of [4, 32]",
    "Silent": "Silent.init_parameters gives no dictionary of values by name, but None",
    "WithoutARole": "WithoutARole.roles gives its parameter A.weight no role; use one of matrix, factor_left,",
    "OddRole": "OddRole.roles gives its parameter A.weight the role right; use one of matrix, factor_left,",
    "SilentPenalty": "SilentPenalty has add_penalty, which is called only where it says penalized = True",
    "SilentProjection": "SilentProjection has after_step, which is called only where it says constrained = True",
    "Penalized optim.in_backward=true train.clip_by=parameter train.batch_size=8 train.micro_batch_size=8":
    "model.layers.0.self_attn.q_proj (param=own) has a penalty, which adds to the gradients after the backward pass",
    "Good optim._target_=flawed.NoOptimizerOfOurs":
    "optim._target_=flawed.NoOptimizerOfOurs is not a subclass of lrtrain.optim.base.ShardedOptimizer",
    "FourDimensions optim=muon":
    "model.layers.0.self_attn.q_proj.W of shape 2×2×16×16 has the role matrix, but is no matrix or batch of matrices",
}  # fmt: skip
SOUND = ["Good", "ManyKeys", "ManyKeys +param.device=null", "OneOfTwo", "OneOfTwo +param.kind=b", "Batch"]
SOUND += ["Good optim._target_=flawed.TakesAll", *(f"Batch optim={name}" for name in MATRICES)]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a run does with the class and overrides of a case before it allocates anything."""

    def compose_and_check(case: str) -> None:
        name, *overrides = case.split()
        (tmp_path / "param").mkdir()
        (tmp_path / "param" / "own.yaml").write_text(YAML.format(name=name))
        monkeypatch.setenv("LRTRAIN_CONF", str(tmp_path))
        monkeypatch.syspath_prepend(str(Path(__file__).parent))
        config = compose("param=own", *(o for o in SMALL if not o.startswith("param")), *overrides)
        check(config, 1)
        model = make_model(config)
        check_contract(model, 0)
        choice(config.optim)(model)

    return compose_and_check


@pytest.mark.parametrize("case", SENTENCES)
def test_a_flaw_is_one_sentence(case: str, begin):
    with pytest.raises(ConfigError) as raised:
        begin(case)
    assert str(raised.value).startswith(SENTENCES[case])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("case", SOUND)
def test_what_is_allowed_passes(case: str, begin):
    begin(case)
