"""Taking over, its parts one by one: who may, what lies aside meanwhile, and whose the names are in the end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidecar.errors import ConfigError
from sidecar.rundirectory import Ownership, RunDirectory, write_token
from sidecar.segment import LEDGER_END, SHARED_MEMORY, Segment
from sidecar.takeover import TakeOver, outstay
from sidecar.tenants import OPEN, Quotas, Tenant
from sidecar.tenantsockets import Keeper, TenantSockets, aside, listen_at
from tests.segments import PAGE, Make, segments

pytestmark = pytest.mark.usefixtures("nothing_leaks")

BUDGET = 64 * PAGE


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.create()
    return made


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in another process; return 0 for what is false, 1 for what is true, 2 where it was refused."""
    pid = os.fork()
    if not pid:
        status = 3
        try:
            status = int(bool(work()))
        except ConfigError as error:
            status = 2 if "another sidecar is about to take over in" in str(error) else 4
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def succeeds(run: RunDirectory) -> bool:
    with run.succession():
        return True


def owns(run: RunDirectory) -> bool:
    with run.owned(0.0):
        return True


def test_one_at_a_time_may_be_about_to_take_over(run: RunDirectory) -> None:
    assert not run.has_successor()
    with run.succession():
        assert in_child(lambda: succeeds(run)) == 2
        assert in_child(run.has_successor) == 1
        # Nor does one start in its place that does not take over.
        assert in_child(lambda: owns(run)) == 2
    assert in_child(run.has_successor) == 0
    assert in_child(lambda: succeeds(run)) == 1
    assert in_child(lambda: owns(run)) == 1


def test_to_ask_is_in_nobodys_way(run: RunDirectory) -> None:
    with run.succession():
        for _ in range(3):
            assert in_child(run.has_successor) == 1
            assert in_child(lambda: succeeds(run)) == 2


def test_an_owner_is_seen_by_others(run: RunDirectory) -> None:
    assert not run.has_owner()
    with run.owned(0.0):
        for _ in range(3):
            assert in_child(run.has_owner) == 1
            assert in_child(lambda: owns(run)) != 1
    assert in_child(run.has_owner) == 0


