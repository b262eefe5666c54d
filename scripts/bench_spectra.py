"""Time the singular values of factorized weights: from the factors (lrtrain), and by svdvals of the product.

python scripts/bench_spectra.py                       60M, 1B and 7B shapes, three interleaved rounds
python scripts/bench_spectra.py --shapes 1b --rounds 5

Columns: seconds of a float32 `torch.linalg.svdvals` of W = BA (without the time to form W); speedups of the QR core in
float32 and of lrtrain's float64 Grams ("ours"); and the largest relative errors over the r values of all three,
relative to the QR core in float64.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain.core.streams import never_fail_to_print
from lrtrain.linalg.factors import product_singular_values

SHAPES = {  # (out, in, rank) as published for SLTrain
    "60m": [(512, 512, 128), (1376, 512, 128), (512, 1376, 128)],
    "1b": [(2048, 2048, 512), (5461, 2048, 512), (2048, 5461, 512)],
    "7b": [(4096, 4096, 1024), (11008, 4096, 1024), (4096, 11008, 1024)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(
        f"{'out×in, rank':>18}{'svdvals s':>11}{'QR fp32':>10}{'ours':>10}   errors: {'svdvals':>9}{'QR':>9}{'ours':>9}"
    )
    for size in args.shapes:
        for m, n, r in SHAPES[size]:
            print(row(m, n, r, args.rounds), flush=True)


def row(m: int, n: int, r: int, rounds: int) -> str:
    """One line of the table, for factors with a decaying spectrum as in training."""
    generator = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -2, r)
    left = torch.randn(m, r, generator=generator) * decay
    right = torch.randn(r, n, generator=generator)
    weight = left @ right
    calls: dict[str, Callable[[], Tensor]] = {
        "svdvals": lambda: torch.linalg.svdvals(weight)[:r],
        "qr": lambda: qr_core(left, right),
        "ours": lambda: product_singular_values(left, right, 1.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = perf_counter()
            call()
            seconds[name].append(perf_counter() - started)
    truth = qr_core(left.double(), right.double())
    errors = {name: float(((call().double() - truth) / truth).abs().max()) for name, call in calls.items()}
    dense = median(seconds["svdvals"])
    ratios = [dense / median(seconds[name]) for name in ("qr", "ours")]
    return (
        f"{f'{m}×{n}, {r}':>18}{dense:>11.3f}{ratios[0]:>9.1f}×{ratios[1]:>9.1f}×           "
        f"{errors['svdvals']:>9.0e}{errors['qr']:>9.0e}{errors['ours']:>9.0e}"
    )


def qr_core(left: Tensor, right: Tensor) -> Tensor:
    """σ(BA) = σ(R_B R_Aᵀ) with B = Q_B R_B and Aᵀ = Q_A R_A, in the dtype of the factors."""
    left_r, right_r = torch.linalg.qr(left, mode="r").R, torch.linalg.qr(right.T, mode="r").R
    return torch.linalg.svdvals(left_r @ right_r.T)


if __name__ == "__main__":
    never_fail_to_print()
    main()
