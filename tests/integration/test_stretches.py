"""Stages run as one for a request that is alone, and one by one where requests meet, or where that would not do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline import model, models
from trunkline.errors import DeviceOutOfMemory, ValueOutOfBounds

from sidecar.catalog import Deployed, Step
from sidecar.devices import TorchDevice, open_device
from sidecar.stretches import Unjoined
from sidecar.wavefront import Wavefront
from tests.fakes import Running
from tests.forms import prefer
from tests.integration.test_sharing import ask, at_once, counted, deploy, network, serving
from tests.networks import Network, agrees
from tests.waiting import until


@pytest.fixture(autouse=True)
def in_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have stages run in sessions, each request meet none of the last test's, and no moment of a slow machine be a crowd."""
    if not open_device("cpu").block:
        pytest.skip("ONNX Runtime is not here, or has no convolutions in blocks on this processor")
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    monkeypatch.setattr("sidecar.stretches.LONGEST_S", 10.0)
    monkeypatch.setattr("sidecar.strides.LONGEST_S", 10.0)
    monkeypatch.setattr("sidecar.strides._NEXT_S", 0.0)
    prefer(monkeypatch, "blocked")


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    with serving(tmp_path, monkeypatch) as made:
        yield made


def joined_count(running: Running) -> int:
    return int(ask(running, "status")["sharing"]["joined"])


def joined_programs(deployed: Deployed) -> list[Any]:
    """Return the programs that are not of one stage alone."""
    return [piece.program for stretch in deployed.stretches.values() for piece in stretch.pieces if piece.count > 1]


def fail_joined(monkeypatch: pytest.MonkeyPatch, deployed: Deployed, kind: type[Exception], message: str) -> list[int]:
    """Have such programs raise; return the list to which each such run adds the rows of its first input."""
    programs, run, failed = joined_programs(deployed), TorchDevice.run, []

    def failing(self: TorchDevice, program: Any, weights: Any, inputs: Any) -> Any:
        if any(program is each for each in programs):
            failed.append(inputs[0].shape[0])
            raise kind(message)
        return run(self, program, weights, inputs)

    monkeypatch.setattr(TorchDevice, "run", failing)
    return failed


def first_step(deployed: Deployed) -> Step:
    """Return the first step that is run by such a program."""
    for first, stretch in deployed.stretches.items():
        for piece in stretch.pieces:
            if piece.count > 1:
                return deployed.steps[first + piece.start]
    raise AssertionError("nothing is joined")


def answered(running: Running, made: Network, seed: int) -> tuple[np.ndarray[Any, Any], int]:
    """Ask once; return the answer, and how many stages were run within another's run."""
    before = joined_count(running)
    answer = model(made.name).call(made.inputs(1, seed))
    return np.asarray(answer), joined_count(running) - before


