"""Pulls from a real HTTP server on this machine, which misbehaves: nothing is believed, nothing is lost that was checked."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from sidecar.bundle import blob_path
from sidecar.errors import (
    BlobCorrupt,
    BundleError,
    ConfigError,
    NotAtOrigin,
    NotTrusted,
    OriginFailed,
    OriginRefused,
    StoreFull,
)
from sidecar.fetching import StoredFiles
from sidecar.jobs import Cancelled, Unwatched
from sidecar.origins import Policy, Reference, manifest_file, parse_origin, parse_reference, signature_file
from sidecar.publishing import publish
from sidecar.pulling import Pulled, pull
from sidecar.store import Store
from tests import origin_server as origin
from tests.origin_server import Handler, OriginServer, origin_server, write_certificate, write_chained_bundle
from tests.unit.test_signers import write_key
from tests.waiting import PATIENCE_S

SMALL = [1.0, 2.0, 3.0]
# More than a client has in its hands at a time.
LARGE = [0.5] * 3_000_001


class Watched(Unwatched):
    """Remembers what was told, and stops the work when it is told to."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, str, str]] = []
        self.stop: Callable[[], bool] = lambda: False

    def advance(self, done: int, total: int, unit: str, step: str = "") -> None:
        self.told.append((done, total, unit, step))

    def checkpoint(self) -> None:
        if self.stop():
            raise Cancelled


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "origin"
    folder.mkdir()
    return folder


@pytest.fixture
def server(root: Path) -> Iterator[OriginServer]:
    with origin_server(root) as made:
        yield made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def published(tmp_path: Path, root: Path, name: str, *weights: list[float], key: Path | None = None) -> str:
    """Publish a bundle below the origin's root, and return NAME@sha256:DIGEST."""
    write_chained_bundle(tmp_path / name, name, *weights)
    return publish(str(tmp_path / name), str(root), store_dir=tmp_path / "store", sign_key=key).reference


def pulled(server: OriginServer, store: Store, reference: str, *, name: str | None = None, **policy: Any) -> Pulled:
    allowed = Policy(**{"origins": (parse_origin(server.url),)} | policy)
    return pull(parse_reference(f"{server.url}/{reference}"), store, allowed, Watched(), name=name)


def partials(store: Store) -> dict[str, int]:
    folder = store.root / "partial"
    return {path.name: path.stat().st_size for path in folder.iterdir()} if folder.is_dir() else {}


def stored_blobs(store: Store) -> set[str]:
    return {path.name for path in (store.root / "blobs").rglob("*") if path.is_file()}


def digest_of(values: list[float]) -> str:
    import numpy as np

    return hashlib.sha256(np.asarray(values, np.float32).tobytes()).hexdigest()


def test_a_model_comes_over_and_only_what_is_missing(
    tmp_path: Path, root: Path, server: OriginServer, store: Store, nothing_leaks: None
) -> None:
    reference = published(tmp_path, root, "first", SMALL, [4.0, 5.0, 6.0])
    found = pulled(server, store, reference)
    assert found == Pulled("first", "1", reference.partition("sha256:")[2], None, 2, 2, 24, 24)
    assert server.paths() == ["manifests", "graphs", "blobs", "blobs"]
    assert store.model("first").version == "1"
    assert store.verify().broken == {}
    sibling = published(tmp_path, root, "sibling", SMALL, [7.0, 8.0, 9.0])
    server.asked.clear()
    assert (pulled(server, store, sibling).fetched_count, pulled(server, store, sibling).fetched_bytes) == (1, 0)
    assert server.paths() == ["manifests", "graphs", "blobs", "manifests", "graphs"]


def test_a_model_may_be_called_otherwise_here(tmp_path: Path, root: Path, server: OriginServer, store: Store) -> None:
    reference = published(tmp_path, root, "theirs", SMALL)
    assert pulled(server, store, reference, name="ours").name == "ours"
    assert store.models() == ["ours"]
    with pytest.raises(BundleError, match="that of theirs, not of another"):
        pulled(server, store, reference.replace("theirs", "another"))


