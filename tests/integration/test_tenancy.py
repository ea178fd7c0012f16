"""Who may ask for what: tokens, models, limits and changes of them, over a real socket; device and store are fakes."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline import client, errors, model, models, protocol
from trunkline.admin import AdminConnection
from trunkline.connection import Connection
from trunkline.errors import TrunklineError
from trunkline.pool import DEFAULT_CREDENTIAL, read_token

from sidecar.catalog import Catalog
from sidecar.errors import ConfigError
from sidecar.reloading import QuotaFile
from sidecar.tenants import OPEN, Quotas, hash_of
from tests.fakes import ADMIN_TOKEN, FakeSource, Running, running_server
from tests.integration.test_session import offset_of
from tests.waiting import PATIENCE_S, soon

pytestmark = pytest.mark.usefixtures("nothing_leaks")

# The smallest connection: two arenas of 64 KiB, and a copy of the first.
SMALLEST_BYTES = 3 * 65536


def text_of(text: str) -> str:
    """Return the text of a quota file with what TOKEN(x) stands for: the hash of the token x."""
    return re.sub(r"TOKEN\((\w+)\)", lambda match: f'"sha256:{hash_of(match[1].encode())}"', text)


QUOTAS = """
[tenants.vision]
tokens = [TOKEN(v1), TOKEN(v2)]
models = ["age", "ge*"]
connections = 2

[tenants.search]
tokens = [TOKEN(s1)]
models = ["*"]
domain = "base"
arena = 600000
"""


class Tenancy:
    """A server with tenants. ``put`` changes what the quota file says, ``reload`` has it read."""

    def __init__(self, running: Running, file: Path) -> None:
        self.running = running
        self._file = file

    def connect(self, token: str = "", **sizes: Any) -> Connection:
        return Connection(self.running.path, token=token.encode(), deadline=soon(), **sizes)

    def admin(self) -> AdminConnection:
        return AdminConnection(self.running.path, ADMIN_TOKEN)

    def put(self, text: str) -> None:
        self._file.write_text(text_of(text))

    def tenants(self) -> dict[str, dict[str, Any]]:
        with contextlib.closing(self.admin()) as admin:
            return {entry["name"]: entry for entry in admin.command("tenants")["tenants"]}

    def described(self, connection: Connection, name: str) -> str:
        """Return the name of a model, which is there."""
        return str(connection.describe(name, soon())["model"])

    def until(self, name: str, **expected: object) -> None:
        """Wait until a tenant has what is expected: an end of a connection is seen when its turn comes."""
        deadline = soon()
        while {key: self.tenants()[name][key] for key in expected} != expected:
            assert time.monotonic() < deadline, self.tenants()[name]
            time.sleep(0.005)


@pytest.fixture
def tenancy(tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tenancy]:
    file = tmp_path / "quotas.toml"
    file.write_text(text_of(QUOTAS))
    reading = QuotaFile(file, tmp_path / "in-force.toml")
    quotas = reading.read()

    def reload(told: Callable[[Quotas | TrunklineError], None]) -> None:
        # In a thread of its own, as in a sidecar, but one that ends.
        def read() -> None:
            try:
                outcome = reading.read()
            except ConfigError as error:
                told(error)
            else:
                running.server.use_quotas(outcome, lambda: told(outcome))

        threading.Thread(target=read).start()

    with running_server(tmp_path, source, quotas=quotas, reload=reload) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        yield Tenancy(running, file)
        client._pool.close()


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with the function's token: vision's first."""
    path = tmp_path / "token"
    path.write_text("v1\n")
    monkeypatch.setenv("TRUNKLINE_TOKEN_FILE", str(path))
    return path


X = np.zeros((1, 3), np.float32)


