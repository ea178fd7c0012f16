"""What hostile or unlucky clients, publishers and operators once broke, each kept from breaking again."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trunkline
from trunkline import client, errors, model, protocol
from trunkline.admin import AdminConnection
from trunkline.connection import Connection
from trunkline.protocol import Infer, Placement, TensorSpec

from sidecar.pins import Pins
from sidecar.wavefront import Wavefront
from tests.fakes import ADMIN_TOKEN, FakeSource, Running, bundle_of, running_server, weight_of
from tests.waiting import PATIENCE_S, soon, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")

X = np.ones((1, 3), np.float32)


def admin(running: Running) -> AdminConnection:
    return AdminConnection(running.path, ADMIN_TOKEN)


def connect(running: Running) -> Connection:
    return Connection(running.path, deadline=soon())


class Held:
    """Keeps the device from finishing what it runs, until released."""

    def __init__(self, running: Running) -> None:
        self.entered, self.leave = threading.Event(), threading.Event()
        self.running = running

        def hold() -> None:
            self.entered.set()
            self.leave.wait(PATIENCE_S)

        running.device.on_run = hold
        self.thread = threading.Thread(target=lambda: model("pair")(X))
        self.thread.start()
        assert self.entered.wait(PATIENCE_S)

    def release(self) -> None:
        self.running.device.on_run = lambda: None
        self.leave.set()
        self.thread.join()


def change(running: Running, name: str, contents: list[bytes], **changed: object) -> None:
    running.source.put(bundle_of(name, contents, **changed), contents)  # type: ignore[arg-type]
    admin(running).command("model_changed", {"name": name})


# --- one frame --------------------------------------------------------------------------------------------------------


def test_one_input_given_twice_is_refused(running: Running) -> None:
    for first in ((2**40, 2**40, 0), (1, 3)):
        with contextlib.closing(connect(running)) as hostile:
            inputs = (Placement("x", "float32", first, 0), Placement("x", "float32", (1, 3), 0))
            with pytest.raises(errors.SignatureMismatch, match="twice"):
                hostile.infer("age", inputs, soon())
    assert model("age")(X) is not None


def test_a_bug_that_a_frame_finds_ends_that_session_only(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    bystander = connect(running)

    def view(*_: object) -> object:
        raise RuntimeError("internal detail")

    with monkeypatch.context() as broken, contextlib.closing(connect(running)) as hostile:
        broken.setattr(running.device, "view", view)
        with pytest.raises(errors.SidecarFault, match="incident") as caught:
            hostile.infer("age", (Placement("x", "float32", (1, 3), 0),), soon())
        assert "internal detail" not in str(caught.value)
        with pytest.raises(errors.ConnectionLost):
            hostile.describe("age", soon())
    assert bystander.describe("age", soon())
    bystander.close()


def test_a_bug_that_a_command_finds_is_answered(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def memory() -> dict[str, int]:
        raise RuntimeError("internal detail")

    with monkeypatch.context() as broken:
        broken.setattr(running.device, "memory", memory)
        with pytest.raises(errors.SidecarFault, match="failed at status; its log has incident") as caught:
            admin(running).command("status")
    assert "internal detail" not in str(caught.value)
    assert admin(running).command("status")["engine"]["pid"]


@pytest.mark.parametrize("operation", ["preadv", "pwrite"])
def test_shared_memory_that_its_function_has_made_unusable_ends_that_session_only(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with running_server(tmp_path, source, transport="copy") as running:
        with contextlib.closing(connect(running)) as hostile, monkeypatch.context() as broken:
            broken.setattr(f"trunkline.arena.os.{operation}", full)
            with pytest.raises(errors.MalformedFrame, match="No space left"):
                hostile.infer("age", (Placement("x", "float32", (1, 3), 0),), soon())
        with contextlib.closing(connect(running)) as bystander:
            assert bystander.infer("age", (Placement("x", "float32", (1, 3), 0),), soon())


# --- floods -----------------------------------------------------------------------------------------------------------


def test_refusals_do_not_starve_those_who_wait(running: Running) -> None:
    """An inbox that is never empty, as with a flood of requests that are only refused."""
    stop = threading.Event()

    def again() -> None:
        if not stop.is_set():
            running.engine._post(again)
            running.engine._post(lambda: None)

    running.engine._post(again)
    try:
        for _ in range(5):
            assert model("age").call({"x": X}, deadline_s=20) is not None
    finally:
        stop.set()


def test_a_server_without_descriptors_rests_until_a_session_closes(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = connect(running)
    accept = socket.socket.accept
    refused = threading.Event()

    def full(sock: socket.socket) -> tuple[socket.socket, object]:
        if refused.is_set():
            return accept(sock)
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", full)
    waiting = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    waiting.connect(running.path)
    until(lambda: "raise the limit on open files" in caplog.text)
    time.sleep(0.2)
    assert caplog.text.count("could not be accepted") == 1
    refused.set()
    held.close()
    with contextlib.closing(connect(running)) as late:
        assert late.describe("age", soon())
    waiting.close()


def test_a_server_without_descriptors_looks_again_by_itself(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    accept = socket.socket.accept
    tries: list[int] = []

    def full(sock: socket.socket) -> tuple[socket.socket, object]:
        tries.append(1)
        if len(tries) > 1:
            return accept(sock)
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("sidecar.server.HANDSHAKE_S", 0.05)
    monkeypatch.setattr(socket.socket, "accept", full)
    with contextlib.closing(connect(running)) as late:
        assert late.describe("age", soon())


# --- versions ---------------------------------------------------------------------------------------------------------


def test_what_was_checked_for_one_version_is_not_computed_by_the_next(running: Running) -> None:
    """Two inputs that change places: by name, the answer must not change. The fake device adds to the first input."""
    a, b = TensorSpec("a", "float32", (1,)), TensorSpec("b", "float32", (1,))
    one = (TensorSpec("y", "float32", (1,)),)
    change(running, "two", [b"w"], inputs=(a, b), outputs=one)
    with contextlib.closing(connect(running)) as raw:
        held = Held(running)
        frame = Infer(1, 10**7, "", "two", "", (Placement("a", "float32", (1,), 0), Placement("b", "float32", (1,), 64)))
        raw._channel.send(protocol.encode(frame), soon())
        # Checked by the server's thread, and not yet seen by the engine's.
        until(lambda: not running.engine._inbox.empty())
        running.source.put(bundle_of("two", [b"w"], inputs=(b, a), outputs=one, version="2"), [b"w"])
        running.engine._post(lambda: (running.engine._catalog.deploy("two"), running.engine._catalog.publish()))
        held.release()
        answer = protocol.decode(raw._channel.receive(soon()))
    assert isinstance(answer, protocol.Fault)
    assert answer.code == "signature_mismatch"
    assert "version 2" in answer.message


def test_a_function_follows_a_new_version_at_once(running: Running) -> None:
    known = model("age")
    before = known(X)
    with known.request() as request:
        request["x"][...] = X
        request.run()
        change(running, "age", [b"other"], version="2")
        # What was written for version 1 is what version 2 takes.
        assert (request.run() == X + sum(b"other")).all()
    assert known.signature.version == "2"
    assert (known(X) == X + sum(b"other")).all()
    assert not (known(X) == before).all()


def test_a_request_laid_out_for_another_version_is_refused_once(running: Running) -> None:
    known = model("age")
    wide = (TensorSpec("x", "float32", ("batch", 5)),)
    with known.request() as request:
        change(running, "age", [b"wide"], version="2", inputs=wide, outputs=(TensorSpec("y", "float32", ("batch", 5)),))
        with pytest.raises(errors.SignatureMismatch):
            request.run()
    with known.request() as request:
        assert request.run().shape == (1, 5)


def test_new_bounds_are_asked_for_before_a_size_is_refused(running: Running) -> None:
    known = model("age")
    known(X)
    # The symbol is called otherwise now.
    change(
        running,
        "age",
        [b"w"],
        version="2",
        inputs=(TensorSpec("x", "float32", ("rows", 3)),),
        outputs=(TensorSpec("y", "float32", ("rows", 3)),),
    )
    with known.request(rows=2) as request:
        assert request.run().shape == (2, 3)
    with pytest.raises(errors.SignatureMismatch, match="no axis 'batch'"):
        known.request(batch=2)


def test_a_version_that_changes_the_manifest_only_is_told(running: Running) -> None:
    known = running.source.bundles["age"]
    running.source.bundles["age"] = replace(known, version="7")
    admin(running).command("model_changed", {"name": "age"})
    assert admin(running).command("model", {"name": "age"})["version"] == "7"
    assert model("age").signature.version == "7"


# --- pins and budgets -------------------------------------------------------------------------------------------------


def test_a_pin_that_does_not_fit_any_more_does_not_keep_the_node_from_serving(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Pins(tmp_path / "pins.json").add("age")
    with running_server(tmp_path, source, budget_bytes=50) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        assert model("pair")(X) is not None
        assert not admin(running).command("model", {"name": "age"})["pinned"]
        client._pool.close()
    assert "age is not pinned any more" in caplog.text


def test_a_larger_version_of_a_pinned_model_is_deployed_unpinned(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(tmp_path, source, budget_bytes=150) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        for name in ("text", "pair"):
            admin(running).command("pin", {"name": name})
        change(running, "pair", [b"p" * 150], version="2")
        assert not admin(running).command("model", {"name": "pair"})["pinned"]
        assert admin(running).command("model", {"name": "text"})["pinned"]
        assert Pins(tmp_path / "pins.json").names() == ["text"]
        assert model("text")(np.ones((1, 2), np.int64)) is not None
        client._pool.close()


def test_a_weight_that_failed_for_one_model_is_tried_again_for_the_next(running: Running) -> None:
    """While a model that shares the damaged weight is still loading its other ones."""
    trunk, slow = running.source.bundles["age"].graph.weights[0].digest, weight_of(b"slow").digest
    change(running, "large", [b"t" * 100, b"slow"])
    good = running.source.blobs[trunk]
    running.source.blobs[trunk] = b"x"
    released = threading.Event()
    running.source.before_read = lambda digest: None if digest != slow else released.wait(PATIENCE_S) and None  # type: ignore[func-returns-value]
    large: list[object] = []

    def load_large() -> None:
        try:
            model("large")(X)
        except errors.ModelCorrupt as error:
            large.append(error)

    thread = threading.Thread(target=load_large)
    thread.start()
    until(lambda: any(m["name"] == "large" and m["state"] == "loading" for m in admin(running).command("models")["models"]))

    def load_small() -> None:
        with pytest.raises(errors.ModelCorrupt):
            model("age")(X)

    calls = [threading.Thread(target=load_small) for _ in range(3)]
    for each in calls:
        each.start()
    released.set()
    for each in (thread, *calls):
        each.join(PATIENCE_S)
        assert not each.is_alive()
    assert large
    running.source.blobs[trunk] = good
    assert model("age")(X) is not None
    assert model("large")(X) is not None


# --- the client -------------------------------------------------------------------------------------------------------


def test_many_idle_connections_that_were_lost_together_cost_no_call(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(tmp_path, source) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        taken = [client._pool.take(0, 0, soon()) for _ in range(12)]
        for connection in taken:
            client._pool.give(connection)
        monkeypatch.setattr(client._pool, "_models", ())
    with running_server(tmp_path, source) as running:
        assert model("age")(X) is not None
        trunkline.ready()
    with running_server(tmp_path, source):
        trunkline.ready()
        client._pool.close()


def test_arrays_of_a_request_stay_good_when_it_moves_to_another_connection(running: Running) -> None:
    with model("age").request() as request:
        array = request["x"]
        answers = []
        for value in (1, 2, 3):
            array[...] = value
            answers.append(request.run()[0, 0])
            request._connection._channel.close()  # type: ignore[union-attr]
        request["x"][...] = 4
        answers.append(request.run()[0, 0])
    assert np.diff(answers).tolist() == [1, 1, 1]


def test_a_fork_in_the_middle_of_a_request_shares_nothing(running: Running) -> None:
    with model("age").request() as request:
        request["x"][...] = 1
        expected = request.run()
        pid = os.fork()
        if not pid:
            status = 1
            with contextlib.suppress(BaseException):
                status = 0 if (request.run() == expected).all() else 2
                request.__exit__(None, None, None)
                status = status if all(c._pid == os.getpid() for c in client._pool._idle) else 3
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert (request.run() == expected).all()


def test_an_exception_of_the_caller_s_own_ends_the_connection(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = connect(running)
    monkeypatch.setattr(connection._channel, "receive", lambda deadline: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        connection.describe("age", soon())
    assert connection.closed


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (np.array([[200]], np.uint8), "int8"),
        (np.array([[3_000_000_000]], np.uint32), "int32"),
        (np.array([[2**63 + 5]], np.uint64), "int64"),
        (np.array([[1e300]], np.float64), "float32"),
        (np.array([[1e6]], np.float32), "float16"),
    ],
)
def test_no_value_is_wrapped_or_made_infinite(running: Running, given: np.ndarray, wanted: str) -> None:
    change(running, "narrow", [b"w"], inputs=(TensorSpec("x", wanted, (1, 1)),), outputs=(TensorSpec("y", wanted, (1, 1)),))
    with pytest.raises(errors.ValueOutOfBounds):
        model("narrow")(given)
    assert model("narrow")(np.ones((1, 1), given.dtype)) is not None


def test_infinity_itself_is_a_value(running: Running) -> None:
    assert np.isinf(model("age")(np.full((1, 3), np.inf))).all()


@pytest.mark.parametrize("size", [True, np.bool_(True), "2", 1.0])
def test_a_size_that_is_no_integer_is_refused_and_forgotten(running: Running, size: object) -> None:
    known = model("age")
    with pytest.raises(errors.SignatureMismatch, match="takes batch as an integer"):
        known.request(batch=size)  # type: ignore[arg-type]
    for good in (1, np.int64(2), 2):
        with known.request(batch=good) as request:  # type: ignore[arg-type]
            assert request.run().shape == (good, 3)


@pytest.mark.parametrize("name", ["", "x" * 129, "\ud800", "a b", "../x"])
def test_a_name_that_no_model_can_have_is_refused_at_once(running: Running, name: str) -> None:
    with pytest.raises(errors.InvalidInput, match="no model's name"):
        model(name)
    assert model("age")(X) is not None


def test_a_name_out_of_a_request_is_not_what_the_function_stands_for(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client._pool, "_models", ())
    token = trunkline.context.call_id.set("call-1")
    try:
        with pytest.raises(errors.UnknownModel):
            model("whatever-the-caller-said")(X)
    finally:
        trunkline.context.call_id.reset(token)
    trunkline.ready()


def test_a_model_too_large_for_any_arena_is_refused_alone(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = (TensorSpec("x", "float32", (1, 2**20)),)
    source.put(bundle_of("huge", [b"h"], inputs=huge, outputs=huge), [b"h"])
    monkeypatch.setattr(client._pool, "_models", ())
    with running_server(tmp_path, source, arena_limit_bytes=1 << 20) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        large = model("huge")
        trunkline.ready()
        assert model("age")(X) is not None
        with pytest.raises(errors.ArenaFull):
            large(np.ones((1, 2**20), np.float32))
        client._pool.close()


def test_deadlines_are_numbers(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model("age").call({"x": X}, deadline_s=float("inf")) is not None
    with pytest.raises(errors.InvalidInput, match="nan"):
        model("age").call({"x": X}, deadline_s=float("nan"))
    monkeypatch.setenv("TRUNKLINE_DEADLINE_S", "30s")
    with pytest.raises(errors.InvalidInput, match="TRUNKLINE_DEADLINE_S is '30s'"):
        model("age")(X)


def test_a_call_id_that_cannot_be_encoded_costs_nothing(running: Running) -> None:
    assert model("age").call({"x": X}, call_id="\ud800" * 200) is not None


@pytest.mark.parametrize("method", ["add", "choose", "advance"])
def test_a_bug_in_the_wavefront_costs_one_request(running: Running, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = getattr(Wavefront, method), [RuntimeError("a bug")]

    def failing(self: object, *arguments: object) -> object:
        waiting = method != "choose" or len(self)  # type: ignore[arg-type]
        if failures and waiting:
            raise failures.pop()
        return real(self, *arguments)

    monkeypatch.setattr(Wavefront, method, failing)
    with pytest.raises(errors.SidecarFault, match="incident"):
        model("age")(X)
    assert model("age")(X) is not None
    assert not failures
