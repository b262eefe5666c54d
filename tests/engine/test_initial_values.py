"""Other architectures than Llama start the same, with the same loss, on one process and on two under each engine."""

from pathlib import Path

import pytest
import torch
from crew import together
from transformers import AutoConfig

from lrtrain import distributed
from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.config.schema import Config
from lrtrain.distributed.sharding import whole
from lrtrain.distributed.world import World
from lrtrain.model.build import make_model

ROWS = torch.randint(128, (4, 17), generator=torch.Generator().manual_seed(0))
SIZES = {
    "llama": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 128,
    },
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "vocab_size": 128},
}  # fmt: skip


def start_all(folders: list[Path], engine: list[str], out: Path) -> None:
    """Start each architecture; rank 0 writes `out`. Memory that nothing writes to is NaN."""
    world = distributed.start()
    torch.use_deterministic_algorithms(True, warn_only=True)
    base = ("model=hf", "model.vocab_size=128", "param=lowrank", "param.rank=4", "train.dtype=fp32")
    found = [started(compose(*base, f"model.path={folder}", *engine), world) for folder in folders]
    if world.main:
        torch.save(found, out)
    distributed.stop()


def started(config: Config, world: World) -> dict[str, torch.Tensor]:
    engine = choice(config.engine)(
        world=world, dtype=torch.float32, compile=False, recompute_every=0, recompute_keep="inputs"
    )
    engine.prepare(make_model(config), 0, choice(config.optim))
    values = {name: whole(p).float().clone() for name, p in engine.shards.named_parameters()}
    values |= {name: buffer.float().cpu() for name, buffer in engine.shards.named_buffers()}
    engine.begin_step(0, 1e-3, 1.0, "global")
    loss = engine.forward_backward(ROWS.view(world.size, -1, ROWS.shape[1])[world.dist_rank], 64).cpu()
    torch.distributed.all_reduce(loss)
    return {"loss": loss / 64, **values}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("configs")
    for kind, sizes in SIZES.items():
        AutoConfig.for_model(kind, **sizes).save_pretrained(folder / kind)
    return [folder / kind for kind in SIZES]


@pytest.fixture(scope="module")
def expected(folders: list[Path], tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("one")
    together(start_all, (folders, ["engine=fsdp"], folder / "found"), folder, 1)
    return torch.load(folder / "found")


@pytest.mark.full
@pytest.mark.parametrize("engine", [
    ["engine=fsdp"],
    ["engine=deepspeed", "engine.zero_stage=1"],
    ["engine=deepspeed", "engine.zero_stage=3"],
], ids=lambda e: "-".join(e))  # fmt: skip
def test_initial_values_and_losses_do_not_depend_on_processes_and_engines(
    engine: list[str], folders: list[Path], expected: list[dict[str, torch.Tensor]], tmp_path: Path
):
    together(start_all, (folders, engine, tmp_path / "found"), tmp_path)
    for kind, found, one in zip(SIZES, torch.load(tmp_path / "found"), expected, strict=True):
        assert found.keys() == one.keys()
        for name, value in found.items():
            assert value.isfinite().all(), (kind, name)
            if name == "loss":
                assert value.item() == pytest.approx(one[name].item(), abs=1e-5), kind
            else:
                assert torch.equal(value, one[name]), (kind, name)