def test_a_token_says_whose_a_function_is(tenancy: Tenancy, token: Path) -> None:
    assert (model("age")(X) == offset_of("age")).all()
    assert model("age").signature.model == "age"
    assert tenancy.tenants()["vision"]["connections"] == 1
    assert tenancy.tenants()["search"]["connections"] == 0
    with contextlib.closing(tenancy.connect("v2")):
        assert tenancy.tenants()["vision"]["connections"] == 2
    with contextlib.closing(tenancy.connect("s1")):
        assert tenancy.tenants()["search"] | {"models": ["*"]} == tenancy.tenants()["search"]
        assert tenancy.tenants()["search"]["arena_bytes"] == SMALLEST_BYTES
    client._pool.close()
    tenancy.until("vision", connections=0, arena_bytes=0)


def test_every_wrong_token_is_told_the_same(
    tenancy: Tenancy, tmp_path: Path, source: FakeSource, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trunkline.server.refusals")
    told = set()
    for wrong in ("", "guess", "v", "x" * 64, hash_of(b"v1"), ADMIN_TOKEN.decode() + "x"):
        with pytest.raises(errors.Unauthorized, match="TRUNKLINE_TOKEN_FILE .*`trunkline tenant add`") as refused:
            tenancy.connect(wrong)
        told.add(str(refused.value.to_dict()))
    for quotas in (OPEN, Quotas({})):
        (tmp_path / "other").mkdir(exist_ok=True)
        with running_server(tmp_path / "other", source, quotas=quotas) as running, pytest.raises(errors.Unauthorized) as refused:
            Connection(running.path, token=b"guess", deadline=soon())
        told.add(str(refused.value.to_dict()))
    assert len(told) == 1
    assert "was refused: unauthorized: this sidecar knows no such token" in caplog.text
    assert "guess" not in caplog.text


def refusal(ask: Callable[[], object]) -> dict[str, object]:
    with pytest.raises(errors.UnknownModel) as refused:
        ask()
    return refused.value.to_dict()


@pytest.mark.parametrize(
    "ask",
    [
        lambda connection, name: connection.infer(name, (), soon()),
        lambda connection, name: connection.describe(name, soon()),
        lambda connection, name: connection.infer(f"age+{name}", (), soon()),
        lambda connection, name: connection.describe(f"{name}+zzz", soon()),
    ],
)
def test_what_is_not_allowed_is_told_as_what_is_not_there(tenancy: Tenancy, ask: Callable[[Connection, str], object]) -> None:
    """Text is there and not allowed; none is neither; german would be allowed and is not there."""
    with contextlib.closing(tenancy.connect("v1")) as connection:
        told = [
            str(refusal(lambda name=name: ask(connection, name))).replace(name, "NAME") for name in ("text", "none", "german")
        ]
        assert told[0] == told[1] == told[2]
        assert "there is no model 'NAME' that vision may use; the operator allows it age, ge*" in told[0]
        assert "pair" not in told[0]
        # It serves on.
        assert connection.describe("age", soon())["model"] == "age"


def test_no_session_remembers_more_names_than_it_needs(tenancy: Tenancy) -> None:
    with contextlib.closing(tenancy.connect("s1")) as connection:
        for number in range(70):
            refusal(lambda number=number: connection.describe(f"none-{number}", soon()))  # type: ignore[misc]
        (session,) = tenancy.running.server._sessions.values()
        assert len(session._names) == 6


@pytest.mark.parametrize("name", ["age@base", "age@vision", "@vision", "age@", ""])
def test_no_name_leads_out_of_a_domain(tenancy: Tenancy, name: str) -> None:
    for token in ("v1", "s1"):
        with contextlib.closing(tenancy.connect(token)) as connection:
            refusal(lambda connection=connection: connection.describe(name, soon()))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["age@base", "age@base2", "age@base-2", "@base"])
def test_a_name_that_somebody_made_up_is_told_as_it_was(tenancy: Tenancy, name: str) -> None:
    with contextlib.closing(tenancy.connect("s1")) as connection:
        told = refusal(lambda: connection.describe(name, soon()))
    assert f"there is no model {name!r} that search may use" in str(told["message"])
    assert told["details"] == {"model": name}


