"""A sidecar with a quota file, as processes: tokens, reloads by command and by signal, mistakes, and a killed engine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline import client, errors
from trunkline.connection import Connection
from trunkline.endpoint import Endpoint
from trunkline.pool import Pool

from sidecar.quotas import read_quotas
from tests.bundles import write_adding_bundle
from tests.sidecar_process import ROOT, SidecarProcess, sidecar_process
from tests.waiting import PATIENCE_S, soon

pytestmark = pytest.mark.usefixtures("nothing_leaks")


X = np.ones((1, 2), np.float32)


class Box:
    """A sidecar, its quota file, and the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.quotas = folder / "quotas.toml"
        self.sidecar: SidecarProcess

    def trunkline(self, *words: str, code: int = 0) -> str:
        """Run the command line as an operator does; return what it prints."""
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline",
            "TRUNKLINE_QUOTA_FILE": str(self.quotas),
            "TRUNKLINE_ADMIN": f"unix:{self.folder}/run/admin.sock",
        }
        ran = subprocess.run(
            [sys.executable, "-m", "sidecar", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert ran.returncode == code, ran.stderr
        return ran.stdout if not code else ran.stderr

    def connect(self, token: str) -> Connection:
        return Connection(str(self.sidecar.socket), token=token.strip().encode(), deadline=soon())

    def tenants(self) -> dict[str, Any]:
        return {entry["name"]: entry for entry in self.sidecar.admin.get("tenants")["tenants"]}

    def logged(self, text: str) -> None:
        deadline = soon()
        while text not in self.sidecar.log.read_text():
            assert time.monotonic() < deadline, self.sidecar.log.read_text()
            time.sleep(0.02)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    made.trunkline("tenant", "add", "vision", "--models", "adder", "--connections", "2", "--token-file", str(tmp_path / "token"))
    with sidecar_process(tmp_path, "--quotas", str(made.quotas), "--memory-budget", "64MiB") as made.sidecar:
        made.sidecar.admin.push(write(tmp_path))
        yield made
        made.sidecar.admin.close()


def write(folder: Path) -> Path:
    write_adding_bundle(folder / "adder", "adder", [1.0, 2.0])
    return folder / "adder"


def restart_engine(box: Box) -> None:
    engine = box.sidecar.await_engine()
    os.kill(engine, signal.SIGKILL)
    while box.sidecar.await_engine() == engine:
        time.sleep(0.02)


def through(path: Path, token: str = "") -> Connection:
    return Connection(str(path), token=token.strip().encode(), deadline=soon())


def test_a_tenant_has_a_socket_of_its_own_and_no_other(box: Box) -> None:
    vision = (box.folder / "token").read_text()
    search = box.trunkline("tenant", "add", "search", "--models", "adder", "--socket", "--uid", str(os.getuid()))
    path = box.sidecar.run_dir / "tenants" / "search" / "trunkline.sock"
    admin = (box.sidecar.run_dir / "admin.token").read_text()

    def only_search_comes_in() -> None:
        with contextlib.closing(through(path, search)) as connection:
            connection.describe("adder", soon())
        for token in ("", "guess", vision, admin):
            with pytest.raises(errors.Unauthorized):
                through(path, token)
        with pytest.raises(errors.Unauthorized):
            box.connect(search)
        box.connect(vision).close()

    only_search_comes_in()
    # The next engine has the same socket.
    number = path.stat().st_ino
    restart_engine(box)
    assert path.stat().st_ino == number
    only_search_comes_in()
    # A call that meets an engine's death is repeated, and answered by the next one.
    asked = client.Model("adder", pool := Pool(endpoint=Endpoint(str(path)), credential=lambda: search.strip().encode()))
    assert asked(X).shape == X.shape
    restart_engine(box)
    assert asked(X).shape == X.shape
    pool.close()
    # Without a token the folder is the credential, and a token is nobody's.
    box.quotas.write_text(box.quotas.read_text() + "\n[tenants.bare]\nmodels = ['adder']\nsocket = true\n")
    box.sidecar.admin.post("quotas/reload")
    bare = path.parents[1] / "bare" / "trunkline.sock"
    held = through(bare)
    for token in (search, vision, "guess"):
        with pytest.raises(errors.Unauthorized):
            through(bare, token)
    with pytest.raises(errors.Unauthorized):
        box.connect("")
    # Who is gone has no folder, and no connection.
    box.trunkline("tenant", "rm", "bare")
    assert not bare.parent.exists()
    with pytest.raises(errors.TransportError), contextlib.closing(held):
        held.describe("adder", soon())
    only_search_comes_in()
    assert box.sidecar.stop() == 0
    assert [each.name for each in path.parents[1].iterdir()] == ["search"]
    assert not path.exists()


def test_a_token_counts_from_its_tenants_uid_only(box: Box) -> None:
    vision = (box.folder / "token").read_text()
    held = box.connect(vision)
    text = box.quotas.read_text()
    for key, number in (("uid", os.getuid()), ("gid", os.getgid())):
        box.quotas.write_text(f"{text}{key} = {number}\n")
        box.sidecar.admin.post("quotas/reload")
        held.describe("adder", soon())
        box.connect(vision).close()
    for key, number in (("gid", os.getgid() + 1), ("uid", os.getuid() + 1)):
        box.quotas.write_text(f"{text}{key} = {number}\n")
        box.sidecar.admin.post("quotas/reload")
        with pytest.raises(errors.Unauthorized, match="from the other"):
            box.connect(vision)
        box.logged(f"vision is bound to uid {'None' if key == 'gid' else number}")
    with pytest.raises(errors.TransportError), contextlib.closing(held):
        held.describe("adder", soon())


def test_tenants_come_and_go_while_the_sidecar_runs(box: Box) -> None:
    vision = (box.folder / "token").read_text()
    for wrong in ("", "guess"):
        with pytest.raises(errors.Unauthorized, match="trunkline tenant add"):
            box.connect(wrong)
    with contextlib.closing(box.connect(vision)) as held:
        # By the command line: in force when it has ended.
        search = box.trunkline("tenant", "add", "search", "--models", "*", "--arena", "200000")
        assert sorted(box.tenants()) == ["search", "vision"]
        with contextlib.closing(box.connect(search)):
            with pytest.raises(errors.ArenaFull, match="its quota is 200000"):
                box.connect(search)
            assert box.tenants()["search"]["connections"] == 1
        # By hand and a signal.
        text = box.quotas.read_text()
        box.quotas.write_text(text.replace("connections = 2", "connections = 1"))
        box.sidecar.process.send_signal(signal.SIGHUP)
        deadline = soon()
        while box.tenants()["vision"]["connection_limit"] != 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(errors.QuotaExceeded, match="vision has 1 connections open, its quota is 1"):
            box.connect(vision)
        # A mistake, by either way.
        box.quotas.write_text(box.quotas.read_text() + "wieght = 3\n")
        line = box.quotas.read_text().count("\n")
        told = f"quotas.toml, line {line}: tenants.search.wieght is no key of a tenant"
        with pytest.raises(errors.TrunklineError, match=told):
            box.sidecar.admin.post("quotas/reload")
        box.sidecar.process.send_signal(signal.SIGHUP)
        box.logged(told)
        assert told in box.trunkline("tenant", "rm", "search", code=1)
        assert sorted(box.tenants()) == ["search", "vision"]
        # An engine that is started now goes by what was in force.
        engine = box.sidecar.await_engine()
        os.kill(engine, signal.SIGKILL)
        while box.sidecar.await_engine() == engine:
            time.sleep(0.02)
        assert box.tenants()["vision"]["connection_limit"] == 1
        with contextlib.closing(box.connect(vision)):
            pass
        with contextlib.suppress(errors.ConnectionLost):
            held.describe("adder", soon())
    box.quotas.write_text(box.quotas.read_text().replace("wieght = 3\n", ""))
    box.trunkline("tenant", "rm", "search")
    assert sorted(box.tenants()) == ["vision"]
    with pytest.raises(errors.Unauthorized):
        box.connect(search)
    assert "vision" in box.trunkline("tenant", "ls")
    assert box.sidecar.stop() == 0
    assert not (box.sidecar.run_dir / "quotas.toml").exists()


def test_a_function_does_not_notice_that_its_token_changes(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    file = box.folder / "token"
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(box.sidecar.socket))
    monkeypatch.setenv("TRUNKLINE_TOKEN_FILE", str(file))
    adder = client.Model("adder", pool := Pool())
    assert adder(X).tolist() == [[2.0, 3.0]]
    older = file.read_text()
    box.trunkline("tenant", "rotate", "vision", "--token-file", str(file))
    assert adder(X).tolist() == [[2.0, 3.0]]
    assert pool.connect_count == 1
    box.trunkline("tenant", "rotate", "vision", "--end")
    assert adder(X).tolist() == [[2.0, 3.0]]
    assert pool.connect_count == 2
    pool.close()
    with pytest.raises(errors.Unauthorized):
        box.connect(older)
    assert len(read_quotas(box.quotas).tenants["vision"].token_hashes) == 1


def test_what_is_not_allowed_is_told_as_what_is_not_there(box: Box) -> None:
    token = box.trunkline("tenant", "add", "other", "--models", "none-*")
    told = []
    with contextlib.closing(box.connect(token)) as connection:
        for name in ("adder", "absent", "none-such"):
            with pytest.raises(errors.UnknownModel) as refused:
                connection.describe(name, soon())
            told.append(str(refused.value.to_dict()).replace(name, "NAME"))
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[tenants.a]\nmodels = []\nwieght = 1\n", "quotas.toml, line 3: tenants.a.wieght is no key of a tenant"),
        (None, "the quota file quotas.toml cannot be read"),
    ],
)
def test_a_mistake_is_told_at_the_start(tmp_path: Path, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / "quotas.toml").write_text(content)
    made = Box(tmp_path)
    flags = ["--run-dir", f"{tmp_path}/run", "--store-dir", f"{tmp_path}/store", "--admin-port", "0"]
    refused = made.trunkline("serve", *flags, code=1)
    assert f"error: config_error: {told}" in refused
    assert "Traceback" not in refused


def test_a_signal_to_look_again_ends_no_sidecar_without_a_quota_file(tmp_path: Path) -> None:
    with sidecar_process(tmp_path, "--memory-budget", "64MiB") as sidecar:
        engine = sidecar.await_engine()
        for _ in range(3):
            sidecar.process.send_signal(signal.SIGHUP)
            assert sidecar.await_engine() == engine
        with pytest.raises(errors.InvalidInput, match="has no quota file"):
            sidecar.admin.post("quotas/reload")
        assert [entry["name"] for entry in sidecar.admin.get("tenants")["tenants"]] == ["anyone"]
        sidecar.admin.close()
