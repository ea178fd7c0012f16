"""Settings: defaults, then a TOML file, then the environment, then flags; the last to speak wins.

Every value is checked where it enters, and a bad one is refused with its source, its key and what would be accepted. An unknown
key in the file is refused too: a misspelt budget must not silently be the default. Must not import torch.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sidecar.errors import ConfigError
from sidecar.machine import available_bytes, core_count, has_gpu_driver
from sidecar.origins import Network, Origin, Policy, parse_origin
from sidecar.policies import Either

PREFIX: Final = "TRUNKLINE_"
_UNITS: Final = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SHORTER: Final = {"quota_file": "--quotas", "pull_origins": "--pull-origin", "pull_networks": "--pull-network"}
_DEVICE: Final = re.compile(r"auto|cuda(?::\d{1,3})?|cpu(?::(\d{1,4})(?:-(\d{1,4}))?)?", re.ASCII)
_SIZE: Final = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)", re.ASCII)


def _default_budget_bytes() -> int:
    # Weights may take most of what can be had when the sidecar starts; activations and functions need the rest.
    return max(1, int(0.7 * available_bytes()))


def _default_host_bytes() -> int:
    return max(1, int(0.5 * available_bytes()))


def _default_activation_bytes() -> int:
    return max(1, int(0.15 * available_bytes()))


def _default_threads() -> int:
    return core_count()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything an operator can set. Sizes in bytes, times in seconds."""

    run_dir: Path = Path("/run/trunkline")
    store_dir: Path = Path("/var/lib/trunkline")
    quota_file: Path | None = None
    # One, or several with commas in between.
    device: str = "auto"
    threads: int = 1
    # Of each device. 0: as much as the device has room for, and of a CPU beside GPUs what each of those has of the host.
    memory_budget_bytes: int = 0
    host_budget_bytes: int = 0
    activation_budget_bytes: int = 0
    # None: a part of what is free on the disk.
    block_files_limit_bytes: int | None = None
    eviction_policy: str = Either.name
    admin_host: str = "127.0.0.1"
    admin_port: int = 9470
    # Whose tokens count over TCP. None: nobody needs one, and nobody comes from another machine.
    admin_tokens: Path | None = None
    admin_tls_certificate: Path | None = None
    admin_tls_key: Path | None = None
    admin_workers: int = 2
    # None: changes are told in the log alone.
    audit_file: Path | None = None
    blob_limit_bytes: int = 64 * 2**30
    pull_origins: tuple[Origin, ...] = ()
    pull_networks: tuple[Network, ...] = ()
    pull_signers: Path | None = None
    # What is brought in before anybody asks for it.
    pull_list: Path | None = None
    pull_timeout_s: float = 3600.0
    queue_limit: int = 256
    batch_limit: int = 8
    batch_window_s: float = 0.0
    compute_once: bool = True
    packing: bool = True
    stacking: bool = True
    # None: chosen by measuring.
    lanes: int | None = None
    arena_limit_bytes: int = 64 * 2**20
    arena_total_bytes: int = 2 * 2**30
    connection_limit: int = 1024
    drain_timeout_s: float = 10.0
    # 0: nothing takes too long.
    watchdog_s: float = 10.0
    log_level: str = "info"
    log_format: str = "human"
    traces: bool = False

    @property
    def devices(self) -> tuple[str, ...]:
        """Return the names of the devices."""
        return tuple(self.device.split(","))

    @property
    def is_exposed(self) -> bool:
        """Say whether the admin endpoint can be reached from other machines."""
        return self.admin_port > 0 and not _is_loopback(self.admin_host)

    @property
    def pull_policy(self) -> Policy:
        """Return what may be pulled."""
        return Policy(
            origins=self.pull_origins,
            networks=self.pull_networks,
            signers=self.pull_signers,
            blob_limit_bytes=self.blob_limit_bytes,
            timeout_s=self.pull_timeout_s,
        )

    def budget_bytes(self, device: str) -> int:
        """Return the memory for weights on a device; 0: as much as it has room for."""
        return self.memory_budget_bytes or (self.host_budget_bytes if device.startswith("cpu") else 0)

    def segment_bytes(self, device: str) -> int:
        """Return how much of the host's memory is for weights of a device. What ``auto`` is, only the engine finds out."""
        if device.startswith("cpu") or (device == "auto" and not has_gpu_driver()):
            return self.budget_bytes(device)
        return max(self.memory_budget_bytes, self.host_budget_bytes) if device == "auto" else self.host_budget_bytes


def flag_of(key: str) -> str:
    """Return the flag of ``trunkline serve`` that gives a setting: units are left out, since a value may name its own."""
    return _SHORTER.get(key, "--" + key.removesuffix("_bytes").removesuffix("_s").replace("_", "-"))


