"""Tracing: notes become spans within each other, nobody waits for a collector, and what is lost is counted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, DEFAULT_OFF, DEFAULT_ON, Sampler, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode

from sidecar import otel
from sidecar.errors import ConfigError
from sidecar.tracing import ANSWERED, INTERNAL, SERVER, Place, RequestNotes, Span, Tracer, traceparent_of
from tests.waiting import PATIENCE_S, until

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
PLACE = Place(0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7)


def notes(**changed: object) -> RequestNotes:
    made = RequestNotes(PLACE, 10.0, "net", "anyone", "call-1", 2)
    for name, value in changed.items():
        setattr(made, name, value)
    return made


def ended(count: int = 1) -> list[RequestNotes]:
    made = [notes() for _ in range(count)]
    for each in made:
        each.end(11.0, ANSWERED)
    return made


class Exporter:
    """Takes spans, holds them up, or fails."""

    def __init__(self) -> None:
        self.batches: list[list[Span]] = []
        self.act: Callable[[], bool] = lambda: True
        self.stopped = 0

    def __call__(self, spans: Sequence[Span]) -> bool:
        self.batches.append(list(spans))
        return self.act()

    def stop(self) -> None:
        self.stopped += 1


@pytest.fixture
def exporter() -> Exporter:
    return Exporter()


@pytest.fixture
def tracer(exporter: Exporter, nothing_leaks: None) -> Iterator[Tracer]:
    made = Tracer(otel.samples_of(DEFAULT_ON), exporter, exporter.stop, limit=8, batch=4, delay_s=0.0)
    yield made
    made.close(10)


def counts(exported: int = 0, queue_full: int = 0, export_failed: int = 0) -> dict[str, object]:
    return {"exported": exported, "dropped": {"queue_full": queue_full, "export_failed": export_failed}}


# --- spans of a request -----------------------------------------------------------------------------------------------


def test_a_request_that_found_everything_in_memory_was_in_three_parts() -> None:
    made = notes(rows=3)
    made.taken(10.5, "cpu")
    made.ran(10.6, 10.7, 3, 1)
    made.ran(10.8, 10.9, 8, 3)
    made.reply_s = 10.95
    made.end(11.0, ANSWERED)
    whole, *parts = made.spans()
    assert made.span_count == 1 + len(parts)
    assert whole == Span("infer", SERVER, PLACE, whole.span_id, 10.0, 11.0, whole.attributes)
    assert whole.attributes == {
        "trunkline.model": "net",
        "trunkline.tenant": "anyone",
        "trunkline.outcome": "answered",
        "trunkline.generation": 2,
        "trunkline.device": "cpu",
        "trunkline.rows": 3,
        "trunkline.call_id": "call-1",
    }
    assert [(each.name, each.start_s, each.end_s) for each in parts] == [
        ("queue", 10.0, 10.5),
        ("run", 10.6, 10.9),
        ("reply", 10.95, 11.0),
    ]
    assert {each.place for each in parts} == {Place(PLACE.trace_id, whole.span_id)}
    assert {each.kind for each in parts} == {INTERNAL}
    assert len({each.span_id for each in (whole, *parts)}) == 4
    assert parts[1].attributes == {"trunkline.stages": 2, "trunkline.batch_rows": 8, "trunkline.shared_with": 2}


def test_weights_that_arrive_in_pieces_are_one_fetch_and_one_swap() -> None:
    made = notes()
    made.taken(10.1, "cpu")
    made.moved(10.1, 10.3, 10.4)
    made.moved(10.2, 10.5, 10.6)
    # Found in memory of the host still.
    made.moved(10.2, 0.0, 10.7)
    made.end(11.0, ANSWERED)
    found = {each.name: (each.start_s, each.end_s) for each in made.spans()}
    assert found["fetch"] == (10.1, 10.5)
    assert found["swap in"] == (10.2, 10.7)
    assert made.span_count == len(found)


def test_what_others_had_fetched_before_is_not_its_own() -> None:
    made = notes()
    made.moved(8.0, 9.0, 10.2)
    made.moved(9.5, 10.3, 10.4)
    made.end(11.0, ANSWERED)
    found = {each.name: (each.start_s, each.end_s) for each in made.spans()}
    assert found["fetch"] == (10.0, 10.3)
    assert found["swap in"] == (10.0, 10.4)


def test_a_request_that_was_never_taken_up_was_in_the_queue_until_its_end() -> None:
    made = notes()
    made.end(12.0, "deadline_exceeded")
    whole, queue = made.spans()
    assert whole.error == whole.attributes["trunkline.outcome"] == "deadline_exceeded"
    assert "trunkline.device" not in whole.attributes
    assert (queue.name, queue.start_s, queue.end_s, queue.error) == ("queue", 10.0, 12.0, "")


def test_the_first_device_and_the_first_time_it_is_taken_up_count() -> None:
    made = notes()
    made.taken(10.1, "a")
    made.taken(10.2, "b")
    assert (made.taken_s, made.device) == (10.1, "a")


def test_a_run_that_outlives_its_request_ends_with_it() -> None:
    made = notes()
    made.taken(10.1, "cpu")
    made.end(11.0, "connection_lost")
    made.ran(11.5, 12.0, 1, 1)
    run = made.spans()[-1]
    assert (run.name, run.start_s, run.end_s) == ("run", 11.0, 11.0)


# --- what is traced ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "alone", "in_sampled", "in_unsampled"),
    [
        (DEFAULT_ON, True, True, False),
        (DEFAULT_OFF, False, True, False),
        (ALWAYS_ON, True, True, True),
        (ALWAYS_OFF, False, False, False),
        (TraceIdRatioBased(0.0), False, False, False),
        (TraceIdRatioBased(1.0), True, True, True),
    ],
)
def test_the_sampler_and_the_caller_decide(sampler: Sampler, alone: bool, in_sampled: bool, in_unsampled: bool) -> None:
    tracer = Tracer(otel.samples_of(sampler), lambda spans: True)
    assert (tracer.begin("") is not None) == alone
    assert tracer.begin(PARENT) == (PLACE if in_sampled else None)
    assert tracer.begin(f"{PARENT[:-2]}00") == (PLACE if in_unsampled else None)
    # Flags there may be besides.
    assert (tracer.begin(f"{PARENT[:-2]}fe") is not None) == in_unsampled


def test_a_trace_that_begins_here_has_an_id_of_its_own() -> None:
    tracer = Tracer(otel.samples_of(DEFAULT_ON), lambda spans: True)
    first, second = tracer.begin(""), tracer.begin("")
    assert first is not None
    assert second is not None
    assert first.parent_id == second.parent_id == 0
    assert first.trace_id != second.trace_id
    assert traceparent_of(PLACE.trace_id, PLACE.parent_id) == PARENT


# --- exporting --------------------------------------------------------------------------------------------------------


def test_what_is_over_is_exported(tracer: Tracer, exporter: Exporter) -> None:
    tracer.start()
    for each in ended(3):
        tracer.finish(each)
    until(lambda: tracer.counts() == counts(exported=6))
    assert [span.name for batch in exporter.batches for span in batch] == ["infer", "queue"] * 3


def test_a_batch_is_no_larger_than_it_may_be_and_what_is_left_goes_at_the_end(tracer: Tracer, exporter: Exporter) -> None:
    for each in ended(7):
        tracer.finish(each)
    tracer.start()
    tracer.close(10)
    assert [len(batch) for batch in exporter.batches] == [8, 6]
    assert tracer.counts() == counts(exported=14)
    assert exporter.stopped == 1


def test_while_a_collector_is_slow_so_many_wait_and_the_others_are_dropped(tracer: Tracer, exporter: Exporter) -> None:
    release, entered = threading.Event(), threading.Event()

    def slow() -> bool:
        entered.set()
        return release.wait(PATIENCE_S)

    exporter.act = slow
    tracer.start()
    tracer.finish(ended()[0])
    assert entered.wait(PATIENCE_S)
    # None of these waits for anything.
    for each in ended(10):
        tracer.finish(each)
    assert tracer.counts() == counts(queue_full=4)
    release.set()
    until(lambda: tracer.counts() == counts(exported=18, queue_full=4))


def test_a_batch_that_is_full_does_not_wait(exporter: Exporter) -> None:
    tracer = Tracer(otel.samples_of(DEFAULT_ON), exporter, limit=8, batch=2, delay_s=3600.0)
    tracer.start()
    for each in ended(2):
        tracer.finish(each)
    until(lambda: tracer.counts() == counts(exported=4))
    tracer.close(10)


@pytest.mark.parametrize("raises", [False, True])
def test_what_nobody_takes_is_counted_and_the_next_is_tried(
    tracer: Tracer, exporter: Exporter, caplog: pytest.LogCaptureFixture, raises: bool
) -> None:
    def fail() -> bool:
        if raises:
            raise RuntimeError("no encoder")
        return False

    exporter.act = fail
    tracer.start()
    tracer.finish(ended()[0])
    until(lambda: tracer.counts() == counts(export_failed=2))
    assert ("no encoder" in caplog.text) == raises
    exporter.act = lambda: True
    tracer.finish(ended()[0])
    until(lambda: tracer.counts() == counts(exported=2, export_failed=2))


def test_a_process_that_ends_waits_for_a_collector_no_longer_than_it_says(exporter: Exporter) -> None:
    tracer = Tracer(otel.samples_of(DEFAULT_ON), exporter, exporter.stop, delay_s=0.0)
    release = threading.Event()
    exporter.act = lambda: release.wait(PATIENCE_S)
    tracer.start()
    thread = tracer._thread
    assert thread is not None
    tracer.finish(ended()[0])
    tracer.close(0.01)
    # The exporter was told to give up; twice is safe.
    assert exporter.stopped == 1
    tracer.close(0.01)
    assert exporter.stopped == 1
    release.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


# --- in OpenTelemetry's terms -----------------------------------------------------------------------------------------


def test_spans_are_opentelemetrys() -> None:
    sink = InMemorySpanExporter()
    spans = [
        Span("infer", SERVER, PLACE, 7, 10.0, 11.5, {"trunkline.rows": 2}, "queue_full"),
        Span("queue", INTERNAL, Place(PLACE.trace_id, 7), 8, 10.0, 10.25, {}),
        Span("infer", SERVER, Place(5, 0), 9, 10.0, 11.0, {}),
    ]
    assert otel.exported(sink, Resource({"service.name": "trunkline"}), spans)
    failed, queue, alone = sink.get_finished_spans()
    assert failed.context.trace_id == PLACE.trace_id
    assert failed.context.trace_flags.sampled
    assert failed.parent is not None
    assert (failed.parent.span_id, failed.parent.is_remote) == (PLACE.parent_id, True)
    assert (failed.kind, failed.status.status_code) == (SpanKind.SERVER, StatusCode.ERROR)
    assert failed.attributes == {"trunkline.rows": 2, "error.type": "queue_full"}
    assert queue.parent is not None
    assert (queue.parent.span_id, queue.parent.is_remote) == (7, False)
    assert (queue.kind, queue.status.status_code, queue.attributes) == (SpanKind.INTERNAL, StatusCode.UNSET, {})
    assert alone.parent is None
    assert failed.start_time == queue.start_time
    assert failed.start_time is not None
    assert failed.end_time is not None
    assert failed.end_time - failed.start_time == 1_500_000_000


def test_a_collector_that_refuses_has_not_taken_them() -> None:
    class Refuses(InMemorySpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            return SpanExportResult.FAILURE

    assert not otel.exported(Refuses(), Resource({}), [Span("infer", SERVER, PLACE, 7, 1.0, 2.0, {})])


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "trunkline"),
        ({"OTEL_SERVICE_NAME": "node-7"}, "node-7"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=models,zone=a"}, "models"),
    ],
)
def test_the_service_is_called_trunkline_unless_it_is_called_something_else(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str
) -> None:
    for variable in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert otel._resource().attributes["service.name"] == name


def test_the_environment_says_how_much_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "3")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    tracer = otel.open_tracer()
    assert tracer.begin(PARENT) is None
    for each in ended(4):
        tracer.finish(each)
    assert tracer.counts() == counts(queue_full=2)


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "\u0663", "99999999"])
def test_a_bad_number_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", value)
    with pytest.raises(ConfigError, match="OTEL_BSP_SCHEDULE_DELAY"):
        otel.open_tracer()
