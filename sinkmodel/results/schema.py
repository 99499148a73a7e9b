"""Typed records as JSON objects: how a record is written, and how an object is read and checked.

A record is a frozen dataclass. The annotations of its fields are the form of the object:

    str, int, bool     a text, a whole number, true or false
    float              a number; NaN and infinity are not numbers
    Number             a number that was measured, or null: it was not measured, or it is not finite
    list[X]            a list of X
    tuple[X, Y]        a list of two items
    dict[str, X]       an object whose entries are X
    a record           an object
    X | None           X or null

A field without a default must be in the object. A field with a default may be missing, since older versions did not
write it. A field with `omitted()` is written only if it is not None. Entries that a record does not know are ignored.

Fields are written in their order. If a record has several bases, those of the last base come first: a row that is to
begin with the fields of `_Model` is a `class GridRow(PolicyFields, _Model)`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

Number: TypeAlias = float | None  # a measured number


class Record(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=Record)


class Mismatch(ValueError):
    """A phrase that names the first place where an object does not have the form of a record."""


def omitted(key: str | None = None) -> Any:
    """A field that is None by default, and is not written then. `key`: its name in the object."""
    return dataclasses.field(default=None, metadata={"omitted": True, "key": key})


def named(key: str) -> Any:
    """A field whose name in the object is a keyword of Python."""
    return dataclasses.field(metadata={"key": key})


def to_json(value: Any) -> Any:
    """A record as an object of JSON, with its fields in their order."""
    if dataclasses.is_dataclass(value):
        pairs = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        kept = [(field, inner) for field, inner in pairs if inner is not None or not field.metadata.get("omitted")]
        return {_key(field): to_json(inner) for field, inner in kept}
    if isinstance(value, dict):
        return {key: to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(inner) for inner in value]
    return value


def from_json(kind: type[R], content: Any, place: str = "") -> R:
    """The record of an object. Raises Mismatch if the object does not have its form."""
    if not isinstance(content, dict):
        raise Mismatch(f"{_shown(place)} is not an object")
    hints, found = _hints(kind), {}
    for field in dataclasses.fields(kind):
        key = _key(field)
        if key in content:
            found[field.name] = _read(hints[field.name], content[key], f"{place}.{key}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise Mismatch(f"{_shown(place)} has no {key}")
    return kind(**found)


def _key(field: dataclasses.Field[Any]) -> str:
    return field.metadata.get("key") or field.name


def _shown(place: str) -> str:
    return place.lstrip(".") or "it"


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _read(kind: Any, value: Any, place: str) -> Any:
    """The value of a field with the annotation `kind`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in (Any, object):
        return value
    if origin in (types.UnionType, typing.Union):
        return _read_optional(next(part for part in inner if part is not types.NoneType), value, place)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return from_json(kind, value, place)
    if origin is dict:
        if not isinstance(value, dict):
            raise Mismatch(f"{_shown(place)} is not an object")
        return {key: _read(inner[1], item, f"{place}.{key}") for key, item in value.items()}
    if origin is list:
        if not isinstance(value, list):
            raise Mismatch(f"{_shown(place)} is not a list")
        return [_read(inner[0], item, f"{place}[{i}]") for i, item in enumerate(value)]
    if origin is tuple:
        if not isinstance(value, list) or len(value) != len(inner):
            raise Mismatch(f"{_shown(place)} is not a list of {len(inner)}")
        return tuple(_read(part, item, place) for part, item in zip(inner, value))
    word, accepts = PLAIN[kind]
    if not accepts(value):
        raise Mismatch(f"{_shown(place)} is not {word}")
    return value


def _read_optional(kind: Any, value: Any, place: str) -> Any:
    if value is None or (kind is float and isinstance(value, float) and not math.isfinite(value)):
        return None
    if kind in PLAIN and not PLAIN[kind][1](value):
        raise Mismatch(f"{_shown(place)} is not {PLAIN[kind][0]} or null")
    return _read(kind, value, place)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# By annotation: its name in a message, and whether a value has it.
PLAIN: dict[Any, tuple[str, typing.Callable[[Any], bool]]] = {
    str: ("a text", lambda value: isinstance(value, str)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", _is_count),
    float: ("a number", lambda value: _is_count(value) or (isinstance(value, float) and math.isfinite(value))),
}
