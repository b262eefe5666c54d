"""A model that trains in a second, and the command line that starts it on real processes."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A model for tests that need no run.
SMALL = (
    "model.vocab_size=128",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_attention_heads=4",
    "param.rank=4",
)

# A run that takes a second.
TINY = [
    "model=llama_tiny",
    "model.vocab_size=384",
    "model.config.hidden_size=48",
    "model.config.intermediate_size=96",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "data=local",
    "data.seq_len=32",
    "data.validation_fraction=0.1",
    "param.rank=8",
    "train.batch_size=8",
    "train.micro_batch_size=4",
    "train.log_every=1",
    "eval.every=0",
    "eval.sequences=16",
    "checkpoint.every=0",
    "spectra.every=0",
    "tracking=none",
]

# What every optimizer is given.
OPTIM = {
    "lr": 1e-2,
    "other_lr": None,
    "lr_ratio": 1.0,
    "betas": [0.9, 0.99],
    "eps": 1e-8,
    "eps_convention": "corrected",
    "weight_decay": 0.0,
    "decay": "matrices",
    "in_backward": False,
    "seed": 0,
}


def command(overrides: list[str], processes: int) -> list[str]:
    """The user's command line."""
    script = str(ROOT / "launch" / "pretrain.py")
    if processes == 1:
        return [sys.executable, script, *overrides]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*torchrun, script, *overrides]
