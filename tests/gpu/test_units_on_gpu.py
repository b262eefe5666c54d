"""Layers, optimizers and spectra on a GPU against the CPU."""

import copy
import warnings

import pytest
import torch
from launching import SMALL

from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.measure.weights import weight_spectra
from lrtrain.model.build import make_model
from lrtrain.model.init import materialize
from lrtrain.model.structure import factorized_layers
from lrtrain.run.throughput import matmul_peak

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LAYERS = {
    "lowrank": ["param=lowrank"],
    "sltrain, materialize": ["param=sltrain", "param.execution=materialize"],
    "sltrain, blocks, factored": ["param=sltrain", "param.support=block", "param.block=16", "param.execution=factored"],
    "sltrain, blocks, triton": ["param=sltrain", "param.support=block", "param.block=16", "param.execution=triton"],
    **{name: [f"param={name}"] for name in ("lost", "cola", "dlr", "nested", "relora", "sst")},
}
OPTIMIZERS = "adamw adamw8bit apollo dct_adamw fira galore loro muon preconditioned_adamw spectron trion".split()
ITERATIVE = ("muon", "trion", "spectron", "dct_adamw")
"""Optimizers that orthogonalize in bfloat16 on a GPU."""


def built(*overrides: str, device: torch.device = CPU):
    config = compose("model=llama_tiny", *SMALL, *overrides)
    model = make_model(config)
    materialize(model, 0, CPU)
    for layer in factorized_layers(model).values():
        layer.execution = config.param.get("execution", layer.execution)
    return config, model.to(device)


def test_the_gpu_multiplies_as_its_kind_does(measured):
    peak = matmul_peak(GPU, torch.bfloat16) / 1e12
    name = torch.cuda.get_device_name()
    known = any(kind in name for kind in ("H100", "H200"))
    measured(f"1. bf16 product on {name}, TFLOP/s", peak, "600 to 800 on an H100 SXM", not known or peak > 400)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_give_the_cpus_gradients_without_a_sync(kind: str, measured):
    wide = ["model.config.hidden_size=64", "model.config.intermediate_size=128", "param.rank=16"]
    _, model = built(*LAYERS[kind], *wide)
    layer = next(iter(factorized_layers(model).values()))
    there = copy.deepcopy(layer).to(GPU, torch.bfloat16)
    if layer.execution == "triton":
        layer.execution = "factored"  # on the CPU
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, layer.in_features, generator=generator)
    g = torch.randn(64, layer.out_features, generator=generator)
    expected = gradients(layer, x, g)
    gradients(there, x, g)  # compiles kernels, for which the CPU waits
    inputs = x.to(GPU, torch.bfloat16), g.to(GPU, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = gradients(there, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gap = max(relative(a, b) for a, b in zip(expected, found, strict=True))
    measured(f"2. {kind}: gradients, relative", gap, "< 0.02", gap < 0.02)


def gradients(layer: torch.nn.Module, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """The output of a layer and its gradients: of x, and of the trained parameters."""
    parameters = [p for p in layer.parameters() if p.requires_grad]
    device, dtype = parameters[0].device, parameters[0].dtype
    x = x.to(device, dtype).requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *parameters], g.to(device, dtype))]


def relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The distance of two tensors ÷ the norm of the first."""
    expected, found = expected.detach().float(), found.detach().float().cpu()
    return float((expected - found).norm() / expected.norm().clamp(min=1e-8))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_an_optimizers_step_is_that_of_the_cpu(optim: str, measured):
    steps: dict[str, list[torch.Tensor]] = {}
    for device in (CPU, GPU):
        config, model = built("param=lowrank", f"optim={optim}", "param.rank=16", device=device)
        optimizer = choice(config.optim)(model)
        before = [p.detach().cpu().clone() for p in model.parameters()]
        for index, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(index)).to(device)
        optimizer.step()
        steps[device.type] = [p.detach().cpu() - b for p, b in zip(model.parameters(), before, strict=True)]
    gap = max(relative(a, b) for a, b in zip(steps["cpu"], steps["cuda"], strict=True))
    most = 0.05 if optim in ITERATIVE else 1e-4
    measured(f"3. {optim}: step, relative", gap, f"≤ {most:g}", gap <= most)


def test_singular_values_are_those_of_the_cpu(measured):
    _, model = built("param=sltrain", "model.config.hidden_size=256", "param.rank=48", "param.execution=materialize")
    here = weight_spectra(factorized_layers(model))
    there = weight_spectra(factorized_layers(copy.deepcopy(model).to(GPU)))
    gap = max(float((here[name] - there[name].cpu()).abs().max() / here[name].max()) for name in here)
    measured("14. singular values, relative", gap, "≤ 1e-5", gap <= 1e-5)


def test_warnings_tell_of_syncs_here():
    """That the debug mode, which the other checks rely on, notices one."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.ones(2, device=GPU).sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert told
