"""What a run prints at its start and its end."""

import re
from collections import Counter, defaultdict
from typing import Any

from torch import nn

from lrtrain.measure.evaluate import perplexity
from lrtrain.model.counts import (
    above_break_even,
    dense_parameter_count,
    factorization_table,
    parameter_count,
    trainable_count,
    unaligned,
)
from lrtrain.model.structure import factorized_layers, weights_read
from lrtrain.optim.groups import parameter_roles

LOSS_AT_SHARE = "eval_loss_at_rank_share_"


def print_factorization(model: nn.Module) -> None:
    """Print the factorized layers, how they are executed, and the model's size."""
    for kind, layers, shape, size in factorization_table(model):
        print(f"  {kind:<12} {layers:>3} × ({shape}): {size:,} parameters")
    if dense := dense_matrices(model):
        print(f"  dense in the blocks: {', '.join(dense)}")
    if chosen := Counter(layer.execution for layer in factorized_layers(model).values() if layer.execution):
        print(f"  execution: {', '.join(f'{name} × {count}' for name, count in chosen.items())}")
    if factorized_layers(model) and (read := weights_read(model)):
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in read}))
        print(f"  left dense, since the model's code reads their weights: {kinds} ({len(read)} layers)")
    if wasteful := above_break_even(model):
        print(f"  above break-even, no fewer trained than dense: {', '.join(wasteful[:4])} … ({len(wasteful)} layers)")
    if raised := getattr(model, "raised", None):
        print(f"  {raised}")
    ours, dense = parameter_count(model), dense_parameter_count(model)
    trained = trainable_count(model)
    frozen = f", {trained:,} of them trained" if trained < ours else ""
    print(f"  {ours:,} parameters{frozen}, {ours / dense:.0%} of the dense model's {dense:,}", flush=True)


def print_unaligned(model: nn.Module) -> None:
    """Print the widths and ranks that tensor cores compute slowly, if there are any."""
    if found := unaligned(model):
        print(f"  no multiples of 8, which bf16 products on tensor cores are slow with: {', '.join(map(str, found))}")


def dense_matrices(model: nn.Module) -> list[str]:
    """What stays dense of the blocks of a factorized model, by kind."""
    if not factorized_layers(model):
        return []
    parameters, kinds = dict(model.named_parameters()), defaultdict(list)
    for name, role in parameter_roles(model).items():
        if role == "matrix":
            kinds[re.split(r"\.\d+\.", name)[-1]].append(parameters[name].numel())
    return [f"{kind} {len(sizes)} × {sizes[0]:,}" for kind, sizes in kinds.items()]


def summary_rows(summary: dict[str, Any]) -> dict[str, str]:
    """The rows of the printed summary."""
    ours, dense, trained = (summary[f"parameters{kind}"] for kind in ("", "_dense", "_trainable"))
    frozen = f", {trained:,} of them trained" if trained < ours else ""
    rows = {
        "run": summary["run"],
        "steps": f"{summary['step']:,} ({summary['tokens']:,} tokens, {summary['skipped']} skipped)",
        "parameters": f"{ours:,} ({ours / dense:.0%} of dense {dense:,}{frozen})",
        "memory": f"{summary['memory_gib']:.2f} GiB per process, peak",
        "optimizer state": f"{summary['optimizer_bytes'] / 2**20:,.1f} MiB, over all processes",
    }
    if summary.get("eval_perplexity") is not None:
        rows["eval perplexity"] = f"{summary['eval_perplexity']:.2f} (loss {summary['eval_loss']:.4f})"
    if summary["tokens_per_second"] is not None:
        rows["tokens/s"] = f"{summary['tokens_per_second']:,.0f}"
    if summary.get("effective_rank") is not None:
        rows["effective rank"] = f"{summary['effective_rank']:.1f} (mean over matrices)"
    for share in sorted(key.rpartition("_")[2] for key in summary if key.startswith(LOSS_AT_SHARE)):
        loss, parameters = summary[LOSS_AT_SHARE + share], summary[f"parameters_at_rank_share_{share}"]
        rows[f"at {float(share):.4g} of its rank"] = (
            f"{parameters:,} parameters, loss {loss:.4f}, perplexity {perplexity(loss):.2f}"
        )
    return rows