def test_progress_is_told_in_bytes_and_weights(tmp_path: Path, root: Path, server: OriginServer, store: Store) -> None:
    reference = parse_reference(f"{server.url}/{published(tmp_path, root, 'm', LARGE, [1.0] * len(LARGE))}")
    watch = Watched()
    pull(reference, store, Policy(origins=(reference.origin,)), watch)
    total = 2 * 4 * len(LARGE)
    assert watch.told[:2] == [(0, 0, "bytes", "manifest"), (0, 0, "bytes", "graph")]
    assert watch.told[-1] == (total, total, "bytes", "publishing")
    done = [told[0] for told in watch.told]
    assert done == sorted(done)
    assert {told[3] for told in watch.told[2:-1]} == {"weight 1 of 2", "weight 2 of 2"}


def test_environment_and_cookies_are_not_used(
    tmp_path: Path, root: Path, server: OriginServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)

    def with_a_cookie(handler: Handler, content: bytes) -> None:
        handler.answer(200, content, {"Set-Cookie": "a=b"})

    server.misbehave["/manifests"] = with_a_cookie
    pulled(server, store, published(tmp_path, root, "m", SMALL))
    assert len(server.headers) == 3
    for headers in server.headers:
        assert not {"authorization", "cookie", "proxy-authorization", "referer"} & {key.lower() for key in headers}
        assert headers["Accept-Encoding"] == "identity"


# --- an origin that misbehaves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["manifests", "graphs", "blobs"])
@pytest.mark.parametrize(
    ("act", "error", "problem"),
    [
        (origin.status(404), NotAtOrigin, "has no {kind}/"),
        (origin.status(301, Location="http://127.0.0.1:9/x"), OriginRefused, "answers 301 and leads somewhere else"),
        (origin.status(302, Location="http://169.254.169.254/"), OriginRefused, "answers 302"),
        (origin.status(307, Location="file:///etc/passwd"), OriginRefused, "answers 307"),
        (origin.status(308), OriginRefused, "answers 308"),
        (origin.status(203), OriginFailed, "answered 203"),
        (origin.status(401), OriginFailed, "answered 401"),
        (origin.status(500), OriginFailed, "answered 500"),
        (origin.status(503), OriginFailed, "answered 503"),
        (origin.altered, BlobCorrupt, "digest"),
        (origin.truncated, OriginFailed, "broke off in the middle of {kind}"),
        (origin.without_end, BlobCorrupt, "bytes"),
        (origin.silent, OriginFailed, "sent nothing for 0.2 s"),
        (origin.silent_in_the_middle, OriginFailed, "sent nothing for 0.2 s"),
    ],
)
@pytest.mark.row("F21")
def test_whatever_an_origin_does_is_told_and_nothing_bad_is_kept(
    kind: str,
    act: Callable[[Handler, bytes], None],
    error: type[Exception],
    problem: str,
    tmp_path: Path,
    root: Path,
    server: OriginServer,
    store: Store,
) -> None:
    reference = published(tmp_path, root, "m", SMALL)
    server.misbehave[f"/{kind}"] = act
    with pytest.raises(error, match=problem.format(kind=kind)) as raised:
        pulled(server, store, reference, idle_s=0.2)
    assert getattr(raised.value, "retryable", None) is (error is OriginFailed)
    assert store.models() == []
    assert stored_blobs(store) == set()
    assert server.paths()[-1] == kind
    server.misbehave.clear()
    server.release.set()
    assert pulled(server, store, reference).name == "m"
    assert partials(store) == {}


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path, root: Path, store: Store) -> None:
    certificate = write_certificate(tmp_path / "certificate")
    with origin_server(root, certificate) as server:
        reference = published(tmp_path, root, "m", SMALL)
        with pytest.raises(OriginFailed, match=r"cannot be reached \(ClientConnectorCertificateError\)"):
            pulled(server, store, reference)
        assert server.asked == []


def test_a_server_that_is_not_there_is_told(tmp_path: Path, root: Path, server: OriginServer, store: Store) -> None:
    reference = published(tmp_path, root, "m", SMALL)
    server.close()
    with pytest.raises(OriginFailed, match=r"cannot be reached \(ClientConnectorError\)"):
        pulled(server, store, reference)


