"""`trunkline serve`, `up` and `pack`: what runs a sidecar, and what makes bundles for it."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import click

from sidecar.cli.bars import steps
from sidecar.cli.printing import as_json, console, print_json
from sidecar.config import load_settings
from sidecar.logs import log_to_stderr


def _given(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...] | None:
    """Tell a list that was not given from one that is empty."""
    return value or None


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with settings.")
@click.option("--run-dir", help="Where the sockets are made.")
@click.option("--store-dir", help="Where models are stored.")
@click.option("--quotas", "quota_file", help="TOML file with tenants and their limits; without one nobody needs a token.")
@click.option("--device", help="auto, cpu, cpu:N-M or cuda:N; several with commas.")
@click.option("--threads", help="CPU threads one operator may use.")
@click.option("--memory-budget", "memory_budget_bytes", help="Memory for weights, e.g. 2GiB.")
@click.option("--host-budget", "host_budget_bytes", help="Memory of the host for weights that are not on the GPU, e.g. 8GiB.")
@click.option("--activation-budget", "activation_budget_bytes", help="Memory for what calls compute on the way, e.g. 500MB.")
@click.option("--block-files-limit", "block_files_limit_bytes", help="Disk for weights as they are needed in memory; 0: none.")
@click.option("--eviction-policy", help="lru, gdsf or adaptive: which weights leave first when there is no room.")
@click.option("--admin-host", help="Address of the admin endpoint; beyond loopback it needs --admin-tokens.")
@click.option("--admin-port", help="Its port; 0: only the Unix socket.")
@click.option("--admin-tokens", help="TOML file with tokens and roles; with one, every request over TCP needs a token.")
@click.option("--admin-tls-certificate", help="PEM file: TCP is TLS.")
@click.option("--admin-tls-key", help="PEM file with its key.")
@click.option("--admin-workers", help="Processes of the admin endpoint.")
@click.option("--audit-file", help="Where changes over the admin endpoint are recorded, beside the log.")
@click.option("--blob-limit", "blob_limit_bytes", help="The largest weight that may be pushed.")
@click.option(
    "--pull-origin", "pull_origins", multiple=True, callback=_given, help="Where models may be pulled from; may be repeated."
)
@click.option("--pull-network", "pull_networks", multiple=True, callback=_given, help="A private network that origins may be in.")
@click.option("--pull-signers", help="Public keys, one of which must have signed what is pulled.")
@click.option("--pull-list", help="File with models to bring in by itself, a reference in each line.")
@click.option("--pull-timeout", "pull_timeout_s", help="Seconds that one pull may take.")
@click.option("--queue-limit", help="Requests that may wait.")
@click.option("--batch-limit", help="Rows of different requests that are run as one batch; 1: none are.")
@click.option("--batch-window", "batch_window_s", help="Seconds that a request waits for others on an idle device.")
@click.option("--compute-once", help="on or off: whether requests with equal inputs are computed as one.")
@click.option("--packing", help="on or off: whether weights are packed for the processor where that is faster.")
@click.option("--stacking", help="on or off: whether heads of one structure are run as one where that pays.")
@click.option("--lanes", help="auto or a number: how many stages of different requests run at the same time.")
@click.option("--arena-limit", "arena_limit_bytes", help="Shared memory of one connection and direction.")
@click.option("--arena-total", "arena_total_bytes", help="Shared memory of all connections.")
@click.option("--connection-limit", help="Connections that may be open.")
@click.option("--drain-timeout", "drain_timeout_s", help="Seconds to finish accepted requests on SIGTERM.")
@click.option("--watchdog", "watchdog_s", help="Seconds that one stage may take, if it was not seen to need longer; 0: any.")
@click.option("--log-level", help="debug, info, warning or error.")
@click.option("--log-format", help="human, or json: one object a line.")
@click.option("--traces", help="auto, on or off: spans of requests, sent as OTEL_EXPORTER_OTLP_* say.")
@click.option("--take-over", is_flag=True, help="Take the place of a sidecar that runs there, once this one is ready.")
@click.option("--stay", is_flag=True, help="When another has taken over, wait to be told to end: for what would start it again.")
def serve(config: Path | None, take_over: bool, stay: bool, **flags: str | tuple[str, ...] | None) -> None:
    """Run the sidecar until SIGTERM, then drain."""
    from sidecar.wiring import serve as run

    path = config or (Path(found) if (found := os.environ.get("TRUNKLINE_CONFIG")) else None)
    settings = load_settings(flags, os.environ, path)
    log_to_stderr(settings.log_level, settings.log_format)
    sys.exit(run(settings, take_over=take_over, stay=stay))


@click.command()
@click.argument("stack", type=click.Path(path_type=Path), default=Path("stack.yml"))
@click.option("--function", "functions", multiple=True, help="Only this function; may be repeated.")
@click.option("--gateway-port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port of the local gateway.")
def up(stack: Path, functions: tuple[str, ...], gateway_port: int) -> None:
    """Run a stack.yml without containers. Starts sidecar, functions and a small gateway on this machine."""
    from sidecar.local import up as run

    sys.exit(run(stack, functions=list(functions) or None, gateway_port=gateway_port))


@click.command()
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the bundle.")
@click.option("--name", help="Name of the model; default: that of the output folder.")
@click.option("--version", default="1", show_default=True, help="Its version.")
@click.option("--batch/--no-batch", default=None, help="Whether axis 0 of every input may vary.")
@click.option("--max-batch", type=click.IntRange(min=1), help="The largest batch; default 64.")
@click.option("--dynamic", multiple=True, metavar="INPUT:AXIS=SYMBOL:MIN..MAX", help="A further axis that may vary.")
@click.option("--bounds", multiple=True, metavar="INPUT=LOW..HIGH", help="Bounds of an integer input.")
@as_json
def pack(
    source: str,
    output: Path,
    name: str | None,
    version: str,
    batch: bool | None,
    max_batch: int | None,
    dynamic: tuple[str, ...],
    bounds: tuple[str, ...],
    as_json: bool,
) -> None:
    """Convert a model to a bundle.

    SOURCE is module:callable, path/to/file.py:callable, a .pt2 file, or a local transformers directory. The callable
    returns the module and example inputs. The bundle is accepted only if it computes what the module computes.
    """
    from sidecar.packing import pack as convert

    with steps("loading") as advance:
        summary = convert(
            source,
            output,
            name=name or output.name,
            version=version,
            batch=batch,
            max_batch=max_batch,
            dynamic=dynamic,
            bounds=bounds,
            progress=advance,
        )
    if as_json:
        print_json(asdict(summary))
        return
    for line in summary.lines():
        console.print(line, markup=False)
