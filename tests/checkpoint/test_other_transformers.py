"""transformers 4 reads the exports that transformers 5 reads, as the same models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from in_memory import InMemory, write_tokenizer
from launching import ROOT
from other_environment import packages, run_with
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrtrain.checkpoint.export import export_dense

pytestmark = pytest.mark.full

VERSION_4 = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
WIDE = SIZES | {"intermediate_size": 48, "max_position_embeddings": 256}
GROUPED = WIDE | {"num_key_value_heads": 2, "head_dim": 8}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LAYERS = {"full_attention": {"rope_type": "default", "rope_theta": 40000.0}}
LAYERS |= {"sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama-tied": {"model_type": "llama", **GROUPED, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "qwen3": {"model_type": "qwen3", **GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    "gemma3_text": {
        "model_type": "gemma3_text", **GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": LAYERS,
    },
    "phi": {
        "model_type": "phi", **WIDE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    },
    "gpt_neox": {
        "model_type": "gpt_neox", **WIDE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 512},
    "mixtral": {
        "model_type": "mixtral", **GROUPED, "num_local_experts": 4, "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    },
    "opt": {"model_type": "opt", **SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 256},
}  # fmt: skip
TEXTS = ["def f(x):\n    return x  # hi", " naïve  東京 12345", "a </s> b"]

READ = """
import json, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
texts, found, logits = json.loads(sys.argv[2]), {"version": transformers.__version__}, {}
for name in sys.argv[3:]:
    model, info = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(f"{sys.argv[1]}/{name}")
    generation = model.generation_config
    config = model.config
    found[name] = {
        "keys": info["missing_keys"] + info["unexpected_keys"],
        "ids": tokenizer(texts)["input_ids"],
        "pad": [tokenizer.pad_token_id, generation.pad_token_id],
        "eos": [tokenizer.eos_token_id, generation.eos_token_id],
        "rope": [getattr(config, "rope_theta", None), (getattr(config, "rope_scaling", None) or {}).get("factor")],
    }
    with torch.no_grad():
        logits[name] = model.float().eval()(input_ids=torch.arange(96)[None]).logits
torch.save(logits, f"{sys.argv[1]}/logits.pt")
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model with factors in its feed-forward layers, merged; the tokenizer is one."""
    out = tmp_path_factory.mktemp("exported")
    write_tokenizer(out / "run", [path.read_text() for path in (ROOT / "lrtrain" / "data").glob("*.py")], 512)
    for name, architecture in MODELS.items():
        folder = out / f"{name}-config"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(architecture))
        overrides = ["model=hf", f"model.path={folder}", "model.vocab_size=512", "param=lowrank", "param.rank=4"]
        run = InMemory(out / "run", overrides)
        export_dense(run, out / name, None, most=10**9)
        torch.save(run.logits(torch.arange(96)[None]), out / f"{name}.pt")
    return out


@pytest.fixture(scope="module")
def by_4(exported: Path) -> dict[str, Any]:
    """What transformers 4 finds in them."""
    printed = run_with(packages(*VERSION_4), READ, exported, json.dumps(TEXTS), *MODELS)
    found = json.loads(printed.partition("FOUND")[2])
    assert found["version"].startswith("4.57.")
    return found | {"logits": torch.load(exported / "logits.pt")}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_run_in_both_versions(exported: Path, by_4: dict[str, Any], name: str):
    expected = torch.load(exported / f"{name}.pt")
    assert expected.std() > 0.1
    with torch.no_grad():
        by_5 = AutoModelForCausalLM.from_pretrained(exported / name).eval()(input_ids=torch.arange(96)[None]).logits
    assert by_4[name]["keys"] == []
    for version, found in {5: by_5, 4: by_4["logits"][name]}.items():
        assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item()), version


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_token_ids_padding_and_ends_are_the_same_in_both_versions(exported: Path, by_4: dict[str, Any], name: str):
    tokenizer = AutoTokenizer.from_pretrained(exported / name)
    assert by_4[name]["ids"] == tokenizer(TEXTS)["input_ids"]
    assert by_4[name]["pad"] == [tokenizer.pad_token_id] * 2 != [None] * 2
    assert by_4[name]["eos"] == [tokenizer.eos_token_id] * 2 != [None] * 2


def test_rotary_settings_are_where_transformers_4_reads_them(by_4: dict[str, Any]):
    assert by_4["llama"]["rope"] == [500000.0, None]
    assert by_4["llama-tied"]["rope"] == [500000.0, 4.0]
    assert by_4["gemma3_text"]["rope"] == [40000.0, None]
