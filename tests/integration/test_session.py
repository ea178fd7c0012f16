"""Client, server and engine together, over a real socket and real shared memory; only device and store are fakes."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
from trunkline import client, errors, model, protocol, ready, transport_name
from trunkline.admin import AdminConnection
from trunkline.connection import Connection
from trunkline.pool import Pool
from trunkline.protocol import Describe, Fault, Hello, Infer, Placement, TensorSpec

from sidecar.server import Server, Session
from tests.fakes import ADMIN_TOKEN, FakeSource, Running, bundle_of, running_server
from tests.integration.conftest import TRUNK
from tests.waiting import PATIENCE_S, soon, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def offset_of(name: str) -> int:
    return sum(TRUNK) + sum(name.encode())


def admin(running: Running) -> AdminConnection:
    return AdminConnection(running.path, ADMIN_TOKEN)


def connect(running: Running, token: bytes = b"", **sizes: int) -> Connection:
    return Connection(running.path, token=token, deadline=soon(), **sizes)


def test_a_call_answers_with_what_the_model_computes(running: Running) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(model("age")(x), x + offset_of("age"))
    np.testing.assert_array_equal(model("age")(x=x), x + offset_of("age"))
    assert transport_name() == f"unix:{running.path}"


def test_several_outputs_come_as_a_dict(running: Running) -> None:
    outputs = model("pair")(np.zeros((1, 3), np.float32))
    assert isinstance(outputs, dict)
    assert sorted(outputs) == ["y", "z"]


def test_a_request_is_written_straight_into_shared_memory(running: Running) -> None:
    before = client.counters()
    with model("age").request(batch=4) as request:
        assert request["x"].shape == (4, 3)
        request["x"][...] = 2
        first = request.run()
        request["x"][...] = 3
        second = request.run()
    assert (first == 2 + offset_of("age")).all()
    assert (second == 3 + offset_of("age")).all()
    after = client.counters()
    assert after["input_copies"] == before["input_copies"]
    assert after["calls"] == before["calls"] + 2


def test_a_request_is_of_no_use_outside_its_block(running: Running) -> None:
    request = model("age").request()
    with pytest.raises(RuntimeError):
        request["x"]


def test_inputs_of_any_layout_and_kindred_dtype_are_taken(running: Running) -> None:
    x = np.arange(12, dtype=np.float64).reshape(3, 4).T[:, :3]
    np.testing.assert_array_equal(model("age")(x), x.astype(np.float32) + offset_of("age"))
    np.testing.assert_array_equal(model("age")([[1, 2, 3]]), np.array([[1, 2, 3]], np.float32) + offset_of("age"))
    big_endian = np.ones((1, 3), ">f4")
    np.testing.assert_array_equal(model("age")(big_endian), big_endian + offset_of("age"))


def test_the_signature_tells_what_the_model_takes(running: Running) -> None:
    signature = model("text").signature
    assert signature.inputs == (TensorSpec("ids", "int64", ("batch", "sequence"), 0, 99),)
    assert signature.symbols == {"batch": (1, 64), "sequence": (1, 64)}


@pytest.mark.parametrize(
    ("name", "inputs", "error", "message"),
    [
        ("age", {"x": np.zeros((1, 4), np.float32)}, errors.SignatureMismatch, r"axis 1 must be 3"),
        ("age", {"x": np.zeros(3, np.float32)}, errors.SignatureMismatch, r"\[batch, 3\], got \[3\]"),
        ("age", {"x": np.zeros((65, 3), np.float32)}, errors.SignatureMismatch, "batch .* from 1 to 64, got 65"),
        ("age", {"y": np.zeros((1, 3), np.float32)}, errors.SignatureMismatch, "'x' is missing"),
        ("age", {}, errors.SignatureMismatch, "'x' is missing"),
        ("age", {"x": np.zeros((1, 3), np.float32), "y": 1}, errors.SignatureMismatch, "no input 'y'"),
        ("age", {"x": np.array([["a", "b", "c"]])}, errors.UnsupportedTensor, "cannot be converted"),
        ("age", {"x": np.zeros((1, 3), complex)}, errors.UnsupportedTensor, "complex128"),
        ("text", {"ids": np.array([[1.0, np.nan]])}, errors.SignatureMismatch, "1 of its values are NaN"),
        (
            "text",
            {"ids": np.array([[1, 100]])},
            errors.ValueOutOfBounds,
            "from 0 to 99, its values reach from 1 to 100",
        ),
        ("text", {"ids": np.array([[-1]])}, errors.ValueOutOfBounds, "from -1"),
        ("text", {"ids": np.zeros((1, 65), np.int64)}, errors.SignatureMismatch, "sequence .* from 1 to 64, got 65"),
        ("nobody", {"x": 1}, errors.UnknownModel, "no model 'nobody'; it holds age, gender"),
    ],
)
def test_bad_input_is_named(
    running: Running, name: str, inputs: dict[str, object], error: type[errors.TrunklineError], message: str
) -> None:
    with pytest.raises(error, match=message):
        model(name).call(inputs)  # type: ignore[arg-type]
    assert model("age")(np.zeros((1, 3), np.float32)) is not None


def test_integers_are_narrowed_only_when_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeSource()
    narrow = (TensorSpec("x", "int32", ("batch",)),)
    source.put(bundle_of("narrow", [b"n"], inputs=narrow, outputs=(TensorSpec("y", "int32", ("batch",)),)), [b"n"])
    with running_server(tmp_path, source) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        assert model("narrow")(np.array([5])).tolist() == [5 + ord("n")]
        with pytest.raises(errors.ValueOutOfBounds, match="2147483648"):
            model("narrow")(np.array([2**31]))
        client._pool.close()


def test_too_many_inputs_in_order_are_refused(running: Running) -> None:
    x = np.zeros((1, 3), np.float32)
    with pytest.raises(errors.SignatureMismatch, match="1 inputs, got 2"):
        model("age")(x, x)
    with pytest.raises(errors.SignatureMismatch, match="twice"):
        model("age")(x, x=x)


def test_an_unknown_axis_or_input_of_a_request_is_named(running: Running) -> None:
    with pytest.raises(errors.SignatureMismatch, match="no axis 'rows'"):
        model("age").request(rows=2)
    with model("age").request() as request, pytest.raises(errors.SignatureMismatch, match="no input 'y'"):
        request["y"]


def test_an_output_of_unknown_size_gets_the_room_it_needs(running: Running) -> None:
    ids = np.ones((64, 64), np.int64)
    connection = connect(running, reply_bytes=1)
    room = connection.reply_bytes
    connection.close()
    wide = np.tile(ids, (1, 1))
    assert model("text")(wide).shape == (64, 64)
    assert room > 64 * 64 * 8, "the first arena would have done; make the test larger"


def test_calls_of_many_threads_do_not_mix(running: Running) -> None:
    shared = model("age")
    wrong: list[float] = []

    def work(value: int) -> None:
        for _ in range(30):
            answer = shared(np.full((1, 3), value, np.float32))
            if not (answer == value + offset_of("age")).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_makes_its_own_connections(running: Running) -> None:
    shared = model("age")
    shared(np.zeros((1, 3), np.float32))
    pid = os.fork()
    if not pid:
        os._exit(0 if (shared(np.ones((1, 3), np.float32)) == 1 + offset_of("age")).all() else 1)
    _, status = os.waitpid(pid, 0)
    assert status == 0
    assert (shared(np.zeros((1, 3), np.float32)) == offset_of("age")).all()


def test_a_deadline_ends_the_wait_and_the_connection(running: Running) -> None:
    entered, leave = threading.Event(), threading.Event()
    slow = model("age")
    slow(np.zeros((1, 3), np.float32))

    def hold() -> None:
        entered.set()
        leave.wait(PATIENCE_S)

    running.device.on_run = hold
    with pytest.raises(errors.DeadlineExceeded):
        slow.call({"x": np.zeros((1, 3), np.float32)}, deadline_s=0.2)
    assert entered.is_set()
    running.device.on_run = lambda: None
    leave.set()
    # The late answer must not be taken for this one's.
    assert (slow(np.ones((1, 3), np.float32)) == 1 + offset_of("age")).all()


def test_work_whose_deadline_passed_while_waiting_never_runs(running: Running) -> None:
    entered, leave = threading.Event(), threading.Event()
    runs: list[int] = []

    def hold() -> None:
        runs.append(1)
        entered.set()
        leave.wait(PATIENCE_S)

    running.device.on_run = hold
    blocker = threading.Thread(target=lambda: model("age")(np.zeros((1, 3), np.float32)))
    blocker.start()
    entered.wait(PATIENCE_S)
    with pytest.raises(errors.DeadlineExceeded):
        model("gender").call({"x": np.zeros((1, 3), np.float32)}, deadline_s=0.1)
    leave.set()
    blocker.join()
    assert admin(running).command("status")["requests"]["waiting"] == 0
    assert len(runs) == 1


def test_a_full_queue_refuses_with_its_length(tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Event(), threading.Event()
    with running_server(tmp_path, source, queue_limit=1) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        model("age")(np.zeros((1, 3), np.float32))

        def hold() -> None:
            entered.set()
            leave.wait(PATIENCE_S)

        running.device.on_run = hold
        submitted: list[object] = []
        submit = running.engine.submit
        monkeypatch.setattr(running.engine, "submit", lambda work: (submit(work), submitted.append(work)))
        refused: list[errors.QueueFull] = []

        def call() -> None:
            try:
                model("age")(np.zeros((1, 3), np.float32))
            except errors.QueueFull as error:
                refused.append(error)

        threads = [threading.Thread(target=call) for _ in range(3)]
        # One is run. Only when it waits no more do two others ask, and only when both have does it end: for one there is no room.
        threads[0].start()
        assert entered.wait(PATIENCE_S)
        for thread in threads[1:]:
            thread.start()
        until(lambda: len(submitted) == 3)
        leave.set()
        for thread in threads:
            thread.join()
        assert len(refused) == 1
        assert refused[0].retryable
        assert refused[0].details | {"retry_after_s": 0} == {"waiting_count": 1, "limit_count": 1, "retry_after_s": 0}
        assert float(refused[0].details["retry_after_s"]) > 0
        client._pool.close()


def test_one_trunk_is_in_memory_once(running: Running) -> None:
    blocks = {tuple(block["models"]): block for block in admin(running).command("blocks")["blocks"]}
    assert [block["tier"] for block in blocks.values()] == ["disk"] * len(blocks)
    for name in ("age", "gender"):
        model(name)(np.zeros((1, 3), np.float32))
    memory = admin(running).command("memory")
    assert memory["resident_bytes"] == 100 + 3 + 6
    assert memory["logical_bytes"] == 100 + 3 + 100 + 6
    assert memory["saved_bytes"] == 100
    assert running.device.allocated_bytes == 109
    assert running.source.read_count == 3
    page = admin(running).command("blocks", {"offset": 0, "limit": 2})
    assert page["total"] == len(blocks) == 4
    age, gender = page["blocks"]
    # Too small to be cut, the two share bytes only; the first to use them owns them.
    assert (age["models"], age["bytes"], age["resident_bytes"], age["weights"], age["tier"]) == (["age"], 103, 103, 2, "device")
    assert (gender["models"], gender["bytes"], gender["resident_bytes"]) == (["gender"], 6, 6)
    tree = admin(running).command("graph")
    assert tree["models"] == ["age", "gender", "pair", "text"]
    assert tree["saved_bytes"] == 100


def test_variants_of_one_model_need_one_program(running: Running) -> None:
    for number in range(50):
        contents = [TRUNK, b"%03d" % number]
        running.source.put(bundle_of(f"variant-{number}", contents), contents)
        admin(running).command("model_changed", {"name": f"variant-{number}"})
    for number in range(50):
        answer = model(f"variant-{number}")(np.zeros((1, 3), np.float32))
        assert (answer == sum(TRUNK) + sum(b"%03d" % number)).all()
    # "age" has as many bytes as a variant's own weight.
    model("age")(np.zeros((1, 3), np.float32))
    assert running.device.prepare_count == 1
    model("gender")(np.zeros((1, 3), np.float32))
    assert running.device.prepare_count == 2
    for number in range(50):
        running.source.bundles.pop(f"variant-{number}")
        admin(running).command("model_removed", {"name": f"variant-{number}"})
    assert len(running.engine._catalog.programs) == 2


def test_an_idle_engine_gives_memory_back_once(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.engine._IDLE_S", 0.01)
    deadline = soon()
    for _ in range(2):
        before = running.device.trim_count
        model("age")(np.ones((1, 3), np.float32))
        # What a request leaves to be done may come a while after its answer, and wakes the engine once more: but if
        # nothing comes for ten times the time after which it is idle, it has given memory back and does not go on with it.
        counts = [before]
        while counts[-1] == before or counts[-1] != counts[-2]:
            assert time.monotonic() < deadline, counts
            time.sleep(0.1)
            counts.append(running.device.trim_count)


def test_commands_of_the_administrator(running: Running) -> None:
    connection = admin(running)
    assert connection.command("load", {"name": "age"})["state"] == "resident"
    assert connection.command("pin", {"name": "age"})["pinned"]
    with pytest.raises(errors.InvalidInput, match="pinned"):
        connection.command("evict", {"name": "age"})
    assert not connection.command("unpin", {"name": "age"})["pinned"]
    evicted = connection.command("evict", {"name": "age"})
    assert evicted["state"] == "stored"
    assert evicted["freed_bytes"] == 103
    assert running.device.allocated_bytes == 0
    residency = connection.command("memory")["residency"]
    assert (residency["policy"], residency["evicted_bytes"]["operator"]) == ("adaptive", 103)
    traced = connection.command("trace", {"limit": 1})
    assert traced["recorded"] == 2
    assert sum(traced["weights"]) == 103
    (plan,) = traced["models"]
    assert plan.startswith("age@")
    assert [lease[1:] for lease in traced["leases"]] == [[[0], 103, 0, 0]]
    assert connection.command("model", {"name": "age"})["signature"]["inputs"][0]["name"] == "x"
    with pytest.raises(errors.UnknownModel):
        connection.command("load", {"name": "nobody"})
    with pytest.raises(errors.InvalidInput, match="no command"):
        connection.command("reboot")
    connection.close()
    assert connection.command("status")["sessions"] >= 1
    connection.close()


def test_an_answer_longer_than_most_has_a_session_of_its_own(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"long": "x" * (3 << 20)}
    monkeypatch.setattr(running.server, "connections", lambda: said)
    with contextlib.closing(AdminConnection(running.path, ADMIN_TOKEN)) as admin:
        assert admin.command("connections") == said
        until(lambda: admin.command("sessions")["total"] == 1)
        said["long"] = "x" * running.server.arena_limit_bytes
        with pytest.raises(errors.ArenaFull, match="ask for less|one arena may have"):
            admin.command("connections")
        assert admin.command("sessions")["total"] == 1


def test_commands_need_the_token(running: Running) -> None:
    with pytest.raises(errors.Unauthorized):
        AdminConnection(running.path, b"").command("status")
    with pytest.raises(errors.Unauthorized):
        AdminConnection(running.path, b"guess").command("status")


def test_a_model_can_be_replaced_and_removed_while_in_use(running: Running) -> None:
    entered, leave = threading.Event(), threading.Event()
    answers: list[object] = []

    def hold() -> None:
        entered.set()
        leave.wait(PATIENCE_S)

    running.device.on_run = hold
    old = threading.Thread(target=lambda: answers.append(model("age")(np.zeros((1, 3), np.float32))))
    old.start()
    entered.wait(PATIENCE_S)
    running.device.on_run = lambda: None
    contents = [TRUNK, b"a newer head"]
    wider = (TensorSpec("x", "float32", ("batch", 5)),)
    running.source.put(
        bundle_of("age", contents, inputs=wider, outputs=(TensorSpec("y", "float32", ("batch", 5)),), version="2"),
        contents,
    )
    changed = threading.Thread(target=lambda: admin(running).command("model_changed", {"name": "age"}))
    changed.start()
    leave.set()
    old.join()
    changed.join()
    assert (np.asarray(answers[0]) == offset_of("age")).all()
    assert model("age")(np.zeros((1, 5), np.float32)).shape == (1, 5)
    del running.source.bundles["age"]
    admin(running).command("model_removed", {"name": "age"})
    with pytest.raises(errors.UnknownModel):
        model("age")(np.zeros((1, 5), np.float32))
    assert running.device.allocated_bytes == 0


def test_a_client_learns_of_a_changed_signature_by_itself(running: Running) -> None:
    known = model("age")
    known(np.zeros((1, 3), np.float32))
    wider = (TensorSpec("x", "float32", ("batch", 5)),)
    contents = [b"wide"]
    running.source.put(
        bundle_of("age", contents, inputs=wider, outputs=(TensorSpec("y", "float32", ("batch", 5)),), version="2"),
        contents,
    )
    admin(running).command("model_changed", {"name": "age"})
    assert known(np.zeros((1, 5), np.float32)).shape == (1, 5)


def test_damaged_weights_are_never_computed_with(running: Running) -> None:
    digest = running.source.bundles["age"].graph.weights[1].digest
    good = running.source.blobs[digest]
    running.source.blobs[digest] = b"xxx"
    for _ in range(2):
        with pytest.raises(errors.ModelCorrupt, match="push the model again"):
            model("age")(np.zeros((1, 3), np.float32))
    # The trunk it shares is unharmed, and so is everybody else.
    assert model("gender")(np.zeros((1, 3), np.float32)) is not None
    running.source.blobs[digest] = good
    assert (model("age")(np.zeros((1, 3), np.float32)) == offset_of("age")).all()


def test_the_bytes_of_a_failed_read_are_freed_at_once(running: Running) -> None:
    """Without the garbage collector: they are outside the budget."""
    digest = running.source.bundles["age"].graph.weights[0].digest
    running.source.blobs[digest] = b"xxx"
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            with pytest.raises(errors.ModelCorrupt):
                model("age")(np.zeros((1, 3), np.float32))
        deadline = soon()
        while running.device.allocated_bytes and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.device.allocated_bytes == 0
    finally:
        gc.enable()


def test_missing_weights_and_unreadable_disks_are_told_apart(running: Running) -> None:
    digest = running.source.bundles["age"].graph.weights[0].digest
    content = running.source.blobs.pop(digest)
    with pytest.raises(errors.ModelCorrupt):
        model("age")(np.zeros((1, 3), np.float32))
    running.source.blobs[digest] = content

    def fail(digest: str) -> None:
        raise OSError(5, "Input/output error")

    running.source.before_read = fail
    with pytest.raises(errors.SidecarFault, match="store cannot be read"):
        model("age")(np.zeros((1, 3), np.float32))
    running.source.before_read = lambda digest: None
    assert model("age")(np.zeros((1, 3), np.float32)) is not None


def test_a_device_without_memory_refuses_that_model_only(running: Running) -> None:
    running.device.capacity_bytes = 50
    with pytest.raises(errors.DeviceFault, match="out of memory"):
        model("age")(np.zeros((1, 3), np.float32))
    assert model("pair")(np.zeros((1, 3), np.float32)) is not None


def test_a_model_that_raises_harms_nobody_else(running: Running) -> None:
    def explode() -> None:
        raise ZeroDivisionError("internal detail")

    running.device.on_run = explode
    with pytest.raises(errors.SidecarFault, match="incident") as caught:
        model("age")(np.zeros((1, 3), np.float32))
    assert "internal detail" not in str(caught.value)
    running.device.on_run = lambda: None
    assert model("age")(np.zeros((1, 3), np.float32)) is not None


def test_a_stored_model_that_is_broken_says_so(tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    source.broken["rotten"] = errors.ModelCorrupt("its manifest is cut short")
    with running_server(tmp_path, source) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        with pytest.raises(errors.ModelCorrupt, match="cut short"):
            model("rotten")(np.zeros((1, 3), np.float32))
        listed = {entry["name"]: entry["state"] for entry in admin(running).command("models")["models"]}
        assert listed["rotten"] == "corrupt"
        assert listed["age"] == "stored"
        client._pool.close()


def test_a_model_over_the_budget_is_refused_with_the_numbers(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(tmp_path, source, budget_bytes=102) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        with pytest.raises(errors.BudgetExceeded, match="take 103 of 102 bytes that are not pinned"):
            model("age")(np.zeros((1, 3), np.float32))
        assert model("pair")(np.zeros((1, 3), np.float32)) is not None
        client._pool.close()


def test_models_beyond_the_budget_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six models, room for two: every answer is right and the budget holds (checked by running_server)."""
    source = FakeSource()
    for number in range(6):
        contents = [bytes([number]) * 40, b"shared"]
        source.put(bundle_of(f"m{number}", contents), contents)
    wrong: list[int] = []
    with running_server(tmp_path, source, budget_bytes=90) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)

        def work(seed: int) -> None:
            order = np.random.default_rng(seed)
            for _ in range(150):
                number = int(order.integers(6))
                answer = model(f"m{number}")(np.full((1, 3), seed, np.float32))
                if not (answer == seed + 40 * number + sum(b"shared")).all():
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = admin(running).command("status")["requests"]
        client._pool.close()
    assert not wrong
    assert counts["answered"] == 600
    assert counts["evicted_bytes"] > 0


