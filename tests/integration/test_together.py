"""Several models asked about one input: right answers, common parts computed once, and no way to get lost in between."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline import client, errors, model, models, protocol
from trunkline.admin import AdminConnection
from trunkline.connection import Connection, view
from trunkline.protocol import TensorSpec
from trunkline.testing import fake_models, signature

from sidecar.server import Session
from tests.fakes import ADMIN_TOKEN, Running, bundle_of, running_server
from tests.integration.conftest import TRUNK
from tests.waiting import PATIENCE_S, soon

pytestmark = pytest.mark.usefixtures("nothing_leaks")

X = np.ones((2, 3), np.float32)


def admin(running: Running) -> AdminConnection:
    return AdminConnection(running.path, ADMIN_TOKEN)


def change(running: Running, name: str, contents: list[bytes], **changed: object) -> None:
    running.source.put(bundle_of(name, contents, **changed), contents)  # type: ignore[arg-type]
    admin(running).command("model_changed", {"name": name})


def test_answers_come_by_model_in_the_order_asked(running: Running) -> None:
    answers = models("pair", "age", "gender")(X)
    assert list(answers) == ["pair", "age", "gender"]
    assert answers["age"].shape == (2, 3)  # type: ignore[union-attr]
    assert answers["pair"].keys() == {"y", "z"}  # type: ignore[union-attr]
    assert models("age", "gender").signature.outputs[0].name == "age/y"
    memory = admin(running).command("memory")
    assert memory["resident_bytes"] == 100 + 3 + 6 + 1
    assert memory["logical_bytes"] == 103 + 106 + 1
    assert memory["saved_bytes"] == 100
    # The weights of all; the trunk's once.
    assert running.device.allocated_bytes == 100 + 3 + 6 + 1


def test_each_model_counts_the_request(running: Running) -> None:
    models("age", "gender")(X)
    model("age")(X)
    counts = {entry["name"]: entry["requests"] for entry in admin(running).command("models")["models"]}
    assert (counts["age"], counts["gender"], counts["pair"]) == (2, 1, 0)


def test_a_new_version_of_one_is_followed(running: Running) -> None:
    both = models("age", "gender")
    both(X)
    wide = (TensorSpec("x", "float32", ("batch", 5)),)
    for name in ("age", "gender"):
        change(running, name, [TRUNK, b"new", name.encode()], version="2", inputs=wide, outputs=wide)
    assert both(np.ones((1, 5), np.float32))["age"].shape == (1, 5)  # type: ignore[union-attr]
    assert both.signature.version == "2+2"
    with pytest.raises(errors.SignatureMismatch):
        both(X)


def test_what_is_asked_together_is_evicted_and_removed_with_its_parts(running: Running) -> None:
    both = models("age", "gender")
    both(X)
    assert running.device.allocated_bytes == 109
    for name, kept_bytes in (("age", 106), ("gender", 0)):
        admin(running).command("evict", {"name": name})
        assert running.device.allocated_bytes == kept_bytes
    both(X)
    for name in ("gender", "age"):
        del running.source.bundles[name]
        admin(running).command("model_removed", {"name": name})
        with pytest.raises(errors.UnknownModel, match=name):
            both(X)
    assert running.device.allocated_bytes == 0


def test_a_part_that_is_replaced_during_a_run_is_let_go_afterwards(running: Running) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        leave.wait(PATIENCE_S)

    running.device.on_run = hold
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(models("age", "gender")(X)))
    thread.start()
    assert entered.wait(PATIENCE_S)
    running.device.on_run = lambda: None
    removal = threading.Thread(target=lambda: change(running, "age", [b"other"], version="2"))
    removal.start()
    leave.set()
    thread.join()
    removal.join()
    assert answers
    for name in ("age", "gender"):
        admin(running).command("evict", {"name": name})
    assert running.device.allocated_bytes == 0


@pytest.mark.parametrize("names", [("age",), ("age", "age"), tuple(f"m{n}" for n in range(9))])
def test_a_call_of_several_names_several(names: tuple[str, ...]) -> None:
    with pytest.raises(errors.InvalidInput, match="2 to 8 different names"):
        models(*names)


def test_names_too_long_for_one_message_are_refused_at_once() -> None:
    with pytest.raises(errors.InvalidInput, match="have 161 characters together, at most 128"):
        models("a" * 80, "b" * 80)


@pytest.mark.parametrize("name", ["gender+age", "age+age", "+", "age+", "+".join(f"m{n}" for n in range(9))])
def test_hand_made_combinations_are_refused(running: Running, name: str) -> None:
    with pytest.raises(errors.InvalidInput, match="in the order of their names"):
        client.Model(name, client._pool)(X)


def test_models_that_do_not_exist_or_go_together_are_told(running: Running) -> None:
    with pytest.raises(errors.UnknownModel, match="nobody"):
        models("age", "nobody")(X)
    with pytest.raises(errors.SignatureMismatch, match="is missing"):
        models("age", "text")(X)


def test_combinations_beyond_what_is_kept_push_out_the_oldest(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.catalog._MOST_JOINT", 2)
    for number in range(4):
        change(running, f"m{number}", [TRUNK, b"%d" % number])
    for number in range(4):
        models("age", f"m{number}")(X)
    assert list(running.engine._catalog._joint) == ["age+m2", "age+m3"]


def test_models_that_do_not_fit_together_are_asked_one_after_the_other(
    tmp_path: Path, source: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 109 bytes together.
    with running_server(tmp_path, source, budget_bytes=108) as running:  # type: ignore[arg-type]
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        alone = {name: model(name)(X) for name in ("age", "gender")}
        for _ in range(3):
            answer = models("gender", "age")(X)
            assert set(answer) == {"age", "gender"}
            for name, expected in alone.items():
                np.testing.assert_array_equal(answer[name], expected)
        client._pool.close()
    assert not running.engine._in_turn


def test_what_fails_of_models_asked_one_after_the_other_fails_the_call(
    tmp_path: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(tmp_path, source, budget_bytes=108) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        runs = []

        def fail_the_second() -> None:
            runs.append(1)
            if len(runs) == 2:
                raise errors.DeviceFault("broken")

        running.device.on_run = fail_the_second
        with pytest.raises(errors.DeviceFault, match="broken"):
            models("age", "gender")(X)
        assert set(models("age", "gender")(X)) == {"age", "gender"}
        client._pool.close()
    assert not running.engine._in_turn


def test_an_answer_that_has_no_room_fails_a_call_in_turn_once(
    tmp_path: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(tmp_path, source, budget_bytes=108) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        models("age", "gender")(X)
        told = []

        def no_room(self: Session, *args: object) -> None:
            told.append(1)
            raise errors.ArenaFull("no room")

        monkeypatch.setattr(Session, "answer", no_room)
        with pytest.raises(errors.ArenaFull, match="no room"):
            models("age", "gender")(X)
        assert told == [1]
        client._pool.close()
    assert not running.engine._in_turn


@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_function_that_dies_in_the_middle_of_a_call_in_turn_leaves_nothing(
    tmp_path: Path, source: Any, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    with running_server(tmp_path, source, budget_bytes=108) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        models("age", "gender")(X)
        running_now, go_on = threading.Event(), threading.Event()
        runs = []

        def hold() -> None:
            runs.append(1)
            if len(runs) == stop_at:
                running_now.set()
                assert go_on.wait(PATIENCE_S)

        running.device.on_run = hold
        deadline = soon()
        connection = Connection(running.path, request_bytes=1 << 16, reply_bytes=1 << 16, deadline=deadline)
        signature = models("age", "gender").signature
        placements, _ = protocol.place([(spec.name, "float32", X.shape) for spec in signature.inputs])
        view(connection.request, placements[0])[...] = X
        asking = protocol.Infer(7, 20_000_000, "", "age+gender", signature.id, tuple(placements))
        connection._channel.send(protocol.encode(asking), deadline)
        assert running_now.wait(PATIENCE_S)
        connection.close()
        go_on.set()
        # Whoever asks now is answered, and of the other nothing is left when the server ends.
        assert set(models("age", "gender")(X)) == {"age", "gender"}
        client._pool.close()
    assert not running.engine._in_turn


def test_commands_are_for_one_model(running: Running) -> None:
    models("age", "gender")(X)
    for command in ("model", "load", "evict", "pin", "unpin", "keep"):
        with pytest.raises(errors.InvalidInput, match="commands are for one"):
            admin(running).command(command, {"name": "age+gender"})


def test_combinations_of_models_that_are_gone_are_forgotten(running: Running) -> None:
    models("age", "gender")(X)
    assert running.engine._catalog._joint
    del running.source.bundles["age"]
    admin(running).command("model_removed", {"name": "age"})
    assert not running.engine._catalog._joint


# --- the fake sidecar of handlers' tests ------------------------------------------------------------------------------


def test_a_handler_s_tests_can_fake_models_asked_together() -> None:
    face = {"face": ("float32", ("batch", 3))}
    years = signature("age", inputs=face, outputs={"years": ("float32", ("batch",))})
    kinds = signature(
        "kind",
        inputs={"x": ("float32", ("rows", 3))},
        outputs={"a": ("float32", ("rows",)), "b": ("float32", ("rows",))},
    )

    def kind(x: np.ndarray) -> dict[str, np.ndarray]:
        return {"a": x[:, 0], "b": x[:, 1]}

    with fake_models({"age": (years, lambda face: face.sum(axis=1)), "kind": (kinds, kind)}):
        answers = models("kind", "age")(X)
    assert np.array_equal(answers["age"], [3, 3])  # type: ignore[arg-type]
    assert np.array_equal(answers["kind"]["b"], [1, 1])  # type: ignore[index,call-overload]
