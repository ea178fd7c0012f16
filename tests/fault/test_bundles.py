"""Rows of the threat table: what strangers put into bundles. Every carrier of code that other formats have had is tried here.

What would run makes a file called ``marker``, or meets the engine's second wall, which logs it; neither may be seen.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import mmap
import pickle
import random
import re
import resource
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from trunkline.client import Model
from trunkline.errors import TrunklineError

from sidecar import graphfile, operators
from sidecar.bundle import canonical_graph, manifest_bytes, parse_bundle, read_bundle
from sidecar.errors import BundleError
from sidecar.ledger import Ledger
from sidecar.segment import SHARED_MEMORY, segment_name
from sidecar.unixhttp import SCHEME, mount_unix
from tests.fault.matrix import EXPECTED, Neighbour, Row, descendants, pool_at
from tests.registered import registered_off_the_list
from tests.sidecar_process import SidecarProcess
from tests.waiting import PATIENCE_S, until

Plain = dict[str, Any]
MUTANTS = 3000


class Payload:
    """What makes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


class Pushing:
    """Sends what no client of ours would send."""

    def __init__(self, box: SidecarProcess) -> None:
        self._session = requests.Session()
        mount_unix(self._session)
        self._session.trust_env = False
        self._base = SCHEME + requests.utils.quote(f"{box.run_dir}/admin.sock", safe="") + "/admin/v1/"

    def model(self, name: str, manifest: object, graph: object) -> requests.Response:
        return self._sent(f"models/{name}", json.dumps({"manifest": manifest, "graph": graph}).encode())

    def raw(self, path: str, body: bytes, kind: str = "application/json") -> requests.Response:
        return self._sent(path, body, kind)

    def _sent(self, path: str, body: bytes, kind: str = "application/json") -> requests.Response:
        return self._session.put(self._base + path, data=body, headers={"Content-Type": kind}, timeout=PATIENCE_S)

    def close(self) -> None:
        self._session.close()


@pytest.fixture
def pushing(steady: SidecarProcess) -> Iterator[Pushing]:
    made = Pushing(steady)
    yield made
    made.close()


@pytest.fixture
def plain(scaled: Path) -> tuple[Plain, Plain]:
    """Return manifest and graph of a good bundle, as JSON has them."""
    bundle = read_bundle(scaled)
    return json.loads(manifest_bytes(bundle)), json.loads(canonical_graph(bundle.graph))


