"""A text begins as the texts did that the model was trained on, and all of the prompt is shown."""

import sys
from pathlib import Path
from typing import Any, cast

import pytest
from launching import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lrtrain.checkpoint.loading import Loaded
from lrtrain.data.tokenizer import from_sentencepiece, train_sentencepiece

sys.path.insert(0, str(ROOT / "scripts"))
import generate

WORDS = {"<s>": 0, "</s>": 1, "def": 2, "f": 3}


def words(puts_bos: bool = False, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of two words and these special tokens."""
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="f"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if puts_bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def front(tokenizer: PreTrainedTokenizerFast, run: object = None) -> list[int]:
    return generate.front_of(Loaded(cast(Any, None), tokenizer, cast(Any, run)))


def test_a_model_of_others_begins_with_what_its_tokenizer_puts_there():
    assert front(words(puts_bos=True, bos_token="<s>", eos_token="</s>")) == [WORDS["<s>"]]
    assert front(words(bos_token="<s>", eos_token="</s>")) == [WORDS["</s>"]]
    assert front(words()) == []


def test_a_run_of_ours_begins_with_eos_whatever_its_tokenizer(tmp_path: Path):
    assert front(words(puts_bos=True, bos_token="<s>", eos_token="</s>"), run="ours") == [WORDS["</s>"]]
    from_sentencepiece(train_sentencepiece(["def f(x): return 12345678"] * 9, 280)).save_pretrained(tmp_path)
    trained = AutoTokenizer.from_pretrained(tmp_path)
    assert trained.bos_token_id is not None
    assert front(trained, run="ours") == front(trained) == [trained.eos_token_id]  # its exports too


def test_all_of_the_prompt_is_shown_where_nothing_is_put_in_front(monkeypatch: pytest.MonkeyPatch, capsys):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4, bos_token_id=None, eos_token_id=None, **sizes))
    monkeypatch.setattr(generate, "load", lambda *_: Loaded(model, words(), None))
    monkeypatch.setattr(sys, "argv", ["generate.py", "any", "--prompt", "def f f", "--tokens", "1"])
    generate.main()
    assert capsys.readouterr().out.startswith("def f f ")