def test_a_length_that_is_announced_otherwise_is_refused_before_a_byte_of_it(
    tmp_path: Path, root: Path, server: OriginServer, store: Store
) -> None:
    reference = published(tmp_path, root, "m", SMALL)
    server.misbehave["/blobs"] = origin.announcing_another_length
    with pytest.raises(BlobCorrupt, match="has 16 bytes at the origin instead of 12"):
        pulled(server, store, reference)
    server.misbehave = {"/manifests": lambda handler, content: handler.answer(200, b" " * ((1 << 20) + 1))}
    with pytest.raises(BlobCorrupt, match="longer than the 1048576 bytes"):
        pulled(server, store, reference)
    assert partials(store) == {}


def test_a_bundle_is_read_as_strictly_as_one_that_is_pushed(
    tmp_path: Path, root: Path, server: OriginServer, store: Store
) -> None:
    published(tmp_path, root, "m", SMALL)
    for content in (b"{}", b'{"format": "trunkline-bundle-1", "format": 1}', b"[" * 100_000, b"\xff"):
        digest = hashlib.sha256(content).hexdigest()
        (root / manifest_file(digest)).write_bytes(content)
        with pytest.raises(BundleError, match=r"^manifest\.json"):
            pulled(server, store, f"m@sha256:{digest}")
    graph = b'{"evil": true}'
    manifest = next(root.glob("manifests/*")).read_bytes()
    manifest = next(p for p in map(Path.read_bytes, root.glob("manifests/*")) if b'"graph"' in p)
    named = hashlib.sha256(graph).hexdigest().encode()
    before = manifest.split(b'"graph":"')[1][:64]
    manifest = manifest.replace(before, named)
    digest = hashlib.sha256(manifest).hexdigest()
    (root / manifest_file(digest)).write_bytes(manifest)
    (root / "graphs" / named[:2].decode()).mkdir(exist_ok=True)
    (root / "graphs" / named[:2].decode() / named.decode()).write_bytes(graph)
    with pytest.raises(BundleError, match=r"^graph\.json"):
        pulled(server, store, f"m@sha256:{digest}")
    assert store.models() == []


def test_a_weight_beyond_the_limit_is_refused_before_it_is_asked_for(
    tmp_path: Path, root: Path, server: OriginServer, store: Store
) -> None:
    reference = published(tmp_path, root, "m", SMALL)
    with pytest.raises(BundleError, match=r"has 12 bytes, the limit is 11 \(--blob-limit\)"):
        pulled(server, store, reference, blob_limit_bytes=11)
    assert server.paths() == ["manifests", "graphs"]


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [origin.truncated, origin.truncated_without_a_length, origin.silent_in_the_middle])
def test_a_pull_goes_on_where_another_broke_off(
    act: Callable[[Handler, bytes], None], tmp_path: Path, root: Path, server: OriginServer, store: Store
) -> None:
    reference = published(tmp_path, root, "m", [1.0] * len(LARGE), LARGE)
    size = 4 * len(LARGE)
    second = digest_of(LARGE)
    server.misbehave[f"/blobs/{second[:2]}/{second}"] = act
    with pytest.raises(OriginFailed):
        pulled(server, store, reference, idle_s=0.5)
    assert stored_blobs(store) == {digest_of([1.0] * len(LARGE))}
    came = partials(store)[second]
    assert 0 < came <= size // 2
    server.misbehave.clear()
    server.asked.clear()
    # Another life of the sidecar finds it, too.
    found = pulled(server, Store(store.root), reference)
    assert server.ranges() == [f"bytes={came}-"]
    assert (found.fetched_count, found.fetched_bytes, found.blob_bytes) == (1, size - came, 2 * size)
    assert store.verify().corrupt == []
    assert partials(store) == {}


def broken_off(server: OriginServer, store: Store, reference: str) -> None:
    server.misbehave["/blobs"] = origin.truncated
    with pytest.raises(OriginFailed):
        pulled(server, store, reference)
    server.misbehave.clear()
    assert len(partials(store)) == 1


def test_a_server_without_ranges_sends_it_all_again(tmp_path: Path, root: Path, server: OriginServer, store: Store) -> None:
    reference = published(tmp_path, root, "m", LARGE)
    broken_off(server, store, reference)
    server.knows_ranges = False
    pulled(server, store, reference)
    assert store.verify().corrupt == []
    assert len(server.ranges()) == 1


