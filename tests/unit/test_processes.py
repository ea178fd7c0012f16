"""Small things around processes: what operators said about models, run directories, children and parents."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from trunkline.errors import InvalidInput

from sidecar.errors import ConfigError
from sidecar.keeping import Keep
from sidecar.pins import Pins
from sidecar.processes import die_with_parent, end_within, forbid_core_dumps
from sidecar.rundirectory import RunDirectory, write_token
from sidecar.tenantsockets import listen_at


def test_pins_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "pins.json"
    pins = Pins(path)
    pins.add("b")
    pins.add("a")
    pins.discard("b")
    pins.discard("never there")
    assert Pins(path).names() == ["a"]


def test_how_models_are_kept_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "pins.json"
    pins = Pins(path)
    pins.add("a")
    pins.keep("a", Keep(9, 60.0))
    pins.keep("b", Keep(0))
    pins.keep("c", Keep(1))
    pins.keep("c", Keep())
    again = Pins(path)
    assert again.names() == ["a"]
    assert [again.kept(name) for name in "abc"] == [Keep(9, 60.0), Keep(0), Keep()]
    assert '"c"' not in path.read_text(), "what is as ever is not written down"
    again.forget("a")
    again.forget("never there")
    assert (Pins(path).names(), Pins(path).kept("a"), Pins(path).kept("b")) == ([], Keep(), Keep(0))


def test_what_was_said_of_a_model_is_forgotten_in_all_domains(tmp_path: Path) -> None:
    path = tmp_path / "pins.json"
    pins = Pins(path)
    for name in ("a", "a@x", "a@y", "b@x", "ab@x"):
        pins.add(name)
        pins.keep(name, Keep(9))
    pins.forget("a")
    again = Pins(path)
    assert again.names() == ["ab@x", "b@x"]
    assert [again.kept(name) for name in ("a", "a@x", "a@y", "b@x")] == [Keep(), Keep(), Keep(), Keep(9)]


def test_a_file_of_pins_alone_is_still_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "pins.json"
    path.write_text('["b", "a"]')
    assert Pins(path).names() == ["a", "b"]
    assert Pins(path).kept("a") == Keep()
    assert not caplog.records


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[" * 100_000,
        b"\xff",
        b"3",
        b"[1, 2]",
        b'{"pinned": 3}',
        b'{"kept": []}',
        b'{"kept": {"a": 1}}',
        b'{"kept": {"a": {}}}',
        b'{"kept": {"a": {"priority": 10}}}',
        b'{"kept": {"a": {"priority": 1, "colour": 2}}}',
        b'{"kept": {"a": {"keep_alive_s": NaN}}}',
    ],
)
def test_what_cannot_be_read_is_ignored_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    path = tmp_path / "pins.json"
    path.write_bytes(content)
    pins = Pins(path)
    assert (pins.names(), pins.kept("a")) == ([], Keep())
    assert len(caplog.records) == 1
    assert "is ignored" in caplog.text
    pins.keep("a", Keep(1))
    assert Pins(path).kept("a") == Keep(1)


def test_what_is_damaged_does_not_take_the_rest_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "pins.json"
    path.write_text('{"pinned": ["p", 1], "kept": {"a": {"priority": "9"}, "b": {"priority": 9}}}')
    pins = Pins(path)
    assert (pins.names(), pins.kept("a"), pins.kept("b")) == (["p"], Keep(), Keep(9))
    assert "for 'a', priority is '9'; it must be an integer from 0 to 9" in caplog.text


def test_what_is_not_said_of_a_model_stays() -> None:
    keep = Keep().changed({"priority": 7}).changed({"keep_alive_s": 60})
    assert keep == Keep(7, 60.0)
    assert keep.changed({"keep_alive_s": None}) == Keep(7)
    assert keep.changed({"priority": 0}).to_plain() == {"priority": 0, "keep_alive_s": 60.0}
    assert Keep().changed({"keep_alive_s": 0, "priority": 9}) == Keep(9, 0.0)
    assert Keep().changed({"keep_alive_s": 31_536_000}).keep_alive_s == 31_536_000


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({}, "priority and keep_alive_s: one of them, or both"),
        ({"colour": 1}, "priority and keep_alive_s: one of them, or both"),
        *(({"priority": value}, "from 0 to 9") for value in (10, -1, 5.0, True, None, "5", [5])),
        *(
            ({"keep_alive_s": value}, "from 0 to 31536000, or null")
            for value in (-1, -0.5, 31_536_001, 10**30, 1e300, float("inf"), float("nan"), True, "60", "forever", [60], {})
        ),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(asked: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem):
        Keep().changed(asked)


def test_pins_that_cannot_be_saved_hold_until_the_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pins = Pins(tmp_path / "none" / "pins.json")
    pins.add("a")
    assert pins.names() == ["a"]
    assert "cannot be saved" in caplog.text


def test_a_child_whose_parent_is_gone_already_does_not_start() -> None:
    pid = os.fork()
    if not pid:
        try:
            die_with_parent(1 << 22)
        except ProcessLookupError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_process_that_hangs_when_told_to_end_is_ended() -> None:
    pid = os.fork()
    if not pid:
        end_within(0.1)
        # Whoever says it again puts it off no longer.
        end_within(3600.0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        while True:
            time.sleep(60)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGALRM


def test_a_run_directory_is_one_sidecars(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    with run.owned(0.0):
        pid = os.fork()
        if not pid:
            try:
                with RunDirectory(run.root).owned(3600.0):
                    os._exit(0)
            except ConfigError as error:
                os._exit(7 if "is running in" in str(error) else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    with run.owned(0.0):
        pass


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[int]:
    """Have a child of a sidecar that was killed, which holds on to its run directory; its pid."""
    run, (reads, writes) = RunDirectory(tmp_path / "run"), os.pipe()
    run.create()
    killed = os.fork()
    if not killed:
        with run.owned(0.0):
            if not os.fork():
                os.write(writes, str(os.getpid()).encode())
                time.sleep(3600)
                os._exit(0)
            signal.pause()
    pid = int(os.read(reads, 32))
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    yield pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.close(reads)
    os.close(writes)


def test_what_a_killed_sidecar_left_is_waited_for(tmp_path: Path, orphan: int, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDirectory(tmp_path / "run")
    end = threading.Timer(0.3, os.kill, (orphan, signal.SIGKILL))
    end.start()
    with run.owned(3600.0):
        pass
    end.join()
    assert [record.getMessage() for record in caplog.records] == [
        f"a sidecar that was killed has left processes in {run.root}; they are waited for"
    ]


def test_what_a_killed_sidecar_left_is_not_waited_for_without_end(tmp_path: Path, orphan: int) -> None:
    run = RunDirectory(tmp_path / "run")
    with (
        pytest.raises(ConfigError, match=r"has not ended within 0\.1 s; end these processes \(fuser .*/lock shows them\)"),
        run.owned(0.1),
    ):
        pass


def test_a_socket_path_that_is_too_long_is_told(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / ("x" * 120))
    run.create()
    with pytest.raises(ConfigError, match="at most 107 characters"):
        listen_at(run.socket, 0o666)


def test_a_token_is_private_and_new_each_time(tmp_path: Path) -> None:
    path = tmp_path / "token"
    first, second = write_token(path), write_token(path)
    assert first != second
    assert path.read_bytes() == second
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_process_that_crashes_leaves_no_copy_of_its_memory(tmp_path: Path) -> None:
    pid = os.fork()
    if not pid:
        try:
            os.chdir(tmp_path)
            # As much as it may have: another test may have had this process give up its own.
            most = resource.getrlimit(resource.RLIMIT_CORE)[1]
            resource.setrlimit(resource.RLIMIT_CORE, (most, most))
            forbid_core_dumps()
            os.abort()
        finally:
            # Whatever goes wrong: not on into the tests that follow.
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WTERMSIG(status) == signal.SIGABRT
    assert not os.WCOREDUMP(status)
    assert not list(tmp_path.iterdir())
