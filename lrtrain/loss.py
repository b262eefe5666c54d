"""Next-token cross-entropy, summed: whoever sums over processes and micro-batches divides once, by all tokens."""

import torch.nn.functional as F
from torch import Tensor, nn


def next_token_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Sum of the cross-entropies (nats) of each row's tokens 1..seq_len given those before.

    Args:
        rows: token ids (sequences, seq_len + 1), int64.
    """
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits  # (sequences, seq_len, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum")
