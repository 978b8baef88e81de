"""`Strings` reads as the list that it makes, once, when it is first looked at."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.strings import Strings

TEXTS = st.lists(st.text(max_size=3), max_size=6)


@settings(deadline=None)
@given(TEXTS, st.integers(0, 6), st.integers(0, 6), st.slices(6))
def test_reads_as_its_list(texts: list[str], one: int, other: int, part: slice) -> None:
    start, stop = sorted((min(one, len(texts)), min(other, len(texts))))
    expected, strings = texts[start:stop], Strings(lambda: texts, start, stop)
    assert len(strings) == len(expected)
    assert list(strings) == strings.tolist() == expected
    assert [*reversed(strings)] == expected[::-1]
    assert strings[part] == expected[part]
    assert strings == expected
    assert expected == strings
    assert strings == tuple(expected)
    assert strings == Strings.of(expected)
    assert strings != [*expected, "more"]
    assert strings != "".join(expected)
    assert strings + ["a"] == strings + Strings.of(["a"]) == [*expected, "a"]  # noqa: RUF005
    assert ["a"] + strings == ["a", *expected]  # noqa: RUF005
    assert repr(strings) == repr(expected)
    for text in {*texts, "not there"}:
        assert (text in strings) == (text in expected)
        assert strings.count(text) == expected.count(text)
    for number, text in enumerate(expected):
        assert strings[number] == strings[number - len(expected)] == text
        assert strings.index(text) == expected.index(text)
    for again in (pickle.loads(pickle.dumps(strings)), copy.deepcopy(strings)):
        assert type(again) is Strings
        assert again == expected


def test_the_list_is_made_at_its_first_use_and_once() -> None:
    made: list[int] = []

    def make() -> list[str]:
        made.append(1)
        return ["a", "b", "c"]

    strings = Strings(make, 1, 3)
    assert len(strings) == 2
    assert made == []
    assert [strings[0], strings[1], *strings] == ["b", "c", "b", "c"]
    assert made == [1]
    with pytest.raises(IndexError):
        strings[2]
    mine = strings.tolist()
    mine.append("d")
    assert strings == ["b", "c"]


def test_two_threads_may_look_at_once() -> None:
    class Overtaken(Strings):
        """Another thread makes the list just after this one has found that there is none."""

        __slots__ = ("is_overtaken",)

        @property
        def _made(self) -> list[str] | None:
            made: list[str] | None = Strings._made.__get__(self)
            if made is None and not hasattr(self, "is_overtaken"):
                self.is_overtaken = True
                assert [*self] == ["a"]
            return made

        @_made.setter
        def _made(self, made: list[str] | None) -> None:
            Strings._made.__set__(self, made)

    assert [*Overtaken(lambda: ["a"], 0, 1)] == ["a"]
