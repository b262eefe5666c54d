"""Thirty faults put into lrtrain one at a time, and which of the tests notices each.

    python tests/mutations.py                 # the quick tests, those of the same package first
    python tests/mutations.py --tests all     # all tests
    python tests/mutations.py 3 17            # some of the faults

Each fault is written into a copy of the tree. The table goes to stdout; see docs/testing.md for the last one.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__")


class Fault(NamedTuple):
    """`old`, once in the file, becomes `new`."""

    what: str
    file: str
    old: str
    new: str


FAULTS = [
    Fault("dropout draws the same on every process", "run/step.py", " process {run.world.dist_rank}", ""),
    Fault("the allocator's settings are swapped", "distributed/memory.py",
          "(TRIM_THRESHOLD, 2**31", "(MMAP_MAX, 2**31"),
    Fault("SLTrain: A's gradient lacks the scale", "layers/sltrain_product.py",
          "dz = ctx.scale * (g @ left)", "dz = g @ left"),
    Fault("LOST: γ weighs the sparse part", "layers/lost.py", "[self.gamma * z, (1 - self.gamma) * chosen]",
          "[(1 - self.gamma) * z, self.gamma * chosen]"),
    Fault("ReLoRA: A is not drawn anew at a merge", "layers/relora.py",
          "        self.A.weight.copy_(self._fresh(generator))\n", ""),
    Fault("SST: enhanced gradients are the true ones", "layers/sst.py", "if not ctx.enhanced", "if ctx.enhanced"),
    Fault("a resize keeps the last rows, not the first", "engine/resize.py", "tuple(map(slice, new.shape))",
          "tuple(slice(n - m, n) for n, m in zip(old.shape, new.shape))"),
    Fault("ZeRO computes with weights from before a revision", "engine/base.py",
          "step, self.seed):\n            self._publish()", "step, self.seed):\n            pass"),
    Fault("gradients are averaged over processes", "engine/fsdp.py", "set_gradient_divide_factor(1.0)",
          "set_gradient_divide_factor(float(self.world.size))"),
    Fault("the gradient's norm is this process's", "engine/base.py", "anyone.sum(squares).sqrt()", "squares.sqrt()"),
    Fault("a skipped step steps", "engine/base.py", "        if finite:\n            self.optimizer.step()",
          "        self.optimizer.step()"),
    Fault("Adam's bias correction is off by a step", "optim/adam.py", "(1 - beta2**step) ** 0.5 / (1 - beta1**step)",
          "(1 - beta2 ** (step + 1)) ** 0.5 / (1 - beta1 ** (step + 1))"),
    Fault("weight decay on norms and embeddings", "optim/groups.py",
          'return role in MATRICES or role in ("sparse_values", "head")', "return True"),
    Fault("GaLore refreshes a step late", "optim/galore.py", "(step - 1) % self.gap ==", "step % self.gap =="),
    Fault("APOLLO without its limiter", "optim/apollo.py", "if self.max_growth is None:", "if True:"),
    Fault("Muon: a wrong coefficient", "optim/orthogonal.py", "(3.4445, -4.7750, 2.0315)", "(3.4445, -4.7550, 2.0315)"),
    Fault("cosine ends a step early", "optim/schedules.py", "max(1.0, steps - 1 - start)", "max(1.0, steps - start)"),
    Fault("every epoch has the same order", "data/order.py", "^ np.uint64(epoch))", "^ np.uint64(0))"),
    Fault("rows do not share a token, so that some are no target", "data/packing.py",
          "stream[count * self.seq_len :]", "stream[count * self.seq_len + 1 :]"),
    Fault("the last, smaller batch of an evaluation weighs more", "measure/evaluate.py", "loss=loss / tokens",
          "loss=galore / world.size * (batches + 1) / batches"),
    Fault("retention counts one checkpoint too few", "checkpoint/checkpointer.py", "counted[-self.keep]",
          "counted[-self.keep + 1]"),
    Fault("a damaged checkpoint is taken", "checkpoint/checkpointer.py",
          "        if damage is None:", "        if True:"),
    Fault("an export takes Conv1D's weights untransposed", "checkpoint/weights.py",
          "return weight.T.contiguous() if self.layers[parent].transposed else weight", "return weight"),
    Fault("all dense layers start with the same values", "model/init.py", "torch.manual_seed(integer_seed(seed, name))",
          "torch.manual_seed(seed)"),
    Fault("attention's FLOPs by hidden size", "model/flops.py",
          'getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or ', ""),
    Fault("a mask is never needed", "model/attention.py", "if not _differ(_logits(other, rows, **inputs), logits):",
          "if True:"),
    Fault("the auxiliary loss is not trained", "model/loss.py", "loss + _auxiliary_coefficient(self.model) * auxiliary",
          "loss"),
    Fault("effective rank by the square root of its entropy", "measure/metrics.py",
          "return math.exp(entropy(sigma))", "return math.exp(entropy(sigma)) ** 0.5"),
    Fault("SIGUSR1 ends a run unsaved", "run/stop.py", "signal.SIGHUP, signal.SIGUSR1, ", "signal.SIGHUP, "),
    Fault("stochastic rounding always rounds down", "optim/rounding.py", "((bits + noise) & -(2**16))",
          "(bits & -(2**16))"),
]  # fmt: skip


def noticed_by(fault: Fault, marked: list[str], workers: int) -> str | None:
    """The first test that fails with the fault, those of its own package before the rest; None if none does."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "lrtrain"
        shutil.copytree(
            ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__")
        )
        file = tree / "lrtrain" / fault.file
        text = file.read_text()
        assert text.count(fault.old) == 1, f"{fault.file} has {text.count(fault.old)} × {fault.old!r}"
        file.write_text(text.replace(fault.old, fault.new))
        room = fault.file.split("/")[0].replace("distributed", "parallel")
        near = [f"tests/{room}"] if (tree / "tests" / room).is_dir() else []
        return (failing(tree, near, marked, 1) if near else None) or failing(tree, ["tests"], marked, workers)


def failing(tree: Path, tests: list[str], marked: list[str], workers: int) -> str | None:
    """The first test that fails in a tree."""
    parallel = ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"] if workers > 1 else []
    line = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", *parallel, *marked, *tests]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    said = subprocess.run(line, cwd=tree, env=environment, capture_output=True, text=True).stdout
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    return found[1] if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="of the faults, from 1; all if none is given")
    parser.add_argument("--tests", choices=["quick", "all"], default="quick", help="which tests are to notice them")
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests")
    options = parser.parse_args()
    marked = ["-m", "not full"] if options.tests == "quick" else []
    for number, fault in enumerate(FAULTS, 1):
        if not options.numbers or number in options.numbers:
            noticed = noticed_by(fault, marked, options.workers)
            print(f"| {number} | {fault.what} (`{fault.file}`) | {f'`{noticed}`' if noticed else '—'} |", flush=True)


if __name__ == "__main__":
    main()
