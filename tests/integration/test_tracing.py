"""Traces of requests through server and engine: which spans there are, in which order, and what becomes of those that fail."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import flask.testing
import numpy as np
import pytest
from opentelemetry.sdk.trace.sampling import DEFAULT_ON
from trunkline import client, context, model, models
from trunkline.admin import AdminConnection
from trunkline.connection import Connection
from trunkline.endpoint import Endpoint
from trunkline.errors import DeviceFault, SidecarFault, TrunklineError, ValueOutOfBounds
from trunkline.logs import JsonFormatter
from trunkline.pool import Pool

from sidecar.http.admin import create_app
from sidecar.http.callers import Callers, Room
from sidecar.http.correlation import Correlation
from sidecar.http.oip import add_open_inference
from sidecar.otel import samples_of
from sidecar.store import Store
from sidecar.tracing import Notes, Span, Tracer
from tests.fakes import ADMIN_TOKEN, FakeDevice, FakeSource, Running, bundle_of, running_server
from tests.integration.test_oip import X as OIP_X
from tests.integration.test_sharing import at_once, deploy, serving
from tests.integration.test_streams import rooms
from tests.networks import network
from tests.nodes import Node, check
from tests.waiting import PATIENCE_S, until

X = np.ones((2, 3), np.float32)
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
UNSAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00"


class Kept(Tracer):
    """Keeps spans as they come, in whichever thread."""

    def __init__(self) -> None:
        super().__init__(samples_of(DEFAULT_ON), lambda spans: True)
        self.kept: list[list[Span]] = []
        self.noted: list[Any] = []

    def finish(self, notes: Notes) -> None:
        self.noted.append(notes)
        self.kept.append(notes.spans())

    def only(self) -> list[Span]:
        """Return the spans of the one request that there was."""
        until(lambda: bool(self.kept))
        (spans,) = self.kept
        return spans


def names(spans: Sequence[Span]) -> list[str]:
    return [span.name for span in spans]


def within(spans: Sequence[Span]) -> None:
    """Check that spans are a whole and its parts: within it, in the order in which they began."""
    whole, *parts = spans
    assert whole.start_s <= whole.end_s
    for part in parts:
        assert part.place == (whole.place.trace_id, whole.span_id)
        assert whole.start_s <= part.start_s <= part.end_s <= whole.end_s, part.name
    assert parts[0].start_s == whole.start_s
    # One after the other, but for weights of later stages.
    serial = [part for part in parts if part.name not in ("fetch", "swap in")]
    for one, other in itertools.pairwise(serial):
        assert one.end_s <= other.start_s, (one.name, other.name)


@contextlib.contextmanager
def traced_by(header: str) -> Iterator[None]:
    token = context.traceparent.set(header)
    try:
        yield
    finally:
        context.traceparent.reset(token)


@contextlib.contextmanager
def unnamed(running: Running, name: str) -> Iterator[client.Model]:
    """Ask as a function does that has not named its models: nothing of them is read before."""
    with closing(Pool(endpoint=Endpoint(running.path), credential=lambda: b"")) as pool:
        yield client.Model(name, pool)


@pytest.fixture
def tracer() -> Kept:
    return Kept()


@pytest.fixture
def running(
    nothing_leaks: None, tmp_path: Path, source: FakeSource, tracer: Kept, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Running]:
    with running_server(tmp_path, source, tracer=tracer, generation=3) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        yield made
        client._pool.close()


# --- what there is ----------------------------------------------------------------------------------------------------


def test_a_cold_request_waits_fetches_swaps_runs_and_is_answered(running: Running, tracer: Kept) -> None:
    with traced_by(PARENT), unnamed(running, "age") as asked:
        asked.call({"x": X}, call_id="call-7")
    spans = tracer.only()
    assert names(spans) == ["infer", "queue", "fetch", "swap in", "run", "reply"]
    within(spans)
    whole, queue, fetch, swap, run, _ = spans
    assert f"{whole.place.trace_id:032x}-{whole.place.parent_id:016x}" == f"{TRACE_ID}-{PARENT_ID}"
    assert queue.end_s <= fetch.start_s
    assert fetch.end_s <= swap.start_s <= swap.end_s <= run.start_s
    assert whole.attributes == {
        "trunkline.model": "age",
        "trunkline.tenant": "anyone",
        "trunkline.outcome": "answered",
        "trunkline.generation": 0,
        "trunkline.device": "fake",
        "trunkline.rows": 2,
        "trunkline.call_id": "call-7",
    }
    assert run.attributes == {"trunkline.stages": 1, "trunkline.batch_rows": 2, "trunkline.shared_with": 0}


def test_a_warm_request_fetches_nothing(running: Running, tracer: Kept) -> None:
    with traced_by(UNSAMPLED):
        model("age")(X)
    assert tracer.kept == []
    with traced_by(PARENT):
        model("age")(X)
    assert names(tracer.only()) == ["infer", "queue", "run", "reply"]
    within(tracer.only())


def test_an_unsampled_request_is_noted_nowhere(running: Running, tracer: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = []
    submit = running.engine.submit
    monkeypatch.setattr(running.engine, "submit", lambda work: (submitted.append(work), submit(work)))
    with traced_by(UNSAMPLED):
        model("age")(X)
    with traced_by("not a traceparent"):
        model("age")(X)
    first, second = submitted
    assert first.notes is None
    # What is no traceparent is none: a trace begins here.
    assert second.notes is not None
    assert second.notes.place.parent_id == 0
    assert tracer.only()[0].place == second.notes.place


def test_without_a_tracer_nothing_is_noted(tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(tmp_path, source) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        submitted = []
        submit = made.engine.submit
        monkeypatch.setattr(made.engine, "submit", lambda work: (submitted.append(work), submit(work)))
        with traced_by(PARENT):
            model("age")(X)
        client._pool.close()
    assert [work.notes for work in submitted] == [None]


def test_a_call_about_several_models_is_one_request(running: Running, tracer: Kept) -> None:
    with unnamed(running, "age+gender") as asked:
        asked(X)
    spans = tracer.only()
    assert names(spans) == ["infer", "queue", "fetch", "swap in", "run", "reply"]
    within(spans)
    assert spans[0].attributes["trunkline.model"] == "age+gender"
    assert spans[4].attributes["trunkline.stages"] == 2
    assert spans[4].attributes["trunkline.shared_with"] == 0


def test_models_asked_one_after_the_other_are_one_request(
    tmp_path: Path, source: FakeSource, tracer: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        content = name.encode() * 30
        source.put(bundle_of(name, [content]), [content])
    with running_server(tmp_path, source, budget_bytes=110, tracer=tracer) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        models("one", "two")(X)
        client._pool.close()
    spans = tracer.only()
    assert names(spans) == ["infer", "queue", "fetch", "swap in", "run", "reply"]
    assert spans[4].attributes["trunkline.stages"] == 2
    within(spans)


def test_the_device_is_the_one_that_was_asked(
    tmp_path: Path, source: FakeSource, tracer: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(tmp_path, source, device=FakeDevice("a"), beside=[FakeDevice("b")], tracer=tracer) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        model("age")(X)
        client._pool.close()
    spans = tracer.only()
    assert spans[0].attributes["trunkline.device"] in ("a", "b")
    within(spans)


def test_requests_of_two_functions_in_one_batch_are_two_traces(
    tmp_path: Path, tracer: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    original = network("resnet")
    siblings = [original.tuned(f"sibling-{number}", number) for number in range(2)]
    with serving(tmp_path, monkeypatch, stacking=False, tracer=tracer) as running:
        deploy(running, *siblings)
        same, other = original.inputs(1, 0), original.inputs(1, 1)
        at_once(running, *((each.name, same) for each in siblings))
        until(lambda: len(tracer.kept) == 2)
        shared, tracer.kept = tracer.kept, []
        at_once(running, *zip((each.name for each in siblings), (same, other), strict=True))
        until(lambda: len(tracer.kept) == 2)
    for found, rows in ((shared, 1), (tracer.kept, 2)):
        assert len({spans[0].place.trace_id for spans in found}) == len(found) == 2
        assert {spans[0].attributes["trunkline.model"] for spans in found} == {each.name for each in siblings}
        for spans in found:
            within(spans)
            run = next(span for span in spans if span.name == "run")
            assert (run.attributes["trunkline.batch_rows"], run.attributes["trunkline.shared_with"]) == (rows, 1)


def test_a_model_that_streams_is_fetched_while_it_runs(node: Node, tracer: Kept) -> None:
    made = network("resnet")
    _, (smallest,) = rooms(node, made)
    node.resize(smallest)
    with node.serve(tracer=tracer) as running:
        check(made, 0)
        stages = len(running.engine._catalog.deployed[made.name].steps)
        client._pool.close()
    spans = {span.name: span for span in tracer.only()}
    within(tracer.only())
    assert spans["run"].attributes["trunkline.stages"] == stages
    assert spans["run"].start_s < spans["fetch"].end_s < spans["run"].end_s
    assert spans["run"].start_s < spans["swap in"].end_s < spans["run"].end_s


def test_lanes_are_noted_as_well(tmp_path: Path, source: FakeSource, tracer: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(tmp_path, source, lanes=2, tracer=tracer) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        model("age")(X)
        client._pool.close()
    within(tracer.only())
    assert "run" in names(tracer.only())


# --- what fails -------------------------------------------------------------------------------------------------------


def test_what_the_server_refuses_is_a_trace_with_its_error(running: Running, tracer: Kept) -> None:
    with pytest.raises(ValueOutOfBounds):
        model("text")(np.full((1, 2), 1000))
    whole, queue = tracer.only()
    assert whole.error == whole.attributes["trunkline.outcome"] == "value_out_of_bounds"
    assert queue.name == "queue"


def test_weights_that_are_missing_are_an_error_after_the_queue(running: Running, source: FakeSource, tracer: Kept) -> None:
    source.blobs.clear()
    with pytest.raises(TrunklineError) as failed:
        model("age")(X)
    spans = tracer.only()
    assert spans[0].error == failed.value.code
    assert names(spans)[:2] == ["infer", "queue"]
    assert "run" not in names(spans)
    within(spans)


def test_a_device_that_fails_is_an_error_after_the_run(running: Running, tracer: Kept) -> None:
    def fail() -> None:
        raise DeviceFault("broken")

    running.device.on_run = fail
    with pytest.raises(DeviceFault):
        model("age")(X)
    spans = tracer.only()
    assert spans[0].error == "device_fault"
    assert names(spans)[-1] == "run"
    within(spans)


def test_an_answer_that_has_no_room_is_an_error_and_the_next_one_is_not(
    running: Running, tracer: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Connection(running.path, deadline=client._deadline(20))) as connection:
        layout = client.Model("age", client._pool)._find(client._deadline(20)).layout("k", lambda: {"batch": 2})
        session = next(iter(running.server._sessions.values()))
        monkeypatch.setattr(type(session), "_place_reply", raising_once(type(session)._place_reply))
        with pytest.raises(TrunklineError) as failed:
            connection.infer("age", layout.inputs, client._deadline(20))
        connection.infer("age", layout.inputs, client._deadline(20))
    until(lambda: len(tracer.kept) == 2)
    refused, answered = tracer.kept
    assert refused[0].error == failed.value.code == "device_fault"
    assert refused[-1].name == "reply"
    assert answered[0].error == ""
    assert answered[0].place.trace_id != refused[0].place.trace_id


def raising_once(real: Callable[..., Any]) -> Callable[..., Any]:
    left = [DeviceFault("no reply")]

    def call(*arguments: Any) -> Any:
        if left:
            raise left.pop()
        return real(*arguments)

    return call


def test_a_caller_that_leaves_is_an_error(running: Running, tracer: Kept) -> None:
    entered, release = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        release.wait(PATIENCE_S)

    running.engine._post(hold)
    assert entered.wait(PATIENCE_S)
    with unnamed(running, "age") as asked, pytest.raises(TrunklineError):
        asked.call({"x": X}, deadline_s=0.2)
    assert tracer.kept == []
    release.set()
    spans = tracer.only()
    # Whichever is seen first: that its deadline has passed, or that it is gone.
    assert spans[0].error in ("connection_lost", "deadline_exceeded")
    within(spans)


def test_what_is_noted_of_weights_is_forgotten_with_the_request(running: Running, tracer: Kept, source: FakeSource) -> None:
    held = threading.Event()
    source.before_read = lambda digest: held.wait(PATIENCE_S) and None
    with unnamed(running, "age") as asked, pytest.raises(TrunklineError):
        asked.call({"x": X}, deadline_s=0.2)
    until(lambda: bool(tracer.kept))
    held.set()
    # Whoever comes next finds the weights; nobody is left who watches them.
    model("age")(X)
    assert running.engine._loads._watching == {}
    assert isinstance(tracer.noted[0].ended_s, float)


def test_a_load_is_no_trace(running: Running, tracer: Kept) -> None:
    with closing(AdminConnection(running.path, ADMIN_TOKEN)) as admin:
        admin.command("load", {"name": "age"})
    assert tracer.kept == []


# --- its log lines ----------------------------------------------------------------------------------------------------


def told_of(caplog: pytest.LogCaptureFixture, logger: str) -> dict[str, str]:
    """Return what the one line of a logger has for programs."""
    (found,) = [record for record in caplog.records if record.name == logger]
    return {key: getattr(found, key) for key in ("call_id", "model", "tenant", "trace_id") if hasattr(found, key)}


def test_the_line_of_a_refused_request_has_its_call_model_tenant_and_trace(
    running: Running, tracer: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise DeviceFault("broken")

    running.device.on_run = fail
    with caplog.at_level("INFO"), pytest.raises(DeviceFault), traced_by(PARENT):
        model("age").call({"x": X}, call_id="call-9")
    told = {"call_id": "call-9", "model": "age", "tenant": "anyone"}
    assert told_of(caplog, "trunkline.engine.refusals") == told | {"trace_id": TRACE_ID}
    with caplog.at_level("INFO"), pytest.raises(DeviceFault), traced_by(UNSAMPLED):
        caplog.clear()
        model("age").call({"x": X}, call_id="call-9")
    assert told_of(caplog, "trunkline.engine.refusals") == told


def test_the_line_of_an_incident_has_its_call_as_well(
    running: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("a bug")

    running.device.on_run = fail
    with pytest.raises(SidecarFault):
        model("age").call({"x": X}, call_id="call-10")
    assert told_of(caplog, "trunkline.engine")["call_id"] == "call-10"
    # And one of the server's thread.
    monkeypatch.setattr(running.server.engine, "check_room", fail)
    with pytest.raises(SidecarFault):
        model("age").call({"x": X}, call_id="call-11")
    assert told_of(caplog, "trunkline.server") == {"call_id": "call-11", "model": "age", "tenant": "anyone"}
    assert "(call call-11)" in caplog.text


# --- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture
def served() -> Kept:
    """The tracer of the HTTP server's process."""
    return Kept()


