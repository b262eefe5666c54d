"""Documents packed into one row that do not see each other: restarting positions, and the attention mask."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

DOCUMENTS = "lrtrain_documents"
"""Attention with the mask of `document_mask`: FlexAttention for a block mask, else torch's fused attention."""


def document_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any):
    """An attention function of transformers; see its AttentionInterface."""
    attend: Any = flex_attention_forward if isinstance(attention_mask, BlockMask) else sdpa_attention_forward
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(DOCUMENTS, document_attention)  # pyright: ignore[reportArgumentType]


def document_inputs(ids: Tensor, end: int, attention: str | None) -> dict[str, Any]:
    """The further inputs of transformers' forward for rows whose documents do not see each other.

    For attentions other than `DOCUMENTS`, transformers builds its masks from the positions, which waits for the GPU.

    Args:
        ids: (rows, tokens). A document includes its last token, which is `end`; a row may begin and end within one.
        attention: name of the attention implementation.
    """
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, :-1] == end
    inputs: dict[str, Any] = {"position_ids": positions(begins)}
    if attention == DOCUMENTS:
        inputs["attention_mask"] = document_mask(begins)
    return inputs


def positions(begins: Tensor) -> Tensor:
    """The position of each token in its document (rows, tokens), from where documents begin (rows, tokens)."""
    index = torch.arange(begins.shape[1], device=begins.device).expand_as(begins)
    return index - torch.where(begins, index, 0).cummax(1).values


def document_mask(begins: Tensor) -> BlockMask | Tensor:
    """The mask for attention to earlier tokens of the same document: a block mask on CUDA, else boolean
    (rows, 1, tokens, tokens).

    Args:
        begins: whether a token is its document's first; (rows, tokens).
    """
    document = begins.cumsum(1)
    rows, tokens = document.shape
    if document.device.type == "cuda":
        return block_mask(document)
    earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=document.device).tril()
    return (earlier & (document[:, :, None] == document[:, None, :]))[:, None]


def block_mask(document: Tensor) -> BlockMask:
    """The same mask for FlexAttention, from each token's document (rows, tokens)."""

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[row, query] == document[row, key])

    rows, tokens = document.shape
    return create_block_mask(allowed, rows, None, tokens, tokens, device=document.device)
