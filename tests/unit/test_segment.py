"""The supervisor's side of the memory that outlives engines: made, adopted, made anew, removed; never taken from its owner."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import pytest

from sidecar import segment as module
from sidecar.errors import NoRoom
from sidecar.segment import LEDGER_END, SHARED_MEMORY, Segment, read_budget, segment_bytes, segment_name
from tests.segments import PAGE, Make, names, segments

pytestmark = pytest.mark.usefixtures("nothing_leaks")

BUDGET = 64 * PAGE


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def make(nothing_leaks: None, run_dir: Path) -> Iterator[Make]:
    with segments(run_dir) as made:
        yield made


def path_of(segment: Segment) -> Path:
    assert segment.name is not None
    return SHARED_MEMORY / segment.name[1:]


def left_behind(make: Make, mark: bytes = b"weights") -> Path:
    """Make a segment, write into it, and let go of it as a supervisor that is killed does."""
    segment = make()
    os.pwrite(segment.descriptor, mark, LEDGER_END)
    segment.close()
    return path_of(segment)


def content(segment: Segment, size_bytes: int = 7) -> bytes:
    return os.pread(segment.descriptor, size_bytes, LEDGER_END)


def test_a_segment_is_private_sparse_and_says_what_it_is(make: Make) -> None:
    segment = make()
    found = os.stat(path_of(segment))
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_size == segment_bytes(BUDGET) > LEDGER_END + 2 * BUDGET
    assert found.st_blocks * 512 == LEDGER_END
    assert read_budget(segment.descriptor) == BUDGET
    assert not os.get_inheritable(segment.descriptor), "a fork passes it on, an exec must not"


def test_the_next_supervisor_of_a_run_directory_adopts_what_was_left(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = left_behind(make)
    adopted = make()
    assert path_of(adopted) == path
    assert content(adopted) == b"weights"
    assert f"with {PAGE} bytes of weights" in caplog.text


def test_a_clean_stop_leaves_nothing(make: Make) -> None:
    segment = make()
    path = path_of(segment)
    segment.unlink()
    segment.unlink()
    assert not path.exists()


def test_a_name_that_was_removed_already_is_no_error(make: Make) -> None:
    segment = make()
    path_of(segment).unlink()
    segment.unlink()


def test_a_path_with_links_names_the_same_run_directory(make: Make, run_dir: Path) -> None:
    left_behind(make)
    (run_dir.parent / "link").symlink_to(run_dir)
    with segments(run_dir.parent / "link") as make_by_link:
        assert content(make_by_link()) == b"weights"


def rewrite(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize(
    ("damage", "flaw"),
    [
        (lambda path: path.chmod(0o640), "mode is 0640 instead of 0600"),
        (lambda path: rewrite(path, b"SOMETHING"), "another version"),
        (lambda path: rewrite(path, bytes(PAGE)), "another version"),
        (lambda path: os.truncate(path, PAGE), f"has {PAGE} bytes instead of the {segment_bytes(BUDGET)}"),
    ],
    ids=["mode", "header", "unfinished", "size"],
)
def test_what_cannot_be_adopted_is_made_anew(make: Make, caplog: pytest.LogCaptureFixture, damage: object, flaw: str) -> None:
    path = left_behind(make)
    assert callable(damage)
    damage(path)
    segment = make()
    assert path_of(segment) == path
    assert content(segment) == bytes(7)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.search(rf"is made anew: .*{flaw}", caplog.text)


def test_a_segment_of_another_version_is_made_anew(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    left_behind(make)
    monkeypatch.setattr(module, "_LAYOUT", module._LAYOUT ^ 1)
    assert content(make()) == bytes(7)


@pytest.mark.parametrize("budget_bytes", [BUDGET + PAGE, 512 << 20])
def test_another_budget_asks_for_another_segment(make: Make, budget_bytes: int) -> None:
    left_behind(make)
    segment = make(budget_bytes)
    assert content(segment) == bytes(7)
    assert read_budget(segment.descriptor) == budget_bytes


def test_a_segment_of_another_user_is_made_anew(
    make: Make, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = left_behind(make)
    other = os.geteuid() + 1
    monkeypatch.setattr(module.os, "geteuid", lambda: other)
    path.rename(SHARED_MEMORY / segment_name(run_dir.resolve())[1:])
    segment = make()
    assert content(segment) == bytes(7)
    segment.unlink()
    assert f"belongs to user {other - 1}, not to {other}" in caplog.text


def test_a_segment_is_never_taken_from_a_live_owner(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    first = make()
    os.pwrite(first.descriptor, b"weights", LEDGER_END)
    second = make()
    assert second.name is None
    assert content(second) == bytes(7)
    assert "another sidecar is using it" in caplog.text
    second.unlink()
    assert path_of(first).exists()
    assert content(first) == b"weights"


def test_an_engine_that_outlives_its_supervisor_keeps_the_segment(make: Make) -> None:
    segment = make()
    os.pwrite(segment.descriptor, b"weights", LEDGER_END)
    ended, end = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(end)
        os.read(ended, 1)
        os._exit(0)
    os.close(ended)
    segment.close()
    assert make().name is None
    os.close(end)
    os.waitpid(pid, 0)
    assert content(make()) == b"weights"


def test_where_shared_memory_is_small_the_segment_has_no_name(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = names()
    state = os.statvfs(SHARED_MEMORY)
    needed_bytes = BUDGET + LEDGER_END
    blocks = needed_bytes // state.f_frsize - 1
    monkeypatch.setattr(module.os, "statvfs", lambda path: os.statvfs_result((*state[:4], blocks, *state[5:])))
    segment = make()
    assert segment.name is None
    assert names() == before
    assert f"{blocks * state.f_frsize} bytes free, the memory budget and its ledger take {needed_bytes}" in caplog.text
    assert read_budget(segment.descriptor) == BUDGET
    assert os.fstat(segment.descriptor).st_blocks * 512 == LEDGER_END
    segment.unlink()


@pytest.mark.parametrize(
    "error",
    [posix_ipc.PermissionsError("no permission"), FileNotFoundError(errno.ENOENT, "no such folder")],
    ids=["squatter", "none"],
)
def test_without_a_name_to_be_had_the_segment_has_none(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(module.posix_ipc, "SharedMemory", refuse)
    assert make().name is None
    assert str(error) in caplog.text


def test_where_not_even_the_ledger_fits_numbers_say_so(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names()

    def refuse(*args: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "posix_fallocate", refuse)
    with pytest.raises(NoRoom, match=f"{LEDGER_END} bytes of shared memory left for the ledger") as caught:
        make()
    assert caught.value.details == {"needed_bytes": LEDGER_END}
    assert names() == before


# --- segments that nobody will ask for ------------------------------------------------------------------------------------


def test_the_segment_of_a_run_directory_that_is_gone_is_removed(
    make: Make, tmp_path: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = left_behind(make)
    with segments(tmp_path / "other") as make_other:
        kept = make_other()
        assert path.exists(), "its run directory is there, so it may be asked for again"
        kept.unlink()
        kept.close()
        shutil.rmtree(run_dir)
        make_other()
        assert not path.exists()
    assert f"its run directory {run_dir.resolve()} is gone" in caplog.text


def test_a_segment_in_use_is_not_removed_though_its_run_directory_is_gone(make: Make, tmp_path: Path, run_dir: Path) -> None:
    segment = make()
    shutil.rmtree(run_dir)
    with segments(tmp_path / "other") as make_other:
        assert make_other().name is not None
    assert path_of(segment).exists()


@pytest.mark.parametrize("data", [b"", b"something of another program, longer than a header"])
def test_what_is_no_segment_is_left_alone(make: Make, data: bytes) -> None:
    path = SHARED_MEMORY / f"trunkline-{os.geteuid()}-test"
    path.write_bytes(data)
    try:
        assert make().name is not None
        assert path.read_bytes() == data
    finally:
        path.unlink()
