"""`name:key=value:key=value` <-> the fields of a frozen dataclass.

A field's type decides how its text is read: bool (true/false), int, float, str, `X | None`, Enum (by value)
and tuples of these (`a+b+c`). `None` means the default. Only values that differ from the default are written,
so `parse(str(p)) == p` and the text stays short.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any, TypeVar

from .errors import UsageError, did_you_mean

T = TypeVar("T")
SEPARATOR = ":"
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def field_types(cls: type) -> dict[str, Any]:
    """Name -> type of the dataclass fields that can be set from text."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def parse_value(text: str, annotation: Any, where: str) -> Any:
    """`text` read as `annotation`; `where` names the option in an error."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        return None if text == "none" else parse_value(text, inner[0], where)
    if origin is tuple:
        return tuple(parse_value(part, arguments[0], where) for part in text.split("+") if part)
    if annotation is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        raise UsageError(f"{where}: {text!r} is not a truth value; write true or false")
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        values = [str(member.value) for member in annotation]
        if text in values:
            return annotation(next(m.value for m in annotation if str(m.value) == text))
        raise UsageError(f"{where}: {text!r} is not a choice; {did_you_mean(text, values)}")
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            kind = "a whole number" if annotation is int else "a number"
            raise UsageError(f"{where}: {text!r} is not {kind}") from None
    return text


def format_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, tuple):
        return "+".join(format_value(item) for item in value)
    return str(value)


def parse_options(cls: type[T], name: str, options: list[str]) -> T:
    """An instance of the dataclass `cls` from `["key=value", ...]`.

    Raises UsageError for a key that is not a field, a value of the wrong kind, or a key given twice.
    """
    known = field_types(cls)
    values: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"{name}: option {option!r} has no value; write {key}=VALUE")
        if key not in known:
            hint = did_you_mean(key, known) if known else "it takes no options"
            raise UsageError(f"{name} has no option {key!r}; {hint}")
        if key in values:
            raise UsageError(f"{name}: option {key!r} is given twice")
        values[key] = parse_value(text.strip(), known[key], f"{name}:{key}")
    try:
        return cls(**values)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error


def format_options(value: Any) -> str:
    """`key=value:key=value` of the fields of `value` that differ from their defaults."""
    parts = []
    for field in dataclasses.fields(value):
        if not field.init:
            continue
        current = getattr(value, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if current != default:
            parts.append(f"{field.name}={format_value(current)}")
    return SEPARATOR.join(parts)
