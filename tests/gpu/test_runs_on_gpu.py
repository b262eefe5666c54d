"""Whole runs on one GPU, started as a user starts them."""

import gzip
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import ROOT, command
from on_gpu import QUIET, environment, largest_gap, read, run, script, simulated

TINY = ["model=llama_tiny", "param=sltrain", "train.steps=30"]
LARGE = ["model=llama_1b_aligned", "data.seq_len=1024", "train.batch_size=16", "train.micro_batch_size=16"]
SHORT = ["train.steps=12"]
SEVEN = ["model=llama_7b", "data.seq_len=2048", "train.recompute_every=1", "train.steps=6"]
METHODS = {
    "dense": ["param=dense"],
    "lowrank": ["param=lowrank"],
    "sltrain": ["param=sltrain", "param.support=block", "param.execution=triton"],
}


@pytest.fixture(scope="module")
def speeds() -> dict[str, float]:
    """Seconds of a step, by run."""
    return {}


def test_losses_follow_those_of_the_cpu(tmp_path: Path, measured):
    cpu = run(tmp_path / "cpu", *TINY, "train.dtype=fp32", cpu=True).values("train/loss")
    gpu = run(tmp_path / "gpu", *TINY, "train.dtype=fp32").values("train/loss")
    bf16 = run(tmp_path / "bf16", *TINY, "train.dtype=bf16").values("train/loss")
    gap, rough = largest_gap(cpu[:10], gpu[:10]), largest_gap(cpu, bf16)
    measured("4. ten losses in fp32 against the CPU's", gap, "≤ 1e-3", gap <= 1e-3)
    measured("4. thirty losses in bf16 against the CPU's in fp32", rough, "≤ 0.02", rough <= 0.02)


