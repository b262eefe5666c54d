"""Validation of values: the error names the first wrong key, its value and what would be right."""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lrtrain.errors import ConfigError

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, arbitrary_types_allowed=True)
"""The `__pydantic_config__` of a schema: no unknown keys, no infinite numbers or NaN."""


class UnknownKey(ConfigError):
    """A key that the schema does not have."""

    def __init__(self, key: str):
        super().__init__(f"{key} is not a key")
        self.key = key


def validated(schema: type[T], values: dict[str, Any], section: str = "") -> T:
    """The values as an instance of a dataclass, with lossless conversions (`1e3` is an integer).

    Raises:
        UnknownKey: if the schema does not have a key.
        ConfigError: if a value is missing, or not of its type.
    """
    adapter = TypeAdapter(schema)
    try:
        result = adapter.validate_python(values)
        _refuse_numbers_from_booleans(values, result, section)
        return result
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
    place = _place(values, found["loc"])
    key = ".".join(filter(None, [section, *map(str, place)]))
    if found["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        raise UnknownKey(key)
    if found["type"] == "missing":
        raise ConfigError(f"{'.'.join(filter(None, [section, *map(str, found['loc'])]))} has no value")
    value, phrase = _at(values, place), _phrase(found["msg"])
    null = ", or null" if phrase.startswith("must") and _accepts_null(adapter, values, place) else ""
    raise ConfigError(f"{key}={'null' if value is None else value} {phrase}{null}")


def _refuse_numbers_from_booleans(given: Any, result: Any, key: str) -> None:
    """Raise ConfigError for `true` or `false` where a number or text was wanted, which pydantic converts."""
    if isinstance(given, bool) and not isinstance(result, bool):
        kind = "a number" if isinstance(result, int | float) else "text"
        raise ConfigError(f"{key}={str(given).lower()} must be {kind}")
    for name, value in given.items() if isinstance(given, dict) else ():
        taken = result[name] if isinstance(result, dict) else getattr(result, name)
        _refuse_numbers_from_booleans(value, taken, f"{key}.{name}" if key else str(name))


def _place(values: Any, loc: Sequence[str | int]) -> list[str | int]:
    """The path of keys to a value: pydantic's location without its names for members of a union."""
    place = []
    for key in loc:
        if not (key in values if isinstance(values, dict) else isinstance(values, list) and isinstance(key, int)):
            break
        place.append(key)
        values = _at(values, [key])
    return place


def _at(values: Any, place: Sequence[str | int]) -> Any:
    for key in place:
        values = values[key]
    return values


def _accepts_null(adapter: TypeAdapter[Any], values: dict[str, Any], place: Sequence[str | int]) -> bool:
    """Whether null is allowed at a path of keys."""

    def with_null(node: Any, keys: Sequence[str | int]) -> Any:
        if not keys:
            return None
        inner = with_null(node[keys[0]], keys[1:])
        if isinstance(node, dict):
            return node | {keys[0]: inner}
        return [inner if k == keys[0] else item for k, item in enumerate(node)]

    try:
        adapter.validate_python(with_null(values, place))
    except ValidationError as error:
        return not any([*found["loc"][: len(place)]] == [*place] for found in error.errors())
    return True


def _phrase(message: str) -> str:
    """`must be a valid integer` of pydantic's `Input should be a valid integer, unable to parse …`."""
    message = re.sub(r"^Value error, |(, (unable|got)| after validation).*", "", message)
    return re.sub(r"^\w+ should", "must", message)
