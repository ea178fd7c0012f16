"""The layers of docs/architecture.md, read from the imports themselves."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
WIRE = ROOT / "template" / "python3-trunkline" / "trunkline"
WIRE_MAY_IMPORT = {"msgpack", "numpy", "posix_ipc", "trunkline"}
# Imported when it is needed, and by nobody else.
OVER_HTTP = "httpconnection"
# What is around a handler; a client alone does without.
FRAME = "frame"

LAYERS = {
    1: {
        "errors",
        "extents",
        "compaction",
        "glued",
        "ledger",
        "libc",
        "segment",
        "takeover",
        "systemd",
        "config",
        "bundle",
        "operators",
        "ir",
        "merkle",
        "together",
        "stages",
        "stretches",
        "costs",
        "lanecount",
        "timeline",
        "policies",
        "traces",
        "outcomes",
        "modelrows",
        "moves",
        "rates",
        "sankey",
        "units",
        "view",
        "blocks",
        "graphfile",
        "lowering",
        "strictjson",
        "openinference",
        "failures",
        "ratelimit",
        "http.access",
        "http.engineclient",
        "http.tokenfile",
        "http.audit",
        "admintokens",
        "processes",
        "disk",
        "jsonfile",
        "jobs",
        "origins",
        "signers",
        "fetching",
        "partials",
        "rundirectory",
        "keeping",
        "labels",
        "releases",
        "peers",
        "tenants",
        "quotas",
        "quotaedit",
        "shares",
        "slices",
        "forecast",
        "inflight",
        "reserves",
        "deaths",
        "journal",
        "quarantine",
        "watchdog",
        "pins",
        "constraints",
        "placement",
        "places",
        "gathered",
        "tenantsockets",
        "logs",
        "loglevels",
        "tracing",
        "otel",
        "machine",
        "wall",
        "probe",
        "unixhttp",
        "kubernetes",
        "kubernetes.names",
        "kubernetes.affinity",
        "kubernetes.jsonpatch",
        "kubernetes.injection",
        "kubernetes.review",
        "kubernetes.certificates",
        "kubernetes.kubelet",
        "kubernetes.kubelet.deviceplugin_pb2",
        "kubernetes.kubelet.deviceplugin_pb2_grpc",
        "kubernetes.apiserver",
    },
    2: {"store", "hosttier", "devicetier", "blockfiles", "graph", "residency", "scheduler", "verdicts", "wavefront"},
    3: {
        "calls",
        "devices",
        "packed",
        "blocked",
        "onnxgraph",
        "bindings",
        "sessions",
        "flat",
        "span",
        "stacked",
        "programs",
        "prepare",
        "dryrun",
        "indices",
        "quotients",
        "vetting",
        "export",
        "sources",
        "translate",
        "capture",
        "numerics",
        "fxgraph",
        "rewrites",
        "recurrent",
    },
    4: {
        "activations",
        "admission",
        "engine",
        "engines",
        "ownloads",
        "placing",
        "readahead",
        "refusals",
        "requestcosts",
        "relays",
        "catalog",
        "claims",
        "commands",
        "picture",
        "deployments",
        "division",
        "inturn",
        "lanes",
        "loads",
        "memory",
        "memories",
        "tiermemory",
        "devicememory",
        "hostcache",
        "holdings",
        "swapmemory",
        "mover",
        "ports",
        "rivals",
        "runs",
        "shortage",
        "streams",
        "strides",
        "trials",
        "forms",
        "independence",
        "reloading",
        "routing",
        "naming",
        "versions",
        "prepull",
        "turns",
        "underway",
        "upkeep",
    },
    5: {
        "server",
        "session",
        "supervisor",
        "admin_client",
        "pulling",
        "http",
        "http.admin",
        "http.callers",
        "http.correlation",
        "http.events",
        "http.jobs",
        "http.metrics",
        "http.oip",
        "http.openapi",
        "http.page",
        "http.server",
        "http.versions",
        "http.watch",
        "http.worker",
        "kubernetes.webhook",
        "kubernetes.deviceplugin",
        "kubernetes.nodelabels",
    },
    6: {"__main__", "wiring", "packing", "publishing", "drawing", "local", "cli"},
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}
MAY_IMPORT_TORCH = LAYERS[3]
# The one builds what it runs in a process of its own, the other serves what is told there.
BUILDERS = {
    ("server", "session"),
    ("http.server", "http.admin"),
    ("http.server", "http.oip"),
    ("http.admin", "http.openapi"),
    ("http.server", "http.callers"),
    ("http.server", "http.worker"),
    ("kubernetes.webhook", "http.worker"),
    ("http.server", "http.correlation"),
    ("http.admin", "http.metrics"),
    ("http.admin", "http.jobs"),
    ("http.jobs", "pulling"),
    ("http.server", "pulling"),
    ("http.admin", "http.page"),
    ("http.admin", "http.events"),
    ("http.admin", "http.watch"),
    ("http.page", "http.events"),
    ("http.events", "http.watch"),
    ("http.server", "http.events"),
    ("http.admin", "http.versions"),
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def sidecar_modules() -> list[Path]:
    return sorted((ROOT / "sidecar").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "sidecar").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", sorted(WIRE.glob("*.py")), ids=lambda path: path.stem)
def test_the_client_imports_little(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path)}
    more = {OVER_HTTP: {"requests", "urllib3"}, FRAME: {"flask", "werkzeug"}}.get(path.stem, set())
    assert tops - set(sys.stdlib_module_names) <= WIRE_MAY_IMPORT | more


def test_functions_with_a_socket_are_spared_what_http_needs() -> None:
    code = (
        "import sys, trunkline, trunkline.testing\n"
        "assert not {'requests', 'urllib3', 'http.client', 'ssl'} & sys.modules.keys(), sys.modules.keys()"
    )
    environment = {"PYTHONPATH": str(ROOT / "template" / "python3-trunkline"), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=PATIENCE_S)


@pytest.mark.parametrize("path", sidecar_modules(), ids=module_name)
def test_modules_import_lower_layers_only(path: Path) -> None:
    name = module_name(path)
    if not name or name.startswith(("local.", "cli.")):
        return
    assert name in LAYER_OF, f"sidecar/{name}: give it a layer here and in docs/architecture.md"
    for imported in imports(path):
        target = imported.removeprefix("sidecar.")
        while target and target not in LAYER_OF:
            target = target.rpartition(".")[0]
        if not imported.startswith("sidecar.") or not target or target == name:
            continue
        same_floor = LAYER_OF[target] == LAYER_OF[name] and LAYER_OF[name] in (2, 5) and (name, target) not in BUILDERS
        assert LAYER_OF[target] <= LAYER_OF[name], f"{name} imports {target}, which is above it"
        assert not same_floor, f"{name} imports {target}, which is beside it"


@pytest.mark.parametrize("path", sidecar_modules(), ids=module_name)
def test_torch_stays_on_its_floor(path: Path) -> None:
    if module_name(path) not in MAY_IMPORT_TORCH:
        assert not {name for name in imports(path) if name.split(".")[0] == "torch"}


def test_the_command_line_and_the_template_do_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import sidecar.__main__, sidecar.http.admin, sidecar.local, sidecar.store, trunkline, trunkline.testing\n"
    )
    path = f"{ROOT}:{ROOT / 'template' / 'python3-trunkline'}"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path, "PATH": ""}, timeout=PATIENCE_S)


@pytest.mark.parametrize("path", sidecar_modules(), ids=module_name)
def test_the_sidecar_never_unpickles(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "marshal", "dill", "shelve"}
    source = path.read_text()
    for call in ("torch.load(", "jit.load(", "yaml.load(", "shell=True", "exec("):
        assert not re.search(rf"(?<![\w.]){re.escape(call)}", source), f"{call} in {path.name}"
    if module_name(path) != "sources":
        assert "export.load" not in source.replace("torch.export.load``", ""), "only the publisher's converter may"
