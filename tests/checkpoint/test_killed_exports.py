"""An export that is killed at any moment leaves nothing that loads, and nothing that the next one mixes with."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_memory import InMemory, write_tokenizer
from launching import ROOT, SMALL

import lrtrain
from lrtrain.checkpoint import safetensors_files
from lrtrain.checkpoint.export import export_dense, export_factorized
from lrtrain.errors import ConfigError

pytestmark = pytest.mark.full

FORMS = {"dense": export_dense, "factorized": export_factorized}
IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> InMemory:
    folder = tmp_path_factory.mktemp("run")
    write_tokenizer(folder, [path.read_text() for path in (ROOT / "lrtrain" / "data").glob("*.py")], 512)
    layers = ["model.config.num_hidden_layers=2", "param=sltrain"]
    return InMemory(folder, ["model=llama_tiny", *SMALL, "model.vocab_size=512", *layers])


def killed(run: InMemory, export: Callable[..., None], out: Path, after: int) -> None:
    """Export in a process of its own, which is killed when it writes the tensor of this number."""
    process = os.fork()
    if not process:
        write, number = safetensors_files.write, iter(range(1000))

        def until_killed(folder: Path, tensors, produce, most: int) -> None:
            def produced(name: str) -> torch.Tensor:
                if next(number) == after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return produce(name)

            write(folder, tensors, produced, most)

        safetensors_files.write = until_killed
        try:
            export(run, out, None, most=20_000)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("after", [0, 3, 17])
def test_what_a_killed_export_leaves_does_not_load_and_is_gone_after_the_next(
    run: InMemory, tmp_path: Path, form: str, after: int
):
    out = tmp_path / "out"
    killed(run, FORMS[form], out, after)
    assert not out.exists()
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(left) == 1
    for folder in (out, *left):
        with pytest.raises(ConfigError):
            lrtrain.load(folder)
    other = next(other for other in FORMS if other != form)
    FORMS[other](run, out, None, most=10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with torch.no_grad():
        found = lrtrain.load(out)(input_ids=IDS).logits
    assert torch.allclose(found, run.logits(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_parameter_that_is_not_finite_is_named_and_nothing_is_written(run: InMemory, tmp_path: Path, form: str):
    weight = run.trained.get_submodule("model.norm").weight
    with torch.no_grad():
        kept = weight[3].clone()
        weight[3] = float("nan")
    with pytest.raises(ConfigError, match="NaN or infinite values in model.norm.weight"):
        FORMS[form](run, tmp_path / "out", None, most=10**9)
    with torch.no_grad():
        weight[3] = kept
    assert not list(tmp_path.iterdir())
