"""A row of the threat table: whoever may not use a model cannot find out, by what it is told or by when, whether others have it.

Times are compared by the test of Kolmogorov and Smirnov, which asks whether two samples may be of one distribution. Samples of
one distribution fail it now and then, one time in a hundred here; five times in a row, never.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from trunkline import protocol
from trunkline.protocol import Describe, Fault, Hello, Infer, Message, Placement, Welcome

from sidecar.naming import Naming
from sidecar.tenants import Quotas, Tenant, hash_of
from tests.asking import called
from tests.fakes import FakeSource, Running, bundle_of, running_server
from tests.fault.matrix import Row

TRIES = 1000
WARM = 50
ATTEMPTS = 5
P = 0.01
SECRET = [b"weights that the others have", b"and some more of them"]
# What others have, and what nobody has; each pair has one length.
RESIDENT, ABSENT = "secret-model", "absent-model"
DIGEST = hashlib.sha256(SECRET[0]).hexdigest()
PAIRS = {
    "a name": (RESIDENT, ABSENT),
    "a name with the others' domain": (f"{RESIDENT}@a", f"{ABSENT}@a"),
    "a version": (f"{RESIDENT}:1", f"{ABSENT}:1"),
    "one of two names": (f"own+{RESIDENT}", f"own+{ABSENT}"),
    "the digest of a weight": (DIGEST, hashlib.sha256(b"nobody has this").hexdigest()),
}


def tenant(name: str, *models: str) -> Tenant:
    return Tenant(name=name, domain=name, token_hashes=(hash_of(name.encode()),), models=models)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """A sidecar where one tenant has a model in memory, and another may use only its own."""
    source = FakeSource()
    source.put(bundle_of(RESIDENT, SECRET), SECRET)
    source.put(bundle_of("own", [b"own"]), [b"own"])
    quotas = Quotas({each.name: each for each in (tenant("a", "*"), tenant("b", "own*"))})
    with running_server(tmp_path, source, quotas=quotas) as made:
        for name in (f"{RESIDENT}@a", "own@b"):
            called(made, name, {"x": np.ones((1, 3), np.float32)})
        yield made


class Stranger:
    """A connection of the tenant that may not."""

    def __init__(self, path: str, *models: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(20)
        self._sock.connect(path)
        self.welcome = self.asked(Hello(1, protocol.VERSION, b"b", "stranger", 0, 0, models))

    def asked(self, message: Message) -> Message:
        """Send a message and return the answer."""
        self._sock.send(protocol.encode(message))
        frame, descriptors, _, _ = socket.recv_fds(self._sock, protocol.MAX_FRAME_BYTES, 2)
        for each in descriptors:
            os.close(each)
        return protocol.decode(frame)

    def close(self) -> None:
        self._sock.close()


def p_of(one: Sequence[float], other: Sequence[float]) -> float:
    """Return how likely samples of one distribution are at least as far apart as these: Kolmogorov and Smirnov, two-sided."""
    both = np.sort(np.concatenate([one, other]))
    steps = [np.searchsorted(np.sort(each), both, side="right") / len(each) for each in (one, other)]
    distance = float(np.abs(steps[0] - steps[1]).max())
    root = math.sqrt(len(one) * len(other) / (len(one) + len(other)))
    scaled = (root + 0.12 + 0.11 / root) * distance
    if scaled < 0.3:
        # The series does not converge there, and it is 1 to many digits.
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101)))


def timed(ask: Callable[[str], Message], names: Sequence[str], tries: int) -> tuple[list[list[float]], list[set[str]]]:
    """Ask about each name in turn, so often; return the seconds of each, and what was told with the name taken out.

    Which comes first is drawn, so that what happens every so many requests, such as a collection of garbage, meets all alike.
    """
    seconds: list[list[float]] = [[] for _ in names]
    told: list[set[str]] = [set() for _ in names]
    order = random.Random(0)
    for _ in range(WARM + tries):
        for at in order.sample(range(len(names)), len(names)):
            name = names[at]
            began = time.perf_counter()
            answer = ask(name)
            seconds[at].append(time.perf_counter() - began)
            without_ids = answer._replace(request_id=0) if isinstance(answer, Fault) else answer
            told[at].add(repr(without_ids).replace(name.removeprefix("own+"), "NAME").replace(name, "NAME"))
    return [each[WARM:] for each in seconds], told


def describe(stranger: Stranger, name: str) -> Message:
    return stranger.asked(Describe(1, name))


def infer(stranger: Stranger, name: str) -> Message:
    return stranger.asked(Infer(1, 1_000_000, "call", name, "", (Placement("x", "float32", (1, 3), 0),)))


def distinguished(row: Row, ask: Callable[[str], Message], names: Sequence[str], tries: int) -> float:
    """Return the largest p that a few measurements give: near 0 says that the names can be told apart by time."""
    best = 0.0
    for _ in range(ATTEMPTS):
        (resident, absent), (of_resident, of_absent) = timed(ask, names, tries)
        row.attempts += len(resident) + len(absent)
        assert of_resident == of_absent, "what is told differs"
        assert len(of_resident) == 1
        best = max(best, p_of(resident, absent))
        if best > P:
            break
    return best


@pytest.mark.row("T17")
@pytest.mark.parametrize("how", [describe, infer])
@pytest.mark.parametrize("what", PAIRS)
def test_nobody_learns_what_others_have_loaded(
    what: str, how: Callable[[Stranger, str], Message], row: Row, running: Running
) -> None:
    with contextlib.closing(Stranger(running.path)) as stranger:
        assert isinstance(how(stranger, RESIDENT), Fault)
        p = distinguished(row, lambda name: how(stranger, name), PAIRS[what], row.count(TRIES))
    assert p > P, f"{what} that others have can be told from one that nobody has by its time: p = {p:.2g}"


@pytest.mark.row("T17")
def test_nobody_learns_it_by_naming_what_it_is_going_to_ask_for(row: Row, running: Running) -> None:
    def attach(name: str) -> Message:
        with contextlib.closing(Stranger(running.path, name)) as stranger:
            assert isinstance(stranger.welcome, Welcome)
            # The numbers of sessions go up for everybody.
            return stranger.welcome._replace(session=0)

    p = distinguished(row, attach, PAIRS["a name"], row.count(TRIES // 4))
    assert p > P, f"a session for a model that others have takes another time than for one that nobody has: p = {p:.2g}"


@pytest.mark.row("T17")
def test_a_sidecar_that_looks_before_it_refuses_is_found_out(row: Row, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    known_as = Naming.known_as

    def looks_first(self: Naming, model: str, asking: Tenant, is_admin: bool) -> str:
        if model == RESIDENT:
            hashlib.sha256(bytes(1 << 16)).digest()
        return known_as(self, model, asking, is_admin)

    monkeypatch.setattr(Naming, "known_as", looks_first)
    with contextlib.closing(Stranger(running.path)) as stranger:
        assert distinguished(row, lambda name: describe(stranger, name), PAIRS["a name"], TRIES) < P


def test_the_statistic_tells_distributions_apart_and_takes_one_for_one() -> None:
    chance = np.random.default_rng(1)
    one, same, other = chance.normal(0, 1, 1000), chance.normal(0, 1, 1000), chance.normal(0.2, 1, 1000)
    assert p_of(one, same) > 0.05
    assert p_of(one, other) < 0.001
    assert p_of(one, one) == 1.0
    assert p_of(list(range(100)), [each + 50 for each in range(100)]) < 1e-9
    assert 0.2 < p_of(list(range(100)), [each + 13 for each in range(100)]) < 0.45
