"""Next-token cross-entropy, summed over tokens; the caller divides once by the tokens of all processes and
micro-batches.

With a vocabulary of 32,000 the logits are the largest tensor of a small model. For model types whose logits are a known
function of the head's output they are never stored: head, loss and gradient are computed in chunks of tokens within the
forward pass, while the engine has the head's weight gathered.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from lrtrain.errors import ConfigError
from lrtrain.model.documents import document_inputs

CHUNK = 1024
"""Tokens per chunk. Smaller chunks make matrix products slower and accumulate the weight's gradient more often."""

LogitsOf = Callable[[Any, Tensor], Tensor]
"""(config, output of the head) → logits."""


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


_PLAIN = (
    "arcee bart biogpt bitnet bloom ctrl deepseek_v3 diffllama ernie4_5 falcon falcon_mamba gemma glm glm4 gpt2 "
    "gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj hunyuan_v1_dense jamba llama mamba mistral mixtral nemotron "
    "olmo olmo2 olmo3 openai-gpt opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss "
    "smollm3 starcoder2 xglm xlnet"
)
LOGITS: dict[str, LogitsOf] = {
    **dict.fromkeys(_PLAIN.split(), lambda config, output: output),
    "cohere": lambda config, output: output * config.logit_scale,
    "granite": lambda config, output: output / config.logits_scaling,
    "granitemoe": lambda config, output: output / config.logits_scaling,
    "gemma2": lambda config, output: _capped(output, config.final_logit_softcapping),
    "gemma3_text": lambda config, output: _capped(output, config.final_logit_softcapping),
    "gemma4_text": lambda config, output: _capped(output, config.final_logit_softcapping),
    "recurrent_gemma": lambda config, output: _capped(output, config.logits_soft_cap),
}
"""By model type, for transformers' classes whose logits are this function of `head(base_model(ids))` (each is tested);
all other models compute all logits at once."""


class TokenLoss(nn.Module):
    """A causal language model of transformers with its loss as output, called by engines in training and evaluation.

    Args:
        document_end: the token that ends a document, if documents do not see each other; None if they do.
    """

    def __init__(self, model: PreTrainedModel, document_end: int | None = None):
        super().__init__()
        self.model = model
        self.document_end = document_end
        self.head = HeadLoss(model) if _is_known(model) else None

    def forward(self, rows: Tensor) -> Tensor:
        """Sum of the cross-entropies (nats) of each row's tokens 1..seq_len given those before; (1,).

        In training, a mixture of experts' auxiliary loss is added as in transformers, times its coefficient, if the
        model's config has `output_router_logits`. It is one number per forward pass; multiplied by the number of tokens
        it averages over micro-batches and processes like token losses. The output is then (3,): the sum to train on,
        the sum of token losses, and the auxiliary loss times the number of tokens.

        Args:
            rows: token ids (sequences, seq_len + 1), int64.
        """
        loss, output = self.token_loss(rows)
        if not self.training or getattr(output, "aux_loss", None) is None:
            return torch.stack([loss])  # FSDP2 warns about views
        auxiliary = rows[:, 1:].numel() * output.aux_loss
        return torch.stack([loss + _auxiliary_coefficient(self.model) * auxiliary, loss, auxiliary])

    def heads(self) -> list[nn.Module]:
        """The modules that use the head's parameters, outermost first."""
        head = self.model.get_output_embeddings()
        return [module for module in (self.head, head) if module is not None]

    def token_loss(self, rows: Tensor) -> tuple[Tensor, Any]:
        """The sum of the cross-entropies, a scalar, and the output of the model or of its body."""
        ids, targets = rows[:, :-1], rows[:, 1:].flatten()
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if self.document_end is not None:
            inputs |= document_inputs(ids, self.document_end, self.model.config._attn_implementation)
        if self.head is not None:
            output = self.model.base_model(**inputs)
            return self.head(output[0].flatten(0, 1), targets), output
        output = self.model(**inputs)
        return F.cross_entropy(output.logits.flatten(0, 1).float(), targets, reduction="sum"), output


class HeadLoss(nn.Module):
    """A model's head with losses as output: a separate module, so that an engine's hooks gather the head's parameters
    once for all chunks."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.head = cast(nn.Module, model.get_output_embeddings())
        self.config = model.config

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See `head_loss`."""
        return head_loss(self.head, self._logits, hidden, targets)

    def _logits(self, hidden: Tensor) -> Tensor:
        # Not by __call__: hooks on the head itself, such as ZeRO-3's, would gather it for each chunk.
        return LOGITS[self.config.model_type](self.config, self.head.forward(hidden))


