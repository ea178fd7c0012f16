"""Functions without a socket, over HTTP: the same answers to the bit, the same errors, and the way there and back."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trunkline import client, errors, model, oip, ready, transport_name
from trunkline.client import Model, Models
from trunkline.endpoint import Endpoint
from trunkline.errors import TrunklineError
from trunkline.pool import Pool
from trunkline.protocol import TensorSpec

from sidecar.bundle import write_bundle
from sidecar.export import convert
from sidecar.quotas import parse_quotas
from tests.fakes import FakeSource, Running, bundle_of, running_server
from tests.integration.test_admin_http import free_port
from tests.integration.test_adversity import change
from tests.integration.test_session import offset_of
from tests.integration.test_tenancy import QUOTAS, text_of
from tests.networks import network
from tests.over_http import routes_of
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import PATIENCE_S, soon

X = np.zeros((1, 3), np.float32)
DTYPES = tuple(oip.DATATYPES)
NETWORKS = {"resnet": "resnet", "again": "resnet", "bert": "bert"}


class Kinds(torch.nn.Module):
    """Takes and gives one tensor of each dtype there is, and two that are empty or without axes."""

    def forward(self, b: Any, u8: Any, i8: Any, i16: Any, i32: Any, i64: Any, f16: Any, f32: Any, f64: Any, none: Any) -> Any:
        return ~b, u8 + 1, i8 + 1, i16 + 1, i32 + 1, i64 + 1, f16 * 2, f32 * 2, f64 * 2, none * 2


class Texts(torch.nn.Module):
    """Takes any number of texts of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(100, 8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids].cumsum(1)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SidecarProcess, str]]:
    """A real sidecar, and its URL. One lane and no forms, so that equal requests have equal answers at any time."""
    folder = tmp_path_factory.mktemp("over-http")
    rows = torch.zeros(2, 3)
    kinds = tuple(rows.to(getattr(torch, name)) for name in DTYPES)
    made = {"kinds": convert(Kinds(), (*kinds, torch.zeros(2, 0, 3)), name="kinds")}
    made["texts"] = convert(
        Texts(),
        (torch.zeros(2, 5, dtype=torch.int64),),
        name="texts",
        dynamic_axes={"ids": {1: ("tokens", 1, 64)}},
        input_bounds={"ids": (0, 99)},
    )
    for name, packed in made.items():
        write_bundle(folder / name, packed.bundle, packed.blobs)
    for name, kind in NETWORKS.items():
        found = network(kind).called(name)
        write_bundle(folder / name, found.bundle, found.blobs.items())
    port = free_port()
    flags = ("--admin-port", str(port), "--packing", "off", "--stacking", "off", "--lanes", "1", "--batch-limit", "1")
    with sidecar_process(folder, *flags) as running:
        for name in (*made, *NETWORKS):
            running.admin.push(folder / name)
        yield running, f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def asked_at(*places: str, token: bytes = b"") -> Iterator[list[Pool]]:
    """Give a pool that asks at each of these places, and at no other."""
    pools = [Pool(endpoint=Endpoint(place), credential=lambda: token) for place in places]
    yield pools
    for pool in pools:
        pool.close()


