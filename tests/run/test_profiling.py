"""What a profile leaves behind."""

import gzip
import json

from lrtrain.config.compose import compose
from lrtrain.run.loop import pretrain
from lrtrain.run.profiling import profiled


def test_a_run_leaves_a_trace_and_the_dearest_operators_of_the_step_asked_for(tiny, tmp_path, monkeypatch):
    steps = []

    def noted(folder):
        steps.append(folder)
        return profiled(folder)

    monkeypatch.setattr("lrtrain.run.callbacks.profile.profiled", noted)
    monkeypatch.setattr("lrtrain.analysis.plots.plot_run", lambda run: run / "no picture")
    pretrain(compose(*tiny, "train.steps=2", "train.profile=2", f"run.dir={tmp_path}/run"))
    folder = tmp_path / "run" / "profile"
    assert steps == [folder]
    events = json.loads(gzip.open(folder / "trace.json.gz").read())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "cpu_op"]
    assert "aten::mm" in names and "aten::_fused_adamw_" in names  # backward pass and update are in it
    table = (folder / "top.txt").read_text().splitlines()
    assert sum("aten::" in line or "Backward" in line or "Loss" in line for line in table) in range(5, 11)
