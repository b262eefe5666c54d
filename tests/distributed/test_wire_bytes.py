"""Bytes on the wire against what the engines' algorithms have to move."""

from pathlib import Path

import pytest
from crew import script, together
from launching import ROOT, SMALL

from lrtrain.config.compose import compose
from lrtrain.model.build import make_model
from lrtrain.model.counts import parameter_count

pytestmark = pytest.mark.full


def test_a_step_moves_what_the_formulas_say_and_less_with_factors(tmp_path: Path):
    """Two processes: a gather or a scatter brings each half of the parameters, a sum for both brings them once."""
    overrides = [*SMALL, "model.vocab_size=1024"]
    engines, methods = ["fsdp", "ZeRO-1", "ZeRO-2", "ZeRO-3"], ["dense", "lowrank"]
    arguments = ["--model", "llama_tiny", "--methods", *methods, "--engines", *engines, "--overrides", *overrides]
    together(script, (ROOT / "scripts" / "wire_bytes.py", arguments), tmp_path)
    said = (tmp_path / "0.txt").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in said if line.startswith("|")][2:]
    found = {row[0]: [float(value) for value in row[1:]] for row in rows}
    for i, method in enumerate(methods):
        model = make_model(compose(*overrides, f"param={method}"))
        everything = 4 * parameter_count(model) / 2**20
        ends = 2 * 4 * parameter_count(model.get_output_embeddings()) / 2**20  # gathered once: embedding and head
        assert found["fsdp"][i] == pytest.approx(1.5 * everything - ends / 2, rel=0.02)
        assert found["ZeRO-1"][i] == pytest.approx(1.5 * everything, rel=0.02)  # gradients for both, then parameters
        assert found["ZeRO-2"][i] == pytest.approx(1.5 * everything, rel=0.02)
        assert found["ZeRO-3"][i] == pytest.approx(everything, rel=0.02)  # so small a model is gathered once
    assert all(factors < dense for dense, factors in found.values())