def test_pins_outlive_the_engine(tmp_path: Path, source: FakeSource) -> None:
    with running_server(tmp_path, source) as running:
        admin(running).command("pin", {"name": "age"})
    with running_server(tmp_path, source) as running:
        deadline = soon()
        while time.monotonic() < deadline:
            entry = admin(running).command("model", {"name": "age"})
            if entry["state"] == "resident":
                break
        assert entry["pinned"]
        assert entry["state"] == "resident"


def test_a_session_that_ends_takes_its_requests_along(running: Running) -> None:
    entered, leave = threading.Event(), threading.Event()
    model("age")(np.zeros((1, 3), np.float32))

    def hold() -> None:
        entered.set()
        leave.wait(PATIENCE_S)

    running.device.on_run = hold
    blocker = threading.Thread(target=lambda: model("age")(np.zeros((1, 3), np.float32)))
    blocker.start()
    entered.wait(PATIENCE_S)
    leaver = connect(running)
    leaver._channel.send(protocol.encode(Infer(1, 10**7, "", "gender", "", (Placement("x", "float32", (1, 3), 0),))), soon())
    leaver.close()
    running.device.on_run = lambda: None
    leave.set()
    blocker.join()
    deadline = soon()
    while time.monotonic() < deadline and admin(running).command("status")["sessions"] > 3:
        pass
    assert admin(running).command("model", {"name": "gender"})["leases"] == 0


