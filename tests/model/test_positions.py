"""Sequences that are longer than the config's positions."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrtrain.config.compose import compose
from lrtrain.model.build import make_model
from lrtrain.model.positions import raise_positions

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "of each kind of layer": ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 8}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_raised_positions_leave_the_logits_of_those_that_were_there(kind: str):
    model_type, settings = KINDS[kind]
    config = AutoConfig.for_model(model_type, **SMALL, **settings, max_position_embeddings=16)
    torch.manual_seed(0)
    before = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    told = raise_positions(config, 24)
    assert told is not None and told.startswith("max_position_embeddings raised from 16 to data.seq_len=24; rotary")
    after = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    after.load_state_dict(before.state_dict())
    rows = torch.randint(0, 64, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(after(rows).logits[:, :16], before(rows[:, :16]).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type,settings", [("llama", {"rope_parameters": YARN}), ("opt", {})])
def test_positions_that_follow_from_the_largest_one_are_left(model_type: str, settings: dict[str, Any]):
    config = AutoConfig.for_model(model_type, **SMALL, **settings, max_position_embeddings=16)
    assert raise_positions(config, 24) is None and config.max_position_embeddings == 16


def test_a_run_has_as_many_positions_as_its_sequences_need():
    model = make_model(compose("model=llama_60m", "data.seq_len=3000"))
    assert model.config.max_position_embeddings == 3000
    assert make_model(compose("model=llama_60m", "data.seq_len=64")).config.max_position_embeddings == 1024
