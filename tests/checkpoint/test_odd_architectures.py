"""Models that transformers would change when it loads or evaluates them keep their logits through export and load."""

from pathlib import Path

import pytest
import torch
from in_memory import InMemory, write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import lrtrain
from lrtrain.checkpoint.export import export_dense, export_factorized
from lrtrain.checkpoint.factorized_folder import config_with
from lrtrain.errors import ConfigError
from lrtrain.model.architecture import architecture

LLAMA_LIKE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
    "max_position_embeddings": 64,
}  # fmt: skip
ODD = {
    "roberta": LLAMA_LIKE | {"is_decoder": True},  # counts positions from the id of padding
    "youtu": LLAMA_LIKE | {"num_key_value_heads": 4,
                           "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                           "v_head_dim": 8},  # sets the embedding of padding to zero as it is loaded
    "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 300,
              "rescale_prenorm_residual": True},  # scales its weights as it is loaded
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
               "alibi": True},  # chooses its attention as it is built
    "bamba": LLAMA_LIKE | {"num_key_value_heads": 2,
                           "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_n_groups": 1,
                           "mamba_chunk_size": 16, "attn_layer_indices": [1]},  # has an infinite number in its config
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 300,
             "rescale_every": 2},  # scales its weights as it is evaluated
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    write_tokenizer(folder, ["some words and some more words"] * 50, 280)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("kind", ODD)
def test_exports_of_an_odd_architecture_have_the_logits_of_the_run(folder: Path, tmp_path: Path, kind: str):
    AutoConfig.for_model(kind, **ODD[kind]).save_pretrained(tmp_path / "model")
    run = InMemory(
        folder, ["model=hf", f"model.path={tmp_path}/model", "model.vocab_size=280", "param=lowrank", "param.rank=4"]
    )
    export_dense(run, tmp_path / "dense", None, 10**9)
    export_factorized(run, tmp_path / "factorized", None, 10**9)
    ids = torch.randint(3, 280, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 3], ids[:, 5] = 0, 1  # what other configs or tokenizers may call padding
    expected = run.logits(ids)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", attn_implementation="eager").eval()
    loaded = [lrtrain.load(str(tmp_path / form)) for form in ("dense", "factorized")]
    for model in (plain, *loaded):
        for _ in range(2):  # an evaluation changes nothing
            with torch.no_grad():
                found = model(input_ids=ids, use_cache=False).logits
            assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    for i, model in enumerate(loaded):
        model.save_pretrained(tmp_path / f"again-{i}")
        with torch.no_grad():
            again = lrtrain.load(str(tmp_path / f"again-{i}"))(input_ids=ids, use_cache=False).logits
        assert (again - expected).abs().max() < 2e-5 * expected.abs().max()


def test_the_merged_weights_of_a_conv1d_are_stored_as_it_stores_them(folder: Path, tmp_path: Path):
    AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=4, n_positions=64, vocab_size=280).save_pretrained(
        tmp_path
    )
    run = InMemory(
        folder, ["model=hf", f"model.path={tmp_path}", "model.vocab_size=280", "param=lowrank", "param.rank=4"]
    )
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"):  # (32, 96) and (32, 32)
        merged = x @ run.dense(f"{name}.weight") + run.dense(f"{name}.bias")
        torch.testing.assert_close(merged, run.trained.get_submodule(name)(x), rtol=1e-5, atol=1e-5)


def test_infinite_numbers_of_a_config_are_numbers_in_its_file():
    config = AutoConfig.for_model("bamba")
    written = config_with(config, {})
    assert written["time_step_limit"] == [0.0, float("inf")]
    assert architecture(None, written).time_step_limit[1] == float("inf")


@pytest.mark.full
def test_an_architecture_that_publishes_several_tensors_as_one_is_refused(folder: Path, tmp_path: Path):
    sizes = {key: LLAMA_LIKE[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
    AutoConfig.for_model("hrm_text", **sizes).save_pretrained(tmp_path / "model")
    run = InMemory(folder, ["model=hf", f"model.path={tmp_path}/model", "model.vocab_size=280", "param=dense"])
    with pytest.raises(ConfigError, match="model_type=hrm_text publishes .* as one tensor .*hf-dense cannot write"):
        export_dense(run, tmp_path / "dense", None, 10**9)
    assert not (tmp_path / "dense").exists()
