"""Learning-rate schedules: pure functions of the step, giving the factor on `optim.lr`.

`step` counts from 0, so the first update already has a learning rate above zero. `warmup` and `decay` are shares of
all steps.
"""

import math


def _warmup(step: int, steps: int, share: float) -> float:
    """Linear from 1/w to 1 over the first w = share·steps steps, then 1."""
    return min(1.0, (step + 1) / max(1.0, share * steps))


def constant(step: int, steps: int, warmup: float) -> float:
    """Warmup, then 1."""
    return _warmup(step, steps, warmup)


def cosine(step: int, steps: int, warmup: float, floor: float) -> float:
    """Warmup, then half a cosine from 1 down to `floor` at the last step (GaLore's and SLTrain's: floor 0.1)."""
    start = warmup * steps
    if step < start:
        return _warmup(step, steps, warmup)
    progress = (step - start) / max(1.0, steps - 1 - start)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def cosine_restarts(
    step: int, steps: int, warmup: float, floor: float, restart_every: int, restart_warmup: int
) -> float:
    """`cosine`, left for a linear ramp over the first `restart_warmup` steps after each multiple of `restart_every`.

    The ramp ends where the cosine is at that step (ReLoRA's). Both are numbers of steps.
    """
    since = step % restart_every
    if step < restart_every or since >= restart_warmup:
        return cosine(step, steps, warmup, floor)
    last = step - since + restart_warmup - 1  # of the ramp
    return (since + 1) / restart_warmup * cosine(last, steps, warmup, floor)


def wsd(step: int, steps: int, warmup: float, decay: float, floor: float) -> float:
    """Warmup, stable at 1, then linearly down to `floor` over the last `decay` share of the steps."""
    left = (steps - 1 - step) / max(1.0, decay * steps)
    return min(_warmup(step, steps, warmup), floor + (1 - floor) * min(1.0, left))