def next_token_loss(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """The sum of the cross-entropies of a model without an engine and without an auxiliary loss; see `TokenLoss`."""
    return TokenLoss(model).token_loss(rows)[0]


def has_other_terms(model: PreTrainedModel, rows: Tensor) -> bool:
    """Whether the loss that transformers trains has terms that `TokenLoss` does not have, such as a z-loss.

    Args:
        model: in eval mode. What is not of transformers may have any loss, and is not asked for it.
        rows: token ids (sequences, tokens), int64.
    """
    if not type(model).__module__.startswith("transformers.models."):
        return False
    output = model(input_ids=rows, labels=rows, use_cache=False)
    logits = output.logits.float()
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    by_user = F.cross_entropy(logits.flatten(0, 1), rows.flatten())  # decoders that leave the shift to their users
    auxiliary = getattr(output, "aux_loss", None)
    more = 0.0 if auxiliary is None else _auxiliary_coefficient(model) * auxiliary
    return not any(torch.isclose(output.loss, one + more, rtol=1e-5) for one in (shifted, by_user))


def _is_known(model: PreTrainedModel) -> bool:
    """Whether the model's logits are a function in LOGITS, and it has no auxiliary loss."""
    own = type(model).__module__.startswith("transformers.models.")
    return own and model.config.model_type in LOGITS and not getattr(model.config, "output_router_logits", False)


def _auxiliary_coefficient(model: Any) -> float:
    """The coefficient of the auxiliary loss in transformers.

    Raises:
        ConfigError: if the model has it under none of the known names.
    """
    for owner in (model, model.config.get_text_config()):
        for key in ("router_aux_loss_coef", "aux_loss_coef"):
            if (found := getattr(owner, key, None)) is not None:
                return found
    raise ConfigError(
        f"model.config.output_router_logits=true asks for the auxiliary loss of model_type={model.config.model_type}, "
        "which has no router_aux_loss_coef; set it to false"
    )


# --- the chunks --------------------------------------------------------------------------------------------------


def head_loss(head: nn.Module, compute: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of `compute(hidden)` to `targets`, `CHUNK` tokens at a time; a scalar.

    Args:
        head: whose parameters `compute` uses.
        compute: hidden states (tokens, d) → logits (tokens, vocabulary).
        hidden: (tokens, d).
        targets: (tokens,), int64.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    return cast(Tensor, _HeadLoss.apply(compute, targets, torch.is_grad_enabled(), hidden, *parameters))


class _HeadLoss(torch.autograd.Function):
    """Computes gradients together with the losses; the backward pass scales them in place, so it can run only once.
    Softmax and all sums are at least float32."""

    @staticmethod
    def forward(ctx, compute, targets, train, hidden, *parameters):
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradients: list[Tensor] = []
        d_hidden = torch.empty_like(hidden)
        chunks = -(-len(hidden) // CHUNK)
        for x, target, dx in zip(*(t.tensor_split(chunks) for t in (hidden, targets, d_hidden)), strict=True):
            with torch.set_grad_enabled(train):
                x = x.detach().requires_grad_(train)
                logits = compute(x)
            loss, d_logits = _cross_entropy(logits.detach(), target, train)
            total += loss
            if train:
                first, *more = torch.autograd.grad(logits, (x, *parameters), d_logits)
                dx.copy_(first)
                gradients = _added(gradients, more, total.dtype)
        if train:
            ctx.gradients = [d_hidden, *(g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True))]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = ctx.gradients
        del ctx.gradients  # so that autograd does not copy them
        return None, None, None, *(gradient.mul_(grad_outputs[0]) for gradient in gradients)


def _added(sums: list[Tensor], new: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The sums plus the new terms, in place if there are sums already."""
    return [a.add_(b) for a, b in zip(sums, new, strict=True)] if sums else [b.to(dtype) for b in new]


def _cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the cross-entropies of logits (tokens, vocabulary) to targets (tokens,), and its gradient, which
    overwrites float32 logits."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    at_target = targets[:, None]
    scores.sub_(scores.amax(1, keepdim=True))  # all in place: one tensor of this size
    of_target = scores.gather(1, at_target)
    total = scores.exp_().sum(1, keepdim=True)
    loss = (total.log() - of_target).sum()
    if not with_gradient:
        return loss, None
    softmax = scores.div_(total)
    softmax.scatter_add_(1, at_target, softmax.new_full((1, 1), -1.0).expand_as(at_target))
    return loss, softmax.to(logits.dtype)
