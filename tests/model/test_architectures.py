"""Any architecture of transformers: the same model as transformers' own, the same start, or a refusal."""

import copy
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig

from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.errors import ConfigError
from lrtrain.model import attention
from lrtrain.model.architecture import new_model
from lrtrain.model.attention import CAUSAL, PLAIN, _on_meta, _shallow, attention_for, narrowed
from lrtrain.model.build import build_model, make_model
from lrtrain.model.counts import parameter_count
from lrtrain.model.deferred import Recording, named_tensors
from lrtrain.model.flops import formula, training_flops
from lrtrain.model.init import materialize
from lrtrain.model.rank import RankPlan
from lrtrain.model.structure import blocks, factorized_layers, linears, matrices, weights_read

CPU = torch.device("cpu")
LLAMA_LIKE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
GPT_LIKE = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}
SIZES = {
    "llama": LLAMA_LIKE,
    "gemma3_text": LLAMA_LIKE | {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "mixtral": LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": LLAMA_LIKE | {
        "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 24, "first_k_dense_replace": 1,
    },
    "gpt_oss": LLAMA_LIKE | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "vocab_size": 128},
    "gpt2": GPT_LIKE,
    "openai-gpt": GPT_LIKE,
    "gptj": GPT_LIKE | {"rotary_dim": 8},
    "mamba": {"hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "vocab_size": 128},
    "modernbert-decoder": LLAMA_LIKE | {"local_attention": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "qwen3_next": LLAMA_LIKE | {
        "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "afmoe": LLAMA_LIKE | {  # experts of a width that torch's grouped product does not take
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 30, "num_dense_layers": 1,
        "sliding_window": 8, "global_attn_every_n_layers": 2,
    },
    "rwkv": {"hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 128, "max_seq_len": 64},
    "gpt_bigcode": GPT_LIKE,
    "gemma2": LLAMA_LIKE | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "bamba": LLAMA_LIKE | {
        "mamba_d_state": 16, "mamba_d_head": 16, "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_chunk_size": 32,
        "attn_layer_indices": [1],
    },
}  # fmt: skip


def tiny(kind: str, **changes: object) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **SIZES[kind], **changes)


def started(config: PreTrainedConfig, seed: int = 0):
    model = build_model(config)
    torch.use_deterministic_algorithms(True)  # what is allocated holds NaN
    try:
        materialize(model, seed, CPU)
    finally:
        torch.use_deterministic_algorithms(False)
    return model.eval()


# --- attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
def test_logits_are_those_of_transformers_and_heed_no_later_token(kind: str):
    model = started(tiny(kind))
    own = new_model(tiny(kind), "eager").eval()
    own.load_state_dict(model.state_dict())
    rows = torch.randint(128, (2, 40))
    later = torch.cat([rows[:, :20], rows[:, 20:].roll(1, 1)], 1)
    with torch.no_grad():
        ours = model(input_ids=rows, use_cache=False).logits
        assert (ours - own(input_ids=rows, use_cache=False).logits).abs().max() < 1e-5
        assert (ours - model(input_ids=later, use_cache=False).logits)[:, :20].abs().max() < 1e-5


@pytest.mark.parametrize(
    "kind,found",
    [("llama", CAUSAL), ("gpt2", CAUSAL), ("bloom", "eager"), ("xglm", "eager"), ("gptj", "eager"),
     ("gpt_oss", "eager"), ("gemma3_text", "sdpa")],
)  # fmt: skip
def test_masks_are_made_only_where_they_are_needed(kind: str, found: str):
    assert attention_for(tiny(kind)) == found
    assert attention_for(tiny(kind), PLAIN) == ("eager" if found == "eager" else "sdpa")


def test_a_model_of_a_published_size_is_judged_by_a_small_copy():
    config = AutoConfig.for_model("mistral", num_hidden_layers=2)  # 4,096 wide, with a window of 4,096 tokens
    assert attention_for(config) == "sdpa" and attention_for(AutoConfig.for_model("llama")) == CAUSAL


def test_a_small_copy_has_fewer_layers_but_all_kinds_of_them():
    config = AutoConfig.for_model("gemma3_text")  # of 26 layers the sixth is the first without a window
    small = _shallow(type(config).from_dict(narrowed(config.to_dict(), 2)))
    assert small.num_hidden_layers == 8 and set(small.layer_types) == set(config.layer_types)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_an_encoder_is_refused_by_name_unless_it_decodes(is_decoder: bool):
    sizes = {key: SIZES["llama"][key] for key in ("hidden_size", "intermediate_size", "vocab_size")}
    config = AutoConfig.for_model("bert", **sizes, num_hidden_layers=2, num_attention_heads=4, is_decoder=is_decoder)
    config.name_or_path = "some/bert"
    if is_decoder:
        assert started(config)(input_ids=torch.randint(128, (1, 8))).logits.isfinite().all()
    else:
        with pytest.raises(ConfigError, match="model.path=some/bert .* depend on later tokens"):
            build_model(config)


@pytest.mark.parametrize("coefficient", [0.0, 1e-4])
def test_a_loss_that_has_a_z_loss_in_transformers_is_refused(coefficient: float):
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 1, "mamba_d_state": 8, "attn_layer_indices": [1]}
    config = AutoConfig.for_model("bamba", **LLAMA_LIKE, **mamba, z_loss_coefficient=coefficient)
    if coefficient:
        with pytest.raises(ConfigError, match="model_type=bamba has in transformers more terms in its loss"):
            build_model(config, None, None, None)
        assert attention_for(config, PLAIN) in PLAIN  # to be evaluated and generated with
    else:
        build_model(config, None, None, None)


