"""A real sidecar that exports to a real collector: one trace from HTTP to the stages, and no request waits for a collector."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from requests_unixsocket import Session
from trunkline import context
from trunkline.client import Model
from trunkline.connection import Connection
from trunkline.endpoint import Endpoint
from trunkline.errors import SignatureMismatch, UnknownModel
from trunkline.pool import Pool

from tests.collector import Collector, Got, collector
from tests.fault.matrix import write_scaled
from tests.sidecar_process import ROOT, SidecarProcess, sidecar_process
from tests.template.test_template import TEMPLATE
from tests.template.test_template import Running as Function
from tests.waiting import PATIENCE_S, soon, until

X = np.ones((2, 8), np.float32)
HANDLER = """
import numpy as np
from trunkline import model

m = model("scaled")

def handle(event, context):
    return {"body": m(np.ones((2, 8), np.float32))}
"""
PARTS = ["queue", "run", "reply"]


def parent(number: int, flags: int = 1) -> str:
    return f"00-{number:032x}-00000000000000aa-{flags:02x}"


class Traced:
    """A sidecar that traces, and whoever asks it."""

    def __init__(self, running: SidecarProcess, got: Collector) -> None:
        self.running = running
        self.got = got
        self._pool = Pool(endpoint=Endpoint(str(running.socket)), credential=lambda: b"")
        self.http = Session()
        self.url = f"http+unix://{str(running.run_dir / 'admin.sock').replace('/', '%2F')}"

    def ask(self, number: int, flags: int = 1, name: str = "scaled") -> Any:
        """Ask within a trace of this id."""
        token = context.traceparent.set(parent(number, flags))
        try:
            return Model(name, self._pool).call({"x": X}, call_id=f"call-{number}")
        finally:
            context.traceparent.reset(token)

    def spans(self, number: int, last: str = "reply") -> list[Got]:
        """Return the spans of a trace in the order in which they began, when ``last`` has arrived."""
        trace_id = f"{number:032x}"
        self.got.until(lambda: any(span.name == last for span in self.got.traces().get(trace_id, ())))
        return sorted(self.got.traces()[trace_id], key=lambda span: (span.start_ns, -span.end_ns))

    def counted(self, name: str, process: str = "engine", **labels: str) -> float:
        """Return one of the counts of spans."""
        for family in text_string_to_metric_families(self.http.get(f"{self.url}/metrics").text):
            for sample in family.samples:
                if sample.name == f"trunkline_spans_{name}_total" and sample.labels == {"process": process, **labels}:
                    return sample.value
        raise AssertionError(f"{name} is not told")

    def close(self) -> None:
        self._pool.close()
        self.http.close()


@contextlib.contextmanager
def tracing(folder: Path, bundle: Path, got: Collector, **environment: str) -> Iterator[Traced]:
    """Run a sidecar that exports to a collector while the block runs."""
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": got.endpoint,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        "OTEL_BSP_SCHEDULE_DELAY": "20",
        "TRUNKLINE_LOG_FORMAT": "json",
        # Each HTTP worker counts its own spans.
        "TRUNKLINE_ADMIN_WORKERS": "1",
        **environment,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with sidecar_process(folder) as running, contextlib.closing(Traced(running, got)) as made:
            running.admin.push(bundle)
            yield made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scaled(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Iterator[Traced]:
    with collector() as got, tracing(tmp_path_factory.mktemp("traced"), bundle, got) as made:
        yield made


def check(whole: Got, parts: Sequence[Got], names: Sequence[str] = PARTS) -> None:
    """Check that a span has these parts, all within it, one after the other."""
    assert [each.name for each in parts] == list(names)
    assert {each.parent_id for each in parts} == {whole.span_id}
    assert whole.start_ns == parts[0].start_ns
    for one, other in zip([*parts[:-1]], parts[1:], strict=True):
        assert one.start_ns <= one.end_ns <= other.start_ns, (one.name, other.name)
    assert parts[-1].end_ns <= whole.end_ns
    assert {each.service for each in (whole, *parts)} == {"trunkline"}


# --- one trace --------------------------------------------------------------------------------------------------------


def test_a_function_that_is_asked_over_http_is_one_trace(traced: Traced, tmp_path: Path) -> None:
    folder = tmp_path / "function"
    shutil.copytree(TEMPLATE, folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (folder / "function" / "handler.py").write_text(HANDLER)
    function = Function(folder, {"TRUNKLINE_SOCKET": str(traced.running.socket)})
    headers = {"traceparent": parent(1), "X-Call-Id": "call-1"}
    answer = requests.get(function.url, headers=headers, timeout=PATIENCE_S)
    function.stop()
    assert answer.json() == (X * np.arange(8)).tolist()
    whole, *parts = traced.spans(1)
    check(whole, parts)
    assert (whole.name, whole.kind, whole.parent_id, whole.is_error) == ("infer", "server", "00000000000000aa", False)
    assert whole.attributes == {
        "trunkline.model": "scaled",
        "trunkline.tenant": "anyone",
        "trunkline.outcome": "answered",
        "trunkline.generation": 1,
        "trunkline.device": "cpu",
        "trunkline.rows": 2,
        "trunkline.call_id": "call-1",
    }
    assert parts[1].attributes == {"trunkline.stages": 1, "trunkline.batch_rows": 2, "trunkline.shared_with": 0}


def test_an_inference_over_http_is_one_trace_of_two_processes(traced: Traced) -> None:
    body = {"inputs": [{"name": "x", "shape": [2, 8], "datatype": "FP32", "data": X.tolist()}]}
    answer = traced.http.post(f"{traced.url}/v2/models/scaled/infer", json=body, headers={"traceparent": parent(2)})
    assert answer.status_code == 200
    traced.spans(2, last="POST /v2/models/{name}/infer")
    outer, whole, *parts = traced.spans(2)
    assert (outer.name, outer.parent_id) == ("POST /v2/models/{name}/infer", "00000000000000aa")
    assert outer.attributes["http.response.status_code"] == 200
    assert whole.parent_id == outer.span_id
    assert outer.start_ns <= whole.start_ns <= whole.end_ns <= outer.end_ns
    check(whole, parts)
    until(lambda: traced.counted("exported", "http") >= 1)


def test_what_fails_is_told_with_its_code(traced: Traced) -> None:
    deadline = soon()
    with contextlib.closing(Connection(str(traced.running.socket), deadline=deadline)) as connection:
        with pytest.raises(UnknownModel):
            connection.infer("nobody", (), deadline, "call-4", traceparent=parent(4))
        with pytest.raises(SignatureMismatch):
            connection.infer("scaled", (), deadline, "call-5", traceparent=parent(5))
    for number, code in ((4, "unknown_model"), (5, "signature_mismatch")):
        whole, *parts = traced.spans(number, last="queue")
        check(whole, parts, ["queue"])
        assert whole.is_error
        assert whole.attributes["error.type"] == whole.attributes["trunkline.outcome"] == code


def test_what_is_unsampled_is_no_trace(traced: Traced) -> None:
    traced.ask(6, flags=0)
    traced.ask(7)
    traced.spans(7)
    assert f"{6:032x}" not in traced.got.traces()


# --- collectors -------------------------------------------------------------------------------------------------------


@pytest.fixture
def answers(traced: Traced) -> Iterator[Callable[[Callable[[], int]], None]]:
    """Set what the collector answers."""

    def use(answer: Callable[[], int]) -> None:
        traced.got.answer = answer

    yield use
    traced.got.answer = lambda: 200


def test_a_collector_that_fails_costs_its_spans_and_nothing_else(
    traced: Traced, answers: Callable[[Callable[[], int]], None]
) -> None:
    answers(lambda: 500)
    before = traced.counted("dropped", reason="export_failed")
    assert np.array_equal(traced.ask(10), X * np.arange(8))
    until(lambda: traced.counted("dropped", reason="export_failed") == before + 4)
    answers(lambda: 200)
    traced.ask(11)
    check(*split(traced.spans(11)))
    assert f"{10:032x}" not in traced.got.traces()


def split(spans: Sequence[Got]) -> tuple[Got, Sequence[Got]]:
    return spans[0], spans[1:]


def test_a_collector_that_hangs_keeps_nobody_waiting(tmp_path: Path, bundle: Path) -> None:
    release, entered = threading.Event(), threading.Event()

    def hang() -> int:
        entered.set()
        release.wait(PATIENCE_S)
        return 200

    with collector() as got:
        got.answer = hang
        with tracing(tmp_path, bundle, got, OTEL_BSP_MAX_QUEUE_SIZE="4", OTEL_EXPORTER_OTLP_TIMEOUT="60") as traced:
            traced.ask(20)
            assert entered.wait(PATIENCE_S)
            for number in range(21, 31):
                assert np.array_equal(traced.ask(number), X * np.arange(8))
            # Four wait, six were dropped, of four spans each.
            assert traced.counted("dropped", reason="queue_full") == 24
            assert traced.counted("exported") == 0
            # Nor does the end of the sidecar wait for it.
            assert traced.running.stop() == 0
        release.set()


def test_a_collector_that_is_away_costs_its_spans_and_nothing_else(tmp_path: Path, bundle: Path) -> None:
    with collector() as got:
        pass
    with tracing(tmp_path, bundle, got) as traced:
        assert np.array_equal(traced.ask(30), X * np.arange(8))
        until(lambda: traced.counted("dropped", reason="export_failed") >= 4)
        assert np.array_equal(traced.ask(31), X * np.arange(8))


def test_an_engine_that_is_started_again_goes_on_tracing(tmp_path: Path, bundle: Path) -> None:
    with collector() as got, tracing(tmp_path, bundle, got) as traced:
        traced.ask(40)
        # Nobody has asked for it before.
        check(*split(traced.spans(40)), ["queue", "fetch", "swap in", "run", "reply"])
        os.kill(traced.running.await_engine(), signal.SIGKILL)
        # The client asks again, in the same trace.
        assert np.array_equal(traced.ask(41), X * np.arange(8))
        whole, *parts = traced.spans(41)
        assert whole.attributes["trunkline.generation"] == 2
        assert {each.parent_id for each in parts} == {whole.span_id}
        # What is left is exported at the end.
        traced.ask(42)
        assert traced.running.stop() == 0
        assert f"{42:032x}" in got.traces()


# --- what it takes ----------------------------------------------------------------------------------------------------


def started(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    flags = ["serve", "--run-dir", str(tmp_path / "run"), "--store-dir", str(tmp_path / "store"), "--admin-port", "0"]
    variables = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline", **environment}
    return subprocess.run(
        [sys.executable, "-c", f"{code}\nfrom sidecar.__main__ import main\nmain({flags!r})"],
        env=variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_a_sidecar_that_is_to_trace_and_cannot_says_what_to_install(tmp_path: Path) -> None:
    without = "import sys; sys.modules['opentelemetry'] = None"
    ended = started(without, tmp_path, TRUNKLINE_TRACES="on")
    assert ended.returncode == 1
    assert "pip install 'trunkline[otel]'" in ended.stderr
    assert "--traces off" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_bad_variable_is_refused_at_the_start(tmp_path: Path) -> None:
    ended = started("", tmp_path, TRUNKLINE_TRACES="on", OTEL_BSP_SCHEDULE_DELAY="soon")
    assert (ended.returncode, "OTEL_BSP_SCHEDULE_DELAY is 'soon'" in ended.stderr) == (1, True)


def test_a_sidecar_that_does_not_trace_imports_nothing_for_it() -> None:
    code = (
        "import sys, sidecar.wiring, sidecar.__main__; sidecar.wiring._preload()\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    path = f"{ROOT}:{ROOT}/template/python3-trunkline"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path}, timeout=PATIENCE_S)


# --- its log ----------------------------------------------------------------------------------------------------------


def test_every_line_is_json(traced: Traced) -> None:
    answer = traced.http.post(f"{traced.url}/v2/models/scaled/infer", json={}, headers={"X-Call-Id": "call\x1b-50"})
    # gunicorn refuses what is no header, and says so in its own log.
    assert answer.status_code == 400
    lines = [json.loads(line) for line in traced.running.log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert {"trunkline.supervisor", "gunicorn.error"} <= {line["logger"] for line in lines}