def parse_size(value: object) -> int:
    """Return bytes from an integer or a text such as ``500MB`` or ``2GiB``. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(str(value).strip())
    if not match or match[2].upper() not in _UNITS:
        raise ValueError("a size such as 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _path(value: object) -> Path:
    # A list or a number has a text, too, but nobody means it as a path.
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise ValueError("a path")
    return Path(value).absolute()


def _size(minimum: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        size_bytes = parse_size(value)
        if not minimum <= size_bytes <= 2**50:
            raise ValueError(f"a size of at least {minimum} bytes, such as 500MB or 2GiB")
        return size_bytes

    return check


def _devices(value: object) -> str:
    names = [name.strip() for name in str(value).split(",")]
    matches = [_DEVICE.fullmatch(name) for name in names]
    if not all(matches) or (len(names) > 1 and "auto" in names):
        raise ValueError("auto, or one or several of cpu, cpu:N, cpu:N-M, cuda:N, with commas in between")
    taken: set[str] = set()
    for name, match in zip(names, matches, strict=True):
        assert match is not None
        kind, _, number = name.partition(":")
        own = {f"{kind} {int(number or 0)}"}
        if kind == "cpu":
            # Without numbers, all cores.
            first, last = int(match[1] or 0), int(match[2] or match[1] or 9999)
            own = {f"core {core}" for core in range(first, last + 1)}
            if match[1] and not os.sched_getaffinity(0).issuperset(range(first, last + 1)):
                usable = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
                raise ValueError(f"made of cores that this process may use, which are {usable}")
        if not own or not taken.isdisjoint(own):
            raise ValueError("a list of devices that have nothing in common, such as cpu:0-1,cpu:2-3")
        taken |= own
    return ",".join(names)


def _integer(minimum: int, maximum: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if isinstance(value, (bool, float)) or not re.fullmatch(r"\d{1,10}", str(value)):
            raise ValueError(f"an integer from {minimum} to {maximum}")
        if not minimum <= int(str(value)) <= maximum:
            raise ValueError(f"an integer from {minimum} to {maximum}")
        return int(str(value))

    return check


def _lanes(value: object) -> int | None:
    if value == "auto":
        return None
    try:
        return _integer(1, 64)(value)
    except ValueError as error:
        raise ValueError("auto or an integer from 1 to 64") from error


def _switch(value: object) -> bool:
    # TOML has booleans of its own.
    known = {"on": True, "off": False, "true": True, "false": False}
    if str(value).lower() not in known:
        raise ValueError("on or off")
    return known[str(value).lower()]


def _traces(value: object) -> bool | None:
    if value == "auto":
        return None
    try:
        return _switch(value)
    except ValueError as error:
        raise ValueError("auto, on or off") from error


def _wants_traces(environ: Mapping[str, str]) -> bool:
    """Say whether OpenTelemetry's own variables ask for traces. Raises ConfigError."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if exporter not in ("", "otlp", "none"):
        raise ConfigError(f"OTEL_TRACES_EXPORTER is {exporter[:80]!r}; it must be otlp or none", key="OTEL_TRACES_EXPORTER")
    if exporter:
        return exporter == "otlp"
    return any(environ.get(f"OTEL_EXPORTER_OTLP_{which}ENDPOINT", "").strip() for which in ("", "TRACES_"))


def _check_traces_protocol(environ: Mapping[str, str]) -> None:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = environ.get(name, "").strip()
        if protocol not in ("", "http/protobuf"):
            raise ConfigError(f"{name} is {protocol[:80]!r}; spans are sent as http/protobuf only (port 4318 mostly)", key=name)
        if protocol:
            return


def _texts(value: object) -> list[str]:
    """Return the parts of a list, or of a text with commas in between."""
    parts: list[object] = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a text, or a list of texts")
    return [stripped for part in parts for each in str(part).split(",") if (stripped := each.strip())]


def _origins(value: object) -> tuple[Origin, ...]:
    return tuple(dict.fromkeys(parse_origin(text) for text in _texts(value)))


def _networks(value: object) -> tuple[Network, ...]:
    try:
        return tuple(dict.fromkeys(ipaddress.ip_network(text) for text in _texts(value)))
    except ValueError as error:
        raise ValueError("networks such as 10.0.0.0/8 or fd00::/8, with commas in between") from error


def _seconds(value: object) -> float:
    try:
        seconds = float(str(value))
    except ValueError as error:
        raise ValueError("a number of seconds from 0 to 3600") from error
    if isinstance(value, bool) or not 0 <= seconds <= 3600:
        raise ValueError("a number of seconds from 0 to 3600")
    return seconds


