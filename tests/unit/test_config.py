"""Settings: who wins, and what is refused and how."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from sidecar.config import PREFIX, Settings, flag_of, load_settings, parse_size
from sidecar.errors import ConfigError
from sidecar.machine import available_bytes, has_gpu_driver

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.mark.parametrize(("given", "meant"), [("on", True), ("OFF", False), (True, True), (False, False)])
def test_a_switch_is_on_or_off(given: object, meant: bool) -> None:
    assert load_settings({"compute_once": given}, {}).compute_once is meant


def test_flags_beat_environment_beats_file_beats_default(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text('queue_limit = 1\nconnection_limit = 1\nmemory_budget_bytes = "1GiB"\n')
    settings = load_settings({"queue_limit": "3"}, {"TRUNKLINE_QUEUE_LIMIT": "2", "TRUNKLINE_CONNECTION_LIMIT": "2"}, path)
    assert settings.queue_limit == 3
    assert settings.connection_limit == 2
    assert settings.memory_budget_bytes == 2**30
    assert settings.admin_port == 9470


def test_the_default_budget_is_most_of_what_is_free() -> None:
    assert load_settings({}, {}).memory_budget_bytes > 2**20


def test_a_gpu_is_given_what_it_has_unless_the_operator_says_otherwise() -> None:
    assert load_settings({"device": "cuda:1"}, {}).memory_budget_bytes == 0
    assert load_settings({"device": "cuda:1", "memory_budget_bytes": "5"}, {}).memory_budget_bytes == 5


@pytest.mark.parametrize(
    ("device", "has_driver", "budget_bytes", "segment_bytes"),
    [
        ("cpu", True, 5, 5),
        ("cuda", True, 5, 7),
        ("cuda:1", False, 9, 7),
        ("auto", False, 5, 5),
        ("auto", True, 5, 7),
        ("auto", True, 9, 9),
    ],
)
def test_of_the_hosts_memory_weights_have_what_the_device_may_call_for(
    device: str, has_driver: bool, budget_bytes: int, segment_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.config.has_gpu_driver", lambda: has_driver)
    settings = load_settings({"device": device, "memory_budget_bytes": budget_bytes, "host_budget_bytes": 7}, {})
    assert settings.segment_bytes(device) == segment_bytes
    assert load_settings({}, {}).host_budget_bytes > 2**20


def test_devices_of_one_kind_share_what_the_host_has() -> None:
    one, two = load_settings({"device": "cpu"}, {}), load_settings({"device": "cpu:0, cpu:1"}, {})
    assert two.devices == ("cpu:0", "cpu:1")
    assert [two.segment_bytes(device) for device in two.devices] == [two.memory_budget_bytes] * 2
    assert 2 * two.memory_budget_bytes == pytest.approx(one.memory_budget_bytes, rel=0.2)
    assert 2 * two.activation_budget_bytes == pytest.approx(one.activation_budget_bytes, rel=0.2)


def test_a_cpu_beside_a_gpu_has_as_much_of_the_host_as_the_gpu() -> None:
    found = load_settings({"device": "cuda:0,cpu", "host_budget_bytes": 7}, {})
    assert [found.budget_bytes(device) for device in found.devices] == [0, 7]
    assert [found.segment_bytes(device) for device in found.devices] == [7, 7]
    given = load_settings({"device": "cuda:0,cpu", "host_budget_bytes": 7, "memory_budget_bytes": 5}, {})
    assert [given.budget_bytes(device) for device in given.devices] == [5, 5]
    assert [given.segment_bytes(device) for device in given.devices] == [7, 5]


def test_a_gpu_is_looked_for_by_its_drivers_device(tmp_path: Path) -> None:
    assert not has_gpu_driver(tmp_path / "nvidiactl")
    (tmp_path / "nvidiactl").touch()
    assert has_gpu_driver(tmp_path / "nvidiactl")


def test_memory_is_what_can_be_had_and_not_what_is_free(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4000 kB\nMemFree: 10 kB\nMemAvailable:    3000 kB\n")
    assert available_bytes(meminfo, tmp_path / "none") == 3000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert available_bytes(meminfo, tmp_path) == 3000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    assert available_bytes(meminfo, tmp_path) == 999_995
    (tmp_path / "memory.current").write_text("2000000\n")
    assert available_bytes(meminfo, tmp_path) == 0
    meminfo.write_text("")
    assert available_bytes(meminfo, tmp_path / "none") > 2**20


def test_one_core_is_left_to_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, 1), (2, 2), (8, 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, cores=cores: range(cores))
        assert load_settings({}, {}).threads == threads


@pytest.mark.parametrize(("text", "size"), [("17", 17), ("500MB", 500_000_000), ("2GiB", 2**31), ("1.5 kb", 1500), (9, 9)])
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("device", "tpu"),
        ("device", "auto,cpu"),
        ("device", "cpu,cpu"),
        ("device", "cpu,cpu:1"),
        ("device", "cpu:0-2,cpu:2-3"),
        ("device", "cpu:3-1"),
        ("device", "cuda:0,cuda:0"),
        ("device", "cuda,cuda:0"),
        ("device", "cuda:0,cuda:00"),
        ("device", "cpu:0,cpu:9999"),
        ("device", "cpu:0;cpu:1"),
        ("memory_budget_bytes", "lots"),
        ("memory_budget_bytes", "-1"),
        ("memory_budget_bytes", "0"),
        ("memory_budget_bytes", "5XB"),
        ("memory_budget_bytes", "99999999TiB"),
        ("memory_budget_bytes", "9" * 400),
        ("memory_budget_bytes", True),
        ("blob_limit_bytes", "1"),
        ("device", "gpu"),
        ("threads", "0"),
        ("threads", "1.5"),
        ("threads", "-2"),
        ("batch_limit", "0"),
        ("batch_window_s", "-1"),
        ("compute_once", "maybe"),
        ("compute_once", 1),
        ("packing", "fast"),
        ("queue_limit", True),
        ("queue_limit", 2.0),
        ("admin_port", "70000"),
        ("admin_host", "0.0.0"),
        ("admin_host", "example.org"),
        ("admin_host", "127.999.1.1"),
        ("admin_host", "example.com"),
        ("drain_timeout_s", "soon"),
        ("drain_timeout_s", "nan"),
        ("drain_timeout_s", "-1"),
        ("drain_timeout_s", True),
        ("arena_limit_bytes", "1"),
        ("lanes", "0"),
        ("lanes", "65"),
        ("lanes", "many"),
        ("lanes", True),
        ("log_level", "loud"),
        ("log_format", "xml"),
        ("traces", "maybe"),
        ("traces", 1),
        ("run_dir", "\0"),
        ("run_dir", ["/run"]),
        ("store_dir", True),
        ("quota_file", ["quotas.toml"]),
    ],
)
def test_bad_values_are_refused_with_source_and_range(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match="it must be "):
        load_settings({key: value}, {})
    if isinstance(value, str) and "\0" not in value:
        with pytest.raises(ConfigError, match=PREFIX + key.upper()):
            load_settings({}, {PREFIX + key.upper(): value})


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1"])
def test_loopback_addresses_are_taken(host: str) -> None:
    assert load_settings({"admin_host": host}, {}).admin_host == host


def test_the_quota_file_has_a_shorter_flag() -> None:
    assert load_settings({}, {}).quota_file is None
    assert load_settings({}, {"TRUNKLINE_QUOTA_FILE": "/etc/q.toml"}).quota_file == Path("/etc/q.toml")
    with pytest.raises(ConfigError, match="--quotas is"):
        load_settings({"quota_file": ""}, {})


def test_lanes_are_chosen_or_said() -> None:
    assert load_settings({}, {}).lanes is None
    assert load_settings({"lanes": "auto"}, {}).lanes is None
    assert load_settings({"lanes": "3"}, {PREFIX + "LANES": "auto"}).lanes == 3


@pytest.mark.parametrize(
    ("setting", "environ", "wanted"),
    [
        (None, {}, False),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        (None, {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://collector:4318/v1/metrics"}, False),
        (None, {"OTEL_TRACES_EXPORTER": "otlp"}, True),
        (None, {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, False),
        (None, {"OTEL_SDK_DISABLED": "True", "OTEL_TRACES_EXPORTER": "otlp"}, False),
        ("auto", {"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ("on", {}, True),
        (True, {"OTEL_TRACES_EXPORTER": "none"}, True),
        ("off", {"OTEL_TRACES_EXPORTER": "zipkin", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, False),
        ("on", {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, True),
    ],
)
def test_traces_are_asked_for_by_opentelemetrys_variables_or_the_setting(
    setting: object, environ: dict[str, str], wanted: bool
) -> None:
    assert load_settings({"traces": setting}, environ).traces is wanted


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "it must be otlp or none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf only"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "http/protobuf only"),
    ],
)
def test_what_opentelemetry_has_and_the_sidecar_has_not_is_refused(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is '{value}'; .*{message}"):
        load_settings({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", name: value})


def test_a_bad_flag_is_named_as_it_was_written() -> None:
    with pytest.raises(ConfigError, match="--drain-timeout is 'x'"):
        load_settings({"drain_timeout_s": "x"}, {})
    with pytest.raises(ConfigError, match="--memory-budget is 'x'"):
        load_settings({"memory_budget_bytes": "x"}, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'memory_budgte = "1GiB"', "'memory_budgte' is no setting"),
        (b"queue_limit = ", "is not TOML"),
        (b"\xff", "is not TOML"),
        (b'queue_limit = "many"', "queue_limit is 'many'"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_settings({}, {}, path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings({}, {}, tmp_path / "none.toml")


def test_every_setting_and_its_flag_are_documented() -> None:
    documented = [line.split("`")[1:4:2] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert documented == [[field.name, flag_of(field.name)] for field in fields(Settings)]


def test_origins_are_a_list_wherever_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text('pull_origins = ["https://a.example/x", "file:///srv"]\npull_networks = "10.0.0.0/8, fd00::/8"\n')
    flags = {"pull_origins": ("https://A.example:443/x/", "file:///srv"), "pull_networks": ("10.0.0.0/8", "fd00::/8")}
    environ = {"PULL_ORIGINS": "https://a.example/x,file:///srv", "PULL_NETWORKS": "10.0.0.0/8,fd00::/8"}
    for settings in (
        load_settings({}, {}, path),
        load_settings(flags, {}),
        load_settings({}, {PREFIX + key: value for key, value in environ.items()}),
    ):
        assert [origin.url for origin in settings.pull_origins] == ["https://a.example/x", "file:///srv"]
        assert list(map(str, settings.pull_networks)) == ["10.0.0.0/8", "fd00::/8"]
        assert settings.pull_policy.origins == settings.pull_origins
        assert settings.pull_policy.networks == settings.pull_networks
    assert load_settings({}, {}).pull_policy.origins == ()


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("pull_origins", 7, "a text, or a list of texts"),
        ("pull_origins", ["https://a.example", 7], "a text, or a list of texts"),
        ("pull_origins", "a.example", "SCHEME://HOST/PATH"),
        ("pull_networks", "10.0.0.1/8", "networks such as"),
        ("pull_networks", "10.0.0.0/33", "networks such as"),
        ("pull_networks", [7], "networks such as"),
        ("pull_timeout_s", "soon", "a number of seconds"),
    ],
)
def test_what_is_no_origin_nor_network_is_refused(key: str, value: object, accepted: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag_of(key)} is .*; it must be {accepted}"):
        load_settings({key: value}, {})
