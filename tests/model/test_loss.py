"""The head that gives losses, against logits and torch's cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from launching import SMALL
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lrtrain.config.compose import compose
from lrtrain.model import loss
from lrtrain.model.build import make_model
from lrtrain.model.init import materialize
from lrtrain.model.loss import LOGITS, TokenLoss, head_loss, next_token_loss
from lrtrain.planning.kept import kept_bytes

ROWS = torch.randint(128, (3, 12), generator=torch.Generator().manual_seed(0))
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0}  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """33 tokens in five chunks that are not all as long."""
    monkeypatch.setattr(loss, "CHUNK", 8)


def plain_loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum")


def gradients(value: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(value / 7, [p for p in model.parameters() if p.requires_grad])
    return dict(zip([n for n, p in model.named_parameters() if p.requires_grad], found, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_gradients_are_cross_entropys_in_float64(bias: bool):
    head = nn.Linear(16, 50, bias=bias, dtype=torch.float64)
    hidden = torch.randn(33, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (33,))
    inputs = (hidden, *head.parameters())
    found = head_loss(head, head, hidden, targets)
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    ours, theirs = torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_the_gradient_is_the_slope():
    """Central differences along a random direction, which owe nothing to autograd."""
    head, hidden = nn.Linear(16, 50, dtype=torch.float64), torch.randn(33, 16, dtype=torch.float64, requires_grad=True)
    targets, step = torch.randint(50, (33,)), 1e-5
    inputs = (hidden, *head.parameters())
    slopes = torch.autograd.grad(head_loss(head, head, hidden, targets), inputs)
    directions = [torch.randn_like(p) for p in inputs]

    def moved(by: float) -> torch.Tensor:
        with torch.no_grad():
            for p, direction in zip(inputs, directions, strict=True):
                p.add_(direction, alpha=by)
            value = head_loss(head, head, hidden, targets)
            for p, direction in zip(inputs, directions, strict=True):
                p.sub_(direction, alpha=by)
        return value

    along = sum((s * d).sum() for s, d in zip(slopes, directions, strict=True))
    torch.testing.assert_close((moved(step) - moved(-step)) / (2 * step), along, rtol=1e-8, atol=0)


@pytest.mark.parametrize("overrides", [
    ["param=dense"],
    ["param=dense", "model.config.tie_word_embeddings=true"],
    ["param=lowrank", "param.pattern=lm_head"],
    ["param=cola", "param.pattern=lm_head|mlp"],
    ["param=sltrain", "param.pattern=lm_head", "param.execution=factored"],
    ["param=relora", "param.pattern=lm_head"],
], ids=lambda o: "-".join(o))  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_head_gives_the_losses_of_its_logits(overrides: list[str], dtype: torch.dtype):
    if dtype == torch.bfloat16 and "param=sltrain" in overrides:
        overrides = [*overrides[:-1], "param.execution=materialize"]
    model = make_model(compose(*SMALL, *overrides))
    materialize(model, 0, torch.device("cpu"))
    model.to(dtype).train()
    assert TokenLoss(model).head is not None
    found, expected = next_token_loss(model, ROWS), plain_loss(model, ROWS)
    exact = dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6 if exact else 1e-3, atol=0)
    ours, theirs = gradients(found, model), gradients(expected, model)
    for name in theirs:
        gap = (ours[name] - theirs[name]).float().norm() / theirs[name].float().norm().clamp_min(1e-9)
        assert gap < (1e-5 if exact else 2e-2), name


GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
EXPERTS_OF = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SETTINGS: dict[str, dict] = {  # by model type, besides WIDTHS; those that scale or cap do so visibly
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
             "is_decoder": True, "is_encoder_decoder": False},
    "bert": {"is_decoder": True},
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere": {"logit_scale": 0.25},
    "ctrl": GPT | {"dff": 48},
    "deepseek_v3": {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 8,
                    "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
                    "moe_intermediate_size": 16, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma2": {"final_logit_softcapping": 0.1},
    "gemma3_text": {"final_logit_softcapping": 0.1},
    "gemma4_text": {"final_logit_softcapping": 0.1, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8,
                    "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "gptj": GPT | {"rotary_dim": 4},
    "gpt2": GPT,
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "expert_layer_period": 2, "expert_layer_offset": 1,
              "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "openai-gpt": GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                   "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                   "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 0.1},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "d_head": 8},
}  # fmt: skip


def tiny(kind: str) -> PreTrainedModel:
    settings = WIDTHS | EXPERTS_OF | SETTINGS.get(kind, {})
    if kind not in ("falcon", "xlnet"):  # which do not take these
        settings = {"head_dim": 8, "max_position_embeddings": 64} | settings
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)


@pytest.mark.parametrize("kind", [*LOGITS, "bert"])
def test_the_loss_and_gradients_are_those_of_the_logits_that_transformers_computes(kind: str):
    model = tiny(kind).eval()
    assert (TokenLoss(model).head is not None) == (kind in LOGITS)
    found, expected = next_token_loss(model, ROWS), plain_loss(model, ROWS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(v, parameters, allow_unused=True) for v in (found, expected))
    scale = max(g.abs().max() for g in theirs if g is not None)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).abs().max() < 5e-6 * scale


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_class_of_ones_own_computes_its_logits_itself(kind: str):
    model = tiny(kind)

    class Own(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 3 * output.logits
            return output

    model.__class__ = Own
    torch.testing.assert_close(next_token_loss(model.eval(), ROWS), plain_loss(model, ROWS))


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    """What waits for the backward pass grows by the hidden states' gradient, not by logits."""
    tokens, vocabulary, d = 512, 1000, 16
    head = nn.Linear(d, vocabulary, bias=False)
    hidden, targets = torch.randn(tokens, d, requires_grad=True), torch.randint(vocabulary, (tokens,))
    monkeypatch.setattr(loss, "CHUNK", 64)
    sizes = []

    def compute(x):
        sizes.append(len(x))
        return head(x)

    kept = kept_bytes(lambda: head_loss(head, compute, hidden, targets))
    assert sizes == [64] * 8
    assert kept == 4 * (tokens * d + vocabulary * d)  # the two gradients
    with torch.no_grad():
        assert kept_bytes(lambda: head_loss(head, compute, hidden, targets)) == 0


EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "head_dim": 8}


@pytest.mark.parametrize("kind,settings", [
    ("mixtral", {"num_local_experts": 4, "router_aux_loss_coef": 5.0}),
    ("qwen3_moe", {"num_experts": 4, "router_aux_loss_coef": 0.3, "moe_intermediate_size": 16}),
    ("granitemoe", {"num_local_experts": 4, "router_aux_loss_coef": 2.0, "logits_scaling": 3.0}),
    ("jetmoe", {"num_local_experts": 4, "aux_loss_coef": 0.7, "kv_channels": 8}),
])  # fmt: skip
def test_auxiliary_loss_is_trained_as_transformers_adds_it(kind: str, settings: dict):
    config = AutoConfig.for_model(kind, **WIDTHS, **EXPERTS, **settings)
    model = AutoModelForCausalLM.from_config(config).train()
    targets, tokens = ROWS[:, 1:].contiguous(), ROWS[:, 1:].numel()
    theirs = model(input_ids=ROWS[:, :-1], labels=targets, shift_labels=targets, use_cache=False)
    loss, of_tokens, auxiliary = TokenLoss(model)(ROWS) / tokens
    torch.testing.assert_close((loss, auxiliary), (theirs.loss, theirs.aux_loss), rtol=1e-6, atol=0)
    assert loss > of_tokens + 0.1 and torch.equal(of_tokens, next_token_loss(model, ROWS) / tokens)
    ours, expected = gradients(loss, model), gradients(theirs.loss, model)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-6)


def test_without_being_asked_for_there_is_no_auxiliary_loss():
    config = AutoConfig.for_model("mixtral", **WIDTHS, num_local_experts=4, router_aux_loss_coef=5.0)
    model = AutoModelForCausalLM.from_config(config).train()
    assert torch.equal(TokenLoss(model)(ROWS), next_token_loss(model, ROWS)[None])
