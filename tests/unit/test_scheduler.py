"""The queue: in order, bounded, nothing late is run."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from trunkline.errors import QueueFull

from sidecar.scheduler import Queue


@dataclass
class Request:
    name: str
    deadline: float = 10.0


def test_first_come_first_served() -> None:
    queue: Queue[Request] = Queue(3)
    for name in "abc":
        queue.submit(Request(name))
    assert [queue.take(0)[1].name for _ in range(3)] == ["a", "b", "c"]  # type: ignore[union-attr]
    assert queue.take(0) == ([], None)


def test_a_full_queue_refuses_with_the_numbers() -> None:
    queue: Queue[Request] = Queue(1)
    queue.submit(Request("a"))
    with pytest.raises(QueueFull, match="1 requests are waiting, the limit is 1"):
        queue.submit(Request("b"))
    assert len(queue) == 1


def test_what_is_late_is_told_and_not_run() -> None:
    queue: Queue[Request] = Queue(5)
    for name, deadline in (("late", 1.0), ("later", 2.0), ("good", 9.0)):
        queue.submit(Request(name, deadline))
    expired, request = queue.take(2.0)
    assert [late.name for late in expired] == ["late", "later"]
    assert request is not None
    assert request.name == "good"


def test_what_could_not_start_comes_first_again() -> None:
    queue: Queue[Request] = Queue(2)
    queue.submit(Request("a"))
    queue.submit(Request("b"))
    _, first = queue.take(0)
    assert first is not None
    queue.put_back(first)
    assert queue.take(0)[1] is first


def test_dropping_takes_only_what_was_meant() -> None:
    queue: Queue[Request] = Queue(3)
    for name in "aba":
        queue.submit(Request(name))
    assert queue.drop(lambda request: request.name == "a") == 2
    assert len(queue) == 1
