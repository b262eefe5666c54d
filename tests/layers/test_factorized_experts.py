"""Factorized experts against single layers, and against transformers' own dense experts."""

import copy

import pytest
import torch
from launching import SMALL
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import batched_mm_experts_forward

from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.core.seeds import generator_for
from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear
from lrtrain.layers.experts import FactorizedExperts
from lrtrain.linalg.nearest import Fit
from lrtrain.model.build import make_model
from lrtrain.model.counts import dense_parameter_count, factorization_table, parameter_count
from lrtrain.model.experts import dense_experts, factorized_experts_forward, replace_experts
from lrtrain.model.flops import training_flops
from lrtrain.model.init import materialize

IN, OUT, RANK, EXPERTS = 24, 32, 5, 4
METHODS = {
    "lowrank": ["param=lowrank"],
    "cola": ["param=cola"],
    "dlr": ["param=dlr"],
    "sltrain": ["param=sltrain", "param.execution=materialize"],
    "sltrain-factored": ["param=sltrain", "param.execution=factored", "param.support=row_balanced"],
    "sltrain-residual": ["param=sltrain", "param.execution=materialize", "param.select=residual"],
}
MIXTURE = (
    *SMALL,
    "model=llama_tiny",
    "model.config.model_type=mixtral",
    "model.config.num_hidden_layers=2",
    "+model.config.num_key_value_heads=4",
    "+model.config.num_local_experts=4",
    "+model.config.num_experts_per_tok=2",
)


def one(*overrides: str, rank: int = RANK, device: str = "meta") -> FactorizedLinear:
    make = choice(compose(*SMALL, *overrides).param)
    return make(in_features=IN, out_features=OUT, bias=False, rank=rank, device=device)


def batch(*overrides: str, experts: int = EXPERTS, rank: int = RANK) -> FactorizedExperts:
    """With values whose left factors are not zero."""
    made = FactorizedExperts(one(*overrides, rank=rank), experts, 2, False).to_empty(device="cpu")
    values = made.init_parameters(generator_for(0, "x")) | made.init_buffers(generator_for(0, "x/buffers"))
    made.load_state_dict(values, strict=False)
    for key, buffer in made.named_buffers():
        buffer.copy_(values[key])
    for p in made.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return made


@pytest.mark.parametrize("name", METHODS)
def test_each_expert_computes_what_a_layer_of_its_own_does(name: str):
    made, sizes = batch(*METHODS[name]), torch.tensor([3, 0, 7, 2])
    x = torch.randn(12, IN, requires_grad=True)
    y = made(x, sizes)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *made.parameters()], g)
    first = 0
    for i, size in enumerate(sizes.tolist()):
        layer = one(*METHODS[name], device="cpu")
        layer.load_state_dict({key: value[i] for key, value in made.state_dict().items()}, strict=False)
        for key, buffer in layer.named_buffers():
            buffer.copy_(dict(made.named_buffers())[key][i])
        part = x[first : first + size].detach().requires_grad_()
        if size:
            torch.testing.assert_close(y[first : first + size], layer(part), rtol=1e-6, atol=1e-6)
            expected = torch.autograd.grad(layer(part), [part, *layer.parameters()], g[first : first + size])
            torch.testing.assert_close(found[0][first : first + size], expected[0], rtol=1e-5, atol=1e-6)
            for got, wanted in zip(found[1:], expected[1:], strict=True):
                torch.testing.assert_close(got[i], wanted, rtol=1e-5, atol=1e-6)
        else:
            assert not any(gradient[i].any() for gradient in found[1:])
        if name not in ("cola", "dlr"):
            torch.testing.assert_close(made.dense_weight()[i], layer.dense_weight())
            torch.testing.assert_close(made.singular_values()[i], layer.singular_values())
        first += size