def named(manifest: Plain, graph: Plain) -> Plain:
    """Return the manifest that names a graph as it is."""
    text = json.dumps(graph, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    return manifest | {"graph": hashlib.sha256(text).hexdigest()}


def change(*path: str | int, to: object) -> Callable[[Plain], None]:
    def apply(root: Plain) -> None:
        place: Any = root
        for step in path[:-1]:
            place = place[step]
        if isinstance(place, list) and path[-1] == len(place):
            place.append(to)
        else:
            place[path[-1]] = to

    return apply


def carriers(marker: Path) -> dict[str, Callable[[Plain], None]]:
    """Return what is done to a graph, by the carrier of code it stands for."""
    text = f"__import__('os').system('touch {marker}')"
    node = {"args": [{"input": 0}], "kwargs": {}, "origin": ""}
    return {
        "sample inputs": change("sample_inputs", to=pickle.dumps(Payload(marker)).hex()),
        "a pickled weight": change("weights", 0, "use_pickle", to=True),
        "a weight by a file's name": change("weights", 0, "path", to="../../weights.pt"),
        "a weight by a file's name in place of its digest": change("weights", 0, "digest", to=f"file://{marker}"),
        "an opaque object": change("constants", to={"opaque_obj": text}),
        "a custom object": change("weights", 0, "dtype", to="__torch__.torch.classes.a.B"),
        "a size that is an expression": change("inputs", 0, "shape", to=[text, 8]),
        "a symbol that is an expression": change("symbols", 0, "name", to=text),
        "a size computed from text": change("nodes", 1, to={"op": "sym.add", **node, "args": [text, 1]}),
        "the name of an input": change("inputs", 0, "name", to=f"x={text}"),
        "a guard": change("guards_code", to=[text]),
        "the name of an intermediate value": change("nodes", 0, "name", to=text),
        "where a node comes from": change("nodes", 0, "origin", to="\n" + text),
        "a compiled library": change("nodes", 0, "op", to="aoti.model.so"),
        "a target outside of the operators": change("nodes", 0, "op", to="os.system"),
        "a target by its Python name": change("nodes", 0, "op", to="torch.ops.aten.add.__globals__"),
        "a keyword": change("nodes", 0, "kwargs", to={"__class__": text}),
        "a word": change("nodes", 0, "args", to=[{"input": 0}, {"enum": text}]),
        "text": change("nodes", 0, "args", to=[{"input": 0}, text]),
        "a dtype": change("nodes", 0, "args", to=[{"input": 0}, {"dtype": "__class__"}]),
        "a device": change("nodes", 0, "kwargs", to={"device": {"device": "cuda"}}),
        # Past a verifier of names: what registered operators do.
        "a file that is read": change("nodes", 0, to={"op": "aten.from_file.default", **node, "args": [{"enum": "/etc/passwd"}]}),
        "a weight that is written to": change(
            "nodes", 0, to={"op": "aten.copy_.default", **node, "args": [{"weight": 0}, {"input": 0}]}
        ),
        "memory that nobody wrote": change("nodes", 0, to={"op": "aten.empty.memory_format", **node, "args": [[4096]]}),
        "memory beside a weight": change(
            "nodes", 0, to={"op": "aten.as_strided.default", **node, "args": [{"weight": 0}, [1 << 20], [1]]}
        ),
    }


def archive(marker: Path) -> bytes:
    """Return what torch.export.save writes, with a payload wherever it unpickles."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for member in ("archive_format", "byteorder", "data/sample_inputs/model.pt", "data/weights/w.pt", "../../escape"):
            file.writestr(f"model/{member}", pickle.dumps(Payload(marker)))
    return made.getvalue()


def tried_at_the_wall(box: SidecarProcess) -> int:
    return box.log.read_text().count("was tried in the engine")


@pytest.mark.row("T7", "T10")
def test_no_byte_of_a_bundle_is_code(
    row: Row, steady: SidecarProcess, pushing: Pushing, plain: tuple[Plain, Plain], tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    manifest, graph = plain
    manifest["name"] = "hostile"
    with Neighbour(row, steady.socket) as neighbour:
        for carrier, spoil in carriers(marker).items():
            spoilt = copy.deepcopy(graph)
            spoil(spoilt)
            row.attempts += 1
            answer = pushing.model("hostile", named(manifest, spoilt), spoilt)
            assert answer.status_code == 422, f"{carrier}: {answer.text}"
            assert answer.json()["error"]["code"] == "bundle_error", carrier
            assert str(marker) not in answer.json()["error"]["message"][100:], carrier
        for field, value in (("name", f"../{marker}"), ("created", {"k": "\x1b]0;"}), ("version", "$(id)"), ("main", "x.py")):
            row.attempts += 1
            assert pushing.model("hostile", manifest | {field: value}, graph).status_code in (400, 422), field
        # In place of JSON, and in place of a path.
        for body in (archive(marker), pickle.dumps(Payload(marker)), b"!!python/object/apply:os.system ['true']"):
            row.attempts += 1
            assert pushing.raw("models/hostile", body).status_code in (400, 422)
            # As a weight it is so many bytes, and of another digest than it is said to be.
            assert pushing.raw(f"blobs/{'0' * 64}", body, "application/octet-stream").status_code == 422
        for name in ("..%2f..%2fescape", "%252e%252e", "%2fetc%2fpasswd", "..", "a%00b", "a/../../b"):
            row.attempts += 1
            assert pushing.raw(f"models/{name}", b"{}").status_code in (400, 404, 405, 422)
            assert pushing.raw(f"blobs/{name}", b"x", "application/octet-stream").status_code in (400, 404, 405)
        neighbour.await_answers()
    assert not marker.exists()
    assert not list(tmp_path.parent.glob("**/escape"))
    assert not tried_at_the_wall(steady)
    assert [each["name"] for each in steady.admin.get("models")["models"]] == ["scaled"]


@pytest.mark.row("T7")
def test_a_pickle_as_a_weight_is_numbers(
    row: Row, steady: SidecarProcess, pushing: Pushing, plain: tuple[Plain, Plain], tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    manifest, graph = plain
    manifest["name"] = "numbers"
    content = pickle.dumps(Payload(marker))[:32].ljust(32, b".")
    numbers = np.frombuffer(content, np.float32)
    digest = hashlib.sha256(content).hexdigest()
    graph["weights"][0] |= {"digest": digest, "crc32": zlib.crc32(content)}
    assert pushing.raw(f"blobs/{digest}", content, "application/octet-stream").status_code == 201
    assert pushing.model("numbers", named(manifest, graph), graph).status_code == 201
    pool = pool_at(steady.socket)
    with Neighbour(row, steady.socket):
        given = Model("numbers", pool)(np.ones((1, 8), np.float32))
    row.attempts += 1
    pool.close()
    steady.admin.delete("models/numbers")
    assert given.tobytes() == numbers.tobytes()
    assert not marker.exists()
    assert not tried_at_the_wall(steady)


def mutated(draw: random.Random, root: Plain) -> bytes:
    """Return the text of a graph, changed in one to three places, of its values or of its bytes."""
    odd: list[Any] = [None, True, -1, 0, 1 << 63, 1 << 31, 2.5, "", "x", "batch", "?", [], {}, [[]], {"node": 0}, {"weight": 9}]
    odd += [{"item": 1, "node": 0}, {"enum": "none"}, {"dtype": "int64"}, {"float": "nan"}, "aten.embedding.default", "sym.mul"]
    root = copy.deepcopy(root)
    for _ in range(draw.randint(1, 3)):
        place: Any = root
        while True:
            key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.25:
                break
            place = place[key]
        match draw.randrange(3):
            case 0:
                place[key] = copy.deepcopy(draw.choice(odd))
            case 1 if len(place) > 1:
                del place[key]
            case _ if isinstance(place, list):
                place.insert(key, copy.deepcopy(place[key]))
    text = bytearray(json.dumps(root, sort_keys=True, separators=(",", ":")).encode())
    if draw.random() < 0.3:
        start = draw.randrange(len(text))
        text[start : start + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
    return bytes(text)


@pytest.mark.row("T7", "T16", "F18")
def test_mutants_are_refused_or_served_and_nothing_else(
    row: Row, steady: SidecarProcess, pushing: Pushing, plain: tuple[Plain, Plain]
) -> None:
    """Each is read here, in the engine's way; what is a bundle is pushed, deployed, asked and removed."""
    manifest, graph = plain
    manifest["name"] = "mutant"
    draw, pool, before = random.Random(7), pool_at(steady.socket), digests_in_memory(steady)
    outcomes: dict[str, int] = {}
    with Neighbour(row, steady.socket):
        for _ in range(row.count(MUTANTS)):
            text = mutated(draw, graph)
            row.attempts += 1
            try:
                bundle = parse_bundle(json.dumps(manifest | {"graph": hashlib.sha256(text).hexdigest()}).encode(), text)
            except BundleError:
                outcomes["refused"] = outcomes.get("refused", 0) + 1
                continue
            answer = pushing.model("mutant", json.loads(manifest_bytes(bundle)), json.loads(text))
            if answer.status_code == 201:
                try:
                    Model("mutant", pool)(np.ones((1, 8), np.float32))
                    told = "answered"
                except TrunklineError as error:
                    told = error.code
                steady.admin.delete("models/mutant")
            else:
                told = answer.json()["error"]["code"]
            assert told != "sidecar_fault", text
            outcomes[told] = outcomes.get(told, 0) + 1
    pool.close()
    assert outcomes["refused"] > row.attempts / 2, outcomes
    assert outcomes["answered"] > 5, outcomes
    assert before.items() <= digests_in_memory(steady).items()
    assert not tried_at_the_wall(steady)


def off_the_list(row: Row, manifest: Plain, graph: Plain) -> Iterator[Plain]:
    """Have a graph of each operator read that torch has and bundles may not use; give what was refused, with its manifest."""
    for op in registered_off_the_list():
        graph["nodes"] = [{"op": op, "args": [{"input": 0}], "kwargs": {}, "origin": ""}]
        row.attempts += 1
        text = json.dumps(graph, sort_keys=True, separators=(",", ":")).encode()
        with pytest.raises(BundleError, match=r"nodes\[0\]\.op"):
            parse_bundle(json.dumps(named(manifest, graph)).encode(), text)
        yield graph


@pytest.mark.row("T8")
def test_no_operator_off_the_list_gets_in(row: Row, steady: SidecarProcess, pushing: Pushing, plain: tuple[Plain, Plain]) -> None:
    """All that torch has is read here; some are pushed, which takes the same reader longer."""
    manifest, graph = plain
    manifest["name"] = "hostile"
    with Neighbour(row, steady.socket):
        for number, refused in enumerate(off_the_list(row, manifest, graph)):
            if number % 100 == 0:
                assert pushing.model("hostile", named(manifest, refused), refused).status_code == 422
    assert row.attempts > 3000


def test_a_reader_without_a_list_is_found_out(plain: tuple[Plain, Plain], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "check_node", lambda node, index: None)
    monkeypatch.setattr(graphfile, "choice", lambda value, place, allowed: value)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        next(off_the_list(Row(("mutant",)), *plain))


def memory_of(pid: int) -> int:
    """Return the bytes that a process has alone."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith(("Private_", "Swap:")))


def bombs(manifest: Plain, graph: Plain) -> dict[str, tuple[bytes, str]]:
    """Return bodies that claim more than they have, or have more than they say, with why each is to be refused.

    But for what they claim they are good: nothing else may be the reason.
    """

    def text(**changed: object) -> bytes:
        changed = graph | changed
        return json.dumps({"manifest": named(manifest, changed), "graph": changed}).encode()

    wide = copy.deepcopy(graph["weights"])
    wide[0] |= {"shape": [1 << 62], "size_bytes": 1 << 62}
    tall = copy.deepcopy(graph["weights"])
    tall[0] |= {"shape": [1 << 20, 1 << 20], "size_bytes": 1 << 42}
    inputs = copy.deepcopy(graph["inputs"])
    inputs[0]["shape"] = [1 << 62, 8]
    return {
        "a shape of 2^62": (text(weights=wide), r"weights\[0\]\.shape: 4611686018427387904 is outside"),
        "a weight of 4 TiB": (text(weights=tall), "takes 4398046511104 bytes, its blob has 32"),
        "an input of 2^62": (text(inputs=inputs), r"inputs\[0\]\.shape\[0\]: 4611686018427387904 is outside"),
        "a million nodes": (text(nodes=[{"op": ""}] * 1_000_000), "nodes: has 1000000 elements"),
        "lists in lists": (b'{"manifest":' + b"[" * 100_000 + b"]" * 100_000 + b',"graph":{}}', "nested too deeply"),
        "objects in objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        "a number of a million digits": (b'{"manifest":' + b"9" * 1_000_000 + b',"graph":{}}', "is not JSON"),
        "ten million brackets": (b"[" + b"[]," * 10_000_000 + b"[]]", "has more than 6000000 elements"),
    }


@pytest.mark.row("T9")
def test_bombs_are_refused_before_they_take_anything(
    row: Row, steady: SidecarProcess, pushing: Pushing, plain: tuple[Plain, Plain]
) -> None:
    manifest, graph = plain
    manifest["name"] = "bomb"
    engine = steady.await_engine()
    with Neighbour(row, steady.socket) as neighbour:
        for bomb, (body, reason) in bombs(manifest, graph).items():
            before, began_s = memory_of(engine), time.monotonic()
            row.attempts += 1
            answer = pushing.raw("models/bomb", body)
            assert answer.status_code in (400, 409, 413, 422), f"{bomb}: {answer.status_code} {answer.text[:200]}"
            assert re.search(reason, answer.json()["error"]["message"]), f"{bomb}: {answer.text[:300]}"
            # What it takes is a second, and recorded; what is asserted is that it ends.
            took_s = time.monotonic() - began_s
            row.figures["longest refusal, s"] = max(row.figures.get("longest refusal, s", 0.0), round(took_s, 3))
            assert took_s < 30, bomb
            assert memory_of(engine) - before < 64 << 20, bomb
        neighbour.await_answers()
    # The endpoint's workers give back what they read.
    for worker in descendants(steady.process.pid):
        assert memory_of(worker) < 1 << 30
    assert [each["name"] for each in steady.admin.get("models")["models"]] == ["scaled"]


@pytest.mark.row("T9")
def test_what_a_graph_would_take_is_known_before_it_takes_it(
    row: Row, steady: SidecarProcess, pushing: Pushing, plain: tuple[Plain, Plain]
) -> None:
    """A graph that is small, and makes a tensor of a terabyte."""
    manifest, graph = plain
    manifest["name"] = "bomb"
    graph["nodes"] = [
        {"op": "aten.ones.default", "args": [[1 << 20, 1 << 18]], "kwargs": {}, "origin": ""},
        {"op": "aten.sum.default", "args": [{"node": 0}], "kwargs": {}, "origin": ""},
        {"op": "aten.mul.Tensor", "args": [{"input": 0}, {"node": 1}], "kwargs": {}, "origin": ""},
        {"op": "aten.mul.Tensor", "args": [{"node": 2}, {"weight": 0}], "kwargs": {}, "origin": ""},
    ]
    graph["results"] = [{"node": 3}]
    engine, pool = steady.await_engine(), pool_at(steady.socket)
    with Neighbour(row, steady.socket):
        before = memory_of(engine)
        answer = pushing.model("bomb", named(manifest, graph), graph)
        row.attempts += 1
        if answer.status_code == 201:
            with pytest.raises(TrunklineError) as raised:
                Model("bomb", pool)(np.ones((1, 8), np.float32))
            assert raised.value.code in ("device_out_of_memory", "budget_exceeded")
            steady.admin.delete("models/bomb")
        assert memory_of(engine) - before < 64 << 20
    pool.close()


def digests_in_memory(box: SidecarProcess) -> dict[str, str]:
    """Return the sha256 of the bytes of each weight that lies in the sidecar's segment, by its key and piece."""
    with (SHARED_MEMORY / segment_name(box.run_dir.resolve())[1:]).open("rb") as file:
        # Nothing of it may be written to, not even in its ledger.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    ledger = Ledger(memoryview(content))
    found = {}
    for _, record in ledger.records():
        part = content[record.offset : record.offset + record.size_bytes]
        found[f"{record.key} {record.piece}"] = hashlib.sha256(part).hexdigest()
    ledger.close()
    content.close()
    return found


@pytest.mark.row("T16")
def test_weights_in_memory_are_what_they_were(
    row: Row, steady: SidecarProcess, pushing: Pushing, plain: tuple[Plain, Plain]
) -> None:
    """Everything that a graph may do to a weight is done by another model that has the same one."""
    manifest, graph = plain
    manifest["name"] = "sibling"
    x, w = {"input": 0}, {"weight": 0}
    before = digests_in_memory(steady)
    assert before
    pool = pool_at(steady.socket)
    attacks: list[tuple[str, list[Any]]] = [
        ("aten.mul.Tensor", [w, x]),
        ("aten.copy.default", [w, x]),
        ("aten.fill.Scalar", [w, 7.0]),
        ("aten.index_fill.int_Scalar", [w, 0, {"node": 0}, 7.0]),
        ("aten.select_scatter.default", [w, {"node": 1}, 0, 0]),
        ("aten.view.default", [w, [-1, 8]]),
        ("aten.detach.default", [w]),
        ("aten.expand.default", [w, [4, 8]]),
        ("aten.clamp.default", [w, 0.0, 1.0]),
    ]
    with Neighbour(row, steady.socket) as neighbour:
        for op, args in attacks:
            row.attempts += 1
            graph["nodes"] = [
                {"op": "aten.arange.default", "args": [8], "kwargs": {}, "origin": ""},
                {"op": "aten.sum.default", "args": [x], "kwargs": {}, "origin": ""},
                {"op": op, "args": args, "kwargs": {}, "origin": ""},
                {"op": "aten.mul.Tensor", "args": [{"node": 2}, 1.0], "kwargs": {}, "origin": ""},
            ]
            # What may be the weight's own memory is what is answered.
            graph["results"] = [{"node": 2}]
            assert pushing.model("sibling", named(manifest, graph), graph).status_code == 201
            for number in range(3):
                try:
                    given = Model("sibling", pool)(np.full((1, 8), number, np.float32))
                except TrunklineError:
                    continue
                # It is the caller's own: a copy, which he may write to.
                given = np.array(given)
                given.fill(-1)
            steady.admin.delete("models/sibling")
        neighbour.await_answers()
        pool.close()
    after = digests_in_memory(steady)
    assert before.items() <= after.items()
    row.attempts += 1
    pool = pool_at(steady.socket)
    assert np.array_equal(Model("scaled", pool)(np.ones((1, 8), np.float32)), EXPECTED[np.newaxis])
    pool.close()


@pytest.mark.row("T7")
def test_no_process_of_a_sidecar_leaves_a_core(row: Row, steady: SidecarProcess) -> None:
    for pid in [steady.process.pid, *descendants(steady.process.pid)]:
        row.attempts += 1
        # As much as makes no file, and is handed to no program.
        assert resource.prlimit(pid, resource.RLIMIT_CORE)[0] in (0, 1)


class Infected(SidecarProcess):
    """A sidecar with a stranger's code in every process that it forks: when it is told to, that starts a process."""

    def command(self) -> list[str]:
        python, _, _, *rest = super().command()
        return [python, "-c", INFECTION.format(folder=str(self.run_dir.parent)), *rest]


INFECTION = """
import os, runpy, threading, time
def wait():
    while not os.path.exists("{folder}/now"):
        time.sleep(0.01)
    try:
        os.system("touch {folder}/ran.%d" % os.getpid())
    except BaseException as error:
        with open("{folder}/refused.%d" % os.getpid(), "w") as file:
            file.write(str(error))
os.register_at_fork(after_in_child=lambda: threading.Thread(target=wait, daemon=True).start())
runpy.run_module("sidecar", run_name="__main__", alter_sys=True)
"""


@pytest.mark.row("T7")
def test_code_that_got_into_the_engine_starts_no_process(row: Row, scaled: Path, tmp_path: Path) -> None:
    """The second wall, in the process that it is for."""
    box = Infected(tmp_path)
    try:
        box.admin.push(scaled)
        engine = box.await_engine()
        with Neighbour(row, box.socket) as neighbour:
            (tmp_path / "now").touch()
            row.attempts += 1
            until(lambda: (tmp_path / f"refused.{engine}").exists() and any(tmp_path.glob("ran.*")))
            neighbour.await_answers()
        assert (tmp_path / f"refused.{engine}").read_text() == "os.system is refused in the engine"
        assert not (tmp_path / f"ran.{engine}").exists()
        assert box.log.read_text().count("os.system was tried in the engine") == 1
    finally:
        box.stop()
        box.admin.close()
