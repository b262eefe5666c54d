"""Step time and model FLOPs utilization of a simulated step.

Kernels, launches and collectives of a phase are taken to overlap fully, so a phase takes as long as the slowest of the
three; the CPU launches in order, and what it waits for is not added.
"""

from dataclasses import dataclass

from lrtrain.simulation.step import Simulated
from lrtrain.simulation.watch import Work

PHASES = ("start", "forward", "backward", "optimizer")
KINDS = ("matmul", "attention", "other")


@dataclass(frozen=True)
class Phase:
    """One phase of a step, or the whole of it; times in seconds."""

    peak: int
    """Most bytes at a time."""
    kinds: dict[str, Work]
    """Work of the kernels: matmul, attention, other."""
    launching: float
    """Time in which the CPU launches the kernels."""
    wire: float
    """Time of the GPU's collectives."""
    received: float
    """Bytes that they receive."""
    seconds: float

    @property
    def kernels(self) -> int:
        return sum(work.count for work in self.kinds.values())

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.kinds.values())

    @property
    def moved(self) -> float:
        return sum(work.bytes for work in self.kinds.values())


def phase(step: Simulated, name: str) -> Phase:
    """A phase of a step."""
    kinds = {kind: step.counts.work.get((name, kind), Work()) for kind in KINDS}
    sent = [work for (of, device, _), work in step.counts.collectives.items() if of == name and device == "GPU"]
    computing = sum(work.seconds for work in kinds.values())
    launching = step.gpu.launch * sum(work.count for work in kinds.values())
    wire = sum(work.seconds for work in sent)
    received = sum(work.bytes for work in sent)
    return Phase(step.peaks.get(name, 0), kinds, launching, wire, received, max(computing, launching, wire))


def whole(step: Simulated) -> Phase:
    """All phases together, one after the other."""
    phases = [phase(step, name) for name in PHASES]
    kinds = {kind: Work() for kind in KINDS}
    for one in phases:
        for kind, work in one.kinds.items():
            kinds[kind].add(work.count, work.flops, work.bytes, work.seconds)
    sums = {key: sum(getattr(one, key) for one in phases) for key in ("launching", "wire", "received", "seconds")}
    return Phase(peak=step.peak, kinds=kinds, **sums)


def mfu(step: Simulated) -> float:
    """The model's own FLOPs ÷ what the GPU's data sheet allows in the step's time."""
    return step.own_flops / (whole(step).seconds * step.gpu.flops.bf16)
