"""Weight decay only where it belongs."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrtrain.config.compose import compose
from lrtrain.errors import ConfigError
from lrtrain.layers.lowrank import LowRankLinear
from lrtrain.model.build import make_model
from lrtrain.optim.groups import parameter_groups, parameter_roles

SMALL = ("model.config.hidden_size=32", "model.config.num_attention_heads=4", "param.rank=4", "model.vocab_size=64")
OPT = ("model=opt_125m", "model.config.word_embed_proj_dim=32", "model.config.ffn_dim=64", *SMALL)


@pytest.mark.parametrize("overrides", [SMALL, OPT])
@pytest.mark.parametrize("param", ["dense", "lowrank", "sltrain", "sst", "relora"])
def test_matrices_decay_and_biases_norms_and_embeddings_do_not(overrides: tuple[str, ...], param: str):
    model = make_model(compose(*overrides, f"param={param}"))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    listed = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    yes, no = ([names[id(p)] for g in groups if g["weight_decay"] == wd for p in g["params"]] for wd in (0.1, 0.0))
    matrices = (
        "proj.weight",
        "fc1.weight",
        "fc2.weight",
        "A.weight",
        "B.weight",
        "values",
        "left",
        "right",
        "lm_head.weight",
    )
    assert all(n.endswith(matrices) for n in yes)
    assert all("norm" in n or "embed" in n or n.endswith(("bias", "sigma")) for n in no)


def roles(kind: str, **settings) -> dict[str, str]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    assert len({id(p) for g in parameter_groups(model, 0.1) for p in g["params"]}) == len([*model.parameters()])
    return parameter_roles(model)


def test_conv1d_weights_and_experts_are_matrices():
    gpt2 = roles("gpt2", n_embd=32, n_layer=1, n_head=4)
    assert {n for n, role in gpt2.items() if role == "matrix"} == {
        f"transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    gpt_oss = roles(
        "gpt_oss", hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_local_experts=4, head_dim=8
    )
    mlp = {n.removeprefix("model.layers.0.mlp."): role for n, role in gpt_oss.items() if ".mlp." in n}
    assert mlp == {
        "router.weight": "matrix",
        "router.bias": "bias",
        "experts.gate_up_proj": "matrix",
        "experts.gate_up_proj_bias": "bias",
        "experts.down_proj": "matrix",
        "experts.down_proj_bias": "bias",
    }
    mamba = roles("mamba", hidden_size=32, num_hidden_layers=1, state_size=8)
    assert mamba["backbone.layers.0.mixer.conv1d.weight"] == mamba["backbone.layers.0.mixer.A_log"] == "norm"


@pytest.mark.parametrize("role", [None, "factor"])
def test_a_layer_that_gives_a_parameter_no_known_role_is_refused_by_name(role: str | None, monkeypatch):
    model = make_model(compose(*SMALL, "param=lowrank"))
    layer = next(m for m in model.modules() if isinstance(m, LowRankLinear))
    monkeypatch.setattr(type(layer), "roles", {"B.weight": "factor_left"} | ({"A.weight": role} if role else {}))
    with pytest.raises(ConfigError, match=r"LowRankLinear.roles .* parameter A.weight .*; use one of matrix, "):
        parameter_groups(model, 0.1)
