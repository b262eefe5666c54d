"""Runs the Triton kernels without a GPU, as a script: Triton chooses once per process whether it interprets.

`python kernel_cases.py interpret` compares them with the batched products on a CPU (TRITON_INTERPRET=1);
`python kernel_cases.py 80 90 100` compiles them for these architectures. Prints one JSON object.
"""

import json
import os
import sys

import torch
from torch import Tensor

SHAPES = {  # tokens, out, in, block, blocks in a block row
    "fewer tokens than a tile": (7, 64, 96, 16, 2),
    "a rest of tokens": (130, 96, 64, 32, 2),
    "one token": (1, 64, 128, 64, 1),
    "several chunks of tokens and groups of columns": (70, 32, 160, 16, 9),
    "large blocks": (3, 128, 384, 128, 2),
    "block columns without blocks": (5, 32, 256, 16, 1),
    "no blocks": (5, 32, 32, 16, 0),
    "every block": (9, 32, 64, 16, 4),
}
BYTES = 99 * 1024
"""Shared memory of one program on the smallest GPUs since Ampere."""


def interpreted(name: str, seed: int) -> dict[str, float]:
    """The largest error of each kernel relative to the largest entry."""
    from lrtrain.layers import block_kernels as kernels
    from lrtrain.layers import sparse_support as batched
    from lrtrain.layers.block_products import transposed_lists

    kernels.CHUNK = 32
    tokens, outs, ins, b, count = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    col = batched.draw_rows(outs // b, ins // b, count, generator).to(torch.uint16)
    values, x, g = (torch.randn(n, generator=generator) for n in (outs * b * count, tokens * ins, tokens * outs))
    x, g = x.view(tokens, ins), g.view(outs, tokens).T  # g is not contiguous

    def error(found: Tensor, right: Tensor) -> float:
        if not right.numel():
            return float(found.numel())
        return float((found - right).abs().max() / right.abs().max())

    y, dx, expected = torch.stack([g, g])[0], x.clone(), torch.stack([g, g])[0]
    kernels.add(y, values, col, b, x)
    kernels.add_transposed(dx, values, col, b, transposed_lists(col, ins // b), g)
    return {
        "add": error(y, batched.block_add_(expected, values, col, b, x)),
        "add_transposed": error(dx, batched.block_add_transposed_(x.clone(), values, col, b, g)),
        "sampled": error(kernels.sampled(g, x, col, b), batched.block_sampled(g, x, col, b)),
    }


def compiled(architecture: int, dtype: torch.dtype, block: int) -> dict[str, dict[str, int]]:
    """Bytes of the binary and of shared memory, wide asynchronous loads and spills of each kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lrtrain.layers import block_kernels as kernels

    pointers = {"col": "*u16", "starts": "*i32", "entries": "*i32", "partial_sums": "*fp32"}
    pointers |= dict.fromkeys(("y", "values", "x", "g"), "*bf16" if dtype == torch.bfloat16 else "*fp32")
    found = {}
    for kernel in (kernels._add, kernels._add_transposed, kernels._sampled):
        constants = {"B": block, "PRECISION": "ieee", "TILE": kernels.tile_of(dtype, block)}
        if kernel is kernels._sampled:
            constants |= {"TILE": kernels.sampled_tile(dtype), "WIDTH": max(kernels.WIDTH, block)}
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in (*pointers, "outs", "ins")
        }
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": 4, "num_stages": kernels.stages_of(dtype, block)}
        made = triton.compile(source, GPUTarget("cuda", architecture, 32), options=options)
        ptx = made.asm["ptx"]
        found[kernel.__name__] = {
            "binary": len(made.asm["cubin"]),
            "shared": made.metadata.shared,
            "ahead": ptx.count("cp.async.c"),
            "spills": ptx.count(".local"),
        }
    return found


def main(arguments: list[str]) -> dict[str, dict]:
    if arguments == ["interpret"]:
        return {f"{name}, seed {seed}": interpreted(name, seed) for name in SHAPES for seed in range(3)}
    cases = [(torch.bfloat16, 16), (torch.bfloat16, 32), (torch.bfloat16, 64), (torch.bfloat16, 128)]
    cases += [(torch.float32, 16), (torch.float32, 32)]
    return {f"sm_{a}, {dtype}, {b}": compiled(a, dtype, b) for a in map(int, arguments) for dtype, b in cases}


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = str(int(sys.argv[1:] == ["interpret"]))
    print(json.dumps(main(sys.argv[1:])))