@pytest.mark.parametrize("name", METHODS)
def test_initial_values_are_a_function_of_seed_name_and_expert(name: str):
    few, many = (
        FactorizedExperts(one(*METHODS[name]), experts, 2, False).init_parameters(generator_for(0, "x"))
        for experts in (2, 5)
    )
    assert all(torch.equal(few[key], many[key][:2]) for key in few)
    random = "A.weight"
    assert not torch.equal(many[random][0], many[random][1])


def full_rank(experts: nn.Module, method: list[str]) -> nn.Module:
    """The experts with each weight factorized at full rank."""
    block = nn.Module()
    block.experts = copy.deepcopy(experts)
    for name, dense in dense_experts(block, ".").items():
        rank = min(dense.out_features, dense.in_features)
        make = choice(compose(*SMALL, *method).param)
        sizes = {"in_features": dense.in_features, "out_features": dense.out_features}
        made = dense.factorized(make(**sizes, bias=False, rank=rank, device="meta")).to_empty(device="cpu").double()
        for key, value in made.init_buffers(generator_for(0, name)).items():
            made.get_buffer(key).copy_(value)
        weight = dense.weight.mT if dense.transposed else dense.weight
        made.load_state_dict(made.start_from(weight.detach(), Fit(), generator_for(0, name)), strict=False)
        replace_experts(block, name, made)
    return block.experts


@pytest.mark.parametrize("method", [
    ["param=lowrank"],
    ["param=cola", "param.activation=none"],
    ["param=sltrain", "param.density=0", "param.execution=materialize"],
], ids=lambda m: m[0])  # fmt: skip
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h", "granitemoe"])
def test_at_full_rank_they_are_transformers_dense_experts(kind: str, method: list[str]):
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4, "num_hidden_layers": 2}
    if kind == "nemotron_h":
        settings |= {"n_routed_experts": 4, "moe_intermediate_size": 48, "layers_block_type": ["moe"] * 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    dense = next(m for m in model.modules() if hasattr(m, "has_gate")).to_empty(device="cpu").double()
    for p in dense.parameters():
        nn.init.normal_(p, std=0.2)
    x = torch.randn(11, 32, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in x])
    weights = torch.rand(11, 2, dtype=torch.float64)
    expected = batched_mm_experts_forward(dense, x, chosen, weights)
    found = factorized_experts_forward(full_rank(dense, method), x, chosen, weights)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def parts(param: str) -> tuple[nn.Module, dict[str, FactorizedExperts]]:
    model = make_model(compose(*MIXTURE, f"param={param}"))
    return model, {name: m for name, m in model.named_modules() if isinstance(m, FactorizedExperts)}


def test_experts_are_counted():
    model, experts = parts("lowrank")
    assert len(experts) == 4
    gate_up = experts["model.layers.0.mlp.experts.gate_up_proj"]
    assert parameter_count(gate_up) == 4 * 4 * (32 + 96) and gate_up.dense_flops(3) == 2 * 3 * 2 * 32 * 96
    dense = make_model(compose(*MIXTURE, "param=dense"))
    assert dense_parameter_count(model) == parameter_count(dense)
    assert ("gate_up_proj", 2, "4 × 96×32, rank 4", 2 * 4 * 4 * 128) in factorization_table(model)
    flops = training_flops(model, 16)
    assert flops.model < flops.dense_equivalent


def test_gradients_reach_factors_of_experts_that_no_token_chose():
    model, experts = parts("lowrank")
    materialize(model, 0, torch.device("cpu"))
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits.sum().backward()
    for layer in experts.values():
        assert all(p.grad is not None and not p.grad.flatten(1).any(1).all() for p in layer.parameters())


def test_methods_that_cannot_be_batched_leave_experts_dense():
    model, experts = parts("sst")
    assert not experts and model.model.layers[0].mlp.experts.gate_up_proj.ndim == 3


def test_dense_experts_cannot_start_at_zero():
    with pytest.raises(ConfigError, match=r"zero_init.*down_proj.*dense"):
        make_model(compose(*MIXTURE, "param=dense", "param.zero_init=down_proj"))