@pytest.fixture
def http(running: Running, served: Kept, tmp_path: Path) -> Iterator[flask.testing.FlaskClient]:
    callers, admin = Callers(running.relay), AdminConnection(running.path, ADMIN_TOKEN)
    app = create_app(admin, Store(tmp_path / "store"), spans=served.counts)
    add_open_inference(app, admin, callers, Room(8, 1 << 30), body_limit_bytes=1 << 20)
    app.wsgi_app = Correlation(app.wsgi_app, served)  # type: ignore[method-assign]
    token = context.traceparent.set(""), context.call_id.set("")
    yield app.test_client()
    context.traceparent.reset(token[0])
    context.call_id.reset(token[1])
    callers.close()
    admin.close()


def infer(http: flask.testing.FlaskClient, path: str = "age/infer", **headers: str) -> Any:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return http.post(f"/v2/models/{path}", json={"inputs": [OIP_X]}, headers=given, buffered=True)


def test_an_inference_over_http_is_a_span_around_the_engines(http: flask.testing.FlaskClient, tracer: Kept, served: Kept) -> None:
    assert infer(http, traceparent=PARENT, X_Call_Id="call-h").status_code == 200
    ((whole,),) = served.kept
    assert whole.name == "POST /v2/models/{name}/infer"
    assert f"{whole.place.trace_id:032x}-{whole.place.parent_id:016x}" == f"{TRACE_ID}-{PARENT_ID}"
    assert whole.attributes == {
        "http.request.method": "POST",
        "http.route": "/v2/models/{name}/infer",
        "http.response.status_code": 200,
        "trunkline.call_id": "call-h",
    }
    engines = tracer.only()
    assert engines[0].place == (whole.place.trace_id, whole.span_id)
    assert engines[0].attributes["trunkline.call_id"] == "call-h"
    assert whole.start_s <= engines[0].start_s <= engines[0].end_s <= whole.end_s


