"""Learning-rate schedules: pure functions of the step that return the factor on `optim.lr`.

`step` counts from 0, so the first update already has a learning rate above zero. `warmup` and `decay` are shares of
all steps.
"""

import math

from pydantic import NonNegativeInt, PositiveInt

from lrtrain.config.ranges import Share, ShareOfSteps

NEARLY_ZERO = 1e-6  # start of a ramp in LORO's code


def _warmup(step: int, steps: int, share: float) -> float:
    """Linear from 1/w to 1 over the first w = share·steps steps, then 1."""
    return min(1.0, (step + 1) / max(1.0, share * steps))


def constant(step: int, steps: int, warmup: ShareOfSteps) -> float:
    """Warmup, then 1."""
    return _warmup(step, steps, warmup)


def cosine(step: int, steps: int, warmup: ShareOfSteps, floor: Share) -> float:
    """Warmup, then half a cosine from 1 down to `floor` at the last step (GaLore and SLTrain: floor 0.1)."""
    start = warmup * steps
    if step < start:
        return _warmup(step, steps, warmup)
    progress = (step - start) / max(1.0, steps - 1 - start)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def cosine_restarts(
    step: int,
    steps: int,
    warmup: ShareOfSteps,
    floor: Share,
    restart_every: PositiveInt,
    restart_warmup: NonNegativeInt,
) -> float:
    """`cosine` with a linear ramp from zero over `restart_warmup` steps after each multiple of `restart_every`
    (ReLoRA).

    The ramp ends at the cosine's value at that step. Both arguments are numbers of steps.
    """
    since = step % restart_every
    if step < restart_every or since >= restart_warmup:
        return cosine(step, steps, warmup, floor)
    last = step - since + restart_warmup - 1  # of the ramp
    return (since + 1) / restart_warmup * cosine(last, steps, warmup, floor)


def wsd(step: int, steps: int, warmup: ShareOfSteps, decay: ShareOfSteps, floor: Share) -> float:
    """Warmup, constant 1, then linearly down to `floor` over the last `decay` share of the steps."""
    left = (steps - 1 - step) / max(1.0, decay * steps)
    return min(_warmup(step, steps, warmup), floor + (1 - floor) * min(1.0, left))


def loro(
    step: int,
    steps: int,
    warmup: ShareOfSteps,
    floor: Share,
    restart_every: PositiveInt,
    restart_warmup: PositiveInt,
    shift: ShareOfSteps,
) -> float:
    """LORO's schedule, as in its code: warmup from `floor`, a cosine that is 1 at step warmup + shift and does not end
    at `floor`, and a ramp from nearly zero at each restart, during the warmup too.

    Args:
        restart_every, restart_warmup: numbers of steps; the ramp ends at the schedule's value when the ramp began.
        shift: share of all steps by which cosine and restarts are delayed after the warmup.
    """
    first, back = round(warmup * steps), round(shift * steps)

    def cosine_at(at: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * (at - first) / max(1, steps - first)))

    def without_restarts(at: int) -> float:
        if step < first:
            return floor + (cosine_at(first - back) - floor) * at / first
        return floor + (1 - floor) * cosine_at(at)

    at = step if step < first else step - back
    since = at % restart_every
    if at < restart_every or since >= restart_warmup:
        return without_restarts(at)
    return NEARLY_ZERO + since / restart_warmup * (without_restarts(at - since) - NEARLY_ZERO)