def test_the_cpu_waits_for_the_gpu_once_a_step(tmp_path: Path, measured):
    counter = "+callbacks.syncs={_target_: sync_counter.SyncCounter}"
    found = run(tmp_path / "run", *TINY, "train.log_every=30", counter).summary["syncs_per_step"]
    measured("5. syncs a step", found, "≤ 1", found <= 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_1b_model_takes_the_memory_and_time_that_were_computed(method: str, tmp_path: Path, speeds, measured):
    chosen = [*LARGE, *METHODS[method], *SHORT]
    peak, floor = simulated(*chosen)
    ran = run(tmp_path / "run", *chosen, "train.compile=false")
    speeds[method] = ran.step_seconds()
    memory, share = ran.summary["memory_gib"] / peak, ran.reserved_share()
    measured(f"6. 1b, {method}: memory ÷ simulated", memory, "0.97 to 1.03", abs(memory - 1) <= 0.03)
    measured(f"6. 1b, {method}: reserved ÷ allocated", share, "< 1.15", share < 1.15)
    measured(f"7. 1b, {method}: roofline ÷ step", floor / speeds[method], "≥ 0.5", floor / speeds[method] >= 0.5)


def test_a_lowrank_1b_model_is_faster_than_the_dense_one_and_compiled_faster_still(tmp_path: Path, speeds, measured):
    if not {"dense", "lowrank"} <= {*speeds}:
        pytest.skip("needs the runs of the test before")
    gain = speeds["dense"] / speeds["lowrank"]
    measured("7. 1b: dense ÷ lowrank, seconds", gain, "≥ 1.3", gain >= 1.3)
    compiled = run(tmp_path / "run", *LARGE, *METHODS["lowrank"], *SHORT, "train.compile=true").step_seconds()
    gain = speeds["lowrank"] / compiled
    measured("7. 1b, lowrank: eager ÷ compiled, seconds", gain, "≥ 1.25", gain >= 1.25)


def test_aligned_widths_pay(tmp_path: Path, speeds, measured):
    if "dense" not in speeds:
        pytest.skip("needs the runs of the test before")
    odd = run(tmp_path / "run", *LARGE, "model=llama_1b", *METHODS["dense"], *SHORT, "train.compile=false")
    gain = odd.step_seconds() / speeds["dense"]
    measured("8. 1b, dense: seconds with 5461 ÷ with 5504", gain, "≥ 1", gain >= 1)


@pytest.mark.parametrize(
    "what,chosen",
    [
        ("9. 7B, lowrank, AdamW", ["param=lowrank", "train.batch_size=8", "train.micro_batch_size=8"]),
        (
            "10. 7B, sltrain in blocks, adamw8bit in the backward pass",
            [
                *METHODS["sltrain"],
                "optim=adamw8bit",
                "optim.in_backward=true",
                "train.clip_by=parameter",
                "train.dtype=bf16_sr",
                "train.batch_size=2",
                "train.micro_batch_size=2",
            ],
        ),
    ],
)
def test_a_7b_model_takes_what_was_computed(what: str, chosen: list[str], tmp_path: Path, measured):
    chosen = [*SEVEN, *chosen]
    peak, floor = simulated(*chosen)
    ran = run(tmp_path / "run", *chosen, "train.compile=false")
    memory, share = ran.summary["memory_gib"] / peak, floor / ran.step_seconds()
    measured(f"{what}: memory ÷ simulated", memory, "0.97 to 1.03", abs(memory - 1) <= 0.03)
    measured(f"{what}: roofline ÷ step", share, "≥ 0.5", share >= 0.5)


def test_the_gpu_is_busy(tmp_path: Path, measured):
    chosen = ["model=llama_350m", "param=lowrank", "data.seq_len=1024", "train.batch_size=16", "train.profile=8"]
    ran = run(tmp_path / "run", *chosen, "train.micro_batch_size=16", "train.steps=10")
    (trace,) = (ran.folder / "profile").rglob("trace.json.gz")
    kernels = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    end, busy = kernels[0][0], 0.0
    for first, last in kernels:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    share = busy / (end - kernels[0][0])
    measured("11. share of a step in which the GPU is busy", share, "≥ 0.9", share >= 0.9)


def test_deterministic_runs_repeat_bit_for_bit(tmp_path: Path, measured):
    chosen = [*TINY, "param.execution=materialize", "train.deterministic=true", "train.steps=20"]
    losses = [run(tmp_path / name, *chosen).values("train/loss") for name in ("one", "two")]
    gap = largest_gap(*losses)
    measured("12. twenty losses of two deterministic runs", gap, "0", gap == 0)


def test_a_killed_run_goes_on_and_a_checkpoint_stalls_it_briefly(tmp_path: Path, measured):
    chosen = [*QUIET, "model=llama_350m", "param=lowrank", "train.batch_size=16", "train.micro_batch_size=16"]
    chosen += ["train.steps=40", "checkpoint.every=10", "resume=auto", f"run.dir={tmp_path / 'run'}"]
    started = subprocess.Popen(command(chosen, 1), cwd=ROOT, env=environment())
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000020" / "checksums.json"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert checkpoint.exists()
    subprocess.run(command(chosen, 1), cwd=ROOT, env=environment(), check=True)
    ran = read(tmp_path / "run")
    size = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints" / "step-00000040").iterdir())
    stall, allowed = min(ran.values("perf/checkpoint_seconds")), size / 10e9 + 0.1
    measured("13. steps after SIGKILL and resume", ran.summary["step"], "40", ran.summary["step"] == 40)
    measured("13. shortest stall of a checkpoint, s", stall, f"≤ {allowed:.2g}, 10 GB/s", stall <= allowed)


def test_a_run_is_measured_evaluated_exported_and_asked(tmp_path: Path, measured):
    ran = run(tmp_path / "run", *TINY, "spectra.every=10", "spectra=full")
    script("evaluate", str(ran.folder))
    script("export", str(ran.folder), "--to", "hf-dense", "--out", str(tmp_path / "dense"))
    words = len(script("generate", str(tmp_path / "dense"), "--prompt", "def ").split())
    measured("14. words of the exported model's text", words, "> 1", words > 1)