def _match(pattern: str, accepted: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if not re.fullmatch(pattern, str(value)):
            raise ValueError(accepted)
        return str(value)

    return check


def _address(value: object) -> str:
    try:
        _is_loopback(str(value))
    except ValueError as error:
        raise ValueError("an address such as 127.0.0.1, ::1 or 0.0.0.0, or localhost") from error
    return str(value)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback


_CHECKS: Final[dict[str, Callable[[object], Any]]] = {
    "run_dir": _path,
    "store_dir": _path,
    "quota_file": _path,
    "device": _devices,
    "threads": _integer(1, 1024),
    "memory_budget_bytes": _size(1),
    "host_budget_bytes": _size(1),
    "activation_budget_bytes": _size(1),
    "block_files_limit_bytes": _size(0),
    "eviction_policy": _match("lru|gdsf|adaptive", "lru, gdsf or adaptive"),
    "admin_host": _address,
    "admin_port": _integer(0, 65535),
    "admin_tokens": _path,
    "admin_tls_certificate": _path,
    "admin_tls_key": _path,
    "admin_workers": _integer(1, 16),
    "audit_file": _path,
    "blob_limit_bytes": _size(65536),
    "pull_origins": _origins,
    "pull_networks": _networks,
    "pull_signers": _path,
    "pull_list": _path,
    "pull_timeout_s": _seconds,
    "queue_limit": _integer(1, 1_000_000),
    "batch_limit": _integer(1, 1024),
    "batch_window_s": _seconds,
    "compute_once": _switch,
    "packing": _switch,
    "stacking": _switch,
    "lanes": _lanes,
    "arena_limit_bytes": _size(65536),
    "arena_total_bytes": _size(131072),
    "connection_limit": _integer(1, 100_000),
    "drain_timeout_s": _seconds,
    "watchdog_s": _seconds,
    "log_level": _match(r"debug|info|warning|error", "debug, info, warning or error"),
    "log_format": _match("human|json", "human or json"),
    "traces": _traces,
}


def load_settings(flags: Mapping[str, object], environ: Mapping[str, str], toml_path: Path | None = None) -> Settings:
    """Return the settings from all sources. Flags that are None were not given. Raises ConfigError."""
    values: dict[str, Any] = {}
    if toml_path is not None:
        for key, value in _read_toml(toml_path).items():
            values[key] = _checked(f"{toml_path}: {key}", key, value)
    for key in _CHECKS:
        name = PREFIX + key.upper()
        if environ.get(name):
            values[key] = _checked(name, key, environ[name])
    for key, value in flags.items():
        if value is not None:
            values[key] = _checked(flag_of(key), key, value)
    devices = values.get("device", "auto").split(",")
    on_host = [name for name in devices if not name.startswith("cuda")]
    if len(on_host) == len(devices):
        # Else the engine looks how much the device has.
        values.setdefault("memory_budget_bytes", _default_budget_bytes() // len(on_host))
    values.setdefault("host_budget_bytes", _default_host_bytes() // len(devices))
    values.setdefault("activation_budget_bytes", _default_activation_bytes() // len(devices))
    values.setdefault("threads", _default_threads())
    if values.get("traces") is None:
        values["traces"] = _wants_traces(environ)
    if values["traces"]:
        _check_traces_protocol(environ)
    settings = Settings(**values)
    _check_together(settings)
    return settings


def _check_together(settings: Settings) -> None:
    if settings.is_exposed and settings.admin_tokens is None:
        raise ConfigError(
            f"the admin endpoint is to listen on {settings.admin_host}, which other machines reach, and would do what any "
            "of them asks; make a token with `trunkline token add NAME --role operate` and name its file with --admin-tokens, "
            "or leave --admin-host to 127.0.0.1",
            key="admin_tokens",
        )
    if (settings.admin_tls_certificate is None) != (settings.admin_tls_key is None):
        missing = "admin_tls_key" if settings.admin_tls_key is None else "admin_tls_certificate"
        raise ConfigError(f"a certificate and its key belong together; give {flag_of(missing)} as well", key=missing)


def _checked(source: str, key: str, value: object) -> object:
    try:
        return _CHECKS[key](value)
    except ValueError as error:
        raise ConfigError(f"{source} is {str(value)[:80]!r}; it must be {error}", key=key) from error


def _read_toml(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            read = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({os.strerror(error.errno or 0)})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for key in read:
        if key not in _CHECKS:
            raise ConfigError(f"{path}: {key[:80]!r} is no setting; the settings are {', '.join(_CHECKS)}", key=key[:80])
    return read
