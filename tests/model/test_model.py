"""The model: published sizes, factorization by pattern, initial values, and merging back."""

import copy
import math

import pytest
import torch
from launching import SMALL
from transformers import AutoModelForCausalLM

from lrtrain.config.compose import compose
from lrtrain.errors import ConfigError
from lrtrain.init_from.start import check_layers
from lrtrain.layers.base import FactorizedLinear
from lrtrain.layers.lost import LOSTLinear
from lrtrain.layers.lowrank import LowRankLinear
from lrtrain.model.autotune import autotune_layers
from lrtrain.model.build import architecture, make_model
from lrtrain.model.counts import (
    above_break_even,
    dense_parameter_count,
    factorization_table,
    parameter_count,
    unaligned,
)
from lrtrain.model.flops import training_flops
from lrtrain.model.init import materialize
from lrtrain.model.structure import factorized_layers
from lrtrain.model.supports import support_hash

SIZES = {
    "llama_60m": (512, 1376, 8, 128),
    "llama_130m": (768, 2048, 12, 256),
    "llama_350m": (1024, 2736, 24, 256),
    "llama_1b": (2048, 5461, 24, 512),
    "llama_7b": (4096, 11008, 32, 1024),
}
CPU = torch.device("cpu")


def small(*overrides: str, seed: int = 0):
    model = make_model(compose(*SMALL, *overrides))
    materialize(model, seed, CPU)
    for name, execution in autotune_layers(model, 32, torch.float32, CPU).items():
        model.get_submodule(name).execution = execution
    return model


# --- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_follow_the_formulas(size: str):
    d, f, layers, r = SIZES[size]
    embeddings_and_norms = 2 * 32000 * d + (2 * layers + 1) * d
    dense = make_model(compose(f"model={size}", "param=dense"))
    assert parameter_count(dense) == embeddings_and_norms + layers * (4 * d * d + 3 * d * f)
    lowrank = make_model(compose(f"model={size}", "param=lowrank"))
    assert parameter_count(lowrank) == embeddings_and_norms + layers * r * (11 * d + 3 * f)
    sltrain = make_model(compose(f"model={size}", "param=sltrain"))
    nnz = 4 * math.floor(0.03 * d * d) + 3 * math.floor(0.03 * d * f)
    assert parameter_count(sltrain) == parameter_count(lowrank) + layers * nnz
    assert dense_parameter_count(sltrain) == dense_parameter_count(lowrank) == parameter_count(dense)


@pytest.mark.parametrize(
    "size,millions", [("llama_60m", 44), ("llama_130m", 97), ("llama_350m", 194), ("llama_1b", 646)]
)
def test_sltrain_has_the_published_sizes(size: str, millions: int):
    """SLTrain, Table 2, at the published ranks and density 0.03: the yamls' own defaults."""
    assert round(parameter_count(make_model(compose(f"model={size}", "param=sltrain"))) / 1e6) == millions


@pytest.mark.parametrize("size,millions", [("llama_60m", 58), ("llama_130m", 134), ("llama_350m", 368)])
def test_dense_has_the_published_sizes(size: str, millions: int):
    assert round(parameter_count(make_model(compose(f"model={size}", "param=dense"))) / 1e6) == millions


def test_flops_come_from_the_layers():
    d, f, layers, r = SIZES["llama_60m"]
    nnz = 4 * math.floor(0.03 * d * d) + 3 * math.floor(0.03 * d * f)
    head, attention = 2 * d * 32000, 4 * layers * 256 * d
    found = training_flops(make_model(compose("model=llama_60m", "param=sltrain")), 256)
    assert found.model == 3 * (head + attention + 2 * layers * (r * (11 * d + 3 * f) + nnz))
    assert found.dense_equivalent == 3 * (head + attention + 2 * layers * (4 * d * d + 3 * d * f))
    dense = training_flops(make_model(compose("model=llama_60m", "param=dense")), 256)
    assert dense.model == dense.dense_equivalent == found.dense_equivalent


def test_flops_of_attention_follow_the_heads_own_width():
    dense = ["model=llama_60m", "param=dense", "model.config.num_hidden_layers=1"]
    d, heads = 512, 8
    narrow, wide = (
        training_flops(make_model(compose(*dense, *more)), 256).model for more in ([], ["+model.config.head_dim=128"])
    )
    more = heads * 128 - d  # each token's queries, keys, values and outputs are wider by this
    assert wide - narrow == 3 * (2 * 4 * d * more + 4 * 256 * more)


