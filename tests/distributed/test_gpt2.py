"""Other architectures than Llama from training to plain transformers and back."""

from pathlib import Path

import pytest
import torch
from launching import TINY
from runs import run_jobs
from transformers import AutoConfig, AutoModelForCausalLM

import lrtrain
from lrtrain.checkpoint.export import export_dense
from lrtrain.checkpoint.weights import RunWeights
from lrtrain.tracking.jsonl import series

pytestmark = pytest.mark.full

GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 384, "n_positions": 64}
BASE = [*(override for override in TINY if not override.startswith("model")), "model=hf", "model.vocab_size=384"]


@pytest.mark.full
def test_gpt2_trains_factorized_and_its_export_is_plain_and_starts_another_run(cache, corpus, tmp_path: Path):
    """On two processes; the second run has full ranks and hardly learns, so that it is the first."""
    AutoConfig.for_model("gpt2", **GPT2).save_pretrained(tmp_path / "gpt2")
    base = [*BASE, f"data.path={corpus}", "spectra=off"]
    first, second, plain = tmp_path / "first", tmp_path / "second", tmp_path / "plain"
    run_jobs(
        [[*base, f"model.path={tmp_path}/gpt2", "param=lowrank", "train.steps=4", f"run.dir={first}"]], 2, tmp_path
    )
    export_dense(RunWeights(first), plain, None, 10**9)
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(plain).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, lrtrain.load(first)(input_ids=ids).logits, atol=1e-5, rtol=0
        )
    again = ["param=lowrank", "param.rank=1.0", "train.steps=1", "optim.lr=1e-9", f"run.dir={second}"]
    run_jobs([[*base, f"init_from={plain}", *again]], 2, tmp_path)
    losses = [series(run / "metrics.jsonl", "eval/loss")[1][-1] for run in (first, second)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
