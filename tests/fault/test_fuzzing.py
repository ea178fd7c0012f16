"""Rows of the matrix: bytes of strangers. What reads them first gets a corpus, and mutants of it, and raises only what it says.

The corpus was found by coverage-guided fuzzing, which needs a tool and hours (``make fuzz``); to try its mutants takes neither.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.fault.matrix import Row
from tests.fuzzing.mutations import MOST_BYTES, mutants
from tests.fuzzing.targets import TARGETS, corpus

MUTANTS = 10_000
NIGHTLY_MUTANTS = 1_000_000

# What a reader of data has no business with. Hooks cannot be taken out again: this one looks only while it is told to.
FORBIDDEN = ("open", "import", "exec", "compile", "os.", "subprocess.", "pickle.", "marshal.", "ctypes.", "socket.", "shutil.")
seen: list[str] | None = None


def note(event: str, _: object) -> None:
    if seen is not None and event.startswith(FORBIDDEN):
        seen.append(event)


@pytest.fixture(scope="module")
def hook() -> None:
    sys.addaudithook(note)


@pytest.fixture
def watched(hook: None) -> Iterator[Callable[[], list[str]]]:
    """Return what gives the events since it was last asked that a reader has no business with."""
    global seen
    seen = []

    def since() -> list[str]:
        assert seen is not None
        found = seen[:]
        seen.clear()
        return found

    yield since
    seen = None


def attack(row: Row, name: str, begin: Sequence[bytes]) -> None:
    """Give a target mutants of a corpus; fail with the first that makes it do what it must not."""
    target = TARGETS[name]
    for number, data in enumerate(mutants(begin, NIGHTLY_MUTANTS if row.size == "night" else MUTANTS, seed=1)):
        row.attempts += 1
        try:
            target(data)
        except Exception as error:
            raise AssertionError(f"{name}: mutant {number} of seed 1: {error!r}: {data[:400]!r}") from error


@pytest.mark.row("F1", "T5")
@pytest.mark.parametrize("name", ["frames", "inferences"])
def test_a_message_is_read_or_refused(name: str, row: Row) -> None:
    begin = corpus(name)
    for data in begin:
        TARGETS[name](data)
    attack(row, name, begin)


@pytest.mark.row("T7")
@pytest.mark.parametrize("name", ["texts", "manifests", "graphs"])
def test_a_bundle_is_read_or_refused_and_nothing_of_it_is_run(name: str, row: Row, watched: Callable[[], list[str]]) -> None:
    begin = corpus(name)
    for data in begin:
        TARGETS[name](data)
    watched()  # what was imported on the way
    attack(row, name, begin)
    assert watched() == []


def test_what_runs_code_is_seen(watched: Callable[[], list[str]]) -> None:
    pickle.loads(pickle.dumps(Row))
    assert "pickle.find_class" in watched()
    eval("1")
    assert "compile" in watched()


def test_mutants_are_the_same_for_a_seed_and_differ_between_seeds() -> None:
    one, same, other = (list(mutants(corpus("frames"), 200, seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert len(set(one)) > 150
    assert all(len(data) <= MOST_BYTES for data in one)