def test_a_model_with_a_prompt_of_its_own_is_refused_for_what_is_wrong_with_it():
    config = AutoConfig.for_model(
        "cpmant", hidden_size=64, dim_head=16, num_attention_heads=4, dim_ff=96, num_hidden_layers=2, vocab_size=128
    )
    with pytest.raises(ConfigError, match="model_type=cpmant .* depend on later tokens"):
        attention_for(config)


def test_a_large_model_of_many_small_experts_can_be_tried():
    config = AutoConfig.for_model("dots3_note_text")  # whose widths within heads must add up
    assert parameter_count(_on_meta(type(config).from_dict(narrowed(config.to_dict(), 128)))) < 5e7


def test_a_lack_of_memory_is_no_property_of_an_architecture(monkeypatch: pytest.MonkeyPatch):
    config = tiny("bloom", hidden_dropout=0.03)
    with monkeypatch.context() as patch:
        patch.setattr("lrtrain.model.attention._logits", Mock(side_effect=MemoryError("of this process")))
        with pytest.raises(ConfigError, match="memory does not suffice .*model_type=bloom"):
            attention_for(config)
    made = attention.new_model
    with monkeypatch.context() as patch:  # not enough for the second model

        def two_do_not_fit(config: PreTrainedConfig, choice: str):
            if choice != "eager":
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
            return made(config, choice)

        patch.setattr(attention, "new_model", two_do_not_fit)
        with pytest.raises(ConfigError, match="memory does not suffice"):
            attention_for(config, PLAIN)
    assert attention_for(config) == "eager"


def test_what_was_found_is_not_tried_again(monkeypatch: pytest.MonkeyPatch):
    found = attention_for(tiny("bloom"))
    monkeypatch.setattr("lrtrain.model.attention._tried", None)  # cannot be called
    assert attention_for(tiny("bloom")) == found


# --- initial values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
def test_every_tensor_starts_as_transformers_has_it(kind: str):
    """Constants are equal; what is drawn has the same mean and deviation."""
    torch.manual_seed(0)
    theirs = dict(named_tensors(new_model(tiny(kind), "eager")))
    for name, ours in named_tensors(started(tiny(kind))):
        a, b = ours.detach().float(), theirs[name].detach().float()
        assert a.isfinite().all() or torch.equal(a, b), name
        if b.numel() == 1 or b.std() == 0:
            assert torch.equal(a, b), name
        elif b.numel() >= 256:
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.3), name
            assert abs(a.mean() - b.mean()) < 0.3 * abs(b.mean()) + 6 * b.std() / b.numel() ** 0.5, name


