"""Models that do not fit into memory: right answers from a window of stages at a time, and the others served beside them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from trunkline import client, model, models
from trunkline.errors import BudgetExceeded, DeadlineExceeded, ModelCorrupt, SidecarFault
from trunkline.pool import Pool

from sidecar.admission import Admission
from sidecar.errors import BlobCorrupt
from sidecar.tiermemory import TierMemory
from sidecar.timeline import smallest_room
from tests.fakes import Running
from tests.integration.test_sharing import ask, at_once, deploy
from tests.networks import Network, agrees, network
from tests.nodes import Node, check, moved, until_on_disk, weight_bytes
from tests.waiting import PATIENCE_S

KINDS = ("resnet", "densenet", "vit", "minilm")


def rooms(node: Node, *networks: Network) -> tuple[list[int], list[int]]:
    """Return how much memory each model takes, and how little each can stream in."""
    with node.serve() as running:
        deploy(running, *networks)
        for each in networks:
            until_on_disk(node, running, each.name)
        sizes = [sum(weight_bytes(running, each.name)) for each in networks]
        smallest = [
            smallest_room(running.engine._streams._legs(running.engine._catalog.deployed[each.name])) for each in networks
        ]
        client._pool.close()
    return sizes, smallest


def streams(running: Running) -> dict[str, Any]:
    found: dict[str, Any] = ask(running, "status")["streams"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_larger_than_the_budget_answers_as_ever(kind: str, node: Node) -> None:
    made = network(kind)
    (size,), (smallest,) = rooms(node, made)
    assert smallest < size
    for budget in (smallest, (smallest + size) // 2):
        node.resize(budget)
        memory = node.memory()
        with node.serve(memory) as running:
            for seed in range(4):
                check(made, seed)
                assert ask(running, "memory")["resident_bytes"] <= budget
                assert memory._tier.resident_bytes <= budget
            found = streams(running)
            assert (found["runs"], found["starved"]) == (4, 0)
            assert found["predicted_s"] > 0
            client._pool.close()
        memory._tier.check_invariants()


@pytest.fixture
def instant_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is faster than any computation."""
    monkeypatch.setattr("sidecar.timeline._HANDOVER_S", 0.0)
    monkeypatch.setattr("sidecar.mover._FIRST_PACE", 1e15)
    monkeypatch.setattr("sidecar.mover._ENOUGH_BYTES", 1 << 60)
    monkeypatch.setattr(TierMemory, "calibrate", lambda self, verdicts: None)


@pytest.mark.usefixtures("instant_disk")
def test_the_first_stages_stay_and_the_others_are_read_again(node: Node) -> None:
    made = network("resnet")
    # Two stages at a time are enough, and all else stays.
    (size,), (smallest,) = rooms(node, made)
    budget = (smallest + size) // 2
    node.resize(budget)
    with node.serve() as running:
        check(made, 0)
        first = {weight.digest for weight in running.engine._catalog.deployed[made.name].steps[0].graph.weights}
        read = []
        for seed in range(1, 4):
            before = moved(running)["block_file_bytes"]
            check(made, seed)
            read.append(moved(running)["block_file_bytes"] - before)
            assert first <= running.engine._residency._arrived
        # Less than all of it, and not less than what does not fit.
        assert all(size - budget <= each < size for each in read)


