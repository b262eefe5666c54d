"""`train.deterministic`: the same bits twice, or one sentence that names what has no deterministic form."""

import pytest
import torch
from launching import SMALL

from lrtrain.config.check import check
from lrtrain.config.compose import compose
from lrtrain.errors import ConfigError
from lrtrain.run.determinism import deterministic_algorithms


def test_torch_is_held_to_deterministic_algorithms_and_let_go():
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert torch._inductor.config.deterministic  # torch.compile chooses no kernel by its time
    assert not torch.are_deterministic_algorithms_enabled() and not torch._inductor.config.deterministic
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_what_has_no_deterministic_form_is_named():
    with pytest.raises(ConfigError, match="train.deterministic=true: histc_cuda has no deterministic form"):
        with deterministic_algorithms(True):
            raise RuntimeError("histc_cuda does not have a deterministic implementation, but you set …")
    with pytest.raises(ConfigError, match="cuBLAS with CUBLAS_WORKSPACE_CONFIG="):
        with deterministic_algorithms(True):
            raise RuntimeError("Deterministic behavior was enabled with either …, but this operation uses CuBLAS")
    assert not torch.are_deterministic_algorithms_enabled()


def test_it_is_named_by_what_torch_compile_says_of_it_too():
    with pytest.raises(ConfigError, match="train.deterministic=true: histc_cuda has no deterministic form"):
        with deterministic_algorithms(True):
            raise RuntimeError("backend='inductor' raised:\nRuntimeError: histc_cuda does not have a deterministic …")


def test_torch_says_it_in_these_words():
    """Of an operation that has no deterministic form on CPUs either."""
    with pytest.raises(ConfigError, match="train.deterministic=true: put_ has no deterministic form"):
        with deterministic_algorithms(True):
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shape"):
        with deterministic_algorithms(True):
            raise RuntimeError("shape")


def test_an_execution_that_is_measured_is_refused():
    with pytest.raises(ConfigError, match="param.execution=auto is chosen by a measurement"):
        check(compose(*SMALL, "param=sltrain", "train.deterministic=true"), 1)
