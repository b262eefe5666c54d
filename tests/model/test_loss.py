"""The head that gives losses, against logits and torch's cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from launching import SMALL
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lrtrain.config.compose import compose
from lrtrain.model import loss
from lrtrain.model.build import make_model
from lrtrain.model.init import materialize
from lrtrain.model.loss import ends_with_head, head_loss, next_token_loss, training_loss
from lrtrain.planning.plan import kept_bytes

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
    found = head_loss(head, head, hidden, targets).view(())
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
            value = head_loss(head, head, hidden, targets).view(())
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
    assert ends_with_head(model, ROWS)
    found, expected = next_token_loss(model, ROWS), plain_loss(model, ROWS)
    exact = dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6 if exact else 1e-3, atol=0)
    ours, theirs = gradients(found, model), gradients(expected, model)
    for name in theirs:
        gap = (ours[name] - theirs[name]).float().norm() / theirs[name].float().norm().clamp_min(1e-9)
        assert gap < (1e-5 if exact else 2e-2), name


@pytest.mark.parametrize("kind,settings,fused", [
    ("llama", {}, True),
    ("qwen3", {"head_dim": 8}, True),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, True),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, True),
    ("gemma2", {"head_dim": 8, "final_logit_softcapping": 1.0}, False),
    ("gemma2", {"head_dim": 8, "final_logit_softcapping": None}, True),
    ("cohere", {"logit_scale": 0.25}, False),
    ("granite", {"logits_scaling": 3.0}, False),
])  # fmt: skip
def test_models_that_change_their_logits_keep_doing_so(kind: str, settings: dict, fused: bool):
    config = AutoConfig.for_model(kind, **WIDTHS, **settings)
    model = AutoModelForCausalLM.from_config(config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert ends_with_head(model, ROWS) == fused
    assert torch.equal(state, torch.get_rng_state())  # the look draws nothing
    model.config.attention_dropout = 0.0
    found, expected = next_token_loss(model.eval(), ROWS), plain_loss(model, ROWS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert torch.isfinite(model(input_ids=ROWS).logits).all()  # whoever wants logits has them


def test_hooks_and_a_forward_of_its_own_stay_on_the_head():
    model = make_model(compose(*SMALL, "param=dense"))
    materialize(model, 0, torch.device("cpu"))
    seen, own = [], model.lm_head.forward
    model.lm_head.register_forward_hook(lambda *args: seen.append(1))
    model.lm_head.forward = lambda x: 2 * own(x)
    expected = plain_loss(model, ROWS)
    seen.clear()
    torch.testing.assert_close(next_token_loss(model, ROWS), expected)
    assert len(seen) == 2 and vars(model.lm_head)["forward"] is not own  # once to look, once to compute


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
    loss, of_tokens, auxiliary = training_loss(model, ROWS) / tokens
    torch.testing.assert_close((loss, auxiliary), (theirs.loss, theirs.aux_loss), rtol=1e-6, atol=0)
    assert loss > of_tokens + 0.1 and torch.equal(of_tokens, next_token_loss(model, ROWS) / tokens)
    ours, expected = gradients(loss, model), gradients(theirs.loss, model)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-6)


def test_without_being_asked_for_there_is_no_auxiliary_loss():
    config = AutoConfig.for_model("mixtral", **WIDTHS, num_local_experts=4, router_aux_loss_coef=5.0)
    model = AutoModelForCausalLM.from_config(config).train()
    assert torch.equal(training_loss(model, ROWS), next_token_loss(model, ROWS)[None])
