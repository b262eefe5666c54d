"""What is done to blocks whichever engine runs them."""

import pytest
import torch
from launching import SMALL, TINY
from torch._dynamo.utils import counters

from lrtrain.config.compose import compose
from lrtrain.engine.blocks import keeping_latents, prepare_blocks
from lrtrain.model.build import make_model
from lrtrain.model.init import materialize
from lrtrain.model.loss import next_token_loss

# As compiled in test_world_sizes.py, so that no kernel is compiled twice.
ROWS = torch.randint(384, (2, 33), generator=torch.Generator().manual_seed(0))
COMPILED = {
    "own-backward": (["param=sltrain", "param.execution=factored"], 2, "inputs"),
    "kept-bottleneck": (["param=cola"], 1, "bottleneck"),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.full
def test_compiled_blocks_come_back_from_the_disk(name: str):
    """Also with a backward pass written by hand, and with a choice of what is kept for it."""
    param, every, keep = COMPILED[name]
    config = compose(*TINY, "data.path=/x", *param)

    def found() -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        torch.compiler.reset()
        counters.clear()
        model = make_model(config)
        materialize(model, 0, torch.device("cpu"))
        prepare_blocks(model, every, keep, compile=True)
        next_token_loss(model, ROWS).backward()
        return {k: p.grad for k, p in model.named_parameters()}, dict(counters["aot_autograd"])

    first, _ = found()
    again, counts = found()
    assert counts["autograd_cache_hit"] == counts["total"] > 0
    assert all(torch.equal(again[name], gradient) for name, gradient in first.items())


def test_what_is_kept_is_told_by_ranks():
    """Else one rank's compiled graph would be taken for another's."""
    hashes = {keeping_latents(make_model(compose(*SMALL, "param=cola", f"param.rank={r}"))).cache_hash for r in (4, 5)}
    assert len(hashes) == 2