def same(one: Any, other: Any) -> bool:
    """Say whether two answers are equal to the bit, whatever their form."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    assert type(one) is type(other) is np.ndarray
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


# --- a real sidecar ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7])
def test_every_dtype_there_and_back(real: tuple[SidecarProcess, str], rows: int) -> None:
    random = np.random.default_rng(rows)
    numbers = {name: random.integers(0, 2 if name == "bool" else 100, (rows, 3)).astype(name) for name in DTYPES}
    inputs = dict(zip(("b", "u8", "i8", "i16", "i32", "i64", "f16", "f32", "f64"), numbers.values(), strict=True))
    inputs["f32"][0] = np.nan, np.inf, -0.0
    inputs |= {"none": np.zeros((rows, 0, 3), np.float32)}
    with asked_at(str(real[0].socket), real[1]) as pools:
        first, second = (Model("kinds", pool) for pool in pools)
        assert first.signature == second.signature
        assert same(first.call(inputs), second.call(inputs))
        assert len(second.call(inputs)) == 10
        with second.request(batch=rows) as request:
            for name, array in inputs.items():
                request[name][...] = array
            assert same(request.run(), first.call(inputs))
            request["f64"][...] = 3
            assert same(request.run(), first.call(inputs | {"f64": np.full((rows, 3), 3.0)}))
        assert (pools[0].address, pools[1].address) == (f"unix:{real[0].socket}", real[1])


def test_axes_of_any_size_and_bounds(real: tuple[SidecarProcess, str]) -> None:
    with asked_at(str(real[0].socket), real[1]) as pools:
        first, second = (Model("texts", pool) for pool in pools)
        for shape in ((1, 1), (3, 64), (64, 2), (2, 5)):
            ids = np.random.default_rng(0).integers(0, 100, shape)
            assert same(first(ids), second(ids))
        for wrong in (np.zeros((1, 65), np.int64), np.full((1, 2), 100), np.zeros(3, np.int64), np.zeros((1, 1), np.float32)):
            assert told(lambda: first(wrong)) == told(lambda: second(wrong))  # noqa: B023


def test_several_models_at_once(real: tuple[SidecarProcess, str]) -> None:
    image = network("resnet").inputs(2)
    with asked_at(str(real[0].socket), real[1]) as pools:
        both = [Models([Model(name, pool) for name in ("resnet", "again")]) for pool in pools]
        assert both[0].signature == both[1].signature
        found = both[1].call(image)
        assert same(both[0].call(image), found)
        assert same(Model("resnet", pools[1]).call(image), found["again"])
        (array,) = image.values()
        assert same(both[1](array), found)
        unlike = [Models([Model(name, pool) for name in ("resnet", "none")]) for pool in pools]
        assert told(lambda: unlike[0].signature) == told(lambda: unlike[1].signature)


def test_threads_have_connections_of_their_own(real: tuple[SidecarProcess, str]) -> None:
    inputs = network("bert").inputs(1)
    with asked_at(real[1]) as (pool,):
        expected = Model("bert", pool).call(inputs)
        found: list[Any] = []

        def ask() -> None:
            found.extend(same(Model("bert", pool).call(inputs), expected) for _ in range(5))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert found == [True] * 40
        assert 1 < pool.connect_count <= 10


def test_a_fork_leaves_each_process_its_own_connections(
    real: tuple[SidecarProcess, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = network("resnet").inputs(1)
    with asked_at(real[1]) as (pool,):
        resnet = Model("resnet", pool)
        with resnet.request(batch=1) as request:
            for name, array in inputs.items():
                request[name][...] = array
            expected = request.run()
            pid = os.fork()
            if not pid:
                status = 1
                with contextlib.suppress(BaseException):
                    is_same = same(request.run(), expected) and same(resnet.call(inputs), expected)
                    status = 0 if is_same and all(each._pid == os.getpid() for each in pool._idle) else 2
                os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert same(request.run(), expected)
        assert pool.connect_count == 1


# --- errors -----------------------------------------------------------------------------------------------------------


def told(ask: Callable[[], object]) -> tuple[type, str, object]:
    """Return what a call was refused with, all of it."""
    with pytest.raises(TrunklineError) as caught:
        ask()
    return type(caught.value), caught.value.message, caught.value.to_dict()


class Refusing:
    """Sessions that cannot be had."""

    def __init__(self, error: TrunklineError) -> None:
        self.error = error

    def greet(self, *arguments: object) -> None:
        pass

    @contextlib.contextmanager
    def pool(self, token: bytes) -> Iterator[Pool]:
        raise self.error
        yield

    def close(self) -> None:
        pass


def kinds_of(base: type[TrunklineError]) -> list[type[TrunklineError]]:
    # Those of this project's client; others stand for what a newer sidecar may have.
    found = [base] if base.__module__ == errors.__name__ else []
    return found + [each for child in base.__subclasses__() for each in kinds_of(child)]


# What is repeated, and what a connection's end looks like.
LOST = {errors.ConnectionLost, errors.SidecarUnavailable, errors.Draining, errors.Unauthorized}


@pytest.mark.parametrize("kind", sorted(set(kinds_of(TrunklineError)) - LOST, key=lambda kind: kind.code))
def test_every_error_arrives_as_it_was_raised(tmp_path: Path, source: FakeSource, kind: type[TrunklineError]) -> None:
    raised = kind("3 of 2 — “no”\n", asked=3, limit=2.5, who="x", is_so=True, retry_after_s=4.25)
    with (
        running_server(tmp_path, source) as running,
        routes_of(running, tmp_path, Refusing(raised)) as url,
        asked_at(url) as (pool,),
    ):
        assert told(lambda: Model("age", pool).signature) == (kind, raised.message, raised.to_dict())


@pytest.mark.parametrize("kind", sorted(LOST, key=lambda kind: kind.code))
def test_what_is_passing_is_repeated_a_few_times(tmp_path: Path, source: FakeSource, kind: type[TrunklineError]) -> None:
    with (
        running_server(tmp_path, source) as running,
        routes_of(running, tmp_path, Refusing(kind("not now"))) as url,
        asked_at(url) as (pool,),
    ):
        with pytest.raises(errors.Draining if kind is errors.Draining else errors.ConnectionLost):
            Model("age", pool).call({"x": X}, deadline_s=20)
        assert pool.connect_count == 6


@pytest.fixture
def both(tmp_path: Path, source: FakeSource) -> Iterator[tuple[Running, list[Pool]]]:
    """A server of this process, and pools that ask it over its socket and over HTTP."""
    with (
        running_server(tmp_path, source) as running,
        routes_of(running, tmp_path) as url,
        asked_at(running.path, url) as pools,
    ):
        yield running, pools


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("none", lambda asked: asked(X)),
        ("..", lambda asked: asked.signature.version),
        ("A-b_", lambda asked: asked(X)),
        ("age", lambda asked: asked(X, X)),
        ("age", lambda asked: asked.call({"x": X, "z": X})),
        ("age", lambda asked: asked(np.zeros((65, 3)))),
        ("text", lambda asked: asked(np.full((1, 2), 100))),
        ("age", lambda asked: asked.request(batch=2**21).__enter__()),
    ],
)
def test_refusals_are_equal(both: tuple[Running, list[Pool]], name: str, ask: Callable[[Model], object]) -> None:
    over_socket, over_http = (told(lambda pool=pool: ask(Model(name, pool))) for pool in both[1])
    assert over_http[0] is over_socket[0]
    if name != "..":
        assert over_http == over_socket


def test_what_has_no_room_is_refused_before_it_is_sent(tmp_path: Path, source: FakeSource) -> None:
    wide = (TensorSpec("x", "float32", ("batch", 1 << 18)),)
    source.put(bundle_of("wide", [b"w"], inputs=wide, outputs=wide), [b"w"])
    with (
        running_server(tmp_path, source) as running,
        routes_of(running, tmp_path) as url,
        asked_at(running.path, url) as pools,
    ):
        over_socket, over_http = (told(lambda pool=pool: Model("wide", pool)(np.zeros((9, 1 << 18)))) for pool in pools)
        assert over_http == over_socket
        assert over_http[0] is errors.ArenaFull


def test_a_new_version_is_noticed(both: tuple[Running, list[Pool]]) -> None:
    running, pools = both
    ages = [Model("age", pool) for pool in pools]
    before = [age(X) for age in ages]
    signatures = [age.signature for age in ages]
    change(running, "age", [b"other"], version="2")
    answers = [age(X) for age in ages]
    assert same(answers[0], answers[1])
    assert not same(answers[1], before[1])
    assert [age.signature.version for age in ages] == ["2", "2"]
    # A call that goes by the version before is not answered by the new one.
    connection = pools[1].take(0, 0, soon())
    with pytest.raises(errors.SignatureMismatch, match="age is version 2 now") as caught, contextlib.closing(connection):
        layout = ages[1].request()._layout
        connection.infer("age", layout.inputs, soon(), "", signatures[1].id)
    assert caught.value.details == {"version": "2"}


def test_an_output_larger_than_thought_is_asked_for_again(
    both: tuple[Running, list[Pool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trunkline.httpconnection._SMALLEST_BYTES", 4096)
    ids = np.ones((64, 64), np.int64)
    # Its last axis is known only when it is there.
    answers = [Model("text", pool)(ids) for pool in both[1]]
    assert same(*answers)
    assert answers[0].nbytes > 4096


def test_deadlines_and_call_ids_arrive(both: tuple[Running, list[Pool]], monkeypatch: pytest.MonkeyPatch) -> None:
    running, (_, pool) = both
    seen: list[Any] = []
    submit = running.engine.submit
    monkeypatch.setattr(running.engine, "submit", lambda work: (seen.append(work), submit(work)))
    age = Model("age", pool)
    age.call({"x": X}, deadline_s=5, call_id="mine — “yes”")
    assert seen[0].call_id == "mine — “yes”"
    assert 0 < seen[0].deadline - time.monotonic() <= 5
    entered, leave = threading.Event(), threading.Event()
    running.device.on_run = lambda: (entered.set(), leave.wait(PATIENCE_S))
    with pytest.raises(errors.DeadlineExceeded):
        age.call({"x": X}, deadline_s=0.2)
    leave.set()
    with pytest.raises(errors.DeadlineExceeded):
        age.call({"x": X}, deadline_s=0)


def test_models_are_named_when_a_function_begins(both: tuple[Running, list[Pool]]) -> None:
    running, (_, pool) = both
    loaded: list[object] = []
    running.source.before_read = loaded.append
    pool.expect("age")
    pool.give(pool.take(0, 0, soon()))
    deadline = soon()
    while not loaded:
        assert time.monotonic() < deadline, "its weights are brought in before it asks"
        time.sleep(0.01)


# --- tenants ----------------------------------------------------------------------------------------------------------


def test_the_token_says_who_asks_and_may_change(tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_TOKEN_FILE", str(tmp_path / "token"))
    quotas = parse_quotas(text_of(QUOTAS), "quotas.toml")
    with running_server(tmp_path, source, quotas=quotas) as running, routes_of(running, tmp_path) as url:
        pools = [Pool(endpoint=Endpoint(place)) for place in (running.path, url)]
        for token in ("", "wrong", "s1"):
            (tmp_path / "token").write_text(token)
            over_socket, over_http = (outcome(Model("age", pool)) for pool in pools)
            assert same(over_socket, over_http) if token == "s1" else over_socket == over_http
        (tmp_path / "token").write_text("v1")
        for pool in pools:
            pool.close()
        assert outcome(Model("text", pools[0])) == outcome(Model("text", pools[1]))
        later = parse_quotas(text_of(QUOTAS.replace("TOKEN(v1)", "TOKEN(v3)")), "quotas.toml")
        age = Model("age", pools[1])
        age(X)
        done = threading.Event()
        running.server.use_quotas(later, done.set)
        assert done.wait(PATIENCE_S)
        (tmp_path / "token").write_text("v3")
        age(X)
        (tmp_path / "token").write_text("v1")
        pools[1].close()
        with pytest.raises(errors.Unauthorized):
            age(X)
        for pool in pools:
            pool.close()


def outcome(asked: Model) -> Any:
    try:
        return asked(X)
    except TrunklineError as error:
        return error.to_dict()


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a socket that may come and go; where calls should go is looked up before each."""
    monkeypatch.setattr("trunkline.endpoint._LOOK_S", 0.0)
    monkeypatch.setattr("trunkline.endpoint.DEFAULT_SOCKETS", (str(tmp_path / "a.sock"), str(tmp_path / "b.sock")))
    monkeypatch.delenv("TRUNKLINE_SOCKET", raising=False)
    return tmp_path


