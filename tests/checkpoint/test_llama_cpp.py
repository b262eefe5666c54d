"""llama.cpp, given an export as its converter takes it, reads the token ids of transformers and goes on alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from hard_texts import HARD_TEXTS
from in_memory import InMemory, write_tokenizer
from launching import ROOT
from other_environment import packages, run_with
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrtrain.checkpoint.export import export_dense

pytestmark = pytest.mark.full

LLAMA_CPP = ("xllamacpp==2026.10.11549", "gguf==0.19.0")
TEXTS = ["", " ", *HARD_TEXTS, (ROOT / "lrtrain" / "data" / "tokenizer.py").read_text()]
PROMPT = "def test(self):\n    return"

# Writes what llama.cpp's converter writes for a LLaMA model with a tokenizer.model, and asks llama.cpp's server.
READ = """
import json, pathlib, urllib.request
import gguf, numpy, sentencepiece, xllamacpp
from safetensors.numpy import load_file

folder = pathlib.Path(sys.argv[1])
asked = json.loads((folder / "asked.json").read_text())
config = json.loads((folder / "config.json").read_text())
writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
writer.add_block_count(config["num_hidden_layers"])
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_rope_freq_base(config["rope_theta"])
writer.add_rope_dimension_count(config["head_dim"])
writer.add_vocab_size(config["vocab_size"])

trained = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
settings = json.loads((folder / "tokenizer_config.json").read_text())
more = range(len(trained), config["vocab_size"])  # rows of the embedding that no piece has
kinds = [
    gguf.TokenType.UNKNOWN if trained.is_unknown(i) else gguf.TokenType.CONTROL if trained.is_control(i)
    else gguf.TokenType.BYTE if trained.is_byte(i) else gguf.TokenType.NORMAL
    for i in range(len(trained))
]
pieces = [trained.id_to_piece(i) for i in range(len(trained))]
for i, token in settings.get("added_tokens_decoder", {}).items():
    kinds[int(i)] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    pieces[int(i)] = token["content"]
writer.add_tokenizer_model("llama")
writer.add_tokenizer_pre("default")
writer.add_token_list([*pieces, *(f"[PAD{i}]" for i in more)])
writer.add_token_scores([*map(trained.get_score, range(len(trained))), *(-10000.0 for _ in more)])
writer.add_token_types([*kinds, *(gguf.TokenType.UNUSED for _ in more)])
gguf.SpecialVocab(folder, n_vocab=config["vocab_size"]).add_to_gguf(writer)
writer.add_add_space_prefix(settings["add_prefix_space"])

names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
for name, weight in load_file(folder / "model.safetensors").items():
    if name.endswith(("q_proj.weight", "k_proj.weight")):  # rotated in neighbouring pairs there
        weight = weight.reshape(-1, 2, config["head_dim"] // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), numpy.ascontiguousarray(weight))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

params = xllamacpp.CommonParams()
params.model.path = str(folder / "model.gguf")
params.n_ctx, params.warmup, params.n_parallel, params.port = 256, False, 1, 0
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)

def ask(path, **request):
    body = json.dumps(request).encode()
    to = urllib.request.Request(server.listening_address + path, body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(to))

ids = [ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"] for text in asked["texts"]]
texts = [ask("/detokenize", tokens=one)["content"] for one in ids]
more = ask("/completion", prompt=asked["prompt"], n_predict=asked["tokens"], temperature=0, return_tokens=True)
print("FOUND" + json.dumps({"ids": ids, "texts": texts, "more": more["tokens"]}), flush=True)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with factors, merged; its embedding has more rows than there are pieces."""
    out = tmp_path_factory.mktemp("exported")
    write_tokenizer(out / "run", [path.read_text() for path in (ROOT / "lrtrain").rglob("*.py")], 1200)
    model = ["model=llama_tiny", "model.vocab_size=1216", "model.config.num_hidden_layers=2", "param=lowrank"]
    run = InMemory(out / "run", model)
    export_dense(run, out / "dense", None, most=10**9)
    return out / "dense"


@pytest.fixture(scope="module")
def read(exported: Path) -> dict[str, Any]:
    """What llama.cpp makes of the texts and the prompt."""
    (exported / "asked.json").write_text(json.dumps({"texts": TEXTS, "prompt": PROMPT, "tokens": 24}))
    return json.loads(run_with(packages(*LLAMA_CPP), READ, exported).partition("FOUND")[2])


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_token_ids_are_those_of_transformers_and_sentencepiece(exported: Path, read: dict[str, Any], number: int):
    text, found = TEXTS[number], read["ids"][number]
    assert found == AutoTokenizer.from_pretrained(exported)(text)["input_ids"]
    assert found == sentencepiece.SentencePieceProcessor(str(exported / "tokenizer.model")).encode(text)
    assert read["texts"][number] == text.replace("▁", " ")


def test_the_likeliest_continuation_is_that_of_transformers(exported: Path, read: dict[str, Any]):
    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :]
    assert read["more"] == expected.tolist() and len({*read["more"]}) > 5
