"""Weight decay only where it belongs."""

import pytest

from lrtrain.config.compose import compose
from lrtrain.model.build import make_model
from lrtrain.optim.groups import parameter_groups

SMALL = ("model.config.hidden_size=32", "model.config.num_attention_heads=4", "param.rank=4", "model.vocab_size=64")
OPT = ("model=opt_125m", "model.config.word_embed_proj_dim=32", "model.config.ffn_dim=64", *SMALL)


@pytest.mark.parametrize("overrides", [SMALL, OPT])
@pytest.mark.parametrize("param", ["dense", "lowrank", "sltrain", "sst", "relora"])
def test_matrices_decay_and_biases_norms_and_embeddings_do_not(overrides: tuple[str, ...], param: str):
    model = make_model(compose(*overrides, f"param={param}"))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    listed = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    yes, no = ([names[id(p)] for g in groups if g["weight_decay"] == wd for p in g["params"]] for wd in (0.1, 0.0))
    matrices = (
        "proj.weight",
        "fc1.weight",
        "fc2.weight",
        "A.weight",
        "B.weight",
        "values",
        "left",
        "right",
        "lm_head.weight",
    )
    assert all(n.endswith(matrices) for n in yes)
    assert all("norm" in n or "embed" in n or n.endswith(("bias", "sigma")) for n in no)
