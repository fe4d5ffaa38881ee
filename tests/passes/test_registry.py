"""Passes and presets by name."""

from __future__ import annotations

import dataclasses
import re

import pytest
from graphwright.passes import registry
from graphwright.passes.base import Contract, Pass, PassContext
from graphwright.passes.errors import UsageError
from graphwright.passes.pipeline import NEEDS, Pipeline


@pytest.mark.parametrize("name", registry.PASSES)
def test_every_pass_is_what_a_pass_must_be(name: str) -> None:
    """A frozen dataclass that can be made without options, tells what it does, and reads back from its own text."""
    cls = registry.pass_class(name)
    assert issubclass(cls, Pass) and cls.name == name and isinstance(cls.contract, Contract)
    assert cls.__doc__ and len(cls.__doc__) > 80
    step = registry.parse_pass(name)
    assert dataclasses.is_dataclass(step) and str(step) == name
    assert step.needs() <= set(NEEDS)
    assert hash(step) == hash(registry.parse_pass(str(step)))
    for field in dataclasses.fields(step):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(step, field.name, None)


@pytest.mark.parametrize("name", registry.PASSES)
def test_names_are_words_joined_by_dashes(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert registry.pass_class(name.replace("-", "_")) is registry.pass_class(f" {name} ")


@pytest.mark.parametrize("name", registry.PRESETS)
def test_presets_are_pipelines(name: str) -> None:
    text = registry.preset(name)
    assert str(Pipeline.parse(text)) == text
    Pipeline.parse(text).check_needs(PassContext())


def test_presets_keep_the_numbers() -> None:
    """What runs without being asked for is equal in real arithmetic."""
    for name in registry.PRESETS:
        assert Pipeline.parse(registry.preset(name)).contract in (Contract.EXACT, Contract.ROUNDING), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("simplfy", "unknown pass 'simplfy'; did you mean simplify?"),
        ("xyzzy", "unknown pass 'xyzzy'; known: "),
        ("simplify:a=1", "simplify has no option 'a'"),
        ("two-pass-softmax:form", "option 'form' has no value; write form=VALUE"),
    ],
)
def test_what_is_not_known(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        registry.parse_pass(text)
    assert message in str(caught.value)


def test_unknown_presets() -> None:
    with pytest.raises(UsageError, match="unknown preset 'defualt'; did you mean default"):
        registry.preset("defualt")