@pytest.mark.parametrize(
    "size,rank,found", [("llama_1b", 512, [5461]), ("llama_1b_aligned", 512, []), ("llama_60m", 100, [100])]
)
def test_widths_and_ranks_that_tensor_cores_are_slow_with(size: str, rank: int, found: list[int]):
    assert unaligned(make_model(compose(f"model={size}", "param=lowrank", f"param.rank={rank}"))) == found


# --- which layers, which ranks -----------------------------------------------------------------------------------


def test_every_linear_of_the_blocks_is_replaced_and_nothing_else():
    model = small()
    factorized = {name for name, m in model.named_modules() if isinstance(m, FactorizedLinear)}
    assert len(factorized) == 4 * 7 and all(".layers." in name for name in factorized)
    assert type(model.lm_head) is torch.nn.Linear
    assert sum(row[1] for row in factorization_table(model)) == 28


def test_a_pattern_selects_layers():
    model = small("param.pattern='mlp\\.'")
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, FactorizedLinear)}
    assert names == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("param", ["sltrain", "lost", "cola"])
def test_ranks_by_pattern_share_and_number(param: str):
    model = small(f"param={param}", "param.rank={q_proj: 2, mlp: 0.5, proj: 3}")
    ranks = {n.rsplit(".", 1)[-1]: m.rank for n, m in model.named_modules() if isinstance(m, FactorizedLinear)}
    assert ranks == {
        "q_proj": 2,
        "k_proj": 3,
        "v_proj": 3,
        "o_proj": 3,
        "gate_proj": 16,
        "up_proj": 16,
        "down_proj": 16,
    }