@pytest.mark.parametrize(
    ("path", "status", "route", "error"),
    [
        ("age/versions/1/infer", 200, "/v2/models/{name}/versions/{version}/infer", ""),
        ("nobody/infer", 404, "/v2/models/{name}/infer", ""),
        ("pair/infer", 500, "/v2/models/{name}/infer", "500"),
    ],
)
def test_the_status_of_an_answer_is_told(
    http: flask.testing.FlaskClient, running: Running, served: Kept, path: str, status: int, route: str, error: str
) -> None:
    def fail() -> None:
        raise DeviceFault("broken")

    running.device.on_run = fail if error else (lambda: None)
    assert infer(http, path).status_code == status
    ((whole,),) = served.kept
    assert (whole.attributes["http.response.status_code"], whole.attributes["http.route"], whole.error) == (status, route, error)


def test_what_is_unsampled_or_no_inference_is_no_span(http: flask.testing.FlaskClient, tracer: Kept, served: Kept) -> None:
    assert infer(http, traceparent=UNSAMPLED).status_code == 200
    assert http.get("/v2/models/age", headers={"traceparent": PARENT}).status_code == 200
    assert http.get("/v2/models/age/infer", headers={"traceparent": PARENT}).status_code == 405
    assert served.kept == tracer.kept == []
    # And nobody belongs to the trace, or the call, of whom the thread has served before.
    assert infer(http, X_Call_Id="before", traceparent="nonsense").status_code == 200
    assert infer(http).status_code == 200
    until(lambda: len(tracer.kept) == 2)
    first, second = (spans[0] for spans in tracer.kept)
    assert (first.attributes.get("trunkline.call_id"), second.attributes.get("trunkline.call_id")) == ("before", None)
    assert len({first.place.trace_id, second.place.trace_id, int(TRACE_ID, 16)}) == 3


