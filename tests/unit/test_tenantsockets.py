"""Sockets of tenants: there for who asks for one, with the modes that were said, kept beyond an engine, gone with the tenant."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.peers import Peer
from sidecar.tenants import Quotas, Tenant
from sidecar.tenantsockets import Keeper, TenantSockets, listen_at, silence

OWN_GROUP = os.getgid()


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    made = Keeper()
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tenants"


def quotas(*names: str, gid: int | None = None) -> Quotas:
    """Return quotas in which these have sockets of their own, and another has none."""
    tenants = [Tenant(name=name, domain=name, socket=True, socket_gid=gid) for name in names]
    return Quotas({tenant.name: tenant for tenant in (*tenants, Tenant(name="plain", domain="plain"))})


def connected(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return False
        return True


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def close(sockets: TenantSockets) -> None:
    for listener in sockets.follow(Quotas({})).values():
        listener.close()


def test_who_asks_for_a_socket_has_one_in_a_folder_of_its_own(folder: Path, keeper: Keeper) -> None:
    sockets = TenantSockets(folder, keeper)
    found = sockets.follow(quotas("vision", "search"))
    assert found.keys() == {"vision", "search"}
    assert sorted(path.name for path in folder.iterdir()) == ["search", "vision"]
    assert connected(folder / "vision" / "trunkline.sock")
    assert (mode(folder), mode(folder / "vision"), mode(folder / "vision" / "trunkline.sock")) == (0o711, 0o755, 0o666)
    # What is there stays what it is.
    again = sockets.follow(quotas("vision", "search"))
    assert all(again[name] is found[name] for name in found)
    for listener in found.values():
        listener.close()


@pytest.mark.parametrize("is_known", [True, False])
def test_descriptors_go_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool) -> None:
    with monkeypatch.context() as older:
        if not is_known:
            older.setattr("sidecar.tenantsockets._SO_PASSRIGHTS", 9999)
        listener = listen_at(tmp_path / "s", 0o600)
    with listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(tmp_path / "s"))
        try:
            socket.send_fds(client, [b"x"], [0])
        except PermissionError:
            assert is_known
            client.send(b"x")
        sock, _ = listener.accept()
        before = len(os.listdir("/proc/self/fd"))
        with sock:
            assert sock.recv(10) == b"x"
            assert len(os.listdir("/proc/self/fd")) == before


def test_a_socket_of_a_group_is_that_groups(folder: Path, keeper: Keeper) -> None:
    sockets = TenantSockets(folder, keeper)
    first = sockets.follow(quotas("vision"))["vision"]
    second = sockets.follow(quotas("vision", gid=OWN_GROUP))["vision"]
    assert second is not first
    path = folder / "vision" / "trunkline.sock"
    assert (mode(path.parent), mode(path), path.stat().st_gid) == (0o750, 0o660, OWN_GROUP)
    for listener in (first, second):
        listener.close()


def test_folders_go_with_their_tenants_and_what_else_is_there_stays(folder: Path, keeper: Keeper) -> None:
    sockets = TenantSockets(folder, keeper)
    found = sockets.follow(quotas("vision", "search"))
    (folder / "search" / "notes").write_text("mine")
    # Left by a sidecar that was killed.
    (folder / "gone").mkdir()
    (folder / "gone" / "trunkline.sock").touch()
    (folder / "file").touch()
    left = sockets.follow(quotas("vision"))
    assert left == {"vision": found["vision"]}
    assert sorted(path.name for path in folder.iterdir()) == ["file", "search", "vision"]
    assert [path.name for path in (folder / "search").iterdir()] == ["notes"]
    for listener in found.values():
        listener.close()


def test_an_engine_has_the_sockets_of_the_one_before(folder: Path, keeper: Keeper) -> None:
    path = folder / "vision" / "trunkline.sock"
    dead = TenantSockets(folder, keeper).follow(quotas("vision"))
    number = path.stat().st_ino
    for listener in dead.values():
        # It dies the moment after.
        listener.close()
    keeper.take()
    # Who connects meanwhile waits.
    assert connected(path)
    sockets = TenantSockets(folder, keeper)
    found = sockets.follow(quotas("vision"))
    assert found["vision"] is keeper.listeners["vision"]
    assert path.stat().st_ino == number
    found["vision"].setblocking(False)
    found["vision"].accept()[0].close()
    # One that is not wanted any more is not kept either, and nobody can connect to it.
    assert sockets.follow(quotas()) == {}
    keeper.take()
    assert keeper.listeners == {}
    assert found["vision"].fileno() == -1
    assert not connected(path)


def test_a_socket_that_somebody_removed_is_made_anew(folder: Path, keeper: Keeper) -> None:
    sockets = TenantSockets(folder, keeper)
    first = sockets.follow(quotas("vision"))["vision"]
    (folder / "vision" / "trunkline.sock").unlink()
    second = sockets.follow(quotas("vision"))["vision"]
    assert connected(folder / "vision" / "trunkline.sock")
    for listener in (first, second):
        listener.close()


def test_one_that_cannot_be_made_keeps_no_other_from_being(
    tmp_path: Path, keeper: Keeper, caplog: pytest.LogCaptureFixture
) -> None:
    # The path of one name is too long for a socket, and that of the other is not.
    root = tmp_path / ("x" * (100 - len(str(tmp_path)) - len("/trunkline.sock") - len("/a")))
    found = TenantSockets(root, keeper).follow(quotas("a", "a" * 63))
    assert found.keys() == {"a"}
    assert f"{'a' * 63} has no socket of its own" in caplog.text
    found["a"].close()


def test_what_the_supervisor_cannot_be_handed_is_told(folder: Path, keeper: Keeper, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(10_000):
        keeper.hand_over(f"t{number}", None)
        if caplog.text:
            break
    assert "is not kept for the next engine" in caplog.text
    keeper.take()
    keeper.hand_over("a", None)
    assert len(caplog.records) == 1


def test_when_the_sidecar_ends_nobody_is_listening_and_what_is_mounted_stays(folder: Path, keeper: Keeper) -> None:
    found = TenantSockets(folder, keeper).follow(quotas("vision"))
    silence(folder)
    assert [path.name for path in folder.iterdir()] == ["vision"]
    assert list((folder / "vision").iterdir()) == []
    found["vision"].close()
    silence(folder / "nowhere")


@pytest.mark.parametrize(
    ("uid", "gid", "peer", "is_bound"),
    [
        (None, None, None, False),
        (None, None, Peer(1, 2, 3), False),
        (2, None, Peer(1, 2, 3), False),
        (2, 3, Peer(1, 2, 3), False),
        (3, None, Peer(1, 2, 3), True),
        (2, 2, Peer(1, 2, 3), True),
        (None, 2, Peer(1, 2, 3), True),
        (0, None, Peer(1, 2, 3), True),
        # Nobody can see who it is: over HTTP, say.
        (2, None, None, True),
    ],
)
def test_who_is_bound_to_others(uid: int | None, gid: int | None, peer: Peer | None, is_bound: bool) -> None:
    assert Tenant(name="a", domain="a", uid=uid, gid=gid).is_bound_to_others(peer) is is_bound


OF = {"own": "1" * 64, "bare": "", "plain": "2" * 64}
SEVERAL = Quotas(
    {
        "own": Tenant(name="own", domain="own", socket=True, token_hashes=(OF["own"],)),
        "bare": Tenant(name="bare", domain="bare", socket=True),
        "plain": Tenant(name="plain", domain="plain", token_hashes=(OF["plain"],)),
    }
)


@pytest.mark.parametrize("through", ["", *OF, "gone"])
@pytest.mark.parametrize("token_hash", [*OF.values(), "3" * 64])
def test_through_a_tenants_socket_comes_that_tenant_or_nobody(through: str, token_hash: str) -> None:
    expected = {("", OF["plain"]): "plain", ("own", OF["own"]): "own", ("bare", ""): "bare"}.get((through, token_hash))
    found = SEVERAL.holder(token_hash, through)
    assert (None if found is None else found.name) == expected
