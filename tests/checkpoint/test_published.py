"""Checkpoints have the names and shapes that transformers publishes an architecture with, and are read from these."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from lrtrain.checkpoint import source_weights
from lrtrain.checkpoint.published import PublishedParts
from lrtrain.config.compose import compose
from lrtrain.config.schema import as_dict
from lrtrain.config.stored import check_stored_targets
from lrtrain.errors import ConfigError
from lrtrain.init_from.start import named_code
from lrtrain.model.structure import untied

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=3))


def gpt_neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))


@pytest.mark.parametrize(
    ("model", "name"), [(mixtral, "block_sparse_moe.experts.2.w3.weight"), (gpt_neox, "embed_out")]
)
def test_parts_made_one_at_a_time_are_those_of_save_pretrained(tmp_path: Path, model, name: str):
    trained = model()
    trained.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert any(name in key for key in expected)
    state, made = untied(trained), []
    parts = PublishedParts(trained, state, lambda name: made.append(name) or state[name].detach())
    found = {part: parts.take(part) for part in parts.shapes}
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert made == [*state]  # each once


@pytest.mark.parametrize("model", [mixtral, gpt_neox])
def test_a_run_starts_from_what_transformers_saved(tmp_path: Path, model):
    trained = model()
    trained.save_pretrained(tmp_path)
    with torch.device("meta"):
        dense = type(trained)(trained.config)
    origin = source_weights.open_origin(str(tmp_path), dense, ())
    source_weights.check_origin(str(tmp_path), origin, dense)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(origin.tensor(name), tensor), name


def test_a_run_of_an_own_class_is_started_from_only_where_the_command_names_the_class(tmp_path: Path, monkeypatch):
    class Stored:
        def __init__(self, folder: Path, trusted):
            check_stored_targets({"optim": {"_target_": "mine.Adam"}}, str(folder), trusted)
            self.model = SimpleNamespace(state_dict=dict)

    monkeypatch.setattr(source_weights, "RunWeights", Stored)
    config, dense = compose("param=lowrank"), gpt_neox()
    with pytest.raises(ConfigError, match="names optim._target_=mine.Adam, which is no class of lrtrain"):
        source_weights.open_origin(str(tmp_path), dense, named_code(config))
    config.optim["_target_"] = "mine.Adam"
    assert as_dict(config)["optim"]["_target_"] == "mine.Adam"
    source_weights.open_origin(str(tmp_path), dense, named_code(config))