# --- the wire, by hand ------------------------------------------------------------------------------------------------


def raw(running: Running) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(PATIENCE_S)
    sock.connect(running.path)
    return sock


def hello(token: bytes = b"", **changed: object) -> bytes:
    return protocol.encode(Hello(1, 1, token, "test", 0, 0, ())._replace(**changed))


def shaken(running: Running) -> socket.socket:
    sock = raw(running)
    sock.send(hello())
    _, fds, _, _ = socket.recv_fds(sock, 4096, 2)
    for fd in fds:
        os.close(fd)
    return sock


def fault(sock: socket.socket) -> Fault:
    answer = protocol.decode(sock.recv(4096))
    assert isinstance(answer, Fault)
    return answer


@pytest.mark.parametrize(
    "frame",
    [
        b"garbage",
        b"\x00" * 5000,
        msgpack.packb([1, 2]),
        protocol.encode(Describe(1, "age")),
    ],
)
def test_a_bad_first_message_ends_the_connection(running: Running, frame: bytes) -> None:
    sock = raw(running)
    sock.send(frame)
    assert fault(sock).code in ("malformed_frame", "frame_too_large")
    assert sock.recv(1) == b""
    sock.close()


@pytest.mark.parametrize(
    "tensor",
    [
        Placement("x", "float32", (1, 3), 2**30),
        Placement("x", "float32", (1, 3), 4),
        Placement("x", "float32", (1, 3), 65536 - 8),
    ],
)
def test_tensors_outside_the_arena_end_the_connection(running: Running, tensor: Placement) -> None:
    sock = shaken(running)
    sock.send(protocol.encode(Infer(9, 10**6, "", "age", "", (tensor,))))
    assert fault(sock).code == "malformed_frame"
    assert sock.recv(1) == b""
    sock.close()


