"""What systemd is told, and the unit it is told by."""

from __future__ import annotations

import configparser
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from sidecar.config import load_settings
from sidecar.supervisor import EXIT_GRACE_S
from sidecar.systemd import Notifier
from tests.sidecar_process import sidecar_process
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "trunkline.service"
# Of 10, what systemd-analyze may find exposed: above 5 it says "medium".
MOST_EXPOSED = 3.0


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """Return systemd's end, and the address it gives its services."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@trunkline-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0", 1))
        sock.settimeout(PATIENCE_S)
        yield sock, address


def test_a_sidecar_tells_that_it_is_ready_alive_and_stopping(
    manager: tuple[socket.socket, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sock, address = manager
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    with sidecar_process(tmp_path) as box:
        told = [sock.recv(100) for _ in range(4)]
        assert told == [b"READY=1", *[b"WATCHDOG=1"] * 3]
        # What it is told with is nobody else's: gunicorn would say that it is ready, too.
        engine = Path(f"/proc/{box.await_engine()}")
        assert engine.exists()
        box.process.send_signal(signal.SIGTERM)
        while (state := sock.recv(100)) == b"WATCHDOG=1":
            pass
        assert state == b"STOPPING=1"
        assert box.process.wait(PATIENCE_S) == 0
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.recv(100)


def test_children_do_not_inherit_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": str(os.getpid())}.items():
        monkeypatch.setenv(name, value)
    Notifier.from_environment()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()


@pytest.mark.parametrize(("usec", "pid", "told"), [("", "", 0), ("5", "", 1), ("5", "1", 0)])
def test_signs_of_life_are_given_where_they_are_waited_for(
    manager: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch, usec: str, pid: str, told: int
) -> None:
    sock, address = manager
    for name, value in {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": usec, "WATCHDOG_PID": pid}.items():
        monkeypatch.setenv(name, value)
    notifier = Notifier.from_environment()
    notifier.alive()
    notifier.stopping()
    assert [sock.recv(100) for _ in range(1 + told)] == [b"WATCHDOG=1"] * told + [b"STOPPING=1"]


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "@nobody-listens"])
def test_where_nobody_listens_nothing_happens(address: str) -> None:
    notifier = Notifier(address, is_watched=True)
    for tell in (notifier.ready, notifier.alive, notifier.stopping):
        tell()


def test_without_a_descriptor_left_nothing_is_told_and_nothing_ends(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    notifier = Notifier(address)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno(), limits[1]))
        try:
            notifier.ready()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    notifier.stopping()
    assert sock.recv(100) == b"STOPPING=1"


def unit(section: str = "Service") -> dict[str, str]:
    """Return the settings of a section of the unit."""
    parser = configparser.ConfigParser(strict=True, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT)
    return dict(parser[section])


def test_the_unit_leaves_time_to_drain_and_does_not_fight_a_take_over() -> None:
    service, settings = unit(), load_settings({}, {}, ROOT / "deploy" / "systemd" / "sidecar.toml")
    # The engine, and then the endpoint, have a moment of grace each.
    assert float(service["TimeoutStopSec"]) > settings.drain_timeout_s + 2 * EXIT_GRACE_S
    assert service["Restart"] == "on-failure"
    # Failing five times in ten seconds is not the end of it.
    assert unit("Unit")["StartLimitIntervalSec"] == "0"
    assert service["KillMode"] == "mixed"
    assert service["Type"] == "notify"
    assert int(service["LimitNOFILE"]) >= 3136
    assert service["LimitCORE"] == "0"
    # Bind mounts of functions would be of a folder that is no more.
    assert (service["RuntimeDirectoryPreserve"], service["RuntimeDirectoryMode"]) == ("yes", "0755")
    assert service["OOMPolicy"] == "continue"
    assert "DynamicUser" not in service


def test_the_user_is_that_of_the_image() -> None:
    kind, name, uid = (ROOT / "deploy" / "systemd" / "trunkline.sysusers.conf").read_text().splitlines()[-1].split()[:3]
    assert (kind, name) == ("u", unit()["User"])
    assert f"USER {uid}:{uid}" in (ROOT / "Dockerfile").read_text()


def test_systemd_itself_takes_the_unit_and_finds_it_confined(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing: apt-get install systemd")
    copy = tmp_path / UNIT.name
    # It wants the program to be there.
    copy.write_text(UNIT.read_text().replace("/opt/trunkline/bin/trunkline", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert UNIT.name not in done.stderr, done.stderr
    command = ["systemd-analyze", "security", "--no-pager", "--offline=yes", str(copy)]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    exposed = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert exposed, told
    assert float(exposed[1]) <= MOST_EXPOSED, told


def test_the_core_service_of_faasd_has_the_keys_that_faasd_reads_and_starts_the_sidecar() -> None:
    """Of a compose file faasd reads services with these keys, and of volumes only binds."""
    compose = yaml.safe_load((ROOT / "deploy" / "faasd" / "docker-compose.snippet.yaml").read_text())
    ((name, service),) = compose["services"].items()
    assert name == "trunkline"
    assert service.keys() <= {
        "image",
        "command",
        "environment",
        "volumes",
        "user",
        "cap_add",
        "ports",
        "depends_on",
        "entrypoint",
    }
    assert all("=" in each for each in service["environment"])
    assert {volume["target"] for volume in service["volumes"]} == {"/run/trunkline", "/var/lib/trunkline"}
    assert all(volume["type"] == "bind" for volume in service["volumes"])
    assert service["command"][:2] == ["trunkline", "serve"]