def test_another_part_than_was_asked_for_is_refused(tmp_path: Path, root: Path, server: OriginServer, store: Store) -> None:
    reference = published(tmp_path, root, "m", LARGE)
    broken_off(server, store, reference)
    server.misbehave["/blobs"] = origin.another_range
    with pytest.raises(OriginFailed, match="sent another part of it"):
        pulled(server, store, reference)


def test_a_part_that_was_altered_meanwhile_is_given_up(tmp_path: Path, root: Path, server: OriginServer, store: Store) -> None:
    reference = published(tmp_path, root, "m", LARGE)
    broken_off(server, store, reference)
    path = store.root / "partial" / digest_of(LARGE)
    path.write_bytes(b"!" + path.read_bytes()[1:])
    with pytest.raises(BlobCorrupt, match="digest"):
        pulled(server, store, reference)
    assert partials(store) == {}
    assert pulled(server, store, reference).fetched_bytes == 4 * len(LARGE)


def test_what_was_received_whole_but_not_put_in_place_is_not_asked_for_again(
    tmp_path: Path, root: Path, server: OriginServer, store: Store
) -> None:
    reference = published(tmp_path, root, "m", SMALL)
    (store.root / "partial").mkdir()
    whole = root / "blobs" / digest_of(SMALL)[:2] / digest_of(SMALL)
    (store.root / "partial" / digest_of(SMALL)).write_bytes(whole.read_bytes())
    assert pulled(server, store, reference).fetched_bytes == 0
    assert server.paths() == ["manifests", "graphs"]
    assert store.verify().corrupt == []


def test_two_pulls_of_one_weight_do_not_write_into_one_file(
    tmp_path: Path, root: Path, server: OriginServer, store: Store
) -> None:
    reference = published(tmp_path, root, "m", LARGE)
    server.misbehave["/blobs"] = origin.silent_in_the_middle
    failed: list[Exception] = []

    def first() -> None:
        try:
            pulled(server, store, reference)
        except OriginFailed as error:
            failed.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert server.waited_for.wait(PATIENCE_S)
    server.misbehave.clear()
    assert pulled(server, store, reference).fetched_bytes == 4 * len(LARGE)
    server.release.set()
    thread.join(PATIENCE_S)
    assert len(failed) == 1
    assert store.verify().corrupt == []


def test_a_pull_that_is_cancelled_stops_although_nothing_comes(
    tmp_path: Path, root: Path, server: OriginServer, store: Store, nothing_leaks: None
) -> None:
    reference = parse_reference(f"{server.url}/{published(tmp_path, root, 'm', LARGE)}")
    server.misbehave["/blobs"] = origin.silent_in_the_middle
    watch = Watched()
    watch.stop = server.waited_for.is_set
    with pytest.raises(Cancelled):
        pull(reference, store, Policy(origins=(reference.origin,), idle_s=600.0), watch)
    assert 0 < partials(store)[digest_of(LARGE)] <= 2 * len(LARGE)
    server.release.set()


@pytest.mark.row("F21")
def test_a_pull_that_takes_too_long_is_ended(tmp_path: Path, root: Path, server: OriginServer, store: Store) -> None:
    reference = published(tmp_path, root, "m", LARGE)
    server.misbehave["/blobs"] = origin.silent_in_the_middle
    with pytest.raises(OriginFailed, match=r"not done after 0\.5 s"):
        pulled(server, store, reference, timeout_s=0.5)


