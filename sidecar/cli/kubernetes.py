"""`trunkline webhook`, `device-plugin` and `node-labels`: what runs beside sidecars in a Kubernetes cluster."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sidecar.cli.endpoint import endpoint_of
from sidecar.errors import ConfigError
from sidecar.kubernetes.injection import LEFT_ALONE, MODES, MODES_OF_TENANTS, Injection
from sidecar.kubernetes.names import ACCOUNT, HOST_FOLDER, HOST_TENANTS, SOCKET, VOLUME
from sidecar.logs import log_to_stderr
from sidecar.tenants import NAME

_PLUGINS = "/var/lib/kubelet/device-plugins"
_LOOK_S = 1.0
_SECONDS = click.FloatRange(0.05, 3600)
# A sidecar that is busy answers operators later.
_ANSWER_S = 10.0
# As the API server names objects.
_NODE = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_LEVELS = ("debug", "info", "warning", "error")


def _logged(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the two options of the log, by the names that `serve` has for them."""
    levels, forms = click.Choice(_LEVELS), click.Choice(("human", "json"))
    command = click.option("--log-format", type=forms, default="human", envvar="TRUNKLINE_LOG_FORMAT", show_default=True)(command)
    return click.option("--log-level", type=levels, default="info", envvar="TRUNKLINE_LOG_LEVEL", show_default=True)(command)