def test_a_second_request_before_the_answer_ends_the_connection(running: Running) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        leave.wait(PATIENCE_S)

    running.device.on_run = hold
    sock = shaken(running)
    frame = protocol.encode(Infer(9, 10**7, "", "age", "", (Placement("x", "float32", (1, 3), 0),)))
    sock.send(frame)
    entered.wait(PATIENCE_S)
    sock.send(frame)
    assert fault(sock).message == "a connection carries one request at a time"
    leave.set()
    sock.close()


def test_a_command_in_disguise_is_refused(running: Running) -> None:
    sock = shaken(running)
    sock.send(protocol.encode(protocol.Command(5, "status", 2)))
    assert fault(sock).code == "unauthorized"
    sock.send(protocol.encode(protocol.Document(5, 2)))
    assert fault(sock).code == "malformed_frame"
    sock.close()


def test_command_arguments_must_be_a_json_object(running: Running) -> None:
    for body, length in ((b"[]", 2), (b"{", 1), (b"{}", 2**30)):
        connection = connect(running, ADMIN_TOKEN)
        connection.request[: len(body)] = body
        connection._channel.send(protocol.encode(protocol.Command(1, "status", length)), soon())
        answer = protocol.decode(connection._channel.receive(soon()))
        assert isinstance(answer, Fault)
        assert answer.code == "malformed_frame"
        connection.close()


