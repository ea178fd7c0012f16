"""The number of threads of a stage follows what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from sidecar.threadcounts import ThreadCounts


def served(counts: ThreadCounts, runs: int, seconds: Callable[[int], float], key: str = "stage") -> Counter[int]:
    chosen: Counter[int] = Counter()
    for _ in range(runs):
        count = counts.choose(key)
        chosen[count] += 1
        counts.record(key, count, seconds(count))
    return chosen


def test_the_fastest_count_serves_and_the_others_are_tried_now_and_then() -> None:
    counts = ThreadCounts((1, 2, 8))
    assert served(counts, 9, lambda count: 1 / count) == {1: 3, 2: 3, 8: 3}
    chosen = served(counts, 640, lambda count: 1 / count)
    assert chosen[8] > 600
    assert chosen[1] > 0
    assert chosen[2] > 0


def test_fewer_threads_are_taken_where_more_bring_next_to_nothing() -> None:
    counts = ThreadCounts((1, 2))
    served(counts, 6, lambda count: 1.0 if count == 1 else 0.96)
    assert counts.choose("stage") == 1


def test_the_first_run_of_all_does_not_count() -> None:
    counts = ThreadCounts((1, 2))
    times = iter([50.0])
    served(counts, 6, lambda count: next(times, 1.0 if count == 1 else 0.5))
    assert counts.choose("stage") == 2


def test_a_change_of_the_machine_is_noticed() -> None:
    counts = ThreadCounts((1, 2))
    served(counts, 6, lambda count: 1.0 if count == 1 else 0.5)
    assert counts.choose("stage") == 2
    # The second core is busy now.
    served(counts, 20, lambda count: 1.0 if count == 1 else 4.0)
    assert counts.choose("stage") == 1


def test_stages_are_told_apart_and_only_so_many_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.threadcounts._MOST", 2)
    counts = ThreadCounts((1, 2))
    served(counts, 6, lambda count: 1.0 if count == 1 else 0.5, "one")
    served(counts, 6, lambda count: 0.5 if count == 1 else 1.0, "other")
    assert [counts.choose(key) for key in ("one", "other")] == [2, 1]
    counts.choose("third")
    # All is forgotten at once, and what comes back late does no harm.
    counts.record("one", 2, 1.0)
    assert served(counts, 6, lambda count: 1.0, "one") == {1: 3, 2: 3}


def test_where_there_is_no_choice_nothing_is_kept() -> None:
    counts = ThreadCounts((4,))
    assert served(counts, 10, lambda count: 1.0) == {4: 10}
    assert not counts._known
