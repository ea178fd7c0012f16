"""Fixtures of the fault matrix: the row, a sidecar that must survive it, one that may be killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.matrix import Row, held, left, settled, write_scaled
from tests.rows import Size
from tests.sidecar_process import SidecarProcess, sidecar_process


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give the rows the time they need to try all that often."""
    if _size(config) != "push":
        for item in items:
            if item.get_closest_marker("row") is not None:
                item.add_marker(pytest.mark.timeout(4 * 3600), append=False)


def _size(config: pytest.Config) -> Size:
    if config.getoption("--nightly"):
        return "night"
    return "full" if config.getoption("--full") else "push"


@pytest.fixture
def row(request: pytest.FixtureRequest, nothing_leaks: None) -> Iterator[Row]:
    """What the test finds of the rows that it is marked with. Checked after everything else that the test was given."""
    marker = request.node.get_closest_marker("row")
    assert marker is not None, "of which row is it?"
    found = Row(marker.args, _size(request.config))
    began_s = time.monotonic()
    yield found
    found.seconds = round(time.monotonic() - began_s, 3)
    request.node.user_properties.append(("row", found.to_plain()))
    found.check()


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a bundle whose answers are known."""
    return write_scaled(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def steady_box(tmp_path_factory: pytest.TempPathFactory, scaled: Path) -> Iterator[SidecarProcess]:
    """Run one sidecar for all rows of a module that it must survive."""
    with sidecar_process(tmp_path_factory.mktemp("box")) as box:
        box.admin.push(scaled)
        settled(box)
        yield box


@pytest.fixture
def steady(steady_box: SidecarProcess, row: Row) -> Iterator[SidecarProcess]:
    """Give a sidecar whose engine must be the same after the test, and have what it had."""
    engine, before = steady_box.await_engine(), held(steady_box)
    yield steady_box
    row.leaked |= left(steady_box, before)
    if steady_box.await_engine() != engine:
        row.leaked["engines that died"] = 1


@pytest.fixture
def mortal(tmp_path: Path, scaled: Path, row: Row) -> Iterator[SidecarProcess]:
    """Give a sidecar of this test's own, that may be killed. What is left of it when it has stopped is left behind."""
    with sidecar_process(tmp_path) as box:
        box.admin.push(scaled)
        yield box
        box.stop()
        sockets = [path.name for path in box.run_dir.rglob("*.sock")]
        row.leaked |= {"sockets": len(sockets)} if sockets else {}
