"""Networks of every kind, served: asked through the client, alone and with others, they answer as the original does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from trunkline import client, model, models
from trunkline.admin import AdminConnection
from trunkline.pool import Pool

from sidecar.devices import open_device
from tests import zoo
from tests.fakes import ADMIN_TOKEN, FakeSource, Running, running_server
from tests.networks import EXACT, Arrays, Network, agrees, far_apart, network
from tests.waiting import PATIENCE_S

# Parameters of each published network, as its paper or its best-known implementation counts them.
PARAMETERS = {
    "ResNet-18": 11_689_512,
    "ResNet-50": 25_557_032,
    "MobileNetV2": 3_504_872,
    "EfficientNet-Lite0": 4_652_008,
    "DenseNet-121": 7_978_856,
    "VGG-16": 138_357_544,
    "GoogLeNet": 6_624_904,
    "U-Net": 31_030_658,
    "ViT-B/16": 86_567_656,
    "BERT-base": 108_891_648,
    "all-MiniLM-L6": 22_565_376,
    "GPT-2": 124_439_808,
}


@pytest.fixture(scope="module", autouse=True)
def _converter() -> None:
    """The first conversions of a process open what torch keeps open: before anybody counts descriptors and threads."""
    for kind in ("mlp", "bert"):
        network(kind)


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server without models, on a real device."""
    with running_server(tmp_path, FakeSource(), device=open_device("cpu"), budget_bytes=1 << 26, stacking=False) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        yield made
        client._pool.close()


def deploy(running: Running, *networks: Network) -> None:
    for each in networks:
        each.put(running.source)
        AdminConnection(running.path, ADMIN_TOKEN).command("model_changed", {"name": each.name})