@pytest.mark.parametrize(
    "override,message",
    [
        ("param.rank=900", r"param.rank=900 is not between 1 and min\(in, out\)=32 of model.layers.0.self_attn.q_proj"),
        ("param.rank=0", "param.rank=0 is not between"),
        ("param.rank=1.5", "param.rank=1.5 is not a share"),
        ("param.rank={q_proj:4}", "has no pattern that matches model.layers.0.self_attn.k_proj"),
        ("param.pattern=nothing", "param.pattern=nothing matches none"),
        ("param.pattern='['", "param.pattern=\\[ is not a regular expression"),
        ("param.pattern=. model.config.tie_word_embeddings=true", "matches lm_head, .*tie_word_embeddings=false"),
    ],
)
def test_bad_choices_are_named(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        small(*override.split())


@pytest.mark.parametrize(
    "param, parameter",
    [("param=sst param.rank=1.0", "left_frozen of shape 0×32"), ("param=sltrain param.density=0", "values of shape 0")],
)
def test_parameters_without_entries_are_for_all_but_zero3(param: str, parameter: str):
    zero = "engine=deepspeed engine.zero_stage="
    small(*f"{param} {zero}2".split())
    with pytest.raises(ConfigError, match=f"{parameter} has no entries"):
        small(*f"{param} {zero}3".split())


def test_ranks_above_break_even_are_told():
    assert above_break_even(small("param=lowrank", "param.rank=4")) == []
    assert "model.layers.0.self_attn.q_proj" in above_break_even(small("param=lowrank", "param.rank=16"))


# --- initial values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("param", ["dense", "lowrank", "sltrain", "sst", "relora", "lost", "cola"])
def test_initial_values_depend_on_seed_and_name_alone(param: str):
    few = small(f"param={param}", "model.config.num_hidden_layers=2").state_dict()
    many = small(f"param={param}", "model.config.num_hidden_layers=3").state_dict()
    other = small(f"param={param}", "model.config.num_hidden_layers=2", seed=1).state_dict()
    assert all(torch.equal(few[name], many[name]) for name in few)
    assert any(not torch.equal(few[name], other[name]) for name in few)


def test_no_two_layers_start_alike():
    weights = [m.A.weight for m in small("param=lowrank").modules() if isinstance(m, LowRankLinear)]
    assert all(not torch.equal(a, b) for a in weights for b in weights if a is not b and a.shape == b.shape)


def test_supports_come_back_from_the_seed():
    assert support_hash(small()) == support_hash(small()) != support_hash(small(seed=1))


def test_dense_starts_as_transformers_does_and_buffers_are_whole():
    config = compose(*SMALL, "param=dense")
    model = small("param=dense")
    theirs = AutoModelForCausalLM.from_config(architecture(None, config.model.config))
    assert torch.equal(model.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)
    for name, parameter in theirs.named_parameters():
        ours = model.get_parameter(name)
        if parameter.ndim == 2:
            assert ours.std().item() == pytest.approx(0.02, rel=0.15)
        else:
            assert torch.equal(ours, parameter)


@pytest.mark.parametrize("param,zero", [("dense", "weight"), ("lowrank", "B.weight")])
def test_layers_can_start_at_zero_while_the_others_start_as_ever(param: str, zero: str):
    plain, model = small(f"param={param}"), small(f"param={param}", "param.zero_init='o_proj|down_proj'")
    for name, parameter in model.named_parameters():
        if name.endswith((f"o_proj.{zero}", f"down_proj.{zero}")):
            assert not parameter.any()
        else:
            assert torch.equal(parameter, plain.get_parameter(name))
    embedded = model.model.embed_tokens(ids := torch.randint(128, (2, 8)))
    assert torch.equal(model.model(ids).last_hidden_state, model.model.norm(embedded))  # each block is the identity
    model(ids).logits.square().sum().backward()
    assert all(
        p.grad.any() for name, p in model.named_parameters() if name.endswith((f"o_proj.{zero}", f"down_proj.{zero}"))
    )
    with pytest.raises(ConfigError, match="param.zero_init=nothing matches none"):
        small(f"param={param}", "param.zero_init=nothing")


def test_where_every_left_factor_starts_at_zero_no_block_ever_learns():
    model = small("param=lowrank", "param.init=lora")
    model(torch.randint(128, (2, 8))).logits.square().sum().backward()
    factors = [p for m in model.modules() if isinstance(m, LowRankLinear) for p in m.parameters()]
    assert factors and not any(p.grad.any() for p in factors)


@pytest.fixture
def init_files(tmp_path, monkeypatch):
    """The files of costly initial values, in a cache of the test's own."""
    monkeypatch.setenv("LRTRAIN_CACHE", str(tmp_path))
    return lambda: sorted((tmp_path / "init").iterdir())


def test_costly_initial_values_are_computed_once(init_files, monkeypatch):
    first = small("param=lost").state_dict()
    files = init_files()
    assert len(files) == 4 * 7 and all(file.suffix == ".pt" for file in files)
    with monkeypatch.context() as patch:
        patch.setattr(LOSTLinear, "init_parameters", None)  # cannot be called
        again = small("param=lost", "train.compile=true").state_dict()
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_kept_values_are_those_of_their_version(init_files):
    """LOST's, for one seed. Where they have to change, `LOSTLinear.init_version` has to be raised: else runs go on
    with the values that are kept from before."""
    values = small("param=lost").state_dict()
    layer = "model.layers.0.mlp.up_proj"
    product = values[f"{layer}.B.weight"] @ values[f"{layer}.A.weight"]  # the factors' signs are LAPACK's
    assert LOSTLinear.init_version == 1
    found = [product.norm().item(), product[0, 0].item(), values[f"{layer}.sparse"].sum().item()]
    assert found == pytest.approx([0.45164, -0.0115344, -0.156361], rel=1e-4)
    key = init_files()[0].name
    LOSTLinear.init_version = 2
    try:
        small("param=lost")
        assert len(init_files()) == 2 * 4 * 7 and key in [file.name for file in init_files()]
    finally:
        LOSTLinear.init_version = 1


def test_a_layer_that_forgets_an_initial_value_is_refused(monkeypatch):
    """Not left with what the memory held."""
    whole = LowRankLinear.init_parameters
    monkeypatch.setattr(LowRankLinear, "init_parameters", lambda *a: {"A.weight": whole(*a)["A.weight"]})
    with pytest.raises(
        ConfigError, match="LowRankLinear gives no initial value to B.weight of model.layers.0.self_attn.q"
    ):
        small("param=lowrank")


def test_init_from_names_a_layer_that_has_no_start_from(monkeypatch):
    layers = factorized_layers(make_model(compose(*SMALL, "param=lowrank")))
    check_layers(layers, affine=False)
    monkeypatch.delattr(LowRankLinear, "start_from")
    with pytest.raises(ConfigError, match="init_from cannot start model.layers.0.*: LowRankLinear has no start_from"):
        check_layers(layers, affine=False)


@pytest.mark.parametrize("param", ["sst", "sltrain"])
def test_what_a_checkpoint_will_replace_is_not_drawn_but_what_a_seed_gives_back_is(param: str, monkeypatch):
    overrides = (f"param={param}", "model.config.num_hidden_layers=1")
    fresh = small(*overrides)
    model = make_model(compose(*SMALL, *overrides))
    for layer in factorized_layers(model).values():
        monkeypatch.setattr(layer, "init_parameters", None)  # cannot be called
    materialize(model, 0, CPU, fresh=False)
    assert support_hash(model) == support_hash(fresh)
    model.load_state_dict(fresh.state_dict())
    rows = torch.randint(128, (1, 8))
    for layers in (factorized_layers(model), factorized_layers(fresh)):
        for layer in layers.values():
            layer.execution = "materialize"
    assert torch.equal(model(rows).logits, fresh(rows).logits)


def test_damaged_files_of_initial_values_are_written_anew(init_files):
    first = small("param=lost").state_dict()
    whole = init_files()[0].stat().st_size
    for file, damage in zip(init_files(), ([b"", b"nonsense", None] * 10), strict=False):
        file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    again = small("param=lost").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert len(init_files()) == 4 * 7 and init_files()[0].stat().st_size == whole


def test_a_cache_that_is_named_and_cannot_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LRTRAIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="LRTRAIN_CACHE=.*file cannot be made"):
        small("param=lost")


