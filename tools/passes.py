"""`graphwright passes`: what there is to run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from graphwright.passes.errors import GraphwrightError, PassError

from .shell import Command, format_options, print_json, print_table, verbosity_options

if TYPE_CHECKING:
    from graphwright.passes.base import Pass


def list_passes() -> list[dict[str, Any]]:
    """Every pass in the order of the registry. One of another package that cannot be loaded says so in `summary`."""
    from graphwright.passes.registry import pass_class, pass_names, third_party

    rows: list[dict[str, Any]] = []
    for name in pass_names():
        try:
            cls = pass_class(name)
            contract, summary = cls.contract.value, documentation(cls).partition("\n")[0]
        except GraphwrightError as error:
            contract, summary = "", str(error)
        rows.append({"name": name, "contract": contract, "summary": summary, "third_party": name in third_party()})
    return rows


def describe_pass(name: str) -> dict[str, Any]:
    """Help text, contract, needs and options of one pass. Raises UsageError for an unknown name."""
    from graphwright.passes.registry import PRESETS, pass_class
    from graphwright.passes.spec import field_types, format_value

    cls = pass_class(name)
    words = option_words(cls)
    defaults = _example(cls)
    options = [
        {
            "name": option,
            "type": _type_name(kind),
            "default": format_value(getattr(defaults, option)) if hasattr(defaults, option) else None,
            "help": words.get(option, ""),
        }
        for option, kind in field_types(cls).items()
    ]
    return {
        "name": cls.name,
        "contract": cls.contract.value,
        "needs": sorted(defaults.needs()) if defaults is not None else [],
        "presets": [preset for preset, text in PRESETS.items() if cls.name in re.split(r"[,:]", text)],
        "help": documentation(cls),
        "options": options,
    }


def documentation(cls: type) -> str:
    """The class docstring: of a pass this is its help text. Raises PassError when there is none."""
    text = inspect.cleandoc(cls.__doc__ or "")
    if not text or text.startswith(f"{cls.__name__}("):  # what dataclass writes when there is no docstring
        raise PassError(f"{cls.__module__}.{cls.__name__} has no docstring; it is the pass's help text")
    return text


def option_words(cls: type) -> dict[str, str]:
    """Option -> its sentence: the comment at its field, in the class or one that it derives from, or what the docstring
    says after `option:`."""
    from graphwright.passes.spec import field_types

    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            lines = inspect.getsource(base).splitlines()
        except (OSError, TypeError):  # a class made at run time
            continue
        comments.update({name: words for name, words in _field_comments(lines).items() if words})
    return {name: comments.get(name) or _said_of(name, cls.__doc__ or "") for name in field_types(cls)}


def _field_comments(lines: Sequence[str]) -> dict[str, str]:
    """Field -> the comment that ends its line, going on in deeper lines of comment alone."""
    words: dict[str, str] = {}
    current = None
    for line in lines:
        field = re.match(r"    (\w+): [^#]*?(?:#\s*(.*))?$", line)
        if field:
            current = field[1]
            words[current] = field[2] or ""
        elif current and (more := re.match(r"\s{5,}#\s*(.*)$", line)):
            words[current] = f"{words[current]} {more[1]}".strip()
        else:
            current = None
    return words


def _said_of(name: str, text: str) -> str:
    found = re.search(rf"\b{name}: (.+?)(?:\.\s|\.$|\n\s*\n|$)", text, re.S)
    return " ".join(found[1].split()) if found else ""


def _example(cls: type[Pass]) -> Pass | None:
    try:
        return cls()
    except (TypeError, ValueError):  # an option without a default
        return None


def _type_name(kind: Any) -> str:
    import enum

    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "|".join(str(member.value) for member in kind)
    return kind.__name__ if isinstance(kind, type) else str(kind)


@click.command(cls=Command, name="passes")
@click.argument("name", required=False)
@format_options
@verbosity_options
def command(name: str | None, as_json: bool) -> None:
    """List the passes; with NAME show what it does and its options."""
    if name is None:
        rows = list_passes()
        if as_json:
            print_json(rows)
        else:
            print_table(("pass", "contract", "what it does"), [(r["name"], r["contract"], r["summary"]) for r in rows])
        return
    one = describe_pass(name)
    if as_json:
        print_json(one)
        return
    click.echo(f"{one['name']}: {one['contract']}" + "".join(f", needs {need}" for need in one["needs"]))
    click.echo(f"in presets: {', '.join(one['presets']) or 'none'}\n\n{one['help']}")
    if one["options"]:
        click.echo()
        print_table(
            ("option", "type", "default", "what it sets"),
            [(o["name"], o["type"], o["default"], o["help"]) for o in one["options"]],
        )