@pytest.mark.row("F20")
def test_a_full_disk_is_told_and_given_back(
    tmp_path: Path, root: Path, server: OriginServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = published(tmp_path, root, "m", LARGE)
    write = os.write

    def full(descriptor: int, content: Any) -> int:
        if "partial" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        return write(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr("sidecar.partials.os.write", full)
        with pytest.raises(StoreFull, match="could not be stored"):
            pulled(server, store, reference)
    assert partials(store) == {}
    pulled(server, store, reference)


@pytest.mark.row("F20")
def test_what_has_no_room_is_not_begun(
    tmp_path: Path, root: Path, server: OriginServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = published(tmp_path, root, "m", SMALL, [4.0, 5.0, 6.0])
    monkeypatch.setattr("sidecar.store.free_bytes_of", lambda folder: 23)
    with pytest.raises(StoreFull, match="24 bytes could not be stored .*: 23 bytes are free"):
        pulled(server, store, reference)
    assert server.paths() == ["manifests", "graphs"]
    monkeypatch.setattr("sidecar.store.free_bytes_of", lambda folder: 24)
    pulled(server, store, reference)


# --- where names lead -------------------------------------------------------------------------------------------------


class Names:
    """Stands for the resolver of names: answers with one list of addresses after the other, the last one for good."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
        self._answers = list(answers)
        self.asked: list[str] = []
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)

    def _getaddrinfo(self, host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        if host != "models.example":
            return self._real(host, port, *rest, **more)
        self.asked.append(host)
        found = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in found
        ]


def named(server: OriginServer, store: Store, reference: str, **policy: Any) -> Pulled:
    url = f"http://models.example:{server.port}"
    return pull(parse_reference(f"{url}/{reference}"), store, Policy(origins=(parse_origin(url),), **policy), Watched())


@pytest.mark.row("T23")
@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["169.254.169.254"], ["::ffff:127.0.0.1"], ["::1"], ["93.184.215.14", "127.0.0.1"], ["10.0.0.1"]],
)
def test_a_name_that_leads_inside_is_not_connected_to(
    addresses: list[str], tmp_path: Path, root: Path, server: OriginServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = published(tmp_path, root, "m", SMALL)
    Names(monkeypatch, addresses)
    with pytest.raises(OriginRefused, match="which is not a public address"):
        named(server, store, reference)
    assert server.asked == []


@pytest.mark.row("T23")
def test_what_was_checked_is_what_is_connected_to(
    tmp_path: Path, root: Path, server: OriginServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that answers otherwise the second time: each answer is looked at before it is used, and used as it was looked at."""
    reference = published(tmp_path, root, "m", SMALL)
    names = Names(monkeypatch, ["127.0.0.1"], ["192.168.0.1"])
    assert named(server, store, reference, networks=(ip_network("127.0.0.0/8"),)).name == "m"
    assert names.asked == ["models.example"]
    with pytest.raises(OriginRefused, match=r"192\.168\.0\.1"):
        named(server, store, reference, networks=(ip_network("127.0.0.0/8"),))


def test_a_name_that_is_not_known_is_told(
    tmp_path: Path, root: Path, server: OriginServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = published(tmp_path, root, "m", SMALL)

    def unknown(*arguments: Any, **more: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(OriginFailed, match="cannot be reached"):
        named(server, store, reference)


@pytest.mark.row("T23")
def test_an_origin_off_the_list_is_not_asked(tmp_path: Path, root: Path, server: OriginServer, store: Store) -> None:
    reference = published(tmp_path, root, "m", SMALL)
    with pytest.raises(OriginRefused, match="none of the 1 origins"):
        pulled(server, store, reference, origins=(parse_origin(f"http://127.0.0.1:{server.port + 1}"),))
    assert server.asked == []


# --- signatures -------------------------------------------------------------------------------------------------------


@pytest.mark.row("T24")
def test_a_model_must_be_signed_where_the_operator_wants_it(
    tmp_path: Path, root: Path, server: OriginServer, store: Store
) -> None:
    trusted = tmp_path / "signers"
    trusted.write_text(write_key(tmp_path / "ann", name="ann"))
    write_key(tmp_path / "eve", name="ann")
    plain = published(tmp_path, root, "plain", SMALL)
    with pytest.raises(NotTrusted, match="is not signed"):
        pulled(server, store, plain, signers=trusted)
    stranger = published(tmp_path, root, "stranger", SMALL, key=tmp_path / "eve")
    with pytest.raises(NotTrusted, match="none of the 1 signers"):
        pulled(server, store, stranger, signers=trusted)
    good = published(tmp_path, root, "good", SMALL, key=tmp_path / "ann")
    path = root / signature_file(good.partition("sha256:")[2])
    signature = path.read_bytes()
    for altered in (bytes([signature[0] ^ 1]) + signature[1:], signature[:-1], b""):
        path.write_bytes(altered)
        with pytest.raises(NotTrusted, match="none of the 1 signers"):
            pulled(server, store, good, signers=trusted)
    path.write_bytes(signature + b"!")
    with pytest.raises(BlobCorrupt, match="longer than the 64 bytes"):
        pulled(server, store, good, signers=trusted)
    # Nothing further was asked for, for none of them.
    assert set(server.paths()) == {"manifests", "signatures"}
    path.write_bytes(signature)
    assert pulled(server, store, good, signers=trusted).signer == "ann"
    # A key that is taken off the list counts no more.
    trusted.write_text(write_key(tmp_path / "bob", name="bob"))
    with pytest.raises(NotTrusted):
        pulled(server, store, good, signers=trusted)
    trusted.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        pulled(server, store, good, signers=trusted)


@pytest.mark.row("T24")
@pytest.mark.parametrize("what", ["manifest", "graph", "weights", "everything"])
def test_an_older_version_is_not_taken_for_the_one_that_was_asked_for(
    what: str, tmp_path: Path, root: Path, server: OriginServer, store: Store
) -> None:
    """An origin, or who has taken it over, gives a version from before, which is signed by the same key."""
    trusted = tmp_path / "signers"
    trusted.write_text(write_key(tmp_path / "ann", name="ann"))
    older = published(tmp_path, root, "m", SMALL, key=tmp_path / "ann")
    older_files = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    newer = published(tmp_path, root, "m", [4.0, 5.0], key=tmp_path / "ann")
    newer_files = [
        path.relative_to(root) for path in root.rglob("*") if path.is_file() and path.relative_to(root) not in older_files
    ]
    # It has the model that is served, and is asked for the newer one.
    assert pulled(server, store, older, signers=trusted).name == "m"
    before = store.model("m")
    wanted = {"manifest": ["manifests", "signatures"], "graph": ["graphs"], "weights": ["blobs"]}.get(what, [])
    replaced = [path for path in newer_files if path.parts[0] in wanted or what == "everything"]
    assert replaced
    for path in replaced:
        (root / path).write_bytes(next(content for old, content in older_files.items() if old.parts[0] == path.parts[0]))
    with pytest.raises((BlobCorrupt, NotTrusted)):
        pulled(server, store, newer, signers=trusted)
    assert store.model("m") == before
    assert partials(store) == {}


# --- folders and buckets ----------------------------------------------------------------------------------------------


def from_folder(root: Path, store: Store, reference: str, **policy: Any) -> Pulled:
    source = parse_reference(f"file://{root}/{reference}")
    return pull(source, store, Policy(origins=(source.origin,), **policy), Watched())


def test_a_folder_is_an_origin(tmp_path: Path, root: Path, store: Store) -> None:
    reference = published(tmp_path, root, "m", LARGE, [1.0] * len(LARGE))
    assert from_folder(root, store, reference).fetched_count == 2
    assert store.verify().broken == {}
    with pytest.raises(NotAtOrigin, match="has no manifests/"):
        from_folder(root, store, f"m@sha256:{'0' * 64}")


@pytest.mark.row("T10")
def test_what_is_no_plain_file_is_not_read(tmp_path: Path, root: Path, store: Store) -> None:
    reference = published(tmp_path, root, "m", SMALL)
    path = root / manifest_file(reference.partition("sha256:")[2])
    path.rename(tmp_path / "elsewhere")
    for make in (lambda: path.symlink_to(tmp_path / "elsewhere"), lambda: os.mkfifo(path), path.mkdir):
        make()
        with pytest.raises(OriginRefused, match="is not a plain file"):
            from_folder(root, store, reference)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_a_folder_with_damage_is_told(tmp_path: Path, root: Path, store: Store) -> None:
    reference = published(tmp_path, root, "m", SMALL)
    blob = root / "blobs" / digest_of(SMALL)[:2] / digest_of(SMALL)
    content = blob.read_bytes()
    for damaged, problem in ((content[:-1], "has 11 bytes at the origin instead of 12"), (b"!" + content[1:], "digest")):
        blob.write_bytes(damaged)
        with pytest.raises(BlobCorrupt, match=problem):
            from_folder(root, store, reference)
    path = root / manifest_file(reference.partition("sha256:")[2])
    path.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(BlobCorrupt, match="longer than the 1048576"):
        from_folder(root, store, reference)


class Odd:
    """A file system of a library that has errors of its own, and files that shrink."""

    def __init__(self, size: int = 4, content: bytes = b"ab", error: Exception | None = None) -> None:
        self._size, self._content, self._error = size, content, error

    def info(self, path: str) -> dict[str, object]:
        if self._error:
            raise self._error
        return {"type": "file", "size": self._size}

    def open(self, path: str, mode: str, block_size: int) -> Any:
        import io

        return io.BytesIO(self._content)


def test_what_a_library_of_an_object_store_does_is_told() -> None:
    class NoCredentials(Exception):
        pass

    files = StoredFiles(Odd(error=NoCredentials("AKIA…")), "bucket", "s3://bucket", lambda: None)  # type: ignore[arg-type]
    with pytest.raises(OriginFailed, match=r"manifests/x at s3://bucket cannot be read \(NoCredentials\)"):
        files.read("manifests/x", 10)
    files = StoredFiles(Odd(), "bucket", "s3://bucket", lambda: None)  # type: ignore[arg-type]
    with pytest.raises(OriginFailed, match="broke off in the middle of x"):
        list(files.chunks("x", 0, 4))


def test_a_store_whose_library_is_not_installed_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Reference(parse_origin("gs://bucket/models"), "m", "0" * 64)
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"trunkline\[gs\]"):
        pull(source, store, Policy(origins=(source.origin,)), Watched())


def no_such_key(handler: Handler, content: bytes) -> None:
    """Say what S3 says of a folder in which there is nothing."""
    listed = b'<?xml version="1.0"?><ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>'
    handler.answer(200, listed, {"Content-Type": "application/xml"})


def test_a_bucket_is_an_origin(
    tmp_path: Path, root: Path, server: OriginServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3fs against a server on this machine that knows as much of S3 as reading takes."""
    for key, value in {
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
        "DEFAULT_REGION": "none",
        "ENDPOINT_URL": server.url,
    }.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    reference = published(tmp_path, root / "bucket" / "models", "m", LARGE)
    source = parse_reference(f"s3://bucket/models/{reference}")
    policy = Policy(origins=(source.origin,))
    blob = store.root / "partial" / digest_of(LARGE)
    blob.parent.mkdir()
    blob.write_bytes(blob_path(tmp_path / "m", digest_of(LARGE)).read_bytes()[:5_000_000])
    assert pull(source, store, policy, Watched()).fetched_bytes == 4 * len(LARGE) - 5_000_000
    assert store.verify().corrupt == []
    assert server.ranges()[-1].startswith("bytes=5000000-")
    server.misbehave["/bucket?"] = no_such_key
    with pytest.raises(NotAtOrigin, match="has no manifests/"):
        pull(Reference(source.origin, "m", "0" * 64), store, policy, Watched())


def test_buckets_are_read_by_the_same_path(tmp_path: Path, store: Store) -> None:
    """fsspec's own object store in memory stands for those that cannot be reached here."""
    import fsspec

    write_chained_bundle(tmp_path / "m", "m", LARGE)
    done = publish(str(tmp_path / "m"), "memory://bucket/models", store_dir=tmp_path / "none")
    system = fsspec.filesystem("memory")
    try:
        files = StoredFiles(system, "bucket/models", "memory://bucket/models", lambda: None)
        digest = done.reference.partition("sha256:")[2]
        assert hashlib.sha256(files.read(manifest_file(digest), 1 << 20)).hexdigest() == digest
        blob = digest_of(LARGE)
        path = f"blobs/{blob[:2]}/{blob}"
        whole = blob_path(tmp_path / "m", blob).read_bytes()
        assert b"".join(files.chunks(path, 0, len(whole))) == whole
        assert b"".join(files.chunks(path, 3333, len(whole))) == whole[3333:]
        with pytest.raises(NotAtOrigin):
            files.read("manifests/none", 10)
    finally:
        system.rm("/bucket", recursive=True)