def test_a_stream_goes_on_with_what_an_engine_before_it_left_in_memory(node: Node) -> None:
    made = network("resnet")
    (size,), (smallest,) = rooms(node, made)
    node.resize((smallest + size) // 2)
    for seed in range(3):
        with node.serve() as running:
            assert (ask(running, "memory")["resident_bytes"] > 0) == (seed > 0)
            check(made, seed)
            assert (moved(running)["kept_bytes"] > 0) == (seed > 0)
            assert ask(running, "memory")["resident_bytes"] <= node.budget_bytes
            client._pool.close()


@pytest.mark.usefixtures("instant_disk")
def test_the_first_run_after_a_restart_is_predicted_by_the_trial_before_it(node: Node) -> None:
    made = network("resnet")
    (size,), (smallest,) = rooms(node, made)
    node.resize((smallest + size) // 2)
    before: tuple[float, ...] = ()
    for _ in range(2):
        with node.serve() as running:
            # What is awaited is deployed.
            ask(running, "models")
            run_s = running.engine._catalog.deployed[made.name].run_s
            assert run_s == (before or run_s)
            check(made, 0)
            found = streams(running)
            assert found["runs"] == 1
            assert found["predicted_s"] == pytest.approx(sum(run_s), abs=1e-6)
            assert found["predicted_s"] > 0
            before = run_s
            client._pool.close()


def test_too_little_for_two_neighbours_is_refused_with_the_numbers(node: Node) -> None:
    made = network("resnet")
    _, (smallest,) = rooms(node, made)
    node.resize(smallest - 4096)
    with node.serve() as running:
        for _ in range(2):
            with pytest.raises(BudgetExceeded, match=f"take {smallest} of {smallest - 4096} bytes"):
                model(made.name).call(made.inputs(1, 0))
        with pytest.raises(BudgetExceeded):
            ask(running, "load", name=made.name)


def test_requests_that_come_together_stream_together_and_others_wait_for_the_next_run(node: Node) -> None:
    made, other = network("densenet"), network("inception")
    sizes, smallest = rooms(node, made, other)
    node.resize(max(smallest) + 4096)
    assert min(sizes) > node.budget_bytes, (sizes, smallest)
    with node.serve() as running:
        calls = [(each.name, each.inputs(1, seed)) for seed in range(3) for each in (made, other)]
        answers = at_once(running, *calls)
        for (name, inputs), given in zip(calls, answers, strict=True):
            eager = (made if name == made.name else other).eager
            assert agrees(given, eager(inputs), exact=False)
        assert streams(running)["runs"] == 2
        status = ask(running, "status")["requests"]
        assert (status["waiting"], status["running"]) == (0, 0)


def test_a_model_that_fits_is_served_while_another_streams(node: Node) -> None:
    made, small = network("resnet"), network("mlp")
    (size, little), (smallest, _) = rooms(node, made, small)
    node.resize(smallest + little)
    assert size > node.budget_bytes
    with node.serve() as running, ThreadPoolExecutor(2) as threads:
        pending = [threads.submit(check, made, seed) for seed in range(5)]
        for seed in range(30):
            check(small, seed % 3)
        for each in pending:
            each.result(PATIENCE_S)
        assert ask(running, "memory")["resident_bytes"] <= node.budget_bytes


@pytest.mark.parametrize("fits_alone", [True, False])
def test_models_that_do_not_fit_together_are_asked_one_after_the_other(node: Node, fits_alone: bool) -> None:
    made, small = network("resnet"), network("mlp")
    (size, little), (smallest, _) = rooms(node, made, small)
    node.resize(max(size, little) + 4096 if fits_alone else smallest)
    with node.serve():
        given = models(*sorted((made.name, small.name))).call(made.inputs(1, 0) | small.inputs(1, 0))
        assert agrees(given[made.name], made.eager(made.inputs(1, 0)), exact=False)
        assert agrees(given[small.name], small.eager(small.inputs(1, 0)), exact=False)
        check(made, 0)


def test_a_pin_that_leaves_too_little_ends_a_stream_with_an_error(node: Node) -> None:
    made, small = network("resnet"), network("mlp")
    (_, little), (smallest, _) = rooms(node, made, small)
    node.resize(smallest + little // 2)
    with node.serve() as running:
        check(made, 0)
        ask(running, "pin", name=small.name)
        with pytest.raises(BudgetExceeded, match="pinned"):
            model(made.name).call(made.inputs(1, 0))
        ask(running, "unpin", name=small.name)
        check(made, 1)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Reads of block files after the first few wait for this event."""
    release, count = threading.Event(), iter(range(1_000_000))
    read = __import__("sidecar.blockfiles", fromlist=["BlockFiles"]).BlockFiles.read

    def wait(self: Any, keys: Any, targets: Any) -> None:
        if next(count) >= 2:
            assert release.wait(PATIENCE_S)
        read(self, keys, targets)

    monkeypatch.setattr("sidecar.blockfiles.BlockFiles.read", wait)
    yield release
    release.set()


def test_who_leaves_a_stream_leaves_nothing_behind(node: Node, held: threading.Event) -> None:
    made = network("resnet")
    held.set()
    (size,), (smallest,) = rooms(node, made)
    node.resize((smallest + size) // 2)
    held.clear()
    with node.serve() as running:
        with pytest.raises(DeadlineExceeded):
            model(made.name).call(made.inputs(1, 0), deadline_s=1)
        held.set()
        check(made, 1)
        assert ask(running, "model", name=made.name)["leases"] == 0


def test_who_is_late_at_the_last_moment_does_not_fail_who_comes_next(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("resnet")
    (size,), (smallest,) = rooms(node, made)
    node.resize((smallest + size) // 2)
    stream, taken_up = Admission._stream, threading.Semaphore(0)

    def late(self: Admission, work: Any, parts: Any) -> None:
        # In time when it was taken from the queue, and not any more when it is to enter.
        if taken_up.acquire(blocking=False):
            work.deadline = 0.0
        stream(self, work, parts)

    monkeypatch.setattr(Admission, "_stream", late)
    with node.serve() as running:
        inputs = made.inputs(1, 0)
        pools = [Pool() for _ in range(3)]
        asked = [client.Model(made.name, pool) for pool in pools]
        assert all(each.signature for each in asked)
        taken_up.release()
        outcomes = together(running, [lambda each=each: each.call(inputs) for each in asked])  # type: ignore[misc]
        failed = [each for each in outcomes if isinstance(each, Exception)]
        assert [type(each) for each in failed] == [DeadlineExceeded], failed
        assert all(agrees(each, made.eager(inputs), exact=False) for each in outcomes if not isinstance(each, Exception))
        for pool in pools:
            pool.close()


def together(running: Running, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Make calls while the engine is held up, so that all are there when the first is taken up; return answers and errors."""
    release, submitted, submit = threading.Event(), threading.Semaphore(0), running.engine.submit

    def counted(work: Any) -> None:
        submit(work)
        submitted.release()

    running.engine.submit = counted  # type: ignore[method-assign]
    running.engine._post(lambda: (release.wait(PATIENCE_S), None)[1])
    with ThreadPoolExecutor(len(calls)) as threads:
        pending = [threads.submit(call) for call in calls]
        for _ in calls:
            assert submitted.acquire(timeout=PATIENCE_S)
        release.set()
        return [each.exception(60) or each.result() for each in pending]


def test_a_damaged_weight_fails_the_run_and_not_the_next(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("resnet")
    (size,), (smallest,) = rooms(node, made)
    node.resize((smallest + size) // 2)
    with node.serve() as running:
        check(made, 0)
        with monkeypatch.context() as patched:
            read = node.source.read_blob

            def damaged(digest: str, target: memoryview, crc32: int | None = None) -> None:
                raise BlobCorrupt("altered", digest=digest)

            patched.setattr(node.source, "read_blob", damaged)
            running.engine._memory._files.keep(())  # type: ignore[attr-defined]
            with pytest.raises(ModelCorrupt):
                model(made.name).call(made.inputs(1, 0))
            assert read is not damaged
        check(made, 1)
        assert ask(running, "model", name=made.name)["leases"] == 0


def test_a_model_is_replaced_while_it_streams(node: Node, held: threading.Event) -> None:
    made = network("resnet")
    held.set()
    (size,), (smallest,) = rooms(node, made)
    node.resize((smallest + size) // 2)
    held.clear()
    with node.serve() as running, ThreadPoolExecutor(1) as threads:
        inputs = made.inputs(1, 0)
        pending = threads.submit(model(made.name).call, inputs)
        while not streams_open(running):
            ask(running, "status")
        bundle = node.source.bundles.pop(made.name)
        ask(running, "model_removed", name=made.name)
        held.set()
        assert agrees(pending.result(PATIENCE_S), made.eager(inputs), exact=False)
        assert ask(running, "memory")["resident_bytes"] == 0
        node.source.bundles[made.name] = bundle
        ask(running, "model_changed", name=made.name)
        check(made, 1)


def streams_open(running: Running) -> bool:
    return running.engine._streams.deployed is not None


def test_all_who_wait_are_told_when_a_stream_fails_at_its_first_stage(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("resnet")
    (size,), (smallest,) = rooms(node, made)
    node.resize((smallest + size) // 2)
    with node.serve() as running:

        def damaged(digest: str, target: memoryview, crc32: int | None = None) -> None:
            raise BlobCorrupt("altered", digest=digest)

        monkeypatch.setattr(node.source, "read_blob", damaged)
        running.engine._memory._files.keep(())  # type: ignore[attr-defined]
        pools = [Pool() for _ in range(20)]
        # More than one batch, and another beside it, can take up.
        with ThreadPoolExecutor(20) as threads:
            asked = [threads.submit(client.Model(made.name, pool).call, made.inputs(1, 0), deadline_s=30) for pool in pools]
            for each in asked:
                with pytest.raises(ModelCorrupt):
                    each.result(PATIENCE_S)
        for pool in pools:
            pool.close()


def test_a_request_that_cannot_be_taken_up_is_answered(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("mlp")
    with node.serve() as running:
        deploy(running, made)
        with monkeypatch.context() as patched:
            patched.setattr(running.engine._residency, "lease", None)
            with pytest.raises(SidecarFault, match="incident"):
                model(made.name).call(made.inputs(1, 0))
        check(made, 0)