def outstayed(run: RunDirectory, meanwhile: Callable[[int], None]) -> int:
    """Have a child wait as one that was taken over from; return its exit code. ``meanwhile`` is told its pid."""
    # Before the fork: gRPC, where an earlier test has loaded it, starts threads in the child at once, which would take it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        pid = os.fork()
        if not pid:
            outstay(run)
            os._exit(0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    meanwhile(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_one_that_was_taken_over_from_waits_until_it_is_told_to_end(run: RunDirectory) -> None:
    with run.owned(0.0):
        assert outstayed(run, lambda pid: os.kill(pid, signal.SIGTERM)) == 0


def test_one_that_was_taken_over_from_ends_when_the_other_is_gone(run: RunDirectory) -> None:
    with contextlib.ExitStack() as other:
        other.enter_context(run.succession())
        other.enter_context(run.owned(0.0))

        def leave(pid: int) -> None:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)
            other.close()

        assert outstayed(run, leave) == 0


def test_a_directory_is_taken_when_nothing_is_left_of_its_owner(run: RunDirectory) -> None:
    def takes() -> bool:
        with run.ownership() as ownership:
            return ownership.take_if_free()

    with run.ownership() as ownership:
        assert in_child(takes) == 1
        assert ownership.take_if_free()
        assert ownership.take_if_free()
        assert in_child(takes) == 0


@pytest.fixture
def make(nothing_leaks: None, run: RunDirectory) -> Iterator[Make]:
    with segments(run.root) as made:
        yield made


def test_the_segment_of_who_takes_over_lies_beside_the_other_and_takes_its_name_in_the_end(make: Make, run: RunDirectory) -> None:
    first = make()
    os.pwrite(first.descriptor, b"first", LEDGER_END)
    second = Segment.create_or_adopt(run.root, BUDGET, is_next=True)
    os.pwrite(second.descriptor, b"other", LEDGER_END)
    assert (first.name, second.name) == (first.name, f"{first.name}-next")
    # The other ends.
    first.unlink()
    first.close()
    second.take_place()
    second.take_place()
    second.close()
    adopted = make()
    assert adopted.name == second.name
    assert os.pread(adopted.descriptor, 5, LEDGER_END) == b"other"


def test_the_segment_of_one_that_never_took_over_is_removed(make: Make, run: RunDirectory) -> None:
    left = Segment.create_or_adopt(run.root, BUDGET, is_next=True)
    assert left.name is not None
    path = SHARED_MEMORY / left.name[1:]
    made = make()
    assert path.exists(), "it is in use"
    left.close()
    made.close()
    make()
    assert not path.exists()


def test_a_segment_that_an_operator_has_removed_takes_no_place(run: RunDirectory, make: Make) -> None:
    left = Segment.create_or_adopt(run.root, BUDGET, is_next=True)
    assert left.name is not None
    (SHARED_MEMORY / left.name[1:]).unlink()
    name = left.name.removesuffix("-next")
    left.take_place()
    assert left.name == name
    left.unlink()
    left.close()
    assert make().name == name


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    made = Keeper()
    yield made
    made.close()


def with_socket(*names: str) -> Quotas:
    return Quotas({name: Tenant(name=name, domain=name, socket=True) for name in names})


def test_sockets_of_tenants_lie_aside_where_another_has_them(run: RunDirectory, keeper: Keeper) -> None:
    other = Keeper()
    theirs = TenantSockets(run.tenants, other).follow(with_socket("vision"))["vision"]
    path = run.tenants / "vision" / "trunkline.sock"
    before = path.stat().st_ino
    sockets = TenantSockets(run.tenants, keeper)
    assert sockets.open_aside(with_socket("vision", "search")) == {path: "vision"}
    assert aside(path).is_socket()
    # The engine that is given them goes on with these, and makes the others.
    followed = TenantSockets(run.tenants, keeper).follow(with_socket("vision", "search"))
    assert followed["vision"] is keeper.listeners["vision"]
    assert path.stat().st_ino == before
    assert (run.tenants / "search" / "trunkline.sock").is_socket()
    for each in (theirs, followed["search"]):
        each.close()
    other.close()


def taking_over(run: RunDirectory, ownership: Ownership, alone: list[str], state: list[Path]) -> TakeOver:
    return TakeOver(
        run,
        ownership,
        contextlib.ExitStack(),
        OPEN,
        state=lambda: state,
        alone=lambda: alone.append("alone"),
    )


def test_names_change_hands_at_the_end_and_what_was_changed_meanwhile_is_told(
    run: RunDirectory, keeper: Keeper, tmp_path: Path
) -> None:
    told: list[str] = []
    changed = tmp_path / "pins.json"
    changed.write_text("{}")
    theirs, token = listen_at(run.socket, 0o666), write_token(run.token)
    before = run.socket.stat().st_ino
    with run.ownership() as ownership:
        taking = taking_over(run, ownership, told, [changed, tmp_path / "none"])
        listeners, shared = taking.listen(keeper)
        assert shared == token
        assert not taking.is_ready(), "nobody answers"
        assert run.socket.stat().st_ino == before
        taking.put_in_place(keeper)
        assert run.socket.stat().st_ino != before
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as function:
            function.connect(str(run.socket))
            listeners.functions.accept()[0].close()
        assert taking.is_alone()
        # The other has removed it, as one does that does not know that it has a successor.
        run.token.unlink()
        assert not taking.finish()
        assert run.token.read_bytes() == token
        assert told == ["alone"]
        (tmp_path / "new").write_text("{ }")
        (tmp_path / "new").rename(changed)
        assert taking.finish(), "an operator has pinned something"
    for each in (*listeners, theirs):
        each.close()


def test_one_that_gives_up_leaves_nothing_aside(run: RunDirectory, keeper: Keeper) -> None:
    with run.ownership() as ownership:
        taking = taking_over(run, ownership, [], [])
        listeners, token = taking.listen(keeper)
        # None ran there any more: the next ones of it need a token.
        assert run.token.read_bytes() == token
        taking.give_up()
        taking.give_up()
    listeners.close()
    assert [path.name for path in run.root.rglob("*.next")] == []


def test_a_token_that_is_another_users_is_told(run: RunDirectory, keeper: Keeper) -> None:
    run.token.mkdir()
    with run.ownership() as ownership, pytest.raises(ConfigError, match="be the user that runs the sidecar"):
        taking_over(run, ownership, [], []).listen(keeper)