@pytest.mark.parametrize(
    "override",
    [
        "param.rank=5",
        "param.density=0.2",
        "param.select=random",
        "param.complement_rank=3",
        "param.init_std=0.03",
        "seed",
    ],
)
def test_initial_values_of_other_settings_are_others(init_files, override: str):
    small("param=lost", "model.config.num_hidden_layers=1")
    before = len(init_files())
    seed, change = (1, []) if override == "seed" else (0, [override])
    small("param=lost", "model.config.num_hidden_layers=1", *change, seed=seed)
    assert len(init_files()) == 2 * before


# --- merging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "param", ["lowrank", "sltrain", "sst", "relora", "lost param.activation=none", "dlr param.activation=none"]
)
def test_merged_into_the_plain_model_it_gives_the_same_logits(param: str):
    model = small(*f"param={param}".split())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    plain = AutoModelForCausalLM.from_config(architecture(None, compose(*SMALL).model.config))
    state = {name: value for name, value in model.state_dict().items() if name in plain.state_dict()}
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear):
            state[f"{name}.weight"] = layer.dense_weight()
    plain.load_state_dict(state)
    ids = torch.randint(128, (2, 16))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


# --- other architectures -----------------------------------------------------------------------------------------

OPT = (
    "model=opt_125m",
    "model.vocab_size=128",
    "model.config.hidden_size=32",
    "model.config.word_embed_proj_dim=32",
    "model.config.ffn_dim=64",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "param.rank=4",
)


@pytest.mark.parametrize("param", ["lowrank", "sltrain", "sst", "relora"])
def test_opt_keeps_its_biases_and_its_tied_head(param: str):
    model = make_model(compose(*OPT, f"param={param}"))
    materialize(model, 0, CPU)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    layer = model.model.decoder.layers[0].fc1
    assert isinstance(layer, FactorizedLinear)
    assert [p.shape for name, p in layer.named_parameters() if layer.roles[name] == "bias"] == [(64,)]
    assert model(torch.randint(128, (1, 8))).logits.isfinite().all()


def test_any_saved_config_can_be_factorized(tmp_path):
    config = copy.deepcopy(
        architecture(None, compose(*SMALL).model.config | {"model_type": "qwen3", "num_key_value_heads": 2})
    )
    config.save_pretrained(tmp_path)
    model = make_model(compose("model=hf", f"model.path={tmp_path}", "param=lowrank"))
    materialize(model, 0, CPU)
    assert sum(isinstance(m, LowRankLinear) for m in model.modules()) == 7 * config.num_hidden_layers
    assert model(torch.randint(128, (1, 8))).logits.isfinite().all()


def test_a_path_without_a_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"model.path={tmp_path}/nothing is not a transformers model config"):
        make_model(compose("model=hf", f"model.path={tmp_path}/nothing"))