def test_errors_name_models_as_functions_do(tenancy: Tenancy, token: Path) -> None:
    with contextlib.closing(tenancy.connect("v1")) as connection, pytest.raises(errors.SignatureMismatch) as refused:
        connection.infer("age", (), soon())
    assert refused.value.message.startswith("age takes x;")
    with contextlib.closing(tenancy.connect("v1")) as connection, pytest.raises(errors.InvalidInput) as again:
        connection.describe("gender+age", soon())
    assert again.value.message.startswith("'gender+age' does not name")


def test_a_model_that_is_named_at_the_start_and_not_allowed_is_passed_over(
    tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[Sequence[str]] = []
    opened = tenancy.running.engine.session_opened
    monkeypatch.setattr(
        tenancy.running.engine, "session_opened", lambda models, tenant: (ahead.append(models), opened(models, tenant))
    )
    sizes = []
    for name in ("text", "none"):
        connection = tenancy.connect("v1", models=("age", name))
        sizes.append((connection.request_bytes, connection.reply_bytes))
        connection.close()
        tenancy.until("vision", connections=0)
    assert sizes[0] == sizes[1]
    assert [models for models in ahead if models] == [["age@vision"], ["age@vision"]]


def test_the_work_of_a_session_is_its_tenants(tenancy: Tenancy, token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    submit = tenancy.running.engine.submit
    monkeypatch.setattr(tenancy.running.engine, "submit", lambda work: (seen.append(work), submit(work)))
    model("age")(X)
    assert [(work.tenant.name, work.model) for work in seen] == [("vision", "age@vision")]


def test_connections_beyond_the_limit_are_refused(tenancy: Tenancy) -> None:
    held = [tenancy.connect("v1"), tenancy.connect("v2")]
    with pytest.raises(errors.QuotaExceeded, match="vision has 2 connections open, its quota is 2; try again") as refused:
        tenancy.connect("v1")
    assert refused.value.details == {"open_count": 2, "limit_count": 2, "retry_after_s": 1.0}
    assert refused.value.retryable
    # Others have their own.
    tenancy.connect("s1").close()
    held.pop().close()
    tenancy.until("vision", connections=1)
    held.append(tenancy.connect("v1"))
    for connection in held:
        connection.close()


def test_arenas_beyond_the_limit_are_refused(tenancy: Tenancy) -> None:
    held = [tenancy.connect("s1") for _ in range(3)]
    with pytest.raises(
        errors.ArenaFull, match="arenas of search take 589824 bytes, .* would add 196608, its quota is 600000"
    ) as full:
        tenancy.connect("s1")
    assert full.value.details == {"held_bytes": 589824, "asked_bytes": 196608, "limit_bytes": 600000}
    for connection in held:
        connection.close()
    tenancy.until("search", arena_bytes=0)
    with pytest.raises(errors.ArenaFull, match="would add 1376256"):
        tenancy.connect("s1", request_bytes=10 * 65536)
    tenancy.connect("s1", request_bytes=131072).close()
    # Those of whoever has no such limit do not count.
    tenancy.connect("v1", request_bytes=1 << 20).close()


def test_a_token_is_changed_without_a_gap(tenancy: Tenancy, token: Path) -> None:
    """Both count for a while; when the older ends, whoever has the newer by then does not notice."""
    age = model("age")
    age(X)
    before = client._pool.connect_count
    tenancy.put(QUOTAS.replace("TOKEN(v1), TOKEN(v2)", "TOKEN(v1), TOKEN(v3)"))
    with contextlib.closing(tenancy.admin()) as admin:
        assert admin.command("quotas_reload") == {"tenant_count": 2}
        age(X)
        assert client._pool.connect_count == before
        token.write_text("v3")
        tenancy.put(QUOTAS.replace("TOKEN(v1), TOKEN(v2)", "TOKEN(v3)"))
        admin.command("quotas_reload")
        assert (age(X) == offset_of("age")).all()
        assert client._pool.connect_count == before + 1
        token.write_text("v1")
        client._pool.close()
        with pytest.raises(errors.Unauthorized):
            age(X)


def test_a_tenant_that_is_gone_is_gone_at_once(tenancy: Tenancy) -> None:
    """Its request is under way, and answered or not; the connection is over, nothing is left of it, and others go on."""
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        # The table is told when the engine has adopted it, which is after this run: far sooner than the request's deadline.
        leave.wait(1)

    tenancy.running.device.on_run = hold
    told: list[TrunklineError] = []

    def ask() -> None:
        with contextlib.closing(tenancy.connect("v1")) as connection:
            placed = protocol.place([("x", "float32", (1, 3))])[0]
            for _ in range(2):
                try:
                    connection.infer("age", placed, soon())
                except TrunklineError as error:
                    told.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert entered.wait(PATIENCE_S)
    tenancy.put(QUOTAS[QUOTAS.index("[tenants.search]") :])
    with contextlib.closing(tenancy.admin()) as admin:
        admin.command("quotas_reload")
        assert list(tenancy.tenants()) == ["search"]
        leave.set()
        asking.join(PATIENCE_S)
        assert {error.code for error in told} == {"connection_lost"}
        with pytest.raises(errors.Unauthorized):
            tenancy.connect("v1")
        with contextlib.closing(tenancy.connect("s1")) as connection:
            assert connection.describe("age", soon())["model"] == "age"


def test_sessions_go_by_new_limits_at_once(tenancy: Tenancy) -> None:
    with contextlib.closing(tenancy.connect("v1")) as connection, contextlib.closing(tenancy.admin()) as admin:
        refusal(lambda: connection.describe("text", soon()))
        tenancy.put(QUOTAS.replace('"ge*"', '"text"').replace("connections = 2", "connections = 1"))
        admin.command("quotas_reload")
        assert tenancy.described(connection, "text") == "text"
        refusal(lambda: connection.describe("gender", soon()))
        with pytest.raises(errors.QuotaExceeded, match="its quota is 1"):
            tenancy.connect("v2")
        tenancy.put(QUOTAS.replace('models = ["age", "ge*"]', 'models = ["age"]\ndomain = "base"'))
        admin.command("quotas_reload")
        assert tenancy.described(connection, "age") == "age"
        assert tenancy.tenants()["vision"]["domain"] == "base"


def test_a_reload_is_answered_when_all_is_deployed_and_holds_before(tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch) -> None:
    deploying, leave = threading.Event(), threading.Event()
    complete = Catalog.complete

    def held(catalog: Catalog, name: str) -> object:
        deploying.set()
        assert leave.wait(PATIENCE_S)
        return complete(catalog, name)

    monkeypatch.setattr(Catalog, "complete", held)
    tenancy.put(QUOTAS.replace('"ge*"', '"text"').replace("connections = 2", "connections = 1"))
    answers: list[object] = []

    def reload() -> None:
        with contextlib.closing(tenancy.admin()) as admin:
            answers.append(admin.command("quotas_reload"))

    asking = threading.Thread(target=reload)
    with contextlib.closing(tenancy.connect("v1")) as connection:
        asking.start()
        assert deploying.wait(PATIENCE_S)
        with pytest.raises(errors.QuotaExceeded, match="its quota is 1"):
            tenancy.connect("v2")
        refusal(lambda: connection.describe("text", soon()))
        assert not answers
        leave.set()
        asking.join(PATIENCE_S)
        assert answers == [{"tenant_count": 2}]
        assert tenancy.described(connection, "text") == "text"


def test_a_mistake_in_the_file_changes_nothing(tenancy: Tenancy) -> None:
    before = tenancy.tenants()
    with contextlib.closing(tenancy.connect("v1")) as connection, contextlib.closing(tenancy.admin()) as admin:
        tenancy._file.write_text(text_of(QUOTAS) + "wieght = 2\n")
        line = text_of(QUOTAS).count("\n") + 1
        with pytest.raises(TrunklineError, match=f"quotas.toml, line {line}: tenants.search.wieght is no key") as refused:
            admin.command("quotas_reload")
        assert refused.value.code == "config_error"
        assert refused.value.details == {"line": line, "key": "wieght"}
        assert connection.describe("age", soon())["model"] == "age"
    tenancy.until("vision", connections=0)
    assert tenancy.tenants() == before


def test_whoever_asks_for_a_reload_and_leaves_is_not_told(tmp_path: Path, source: FakeSource) -> None:
    """Its arenas may be gone when the file has been read."""
    asked: list[Callable[[Quotas | TrunklineError], None]] = []
    entered = threading.Event()

    def reload(told: Callable[[Quotas | TrunklineError], None]) -> None:
        asked.append(told)
        entered.set()

    with running_server(tmp_path, source, reload=reload) as running:
        leaving = Connection(running.path, token=ADMIN_TOKEN, deadline=soon())
        with pytest.raises(errors.DeadlineExceeded):
            leaving.command("quotas_reload", {}, time.monotonic() + 0.2)
        assert entered.wait(PATIENCE_S)
        leaving.close()
        with contextlib.closing(AdminConnection(running.path, ADMIN_TOKEN)) as admin:
            admin.command("status")
            asked.pop()(OPEN)
            assert admin.command("tenants")["tenants"][0]["name"] == "anyone"


def test_without_a_quota_file_there_is_nothing_to_reload(tmp_path: Path, source: FakeSource) -> None:
    with (
        running_server(tmp_path, source) as running,
        contextlib.closing(AdminConnection(running.path, ADMIN_TOKEN)) as admin,
        pytest.raises(errors.InvalidInput, match="has no quota file; start it with --quotas"),
    ):
        admin.command("quotas_reload")


def test_functions_may_neither_look_nor_reload(tenancy: Tenancy) -> None:
    with contextlib.closing(tenancy.connect("v1")) as connection:
        for name in ("tenants", "quotas_reload", "identify"):
            with pytest.raises(errors.Unauthorized, match="administrator"):
                connection.command(name, {}, soon())


def test_the_administrator_is_no_tenant(tenancy: Tenancy) -> None:
    with contextlib.closing(tenancy.admin()) as admin:
        assert admin.command("status")["engine"]["device"] == "fake"
        assert {entry["connections"] for entry in admin.command("tenants")["tenants"]} == {0}


def test_several_models_are_asked_together_in_a_domain(tenancy: Tenancy, token: Path) -> None:
    found = models("age", "gender")(X)
    assert {name: float(values[0, 0]) for name, values in found.items()} == {name: offset_of(name) for name in ("age", "gender")}


def test_openfaas_mounts_the_token_where_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DEFAULT_CREDENTIAL == "/var/openfaas/secrets/trunkline-token"
    monkeypatch.setattr("trunkline.pool.DEFAULT_CREDENTIAL", str(tmp_path / "secret"))
    monkeypatch.delenv("TRUNKLINE_TOKEN_FILE", raising=False)
    assert read_token() == b""
    (tmp_path / "secret").write_text("mounted\n")
    assert read_token() == b"mounted"
    (tmp_path / "named").write_text("named")
    monkeypatch.setenv("TRUNKLINE_TOKEN_FILE", str(tmp_path / "named"))
    assert read_token() == b"named"
    monkeypatch.delenv("TRUNKLINE_TOKEN_FILE")
    (tmp_path / "secret").unlink()
    (tmp_path / "secret").mkdir()
    with pytest.raises(errors.SidecarUnavailable, match="the token in .*secret cannot be read .*TRUNKLINE_TOKEN_FILE"):
        read_token()
