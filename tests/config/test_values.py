"""Every value of the configuration is held against a type that says what is right."""

import functools
import math
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from launching import ROOT

from lrtrain.config.choice import CALLED_WITH, checked_choice, own_arguments
from lrtrain.config.compose import compose
from lrtrain.config.schema import Config, as_dict
from lrtrain.config.values import UnknownKey, validated
from lrtrain.errors import ConfigError

CHOICES = [(group, path.stem) for group in CALLED_WITH for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]


@functools.cache
def chosen(group: str, name: str) -> dict[str, Any]:
    return getattr(compose(f"{group}={name}"), group)


@functools.cache
def everything() -> dict[str, Any]:
    return as_dict(compose())


def numbers(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all numbers below a node."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}"


def changed(node: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return node | {first: changed(node[first], rest, value) if rest else value}


@pytest.mark.parametrize("group,name", CHOICES)
def test_every_number_of_every_choice_has_a_range(group: str, name: str):
    node = chosen(group, name)
    for key in own_arguments(node).keys() - {"seed"}:
        if isinstance(node[key], int | float) and not isinstance(node[key], bool):
            for wrong in (-1e9, math.nan, math.inf):
                with pytest.raises(ConfigError, match=rf"^{group}\.{key}=(-1|nan|inf)"):
                    checked_choice(group, node | {key: wrong})


def test_every_number_of_the_schema_has_a_range():
    sections = {key: value for key, value in everything().items() if key not in CALLED_WITH}
    found = [
        key
        for key in numbers(sections)
        if not key.startswith(("model.config", "data.source", "train.seed", "model.recipe.rank", "callbacks"))
    ]
    assert len(found) >= 30
    for key in found:
        for wrong in (-(10**9), math.nan):
            with pytest.raises(ConfigError, match=rf"^{key}=(-1|nan)"):
                validated(Config, changed(everything(), key, wrong))


WRONG = {
    "schedule=cosine warmup": {100: "must be a share of all steps, from 0 to 1", -0.5: "must be a share of all steps"},
    "schedule=cosine floor": {5: "must be a share from 0 to 1"},
    "schedule=wsd decay": {200: "must be a share of all steps"},
    "optim=adamw lr": {0: "must be greater than 0", math.inf: "must be a finite number"},
    "optim=adamw betas": {(0.9, 1.5): "must be at least 0 and below 1", (0.8,): "must have at least 2 items"},
    "optim=adamw eps": {-1: "must be greater than 0"},
    "optim=adamw weight_decay": {-1: "must be greater than or equal to 0"},
    "optim=muon momentum": {1: "must be at least 0 and below 1"},
    "optim=muon adjust": {"kimi": "must be 'match_rms_adamw', 'jordan' or 'spectral'"},
    "optim=galore rank": {1.5: "must be an integer from 1 up, or a share", 0: "must be an integer from 1 up"},
    "optim=loro approx_scale": {0: "must be greater than 0, or null"},
    "param=sltrain density": {1.5: "must be a share from 0 to 1"},
    "param=sltrain scale": {"alpha": "must be 'alpha_over_r', 'alpha_over_sqrt_r' or 'const'"},
    "param=nested ranks": {(0.5, 2): "must be a share above 0 and at most 1", (): "must have at least 1 item"},
    "param=nested full_share": {2: "must be a share from 0 to 1"},
    "param=relora prune_by": {"size": "must be 'magnitude' or 'random'"},
    "param=lost complement_rank": {0: "must be greater than 0, or null"},
    "param=cola residual": {"maybe": "must be a valid boolean"},
    "engine=deepspeed zero_stage": {4: "must be 1, 2 or 3"},
    "engine=fsdp reduce_dtype": {"fp8": "must be 'fp32' or 'bf16'"},
}


@pytest.mark.parametrize("place", WRONG)
def test_a_wrong_value_of_a_choice_is_told_with_what_would_be_right(place: str):
    (group, name), key = place.split()[0].split("="), place.split()[1]
    for wrong, sentence in WRONG[place].items():
        value = [*wrong] if isinstance(wrong, tuple) else wrong
        with pytest.raises(ConfigError, match=rf"^{group}\.{key}\S*=.* {sentence}") as raised:
            checked_choice(group, chosen(group, name) | {key: value})
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "key,value,sentence",
    [
        ("train.clip", 0, "train.clip=0 must be greater than 0, or null"),
        ("train.dtype", "fp8", "train.dtype=fp8 must be 'fp32', 'bf16', 'bf16_sr' or 'auto'"),
        ("train.steps", 1.5, "train.steps=1.5 must be a valid integer"),
        ("train.steps", True, "train.steps=true must be a number"),
        ("eval.every", False, "eval.every=false must be a number"),
        ("eval.compat", "lingua", "eval.compat=lingua must be 'galore', or null"),
        ("rollback.window", 1, "rollback.window=1 must be greater than or equal to 2"),
        ("spectra.parts", "*", r"spectra.parts=\* is not a regular expression: nothing to repeat"),
        ("data.seq_len", None, "data.seq_len=null must be a valid integer"),
    ],
)
def test_a_wrong_value_of_the_schema_is_told_with_what_would_be_right(key: str, value: Any, sentence: str):
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        validated(Config, changed(everything(), key, value))


def test_values_are_converted_where_nothing_is_lost():
    config = validated(Config, changed(changed(everything(), "train.steps", 1e3), "run.name", 7))
    assert (config.train.steps, config.run.name) == (1000, "7")


# --- choices of one's own ------------------------------------------------------------------------------------------


def plain(model, rate, bound: float = 1.0): ...


def several(model, kind: Literal["a", "b"], **more): ...


def node(function: str, **values: Any) -> dict[str, Any]:
    return {"name": "mine", "_target_": f"{__name__}.{function}", **values}


def test_a_signature_without_annotations_takes_any_value_but_names_what_is_missing():
    assert checked_choice("optim", node("plain", rate=["x"]))["rate"] == ["x"]
    with pytest.raises(ConfigError, match=r"^optim.rate has no value: .*plain needs one, and the yaml of optim=mine"):
        checked_choice("optim", node("plain"))
    with pytest.raises(UnknownKey):
        checked_choice("optim", node("plain", rate=1, wrong=2))


def test_more_keys_are_taken_where_the_signature_takes_them():
    assert checked_choice("optim", node("several", kind="a", other=3))["other"] == 3
    with pytest.raises(ConfigError, match="^optim.kind=c must be 'a' or 'b'"):
        checked_choice("optim", node("several", kind="c"))


@pytest.mark.parametrize("target", ["nowhere.Layer", f"{__name__}.nothing"])
def test_what_cannot_be_imported_is_one_sentence(target: str):
    with pytest.raises(ConfigError, match=rf"^param._target_={target} cannot be imported: ") as raised:
        checked_choice("param", {"name": "mine", "_target_": target})
    assert "\n" not in str(raised.value)