def test_calls_go_where_they_should_and_it_is_logged_once(
    places: Path, both: tuple[Running, list[Pool]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trunkline")
    running, (_, http) = both
    url = http._endpoint._only
    monkeypatch.setattr(client, "_pool", pool := Pool(credential=lambda: b""))
    age = model("age")
    with pytest.raises(errors.SidecarUnavailable, match=r"neither .*a.sock nor .*b.sock exists; start .*set TRUNKLINE_URL"):
        age(X)
    monkeypatch.setenv("TRUNKLINE_URL", f"{url}/")
    expected = age(X)
    assert (expected == offset_of("age")).all()
    assert transport_name() == url
    ready()
    # In the order of the places; each is used from when it is there.
    for name in ("b.sock", "a.sock"):
        (places / name).symlink_to(running.path)
        for _ in range(3):
            assert same(age(X), expected)
            assert transport_name() == f"unix:{places / name}"
    (places / "a.sock").unlink()
    age(X)
    assert transport_name() == f"unix:{places / 'b.sock'}"
    (places / "b.sock").unlink()
    for _ in range(3):
        age(X)
        assert transport_name() == url
    assert all(each.endpoint == url for each in pool._idle), "what leads elsewhere is closed"
    (places / "c.sock").symlink_to(running.path)
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(places / "c.sock"))
    age(X)
    a, b, c = (f"unix:{places / name}" for name in ("a.sock", "b.sock", "c.sock"))
    assert transport_name() == c
    reached = [record.args[0] for record in caplog.records if "sidecar reached" in record.message]
    # The server of the routes has reached it, too.
    assert [each for each in reached if each != f"unix:{running.relay}"] == [url, b, a, b, url, c]
    pool.close()


def test_a_socket_that_nobody_listens_at_is_passed_by(
    places: Path, both: tuple[Running, list[Pool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (_, http) = both
    url = http._endpoint._only
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(places / "a.sock"))
    monkeypatch.setenv("TRUNKLINE_URL", url)
    pool = Pool(credential=lambda: b"")
    age = Model("age", pool)
    for _ in range(5):
        age(X)
        assert pool.address == url
        # As if a second had passed: it is tried again, which costs no connection over HTTP.
        assert list(pool._endpoint._refused) == [str(places / "a.sock")]
        pool._endpoint._refused.clear()
    assert pool.connect_count == 1
    pool.close()


def test_a_call_under_way_goes_over_http_when_the_socket_s_sidecar_ends(
    places: Path, source: FakeSource, both: tuple[Running, list[Pool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (_, http) = both
    url = http._endpoint._only
    monkeypatch.setenv("TRUNKLINE_URL", url)
    pool = Pool(credential=lambda: b"")
    age = Model("age", pool)
    (places / "other").mkdir()
    with running_server(places / "other", source) as other:
        (places / "a.sock").symlink_to(other.path)
        with age.request() as request:
            request["x"][...] = 1
            expected = request.run()
            assert pool._reached == f"unix:{places / 'a.sock'}"
            (places / "a.sock").unlink()
            other.server.drain()
            other.engine.drain(other.server.stop)
            # What was written into the memory of the one is what the other is sent.
            assert same(request.run(), expected)
            assert request.run().tolist() == (np.ones((1, 3)) + offset_of("age")).tolist()
    age(X)
    assert pool.address == url
    pool.close()


def test_nobody_anywhere_is_told_at_once_and_waited_for_later(
    places: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUNKLINE_URL", f"http://127.0.0.1:{free_port()}")
    pool = Pool(credential=lambda: b"")
    age = Model("age", pool)
    with pytest.raises(errors.SidecarUnavailable, match="or correct TRUNKLINE_URL"):
        age(X)
    (places / "a.sock").symlink_to(places / "trunkline.sock")
    for _ in range(2):
        with running_server(places, source):
            age(X)
    waiting = threading.Thread(target=lambda: age(X))
    waiting.start()
    with running_server(places, source):
        waiting.join(PATIENCE_S)
        assert not waiting.is_alive()
        pool.close()


@pytest.mark.parametrize(
    "url", ["127.0.0.1:9470", "https://a:1", "http://u:p@a", "http://a/?x", "http://", "http://a b", "x" * 999]
)
def test_a_url_that_is_none_is_told(places: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("TRUNKLINE_URL", url)
    with pytest.raises(errors.InvalidInput, match="must be like http://127.0.0.1:9470"):
        Model("age", Pool())(X)


def test_a_look_is_taken_once_a_second(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUNKLINE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(tmp_path / "s"))
    now_s = [100.0]
    looks: list[str] = []
    monkeypatch.setattr("trunkline.endpoint.time", type("Clock", (), {"monotonic": staticmethod(lambda: now_s[0])}))
    monkeypatch.setattr("trunkline.endpoint.os.path.exists", lambda path: bool(looks.append(path)))
    endpoint = Endpoint()
    for _ in range(1000):
        assert endpoint.wanted() == "http://127.0.0.1:1"
    assert len(looks) == 1
    now_s[0] += 1
    endpoint.wanted()
    assert len(looks) == 2
    monkeypatch.delenv("TRUNKLINE_URL")
    now_s[0] += 1
    # Without a choice there is nothing to look for.
    assert endpoint.wanted() is None
    assert len(looks) == 2