def test_versions_that_do_not_meet_are_refused(running: Running) -> None:
    sock = raw(running)
    sock.send(hello(oldest=7, newest=9))
    assert fault(sock).code == "version_mismatch"
    sock.close()


def test_descriptors_of_clients_are_refused_or_thrown_away(running: Running) -> None:
    before = len(os.listdir("/proc/self/fd"))
    sock = shaken(running)
    for _ in range(50):
        # Linux 6.16 and later refuse them; before, they never arrive.
        with contextlib.suppress(PermissionError):
            socket.send_fds(sock, [protocol.encode(Describe(1, "nobody"))], [0] * 100)
            assert fault(sock).code == "unknown_model"
    sock.send(protocol.encode(Describe(1, "nobody")))
    assert fault(sock).code == "unknown_model"
    sock.close()
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_whoever_never_reads_is_disconnected(running: Running) -> None:
    sock = shaken(running)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        # The kernel keeps some 300 answers.
        for _ in range(10_000):
            sock.send(protocol.encode(Describe(1, "age")))
    assert model("age")(np.zeros((1, 3), np.float32)) is not None
    sock.close()


def test_arenas_have_limits(running: Running) -> None:
    with pytest.raises(errors.ArenaFull, match="one arena may have 4194304"):
        connect(running, request_bytes=1 << 23)
    opened = []
    with pytest.raises(errors.ArenaFull, match="all connections"):
        for _ in range(5):
            opened.append(connect(running, request_bytes=1 << 22, reply_bytes=1 << 20))
    for connection in opened:
        connection.close()


