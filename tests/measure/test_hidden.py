"""Measures of the states after each block against those computed from all states at once."""

import copy
import math
import weakref

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lrtrain import distributed
from lrtrain.core.metrics import spelled
from lrtrain.measure.hidden import hidden_metrics, top_states, whole_states
from lrtrain.measure.representations import matrix_entropy, matrix_nuclear_norm, rankme
from lrtrain.model.loss import TokenLoss

ROWS = torch.randint(64, (5, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def world():
    yield distributed.start()
    distributed.stop()


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
            attention_dropout=0.3,
        )
    ).train()  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_metrics_are_those_of_all_states(world, model: LlamaForCausalLM, batch_size: int):
    found = spelled(hidden_metrics(TokenLoss(model), ROWS, batch_size, world, whole_states(model, world)))
    assert len(found) == 3 * 4
    with torch.no_grad():
        states = copy.deepcopy(model).eval()(ROWS[:, :-1], output_hidden_states=True).hidden_states
    for depth in (0, 1):  # of the last block transformers gives the normalized states
        hidden = states[depth + 1].double()
        rows = hidden.flatten(0, 1)
        expected = {
            "rankme": rankme(torch.linalg.svdvals(rows)),
            "rankme_centered": rankme(torch.linalg.svdvals(rows - rows.mean(0))),
            "mnn": sum(map(matrix_nuclear_norm, hidden)) / len(hidden),
            "matent": sum(map(matrix_entropy, hidden)) / len(hidden),
        }
        for metric, value in expected.items():
            assert found[f"hidden/{metric}/L{depth:02d}"] == pytest.approx(value, rel=1e-5)


def test_measuring_leaves_mode_hooks_and_random_numbers_as_they_were(world, model: LlamaForCausalLM):
    state = torch.get_rng_state()
    hidden_metrics(TokenLoss(model), ROWS, 2, world, whole_states(model, world))
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert not any(layer._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize("kept", [whole_states, top_states])
def test_no_states_are_held_beyond_the_next_block(world, model: LlamaForCausalLM, kept):
    """Of the three blocks: what goes into the one at work, and what comes out."""
    made, alive = [], []

    def count(module, inputs, output):
        made.append(weakref.ref(output[0] if isinstance(output, tuple) else output))
        alive.append(sum(states() is not None for states in made))

    handles = [block.register_forward_hook(count) for block in model.model.layers]
    hidden_metrics(TokenLoss(model), ROWS, 2, world, kept(model, world))
    for handle in handles:
        handle.remove()
    assert len(made) == 3 * -(-len(ROWS) // 2) and max(alive) <= 2


def test_states_that_are_not_finite_give_nan_and_no_more_when_they_are_again(world, model: LlamaForCausalLM):
    kept, other = top_states(model, world), top_states(model, world)
    for states in (kept, other):
        hidden_metrics(TokenLoss(model), ROWS, 2, world, states)
    weight = model.model.layers[1].mlp.up_proj.weight
    sound = weight.detach().clone()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(torch.inf)
    found = spelled(hidden_metrics(TokenLoss(model), ROWS, 2, world, whole_states(model, world)))
    assert found["hidden/rankme/L00"] > 1
    assert found["hidden/rankme/L01"] != found["hidden/rankme/L01"]
    shares = spelled(hidden_metrics(TokenLoss(model), ROWS, 2, world, kept))
    assert all(math.isnan(shares[f"hidden/{share}_share/L01"]) for share in ("top", "mean"))
    weight.data.copy_(sound)
    after, expected = (spelled(hidden_metrics(TokenLoss(model), ROWS, 2, world, states)) for states in (kept, other))
    assert all(after[name] == expected[name] for name in after if not name.endswith("L00"))  # which was always finite


def test_the_leading_direction_is_found_from_measurement_to_measurement(world, model: LlamaForCausalLM):
    with torch.no_grad():
        states = copy.deepcopy(model).eval()(ROWS[:, :-1], output_hidden_states=True).hidden_states[1].flatten(0, 1)
    energies = torch.linalg.svdvals(states.double()) ** 2
    mean = float(len(states) * states.mean(0).square().sum() / energies.sum())
    kept = top_states(model, world)
    found = [spelled(hidden_metrics(TokenLoss(model), ROWS, 2, world, kept)) for _ in range(8)]
    assert set(found[0]) == {f"hidden/{m}/L0{i}" for m in ("top_share", "mean_share", "mnn") for i in range(3)}
    assert found[0]["hidden/mean_share/L00"] == found[-1]["hidden/mean_share/L00"] == pytest.approx(mean, rel=1e-4)
    truth = float(energies[0] / energies.sum())
    first, last = (abs(f["hidden/top_share/L00"] / truth - 1) for f in (found[0], found[-1]))
    assert last < 0.05 and last < first < 0.5
    whole = spelled(hidden_metrics(TokenLoss(model), ROWS, 2, world, whole_states(model, world)))
    assert found[0]["hidden/mnn/L00"] == pytest.approx(whole["hidden/mnn/L00"])
