"""Documents in one row, with a mask between them, against each document alone."""

import pytest
import torch
import torch.nn.functional as F
from launching import SMALL
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoConfig, PreTrainedModel

from lrtrain.config.compose import compose
from lrtrain.errors import ConfigError
from lrtrain.model.attention import SEPARATE, separate_attention
from lrtrain.model.build import build_model, make_model
from lrtrain.model.documents import DOCUMENTS, block_mask, document_mask, positions
from lrtrain.model.init import materialize
from lrtrain.model.loss import TokenLoss

END = 1
LENGTHS = (7, 1, 12, 5)
"""Tokens of each document, END included; the last one is cut off by the end of the row."""
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0, "head_dim": 8}  # fmt: skip
WINDOWS = {"mistral": {"sliding_window": 4}, "gemma3_text": {"sliding_window": 4}}


def row_of_documents() -> Tensor:
    """(1, sum of LENGTHS + 1)"""
    row = torch.randint(2, 128, (1, sum(LENGTHS) + 1), generator=torch.Generator().manual_seed(0))
    row[0, torch.tensor(LENGTHS[:-1]).cumsum(0) - 1] = END
    return row


def small(kind: str, **settings: object) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **WIDTHS | WINDOWS.get(kind, {}) | settings)
    model = build_model(config)
    materialize(model, 0, torch.device("cpu"))
    model.set_attn_implementation(separate_attention(config))
    return model.double().eval()  # without dropout


def losses_of_each_alone(model: PreTrainedModel, row: Tensor) -> Tensor:
    """The sum over documents of the losses of their tokens and of the token after the end."""
    found, first = [], 0
    for length in LENGTHS:
        document = row[:, first : first + length + 1]
        logits = model(input_ids=document[:, :-1], use_cache=False).logits
        found.append(F.cross_entropy(logits[0], document[0, 1:], reduction="sum"))
        first += length
    return torch.stack(found).sum()


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "qwen3", "mistral", "gemma3_text"])
def test_losses_and_gradients_are_those_of_each_document_alone(kind: str):
    model, row = small(kind), row_of_documents()
    found, expected = TokenLoss(model, END)(row)[0], losses_of_each_alone(model, row)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # masks of transformers are float32
    assert not torch.isclose(TokenLoss(model)(row)[0], expected, rtol=1e-5)  # without the mask
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_models_that_mix_documents_are_refused(kind: str):
    with pytest.raises(ConfigError, match=rf"data.document_mask=true: .*{kind}.* set data.document_mask=false"):
        separate_attention(AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=2, vocab_size=128))


def test_the_block_mask_is_the_dense_mask():
    begins = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    begins[:, 0] = True
    document = begins.cumsum(1)
    dense = create_mask(block_mask(document).mask_mod, 3, 1, 40, 40, device="cpu")
    assert torch.equal(dense, document_mask(begins))


def test_positions_restart_in_each_row_of_its_own():
    begins = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert positions(begins).tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]


def test_the_option_reaches_the_model():
    model = make_model(compose(*SMALL, "data.document_mask=true"))
    assert model.config._attn_implementation == DOCUMENTS == SEPARATE[0]