def at_once(*jobs: Callable[[], None]) -> None:
    """Run jobs in threads that begin together; what one of them raises is raised here."""
    start, failures = threading.Barrier(len(jobs)), []

    def run(job: Callable[[], None]) -> None:
        start.wait(PATIENCE_S)
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("name", sorted(zoo.PUBLISHED))
def test_the_zoo_has_the_plans_of_the_published_networks(name: str) -> None:
    kind, sizes = zoo.PUBLISHED[name]
    with torch.device("meta"):
        module = zoo.ALL[kind](**sizes).module
    assert sum(parameter.numel() for parameter in module.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("kind", sorted(zoo.ALL))
def test_a_served_network_answers_as_the_original(running: Running, kind: str) -> None:
    made = network(kind)
    deploy(running, made)
    asked = model(made.name)
    row, other = made.inputs(1), made.inputs(1, seed=4)
    assert far_apart(made.eager(row), made.eager(other)), "an answer that hardly depends on the input shows nothing"
    for inputs in (row, other):
        assert agrees(asked.call(inputs), made.eager(inputs), exact=EXACT)
    rows = made.inputs(3)
    assert agrees(asked.call(rows), made.eager(rows), exact=False)


@pytest.mark.parametrize("kind", sorted(set(zoo.ALL) - {"outputs"}))  # whose only weight is an output
def test_two_siblings_asked_together_answer_as_they_do_alone(running: Running, kind: str) -> None:
    one = network(kind).called("one")
    two = one.tuned("two", seed=1)
    deploy(running, one, two)
    row, rows = one.inputs(1), one.inputs(3)
    assert far_apart(one.eager(row), two.eager(row))
    both = models("one", "two")
    for inputs, exact in ((row, EXACT), (rows, False)):
        together = both.call(inputs)
        for each in (one, two):
            alone = model(each.name).call(inputs)
            assert agrees(alone, each.eager(inputs), exact)
            assert agrees(together[each.name], each.eager(inputs), exact)
            if EXACT:
                np.testing.assert_equal(together[each.name], alone)


@pytest.mark.usefixtures("nothing_leaks")
def test_two_different_networks_are_served_beside_each_other(running: Running) -> None:
    networks = [network("densenet"), network("decoder")]
    deploy(running, *networks)

    def ask(each: Network) -> None:
        for seed in range(10):
            inputs = each.inputs(1 + seed % 2, seed=seed)
            assert agrees(model(each.name).call(inputs), each.eager(inputs), exact=False), (each.name, seed)

    at_once(*(lambda each=each: ask(each) for each in networks for _ in range(2)))  # type: ignore[misc]
    for each in networks:
        row = each.inputs(1)
        assert agrees(model(each.name).call(row), each.eager(row), exact=EXACT)


def siblings(kind: str, count: int = 4) -> list[Network]:
    first = network(kind).called("s0")
    return [first, *(first.tuned(f"s{number}", seed=number) for number in range(1, count))]


def solo(networks: list[Network], inputs: list[Arrays]) -> dict[tuple[str, int], Arrays]:
    """Return each model's answer to each of the inputs, asked one by one, and check that no two are alike."""
    found = {}
    for each in networks:
        for number, given in enumerate(inputs):
            answer = model(each.name).call(given)
            assert agrees(answer, each.eager(given), exact=False)
            found[each.name, number] = {each.bundle.graph.outputs[0].name: np.array(answer)}
    keys = list(found)
    for place, key in enumerate(keys):
        for other in keys[place + 1 :]:
            assert far_apart(found[key], found[other]), f"{key} and {other} cannot be told apart"
    return found


@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize("kind", ["resnet", "minilm"])
def test_eight_clients_of_four_siblings_get_each_their_own_answers(running: Running, kind: str) -> None:
    networks = siblings(kind)
    deploy(running, *networks)
    inputs = [networks[0].inputs(1, seed=10 + number, scale=1 + number / 4) for number in range(8)]
    expected = solo(networks, inputs)
    wrong: list[str] = []

    def ask(number: int) -> None:
        # Functions are processes of their own; here each has at least connections of its own.
        pool = Pool()
        try:
            asked = {each.name: client.Model(each.name, pool) for each in networks}
            for turn in range(12):
                name = networks[(number + turn) % len(networks)].name
                answer = asked[name].call(inputs[number])
                if not agrees(answer, expected[name, number], exact=False):
                    whose = [key for key, other in expected.items() if agrees(answer, other, exact=False)]
                    wrong.append(f"client {number} asked {name} and got the answer of {whose or 'nobody'}")
        finally:
            pool.close()

    at_once(*(lambda number=number: ask(number) for number in range(8)))  # type: ignore[misc]
    assert not wrong, wrong[:5]


@pytest.mark.usefixtures("nothing_leaks")
def test_requests_of_many_sizes_at_once_get_rows_of_their_own(running: Running) -> None:
    networks = siblings("vit", 2)
    deploy(running, *networks)
    inputs = [networks[0].inputs(1 + number, seed=20 + number) for number in range(4)]
    wrong: list[tuple[str, int]] = []

    def ask(each: Network, number: int) -> None:
        for _ in range(10):
            if not agrees(model(each.name).call(inputs[number]), each.eager(inputs[number]), exact=False):
                wrong.append((each.name, number))

    jobs = [lambda each=each, number=number: ask(each, number) for each in networks for number in range(4)]  # type: ignore[misc]
    at_once(*jobs)
    assert not wrong


@pytest.mark.usefixtures("nothing_leaks")
def test_equal_inputs_at_once_get_equal_answers(running: Running) -> None:
    networks = siblings("resnet")
    deploy(running, *networks)
    same, other = networks[0].inputs(1, seed=30), networks[0].inputs(1, seed=31)
    expected = solo(networks, [same, other])
    together = models("s0", "s1", "s2", "s3")
    wrong: list[str] = []

    def ask(each: Network, number: int) -> None:
        for _ in range(8):
            if not agrees(model(each.name).call((same, other)[number]), expected[each.name, number], exact=False):
                wrong.append(each.name)

    def ask_all() -> None:
        for _ in range(8):
            answers = together.call(same)
            wrong.extend(each for each in answers if not agrees(answers[each], expected[each, 0], exact=False))

    # Seven with the same input, one with another in between.
    at_once(
        *(lambda each=each: ask(each, 0) for each in networks),  # type: ignore[misc]
        *(lambda: ask(networks[0], 0), ask_all, ask_all, lambda: ask(networks[1], 1)),
    )
    assert not wrong