def test_an_application_that_raises_is_a_span_all_the_same(served: Kept) -> None:
    def broken(environ: dict[str, Any], start_response: Any) -> Any:
        raise RuntimeError("no application")

    with pytest.raises(RuntimeError):
        Correlation(broken, served)({"PATH_INFO": "/v2/models/a/infer", "REQUEST_METHOD": "POST"}, lambda *_: None)
    assert served.kept[0][0].error == "500"


def test_spans_are_counted_by_process(http: flask.testing.FlaskClient) -> None:
    lines = http.get("/metrics").text.splitlines()
    for process in ("engine", "http"):
        assert f'trunkline_spans_exported_total{{process="{process}"}} 0.0' in lines
        for reason in ("queue_full", "export_failed"):
            assert f'trunkline_spans_dropped_total{{process="{process}",reason="{reason}"}} 0.0' in lines


def test_the_lines_of_a_request_over_http_have_its_call_and_trace(
    http: flask.testing.FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("sidecar.http.oip.openinference.encode", fail)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    log = logging.getLogger("trunkline.admin")
    log.addHandler(handler)
    assert infer(http, X_Call_Id="call-12", traceparent=PARENT).status_code == 500
    log.removeHandler(handler)
    (line,) = stream.getvalue().splitlines()
    told = json.loads(line)
    assert (told["call_id"], told["trace_id"]) == ("call-12", TRACE_ID)
    assert "ZeroDivisionError: a bug" in told["exception"]
