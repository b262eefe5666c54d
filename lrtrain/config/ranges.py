"""Types with allowed ranges of numbers and strings.

They annotate the schema and the signatures of layers, optimizers, schedules and engines, like pydantic's types
(`PositiveInt`, `NonNegativeFloat`) and `Literal`; `lrtrain.config.values` validates the configuration with them.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, Field


def _held(test: Callable[[Any], bool], told: str) -> AfterValidator:
    """A condition, and the message if it does not hold, which follows `key=value`."""

    def validate(value: Any) -> Any:
        if not test(value):
            raise ValueError(told)
        return value

    return AfterValidator(validate)


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    return pattern


def _is_rank_rule(rule: Any) -> bool:
    if isinstance(rule, dict):
        return all(
            type(rank) in (int, float) and isinstance(_regular_expression(key), str) for key, rank in rule.items()
        )
    return type(rule) in (int, float, str, type(None))


Share = Annotated[float, _held(lambda x: 0 <= x <= 1, "must be a share from 0 to 1")]
ShareOfSteps = Annotated[float, _held(lambda x: 0 <= x <= 1, "must be a share of all steps, from 0 to 1")]
PositiveShare = Annotated[float, _held(lambda x: 0 < x <= 1, "must be a share above 0 and at most 1")]
ShareBelowOne = Annotated[float, _held(lambda x: 0 <= x < 1, "must be at least 0 and below 1")]
Betas = Annotated[list[ShareBelowOne], Field(min_length=2, max_length=2)]
Regex = Annotated[str, AfterValidator(_regular_expression)]
RegexOrNull = Annotated[str | None, AfterValidator(lambda x: x if x is None else _regular_expression(x))]
RankOrShare = Annotated[
    int | float,
    _held(
        lambda x: 0 < x <= 1 if isinstance(x, float) else x >= 1,
        "must be an integer from 1 up, or a share above 0 and at most 1, such as 0.25",
    ),
]
"""A matrix rank, or a share of each matrix's min(out, in)."""
RankRule = Annotated[
    Any,
    _held(
        _is_rank_rule,
        "must be a rank such as 128, a share such as 0.25, a budget such as 60%, or a mapping from patterns to ranks "
        "or shares",
    ),
]
"""`param.rank`; see `lrtrain.model.rank`."""
