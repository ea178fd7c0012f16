"""Rows of the matrix and of the threat table that are about what the source says."""

from __future__ import annotations

import ast
import hmac
from collections.abc import Iterator
from pathlib import Path

import pytest
from trunkline.errors import Unauthorized

from sidecar.tenants import Quotas, Tenant, hash_of
from tests.fakes import ADMIN_TOKEN, FakeSource, running_server
from tests.fault.matrix import Row

ROOT = Path(__file__).parents[2]
WIRE = ROOT / "template" / "python3-trunkline" / "trunkline"

# Who needs to know what time it is: stamps for people, and ages of files, which the system stamps. Of these an engine
# runs the log and the exporter of spans, and none decides about a request, a lease, a token or a pause.
MAY_KNOW_THE_TIME = {
    *("sidecar/cli/jobs.py", "sidecar/jobs.py", "sidecar/partials.py", "sidecar/store.py", "sidecar/local/environment.py"),
    *("sidecar/http/oip.py", "sidecar/http/watch.py", "sidecar/local/gateway.py", "sidecar/otel.py"),
    "template/python3-trunkline/trunkline/logs.py",
}


def sources(*folders: Path) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def uses(tree: ast.AST, wanted: str, owner: str = "") -> Iterator[tuple[str, str]]:
    """Yield the function and the expression of each use of an attribute."""
    for node in ast.iter_child_nodes(tree):
        inner = node.name if isinstance(node, ast.FunctionDef) else owner
        if isinstance(node, ast.Attribute) and node.attr == wanted:
            yield owner, ast.unparse(node)
        yield from uses(node, wanted, inner)


@pytest.mark.row("F29")
def test_only_who_must_knows_what_time_it_is(row: Row) -> None:
    known = set()
    for name, tree in sources(ROOT / "sidecar", WIRE):
        row.attempts += 1
        used = {expression for each in ("time", "time_ns") for _, expression in uses(tree, each)}
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert "time" not in imported, f"{name}: a clock is called by its module's name, so that it shows which one it is"
        if used & {"time.time", "time.time_ns"} or "datetime" in imported:
            known.add(name)
    assert known == MAY_KNOW_THE_TIME


@pytest.mark.row("T2")
def test_a_request_arena_is_read_in_one_place_each(row: Row) -> None:
    """Its bytes leave it by one copy: of tensors in one function, of an administrator's arguments in another."""
    reads = {}
    for name, tree in sources(ROOT / "sidecar"):
        row.attempts += 1
        for function, expression in (*uses(tree, "read"), *uses(tree, "memory")):
            if expression.startswith(("self._request.", "request.")) and name == "sidecar/session.py":
                reads[function] = expression
        # Nobody else knows arenas.
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert "ServerArena" not in names or name in ("sidecar/server.py", "sidecar/session.py"), name
    assert reads == {"_copy_inputs": "self._request.read", "_command": "self._request.read"}
    tree = ast.parse((WIRE / "arena.py").read_text())
    server_arena = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ServerArena")
    assert {function for function, _ in uses(server_arena, "_view")} == {"__init__", "read", "write", "memory", "close"}


@pytest.mark.row("T22")
def test_every_token_is_compared_by_its_hash_in_constant_time(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holders = {b"one": "a", b"another": "b", b"a third": "c"}
    tenants = {
        name: Tenant(name=name, domain=name, token_hashes=(hash_of(token),), models=("*",)) for token, name in holders.items()
    }
    known = {hash_of(each) for each in (*holders, ADMIN_TOKEN)}
    compared: list[tuple[str, str]] = []
    compare = hmac.compare_digest

    def seen(one: str, other: str) -> bool:
        compared.append((one, other))
        return compare(one, other)

    with running_server(tmp_path, FakeSource(), quotas=Quotas(tenants)) as running:
        monkeypatch.setattr(hmac, "compare_digest", seen)
        for token in (*holders, ADMIN_TOKEN, b"wrong", b"", b"one more"):
            row.attempts += 1
            compared.clear()
            try:
                tenant, is_admin = running.server.identify(hash_of(token))
            except Unauthorized:
                row.wrong += token in (*holders, ADMIN_TOKEN)
            else:
                row.wrong += is_admin != (token == ADMIN_TOKEN)
                row.wrong += not is_admin and tenant.name != holders.get(token)
            # All there are, whichever it is, and never the token itself.
            assert {each for pair in compared for each in pair} == known | {hash_of(token)}
            assert len(compared) == len(known)
