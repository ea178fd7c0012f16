"""Fixtures for all tests: nothing a test starts may outlive it."""

from __future__ import annotations

import gc
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from trunkline import client, context

from tests.waiting import soon

# Tests run side by side, with more threads than cores: those that spin for work keep off those that have some. As sidecars have
# it; read when torch is imported, which nothing above does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def held() -> tuple[int, int]:
    """Return how many descriptors and threads this process has."""
    return open_descriptors(), threading.active_count()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what the fault matrix is told."""
    parser.addoption(
        "--full",
        action="store_true",
        help="have the fault matrix try as often as it asks for, not as often as a push has time for",
    )
    parser.addoption("--nightly", action="store_true", help="have the fault matrix try everything twenty times as often")
    parser.addoption("--rows", metavar="FILE", help="write what the rows of the fault matrix have found as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Gather what rows have found, wherever they ran; and have a folder for what all processes of the run need.

    Properties are tried with the same examples in each run, so that what fails fails for a reason; in a night, with others.
    """
    # Not on top of the profile in force: on machines of continuous integration Hypothesis has one of its own.
    settings.register_profile("push", settings.get_profile("default"), derandomize=True)
    settings.load_profile("default" if config.getoption("--nightly") else "push")
    if not hasattr(config, "workerinput"):
        # Inherited by those that run the tests; ``tests.zoo``, which imports torch, knows it by this name.
        converted = tempfile.TemporaryDirectory(prefix="trunkline-tests-")
        os.environ["CONVERTED_FOR_TESTS"] = converted.name
        config.add_cleanup(converted.cleanup)
    if config.getoption("--rows") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Rows(Path(config.getoption("--rows"))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have reports say which rows a test tries, those of tests that count nothing themselves, too."""
    for item in items:
        if ids := [each for mark in item.iter_markers("row") for each in mark.args]:
            item.user_properties.append(("ids", ids))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Have tests that are skipped fail where ``CI`` is set: there nothing is missing, but perhaps a CUDA device."""
    report = yield
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("gpu") is None:
        # Where it was skipped, and why.
        assert isinstance(report.longrepr, tuple)
        report.outcome, report.longrepr = "failed", f"not to be skipped where CI is set: {report.longrepr[2]}"
    return report


class _Rows:
    """Writes which rows tests have tried, whether they passed, how long they took, and what was found where they count."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun: dict[str, dict[str, Any]] = {}
        # Without those in whose middle everything was ended.
        self._ended: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = self._begun.setdefault(report.nodeid, {"test": report.nodeid, "passed": True, "seconds": 0.0})
        found["passed"] = found["passed"] and report.passed
        found["seconds"] = round(found["seconds"] + report.duration, 3)
        found |= {name: value for name, value in report.user_properties if name in ("ids", "row")}
        if report.when == "teardown" and "ids" in found:
            self._ended.append(found)

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps(self._ended, indent=1))


@pytest.fixture(autouse=True, scope="module")
def imports_at_rest() -> None:
    """Keep the collector from what was imported: to look through all of torch twice for each test took most of the time."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Have the log as it was before the test: how much is logged, and of which call, is one setting, and some change it."""
    loggers = [logging.getLogger(), logging.getLogger("trunkline")]
    before = [(each.level, each.propagate, each.disabled, [*each.handlers], [*each.filters]) for each in loggers]
    yield
    # As a gunicorn worker's thread has it before a request.
    context.call_id.set("")
    context.traceparent.set("")
    for each, (level, propagate, disabled, handlers, filters) in zip(loggers, before, strict=True):
        each.setLevel(level)
        each.propagate, each.disabled = propagate, disabled
        each.handlers[:], each.filters[:] = handlers, filters


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    """Compare what is held before and after the test. Less is no leak: an earlier test's rest may end meanwhile."""
    client._pool.close()
    gc.collect()
    before = held()
    yield
    client._pool.close()
    deadline = soon()
    while True:
        gc.collect()
        after = held()
        if after[0] <= before[0] and after[1] <= before[1]:
            return
        assert time.monotonic() < deadline, f"descriptors, threads: {before} before, {after} after"
        time.sleep(0.05)


def pytest_sessionfinish() -> None:
    """Wait for threads of engines that have ended: an interpreter must not end while torch is in the middle of an operator."""
    for thread in threading.enumerate():
        if thread.name in ("trials", "dry runs"):
            thread.join(20)
