"""What a checkpoint of other data says: which value makes it another one."""

from pathlib import Path

import pytest

from lrtrain.checkpoint.meta import CheckpointMeta, DataState, Progress
from lrtrain.config.compose import compose
from lrtrain.config.schema import as_dict
from lrtrain.errors import ConfigError
from lrtrain.run.rundir import check_compatible

LOCAL = ["data=local", "data.path=/a", "resume=auto"]


@pytest.mark.parametrize(
    "overrides,why",
    [
        (["data.seq_len=64", "data.on_error=refuse"], "data.seq_len is 256 there and 64 here"),
        (["data.path=/b"], "data.path is /a there and /b here"),
        ([], "its files or its tokenizer changed"),
    ],
)
def test_other_data_is_refused_by_what_makes_it_other(overrides: list[str], why: str):
    stored = as_dict(compose(*LOCAL))
    meta = CheckpointMeta(8, Progress(8), DataState("its data", None), stored, "", "", {}, 1)
    with pytest.raises(ConfigError) as refused:
        check_compatible(compose(*LOCAL, *overrides), "other data", Path("step-8"), meta)
    assert f"was trained on other data than data=local gives here ({why}); " in str(refused.value)
