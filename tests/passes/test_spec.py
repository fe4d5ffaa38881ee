"""Options as text: what is written reads back as the same value."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import pytest
from graphwright.passes import spec
from graphwright.passes.errors import UsageError, did_you_mean
from hypothesis import given
from hypothesis import strategies as st


class Mode(enum.Enum):
    FAST = "fast"
    TWO = 2


@dataclass(frozen=True)
class Options:
    flag: bool = False
    count: int = 3
    ratio: float = 0.5
    word: str = "a"
    mode: Mode = Mode.FAST
    maybe: int | None = None
    sizes: tuple[int, ...] = ()
    words: tuple[str, ...] = ("x",)
    modes: tuple[Mode, ...] = ()
    limit: float | None = 1.0


def parse(text: str) -> Options:
    return spec.parse_options(Options, "p", text.split(":") if text else [])


# Text that has no sign of the grammar in it; an empty one cannot be told from no value.
LETTERS = st.characters(blacklist_characters=":,+= ", blacklist_categories=("Cs", "Zs", "Cc"))
WORDS = st.text(LETTERS, min_size=1).filter(lambda word: word == word.strip())
OPTIONS = st.builds(
    Options, flag=st.booleans(), count=st.integers(), ratio=st.floats(allow_nan=False), word=WORDS,
    mode=st.sampled_from(Mode), maybe=st.none() | st.integers(), sizes=st.lists(st.integers()).map(tuple),
    words=st.lists(WORDS).map(tuple), modes=st.lists(st.sampled_from(Mode)).map(tuple),
    limit=st.none() | st.floats(allow_nan=False),
)  # fmt: skip


@given(OPTIONS)
def test_what_is_written_reads_back(options: Options) -> None:
    text = spec.format_options(options)
    assert parse(text) == options
    assert spec.format_options(parse(text)) == text


def test_defaults_are_not_written() -> None:
    assert spec.format_options(Options()) == ""
    assert spec.format_options(Options(maybe=4, flag=True)) == "flag=true:maybe=4"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flag=yes", Options(flag=True)),
        ("flag=OFF", Options()),
        ("maybe=none", Options()),
        ("limit=none", Options(limit=None)),
        ("sizes=1+2+3", Options(sizes=(1, 2, 3))),
        ("sizes=", Options()),
        ("words=", Options(words=())),
        ("ratio=1e-3: count = 7", Options(ratio=1e-3, count=7)),
        ("mode=2", Options(mode=Mode.TWO)),
        ("ratio=inf", Options(ratio=float("inf"))),
    ],
)
def test_what_is_read(text: str, expected: Options) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuont=3", "p has no option 'cuont'; did you mean count?"),
        ("xyz=3", "p has no option 'xyz'; known: count, flag, "),
        ("count", "option 'count' has no value; write count=VALUE"),
        ("count=3:count=4", "option 'count' is given twice"),
        ("count=3.5", "p:count: '3.5' is not a whole number"),
        ("ratio=x", "p:ratio: 'x' is not a number"),
        ("flag=maybe", "p:flag: 'maybe' is not a truth value; write true or false"),
        ("mode=fsat", "p:mode: 'fsat' is not a choice; did you mean fast?"),
        ("sizes=1+b", "p:sizes: 'b' is not a whole number"),
        ("", None),
    ],
)
def test_what_is_not_in_the_grammar(text: str, message: str | None) -> None:
    if message is None:
        assert parse(text) == Options()
        return
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_value_that_the_pass_refuses() -> None:
    @dataclass(frozen=True)
    class Positive:
        count: int = 1

        def __post_init__(self) -> None:
            if self.count < 1:
                raise ValueError(f"count is {self.count}; expected at least 1")

    with pytest.raises(UsageError, match=r"^p: count is 0; expected at least 1$"):
        spec.parse_options(Positive, "p", ["count=0"])


def test_a_pass_without_options_says_so() -> None:
    @dataclass(frozen=True)
    class Plain:
        pass

    with pytest.raises(UsageError, match="p has no option 'a'; it takes no options"):
        spec.parse_options(Plain, "p", ["a=1"])


def test_the_nearest_names_are_offered() -> None:
    assert did_you_mean("sofmax", ["softmax", "relu"]) == "did you mean softmax?"
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"
