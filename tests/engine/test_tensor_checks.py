"""What tensor parallelism refuses, and what travels according to its formula."""

import pytest
from launching import SMALL

from lrtrain.config.check import check
from lrtrain.config.compose import compose
from lrtrain.engine.tensor import latent_width
from lrtrain.errors import ConfigError
from lrtrain.model.build import make_model
from lrtrain.model.structure import blocks

SPLIT = [*SMALL, "data.seq_len=16", "train.batch_size=16", "train.micro_batch_size=1", "engine.tensor=2"]


@pytest.mark.parametrize(
    "overrides,sentence",
    [
        (["engine.tensor=3"], "engine.tensor=3 does not divide the 4 processes"),
        (["data.seq_len=15"], "engine.tensor=2 does not divide data.seq_len=15"),
        (["param=lowrank", "optim=muon"], "optim=muon needs whole rows .* use optim=adamw"),
        (["train.dtype=bf16_sr"], "train.dtype=bf16_sr is not supported with engine.tensor=2"),
        (["train.compile=true"], "train.compile=true is not supported with engine.tensor=2"),
        (["data.document_mask=true"], "data.document_mask=true is not supported with engine.tensor=2"),
        (["spectra=full"], "spectra.hidden=16 is not supported with engine.tensor=2"),
    ],
)
def test_a_run_that_cannot_be_split_is_refused(overrides: list[str], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        check(compose(*SPLIT, *overrides), 4)


@pytest.mark.parametrize(
    "overrides,sentence",
    [
        (["param=sltrain"], "param=sltrain cannot be split over engine.tensor=2 processes"),
        (["param=sst"], "param=sst cannot be split over engine.tensor=2 processes"),
        (["param=relora"], "param=relora cannot be split over engine.tensor=2 processes"),
        (["model=opt_125m", "param=lowrank"], "model_type=llama, not opt"),
        (["param=lowrank", "engine.tensor=8"], "engine.tensor=8 does not divide model.config.num_attention_heads=4"),
        (
            ["param=lowrank", "+model.config.num_key_value_heads=1"],
            "engine.tensor=2 does not divide model.config.num_key_value_heads=1",
        ),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(overrides: list[str], sentence: str):
    base = [] if "model=opt_125m" in overrides else SMALL
    with pytest.raises(ConfigError, match=sentence):
        make_model(compose(*base, "engine.tensor=2", *overrides))


def test_latents_of_seven_ranks_travel_and_four_widths_of_a_dense_model():
    """The count for BOOST's setting, and Megatron's with sequence parallelism."""
    lowrank, dense, lost = (
        blocks(make_model(compose(*SMALL, *param)))[0]
        for param in (["param=lowrank"], ["param=dense", "param.rank=null"], ["param=lost", "param.density=0.1"])
    )
    assert latent_width(lowrank) == 7 * 4
    assert latent_width(dense) == 4 * 32
    assert latent_width(lost) == 7 * 4 + 6 * 3 + 4  # the columns that it reads: a tenth of 32, and of 48