def test_connections_have_a_limit(tmp_path: Path, source: FakeSource) -> None:
    with running_server(tmp_path, source, connection_limit=3) as running:
        opened = [connect(running) for _ in range(3)]
        with pytest.raises(errors.QueueFull, match="3 connections are open"):
            connect(running)
        for connection in opened:
            connection.close()


def test_those_who_say_nothing_keep_nobody_out(tmp_path: Path, source: FakeSource) -> None:
    with running_server(tmp_path, source, connection_limit=3) as running:
        silent = [raw(running) for _ in range(12)]
        opened = [connect(running) for _ in range(3)]
        with pytest.raises(errors.QueueFull, match="3 connections are open"):
            connect(running)
        for each in (*silent, *opened):
            each.close()


@pytest.mark.parametrize("limit", ["HANDSHAKE_S", "MOST_GREETING"])
def test_who_has_spoken_is_not_silent_however_long_the_server_was_busy(
    running: Running, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """They are accepted all at once, after their time, and more than may be silent."""
    monkeypatch.setattr(f"sidecar.server.{limit}", {"HANDSHAKE_S": 0.0, "MOST_GREETING": 2}[limit])
    held = threading.Event()
    running.server._post(lambda: held.wait(PATIENCE_S))
    coming = [raw(running) for _ in range(6)]
    for each in coming:
        each.send(hello())
    held.set()
    assert all(isinstance(protocol.decode(each.recv(4096)), protocol.Welcome) for each in coming)
    for each in coming:
        each.close()


def test_who_asks_has_a_turn_between_those_who_come(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for arenas takes time to make, and several may want the most that there is."""
    welcomed, in_turn, held = [0], [], threading.Event()
    welcome, turn = Session._welcome, Server._turn

    def counted_welcome(self: Session, message: Hello) -> None:
        welcomed[0] += 1
        welcome(self, message)

    def counted_turn(self: Server, patience_s: float) -> None:
        before = welcomed[0]
        turn(self, patience_s)
        in_turn.append(welcomed[0] - before)

    monkeypatch.setattr("sidecar.server._GREETING_S", 0.0)
    monkeypatch.setattr(Session, "_welcome", counted_welcome)
    monkeypatch.setattr(Server, "_turn", counted_turn)
    running.server._post(lambda: held.wait(PATIENCE_S))
    coming = [raw(running) for _ in range(6)]
    for each in coming:
        each.send(hello())
    held.set()
    assert all(each.recv(4096) for each in coming)
    for each in coming:
        each.close()
    until(lambda: sum(in_turn) == 6)
    assert max(in_turn) == 1


def test_whoever_connects_and_says_nothing_is_disconnected(running: Running) -> None:
    sock = raw(running)
    assert sock.recv(1) == b""
    sock.close()


def test_a_client_that_leaves_during_the_handshake_is_forgotten(running: Running) -> None:
    for _ in range(20):
        sock = raw(running)
        sock.send(hello())
        sock.close()
    assert model("age")(np.zeros((1, 3), np.float32)) is not None


# --- finding a sidecar, losing it, finding it again -------------------------------------------------------------------


def test_ready_means_every_model_is_there(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_pool", Pool())
    model("age")
    ready()
    model("nobody")
    with pytest.raises(errors.UnknownModel):
        ready()
    client._pool.close()


def test_no_sidecar_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(tmp_path / "nowhere.sock"))
    lonely = client.Model("age", Pool())
    with pytest.raises(errors.SidecarUnavailable, match="trunkline serve"):
        lonely(np.zeros((1, 3), np.float32))
    monkeypatch.delenv("TRUNKLINE_SOCKET")
    with pytest.raises(errors.SidecarUnavailable, match="TRUNKLINE_SOCKET is not set"):
        lonely(np.zeros((1, 3), np.float32))


def test_a_restarted_sidecar_is_found_again(tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(tmp_path / "trunkline.sock"))
    known = client.Model("age", pool := Pool())
    for _ in range(2):
        with running_server(tmp_path, source):
            assert (known(np.zeros((1, 3), np.float32)) == offset_of("age")).all()
    waiting = threading.Thread(target=lambda: known(np.zeros((1, 3), np.float32)))
    waiting.start()
    with running_server(tmp_path, source):
        waiting.join(PATIENCE_S)
        assert not waiting.is_alive()
        pool.close()


def test_a_sidecar_that_stays_away_is_an_error_at_the_deadline(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(tmp_path / "trunkline.sock"))
    known = client.Model("age", pool := Pool())
    with running_server(tmp_path, source):
        known(np.zeros((1, 3), np.float32))
    with pytest.raises((errors.SidecarUnavailable, errors.DeadlineExceeded)):
        known.call({"x": np.zeros((1, 3), np.float32)}, deadline_s=0.3)
    pool.close()


def test_a_drained_sidecar_answers_what_it_accepted(tmp_path: Path, source: FakeSource) -> None:
    entered, leave = threading.Event(), threading.Event()
    answers: list[object] = []
    with running_server(tmp_path, source) as running:
        running.device.on_run = lambda: (entered.set(), leave.wait(PATIENCE_S))  # type: ignore[func-returns-value,return-value]
        first = connect(running)
        second = connect(running)
        deadline = soon()
        inputs = (Placement("x", "float32", (1, 3), 0),)

        def ask() -> None:
            answers.append(first.infer("age", inputs, deadline))

        asking = threading.Thread(target=ask)
        asking.start()
        entered.wait(PATIENCE_S)
        running.server.drain()
        running.engine.drain(running.server.stop)
        refusing = threading.Thread(target=lambda: answers.append(outcome(second, inputs, deadline)))
        refusing.start()
        time.sleep(0.05)
        leave.set()
        asking.join()
        refusing.join()
        first.close()
        second.close()
    assert any(isinstance(answer, tuple) for answer in answers)
    assert any(isinstance(answer, (errors.Draining, errors.ConnectionLost)) for answer in answers)


def outcome(connection: Connection, inputs: tuple[Placement, ...], deadline: float) -> object:
    try:
        return connection.infer("gender", inputs, deadline)
    except errors.TrunklineError as error:
        return error


def test_a_missing_token_file_is_told(running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUNKLINE_TOKEN_FILE", str(tmp_path / "none"))
    with pytest.raises(errors.SidecarUnavailable, match="TRUNKLINE_TOKEN_FILE"):
        client.Model("age", Pool())(np.zeros((1, 3), np.float32))
    (tmp_path / "token").write_bytes(b"guess\n")
    monkeypatch.setenv("TRUNKLINE_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(errors.Unauthorized):
        client.Model("age", Pool())(np.zeros((1, 3), np.float32))