@pytest.mark.parametrize("kind", ["resnet", "mobilenet", "densenet", "vit"])
def test_a_request_that_is_alone_is_run_as_one_and_answered_to_the_bit_as_by_stages(
    kind: str, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = network(kind)
    deploy(running, made)
    (deployed,) = running.engine._catalog.deployed.values()
    assert deployed.stretches
    most = sum(stretch.count - 1 for stretch in deployed.stretches.values())
    with counted(running) as counts:
        answer, count = answered(running, made, 1)
    assert count == most
    # Nothing is different for whoever counts stages.
    assert counts["stages"] == counts["stage_requests"] == len(deployed.steps)
    assert agrees(answer, made.eager(made.inputs(1, 1)), exact=False)
    monkeypatch.setattr("sidecar.strides.LONGEST_S", 0.0)
    singly, count = answered(running, made, 1)
    assert count == 0
    assert answer.tobytes() == singly.tobytes()


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_models_that_are_asked_together_are_run_as_one_as_far_as_they_go_together(
    kind: str, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = network(kind)
    siblings = [original.tuned(f"{kind}-{number}", number) for number in range(3)]
    deploy(running, *siblings)
    together, entries = models(*(each.name for each in siblings)), list(running.engine._catalog.deployed.values())
    (first,) = (each for each in entries if each.name == siblings[0].name)
    trunk = sum(1 for steps in zip(*(each.steps for each in entries), strict=True) if len({step.key for step in steps}) == 1)
    assert trunk > 1
    inputs = original.inputs(1, 1)
    before = joined_count(running)
    for _ in range(2):
        answers = together.call(inputs)
        for each in siblings:
            assert agrees(answers[each.name], each.eager(inputs), exact=False)
    assert joined_count(running) - before == 2 * (trunk - 1)
    assert not any(each.cuts for each in entries if each is not first)
    assert [(place, stretch and stretch.count) for place, stretch in first.cuts.items()] == [((0, trunk), trunk)]
    # In the whole stretch, too, what is before the head is one session: it is the same.
    cut = first.cuts[0, trunk]
    assert cut is not None
    assert cut.pieces[-1].program is first.stretches[0].pieces[-2].program
    monkeypatch.setattr("sidecar.strides.LONGEST_S", 0.0)
    singly = together.call(inputs)
    assert all(np.array_equal(singly[each.name], answers[each.name]) for each in siblings)
    running.engine._post(running.engine.check_invariants)


def test_where_requests_meet_stages_are_run_one_by_one_and_for_a_while_after(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.strides._HOLDS_S", 1e9)
    one, other = network("resnet"), network("mobilenet")
    deploy(running, one, other)
    before = joined_count(running)
    inputs = [one.inputs(1, 1), other.inputs(1, 2)]
    answers = at_once(running, (one.name, inputs[0]), (other.name, inputs[1]))
    for made, given, answer in zip((one, other), inputs, answers, strict=True):
        assert agrees(answer, made.eager(given), exact=False)
    assert joined_count(running) == before
    assert answered(running, one, 3)[1] == 0
    monkeypatch.setattr("sidecar.strides._HOLDS_S", 0.0)
    assert answered(running, one, 3)[1] > 0


def met(running: Running, *networks: Network, seed: int = 0) -> int:
    """Ask about networks at once; return how many stages were run within another's run."""
    before = joined_count(running)
    inputs = [each.inputs(1, seed + number) for number, each in enumerate(networks)]
    answers = at_once(running, *((each.name, given) for each, given in zip(networks, inputs, strict=True)))
    for made, given, answer in zip(networks, inputs, answers, strict=True):
        assert agrees(answer, made.eager(given), exact=False)
    return joined_count(running) - before


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_batch_is_run_as_one_where_that_was_measured_to_be_faster(
    kind: str, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.strides._HOLDS_S", 1e9)
    monkeypatch.setattr("sidecar.costs._LOOKS", 1)
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    made = network(kind)
    siblings = [made.tuned(f"{kind}-{number}", number) for number in range(3)]
    deploy(running, *siblings)
    entries = list(running.engine._catalog.deployed.values())
    trunk = sum(1 for steps in zip(*(each.steps for each in entries), strict=True) if len({step.key for step in steps}) == 1)
    # As batches of three, stage by stage; the first run of each counts for nothing.
    assert [met(running, *siblings, seed=seed) for seed in range(4)] == [0] * 4
    assert met(running, *siblings) == trunk - 1, "what the three have in common, as one batch"
    costs, stride = running.engine._runs._costs, ("stretch", entries[0].steps[0].key, entries[0].steps[trunk - 1].key, trunk)

    def have(factor: float) -> None:
        for (lanes, key), size in list(costs._seconds):
            if key[:4] == stride:
                costs._seconds[(lanes, key), size] *= factor
                costs._seen[(lanes, key), size] = 3

    for _ in range(3):
        met(running, *siblings)
    have(1e-9)
    assert met(running, *siblings) == trunk - 1
    have(1e18)
    assert met(running, *siblings) == trunk - 2, "it was found to be slower; what follows the first stage was not"


def test_who_begins_before_others_lets_them_catch_up_first(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.strides._HOLDS_S", 1e9)
    monkeypatch.setattr("sidecar.costs.BatchCosts.joins", lambda *arguments: True)
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    made = network("resnet")
    deploy(running, made)
    (deployed,) = running.engine._catalog.deployed.values()
    assert met(running, made, made) == len(deployed.steps) - 1
    # Two were about of late, so that there may come another.
    assert met(running, made) == len(deployed.steps) - 2


def test_whoever_asks_the_same_is_waited_for(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.costs.BatchCosts.joins", lambda *arguments: True)
    made = network("resnet")
    other = made.tuned("other", 1)
    deploy(running, made, other)
    assert met(running, made, other) > 0
    inputs = made.inputs(1, 1)
    before = joined_count(running)
    monkeypatch.setattr("sidecar.strides._HOLDS_S", 1e9)
    with counted(running) as counts:
        at_once(running, (made.name, inputs), (other.name, inputs))
    assert counts["stage_requests"] > counts["stages"], "computed once for both"
    assert joined_count(running) == before
    assert met(running, made, other) == 0, "more of them may come"


def test_what_is_wrong_with_one_of_a_batch_is_told_by_its_stage(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.costs.BatchCosts.joins", lambda *arguments: True)
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    made = network("vit")
    deploy(running, made)
    (deployed,) = running.engine._catalog.deployed.values()
    failed = fail_joined(monkeypatch, deployed, ValueOutOfBounds, "an index is out of range somewhere")
    assert met(running, made, made) == 0
    assert failed == [2]


def test_whoever_begins_at_once_after_a_stretch_has_waited_for_it(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("resnet")
    deploy(running, made)
    assert answered(running, made, 1)[1] > 0
    monkeypatch.setattr("sidecar.strides._NEXT_S", 1e9)
    assert answered(running, made, 1)[1] == 0
    monkeypatch.setattr("sidecar.strides._NEXT_S", 0.0)
    # It is a while until nobody is taken for a crowd.
    assert answered(running, made, 1)[1] == 0


def test_what_has_no_room_as_one_is_run_by_stages(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("resnet")
    deploy(running, made)
    (deployed,) = running.engine._catalog.deployed.values()
    assert answered(running, made, 1)[1] > 0
    failed = fail_joined(monkeypatch, deployed, DeviceOutOfMemory, "no room")
    answer, count = answered(running, made, 1)
    assert failed
    assert count == 0
    assert agrees(answer, made.eager(made.inputs(1, 1)), exact=False)


def test_what_cannot_be_run_as_one_is_tried_once(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("resnet")
    deploy(running, made)
    (deployed,) = running.engine._catalog.deployed.values()
    failed = fail_joined(monkeypatch, deployed, Unjoined, "not on inputs like these")
    for seed in range(3):
        answer, count = answered(running, made, seed)
        assert count == 0
        assert agrees(answer, made.eager(made.inputs(1, seed)), exact=False)
    assert len(failed) == 1
    monkeypatch.setattr("sidecar.strides._MOST_GIVEN_UP", 1)
    strides = running.engine._runs._strides
    strides.give_up(("another",))
    assert strides._given_up == {("another",)}


def test_a_batch_without_room_where_it_parts_is_answered_row_by_row(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.costs.BatchCosts.joins", lambda *arguments: True)
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    made = network("resnet")
    one, other = made.tuned("one", 1), made.tuned("other", 2)
    deploy(running, one, other)
    onward, full = Wavefront._onward, []

    def no_room(self: Wavefront[Any], group: Any, pairs: Any) -> Any:
        if len(group.rows) > 1 and not full:
            full.append(len(group.rows))
            raise DeviceOutOfMemory("no room for a part")
        return onward(self, group, pairs)

    monkeypatch.setattr(Wavefront, "_onward", no_room)
    assert met(running, one, other, one) > 0
    assert full == [3]


def test_what_is_wrong_with_a_request_is_told_by_its_stage(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("vit")
    deploy(running, made)
    (deployed,) = running.engine._catalog.deployed.values()
    (joined,), first = joined_programs(deployed), first_step(deployed).program
    model(made.name).call(made.inputs(1, 1))
    run = TorchDevice.run

    def wrong(self: TorchDevice, program: Any, weights: Any, inputs: Any) -> Any:
        if program is joined or program is first:
            raise ValueOutOfBounds("an index is out of range " + ("somewhere" if program is joined else "here"))
        return run(self, program, weights, inputs)

    monkeypatch.setattr(TorchDevice, "run", wrong)
    with pytest.raises(ValueOutOfBounds, match="here"):
        model(made.name).call(made.inputs(1, 1))


def test_many_rows_go_stage_by_stage(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("vit")
    deploy(running, made)
    (deployed,) = running.engine._catalog.deployed.values()
    monkeypatch.setattr("sidecar.strides.LONGEST_S", sum(deployed.run_s) / 2)
    before = joined_count(running)
    inputs = made.inputs(8, 1)
    answer = model(made.name).call(inputs)
    assert joined_count(running) == before
    assert agrees(answer, made.eager(inputs), exact=False)


def test_weights_that_are_not_there_yet_are_waited_for_stage_by_stage(running: Running) -> None:
    made = network("resnet")
    deploy(running, made)
    for seed in range(3):
        ask(running, "evict", name=made.name)
        answer, _ = answered(running, made, seed)
        assert agrees(answer, made.eager(made.inputs(1, seed)), exact=False)
    assert answered(running, made, 4)[1] > 0


def test_models_of_one_structure_have_one_program_and_none_is_kept_for_nobody(running: Running) -> None:
    one, other = network("resnet"), network("resnet").tuned("other", 1)
    deploy(running, one, other)
    first, second = running.engine._catalog.deployed.values()
    for made in (one, other):
        answer, count = answered(running, made, 1)
        assert count > 0
        assert agrees(answer, made.eager(made.inputs(1, 1)), exact=False)
    assert joined_programs(first) == joined_programs(second)
    del first, second
    for made in (one, other):
        del running.source.bundles[made.name]
        ask(running, "model_removed", name=made.name)
    until(lambda: not running.engine._catalog.programs)
    running.engine._catalog.check_invariants()