def test_starts_of_parents_survive():
    gpt2, mamba = started(tiny("gpt2")), started(tiny("mamba"))
    assert gpt2.get_parameter("transformer.h.0.mlp.c_proj.weight").std().item() == pytest.approx(0.01, rel=0.05)
    steps = nn.functional.softplus(mamba.get_parameter("backbone.layers.0.mixer.dt_proj.bias"))
    assert 1e-4 <= steps.min() and 0.02 < steps.max() <= 0.11


@pytest.mark.parametrize("kind", ["gpt2", "mamba", "mixtral"])
def test_initial_values_depend_on_seed_and_name_alone(kind: str):
    first, again, other = (started(tiny(kind), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_recorded_construction_is_replayed_exactly():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(6, 4))
            nn.init.trunc_normal_(self.weight, std=0.5, a=-1.0, b=1.0)
            with torch.no_grad():
                self.weight[2].zero_()
                self.weight.mul_(3)
            self.register_buffer("table", torch.tensor([1.0, 2.0]).repeat(3) @ torch.ones(6, 2))
            self.never = nn.Parameter(torch.empty(3))

    with Recording() as recording:
        odd = Odd()
    torch.manual_seed(1)
    real = Odd()
    torch.manual_seed(1)
    assert odd.weight.is_meta and torch.equal(recording.value(odd.weight), real.weight)
    assert torch.equal(recording.value(odd.get_buffer("table")), real.get_buffer("table"))
    with pytest.raises(ValueError, match="never written"):
        recording.value(odd.never)


def test_what_is_computed_from_memory_that_was_never_written_is_noticed():
    with Recording() as recording:
        never = torch.empty(4)
        partly = torch.empty(4)
        partly[1:].zero_()
        computed = torch.ones(4) * never
    for tensor in (partly, computed):
        with pytest.raises(ValueError, match="never written"):
            recording.value(tensor)


def test_no_initialization_sees_that_it_is_recorded():
    """torch's own does nothing to a tensor on meta, and what is made of data there is lost."""
    with Recording() as recording:
        weight = nn.init.orthogonal_(torch.empty(6, 4), gain=0.5)
        table = torch.ones(2) * torch.tensor([1.0, 2.0], device=weight.device)
    drawn = recording.value(weight)
    assert torch.allclose(drawn.T @ drawn, 0.25 * torch.eye(4), atol=1e-6)
    assert torch.equal(recording.value(table), torch.tensor([1.0, 2.0]))


# --- which layers are replaced -----------------------------------------------------------------------------------


def test_only_plain_linears_are_replaced_and_none_whose_weight_is_read():
    model = build_model(tiny("mamba"))
    assert {name.rpartition(".")[2] for name in weights_read(model)} >= {"out_proj", "dt_proj", "x_proj"}
    assert {name.rpartition(".")[2] for name in linears(model, r"\.\d+\.")} == {"in_proj"}

    class Router(nn.Linear):
        pass

    model = build_model(tiny("llama"))
    model.set_submodule("model.layers.0.mlp.up_proj", Router(64, 96, device="meta"))
    assert "model.layers.0.mlp.up_proj" not in linears(model, r"\.\d+\.")
    assert "model.layers.1.mlp.up_proj" in linears(model, r"\.\d+\.")
    assert "model.layers.0.mlp.up_proj" in matrices(model, r"\.\d+\.")  # measured, though not replaced


def test_gpt2_is_factorized_and_merges_into_plain_transformers(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    model = make_model(compose("model=hf", f"model.path={tmp_path}", "param=lowrank", "param.rank=8"))
    layers = factorized_layers(model)
    assert len(layers) == 2 * 4 and all(layer.transposed for layer in layers.values())
    assert layers["transformer.h.0.attn.c_attn"].out_features == 3 * 64
    materialize(model, 0, CPU)
    own = new_model(tiny("gpt2"), "eager").eval()
    state = {name: value for name, value in model.state_dict().items() if name in own.state_dict()}
    for name, layer in layers.items():
        state |= {f"{name}.weight": layer.dense_weight().T, f"{name}.bias": layer.B.bias}
    own.load_state_dict(state)
    rows = torch.randint(128, (2, 16))
    assert torch.allclose(model.eval()(input_ids=rows).logits, own(input_ids=rows).logits, atol=1e-5)


def test_blocks_are_not_the_experts():
    model = build_model(tiny("mixtral"))
    model.get_submodule("model.layers.0.mlp").experts_list = nn.ModuleList(nn.Identity() for _ in range(9))
    assert blocks(model) is model.get_submodule("model.layers")


# --- counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in SIZES if kind != "rwkv"])
def test_flops_are_those_that_torch_counts(kind: str):
    """Experts one by one, which torch can see; not rwkv's, which goes slowly from token to token."""
    config = tiny(kind)
    config._experts_implementation = "eager"
    model = new_model(copy.deepcopy(config), "eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(128, (1, 32)), use_cache=False)
    found = training_flops(model, 32).model
    assert found == pytest.approx(3 * counter.get_total_flops() / 32, rel=0.02)
    if kind not in ("qwen3_next", "bamba"):  # whose linear attention multiplies chunk by chunk
        assert formula(model, 32) == pytest.approx(found, rel=0.02)


def test_flops_of_long_sequences_follow_from_shorter_ones(monkeypatch: pytest.MonkeyPatch):
    model = new_model(tiny("gemma2"), "eager")
    found = training_flops(model, 1024).model
    monkeypatch.setattr("lrtrain.model.flops.LONGEST", 1024)
    assert found == pytest.approx(training_flops(model, 1024).model, rel=1e-9)
    assert found == pytest.approx(formula(model, 1024), rel=1e-9)


@pytest.mark.parametrize("kind", [pytest.param("hrm_text", marks=pytest.mark.full), "gpt2"])
def test_factorized_layers_are_counted_as_often_as_they_are_called(kind: str):
    """HRM calls its layers again and again."""
    config = tiny(kind) if kind in SIZES else AutoConfig.for_model(kind, **LLAMA_LIKE)
    param = compose("param=lowrank").param
    model = build_model(config, choice(param), param["pattern"], RankPlan(8))
    own = new_model(config, "eager")
    for name, layer in factorized_layers(model).items():
        factors = nn.Linear(layer.in_features, 8, bias=False), nn.Linear(8, layer.out_features)
        own.set_submodule(name, nn.Sequential(*factors))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        own.eval()(input_ids=torch.randint(128, (1, 32)), use_cache=False)
    assert training_flops(model, 32).model == pytest.approx(3 * counter.get_total_flops() / 32, rel=0.02)


def test_falcons_own_linear_layers_are_factorized():
    config = AutoConfig.for_model("falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
    assert len(linears(build_model(config), r"\.\d+\.")) == 2 * 4


# --- configs that transformers refuses, or reads otherwise than they look ----------------------------------------


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"hidden_size": 33}, "not a multiple of the number of attention heads"),
        ({"hidden_size": 48.5}, "expected int, got float"),
        ({"num_attention_heads": 0}, "is not a transformers model config: integer division"),
        ({"num_key_value_heads": 5}, "model.config.num_key_value_heads=5 does not divide the . attention heads"),
        ({"hiden_size": 32}, r"model.config.hiden_size \(did you mean hidden_size\?\) is not a key"),
    ],
)
def test_a_config_that_transformers_refuses_or_does_not_read_is_one_sentence(changes, message: str):
    overrides = [f"++model.config.{key}={value}" for key, value in changes.items()]
    with pytest.raises(ConfigError, match=message):
        make_model(compose(*overrides))


@pytest.mark.parametrize("key", ["rope_theta", "hiden_size", "output_router_logits"])
def test_a_key_that_the_config_of_a_folder_does_not_take_is_refused_rather_than_ignored(tmp_path, key: str):
    AutoConfig.for_model("llama", **LLAMA_LIKE).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"model.config.{key} .*is not a key of the config of model.path="):
        make_model(compose("model=hf", f"model.path={tmp_path}", "param=dense", f"+model.config.{key}=5"))