def _tenants(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    """Return tenants by namespace. Both are named by the same rule."""
    found: dict[str, str] = {}
    for text in value:
        namespace, _, tenant = text.partition("=")
        if not NAME.fullmatch(namespace) or not NAME.fullmatch(tenant):
            raise click.BadParameter(f"{text[:80]!r} must be NAMESPACE=TENANT")
        if found.setdefault(namespace, tenant) != tenant:
            raise click.BadParameter(f"{namespace} is said to be {found[namespace]}'s and {tenant}'s")
    return found


@click.command()
@click.option("--tls-cert", type=click.Path(path_type=Path), required=True, help="PEM file; read again when it is replaced.")
@click.option("--tls-key", type=click.Path(path_type=Path), required=True, help="PEM file with its key.")
@click.option("--host", default="", help="Address to listen at; every one unless said.")
@click.option("--port", type=click.IntRange(0, 65535), default=8443, show_default=True)
@click.option("--mode", type=click.Choice(MODES), default="none", show_default=True, help="How functions get at the socket.")
@click.option("--url", default="", help="Given to functions as TRUNKLINE_URL, for where there is no socket.")
@click.option("--host-path", default=HOST_FOLDER, show_default=True, help="With hostPath: the folder of the socket on nodes.")
@click.option("--claim", default=VOLUME, show_default=True, help="With pvc: the claim, in each namespace of functions.")
@click.option(
    "--tenant",
    "tenants",
    multiple=True,
    metavar="NAMESPACE=TENANT",
    callback=_tenants,
    help="With hostPath or pvc: whose socket, other than that of all, pods of a namespace get; may be repeated.",
)
@click.option("--tenants-path", default=HOST_TENANTS, show_default=True, help="With hostPath: the folder of theirs on nodes.")
@click.option("--leave-alone", multiple=True, metavar="CONTAINER", help="Beside proxies that are known; may be repeated.")
@click.option("--linger", "linger_s", type=click.FloatRange(0, 600), default=5.0, help="Seconds after SIGTERM.")
@_logged
def webhook(
    tls_cert: Path,
    tls_key: Path,
    host: str,
    port: int,
    mode: str,
    url: str,
    host_path: str,
    claim: str,
    tenants: dict[str, str],
    tenants_path: str,
    leave_alone: tuple[str, ...],
    linger_s: float,
    log_level: str,
    log_format: str,
) -> None:
    """Give labelled pods the socket of their node."""
    from sidecar.kubernetes.webhook import WebhookServer, listen

    if mode == "none" and not url:
        raise click.UsageError("with --mode none functions need --url, such as http://trunkline.trunkline.svc:9470")
    if tenants and mode not in MODES_OF_TENANTS:
        raise click.UsageError(
            f"--tenant needs --mode {' or '.join(MODES_OF_TENANTS)}: with {mode} all pods get one and the same"
        )
    log_to_stderr(log_level, log_format)
    injection = Injection(mode, url, host_path, claim, (*LEFT_ALONE, *leave_alone), tenants, tenants_path)
    WebhookServer(injection, listen(host, port), tls_cert, tls_key, linger_s=linger_s).run()


@click.command("device-plugin")
@click.option(
    "--sockets", type=click.IntRange(1, 10_000), default=256, show_default=True, help="Containers of the node that may have it."
)
@click.option("--socket", default=SOCKET, show_default=True, help="The sidecar's, as this process sees it.")
@click.option("--host-path", default=HOST_FOLDER, show_default=True, help="The folder of the socket on the node.")
@click.option("--url", default="", help="Given to functions as TRUNKLINE_URL, for while there is no socket.")
@click.option("--kubelet-dir", type=click.Path(path_type=Path), default=_PLUGINS, show_default=True, help="The kubelet's folder.")
@_logged
def device_plugin(
    sockets: int, socket: str, host_path: str, url: str, kubelet_dir: Path, log_level: str, log_format: str
) -> None:
    """Have the kubelet give functions the socket."""
    try:
        from sidecar.kubernetes.deviceplugin import DevicePlugin, Sockets
    except ImportError as error:
        raise ConfigError(
            f"the device plugin needs the extra `kubernetes` ({error}); pip install 'trunkline[kubernetes]'"
        ) from error

    log_to_stderr(log_level, log_format)
    DevicePlugin(Sockets(sockets, host_path, url), kubelet_dir, socket).run(_stopped(), _LOOK_S)


@click.command("node-labels")
@click.option("--node", envvar="NODE_NAME", required=True, show_envvar=True, help="This node, as the API server knows it.")
@click.option("--every", "look_s", type=_SECONDS, default=5.0, show_default=True, help="Seconds between looks at the sidecar.")
@click.option(
    "--least-pause", "least_pause_s", type=_SECONDS, default=30.0, show_default=True, help="Seconds between two changes."
)
@click.option("--most", type=click.IntRange(1, 1000), default=100, show_default=True, help="Models; those in memory come first.")
@click.option("--api-server", metavar="URL", help="Instead of the one that the kubelet tells pods of.")
@click.option(
    "--account", type=click.Path(path_type=Path), default=ACCOUNT, show_default=True, help="Folder with token and ca.crt."
)
@_logged
@click.pass_context
def node_labels(
    ctx: click.Context,
    node: str,
    look_s: float,
    least_pause_s: float,
    most: int,
    api_server: str | None,
    account: Path,
    log_level: str,
    log_format: str,
) -> None:
    """Tell the scheduler which models this node has."""
    import time

    from sidecar.kubernetes.apiserver import ApiServer
    from sidecar.kubernetes.nodelabels import NodeLabels

    log_to_stderr(log_level, log_format)
    if not _NODE.fullmatch(node):
        raise click.BadParameter(f"{node[:80]!r} is no name of a node", param_hint="--node")
    api = ApiServer(api_server, account) if api_server else ApiServer.of_this_cluster(account=account)
    client = endpoint_of(ctx).client(timeout_s=_ANSWER_S)
    ctx.call_on_close(client.close)
    told = NodeLabels(
        lambda: client.get("models")["models"],
        lambda labels: api.label_node(node, labels),
        time.monotonic,
        look_s=look_s,
        least_pause_s=least_pause_s,
        most=most,
    )
    told.run(_stopped())


def _stopped() -> threading.Event:
    """Return what is set by SIGTERM or SIGINT."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopped.set())
    return stopped
