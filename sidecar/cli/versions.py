"""The command line's part for versions of models: `trunkline model versions`, `release` and `rm-version`."""

from __future__ import annotations

import re
from typing import Any

import click

from sidecar.cli.endpoint import client_of
from sidecar.cli.names import model_argument
from sidecar.cli.printing import as_json, console, print_json, print_rows, size
from sidecar.labels import LABEL, LABEL_RULE

_WEIGHTED = re.compile(rf"(?P<label>{LABEL.pattern})=(?P<weight>[0-9]{{1,9}})")


def _label(ctx: click.Context, param: click.Parameter, value: str) -> str:
    # Checked here, too: it becomes part of a path that is asked for.
    if not LABEL.fullmatch(value):
        raise click.BadParameter(f"{value[:80]!r} is no version: one has {LABEL_RULE}")
    return value


def _asked(versions: tuple[str, ...]) -> dict[str, object]:
    """Return the release that ``V``, or ``V1=90 V2=10``, asks for."""
    if len(versions) == 1 and "=" not in versions[0]:
        return {"default": versions[0]}
    split: dict[str, int] = {}
    for each in versions:
        found = _WEIGHTED.fullmatch(each)
        if found is None or found["label"] in split:
            raise click.BadParameter(f"{each[:80]!r}: give one version, or several, each once, as VERSION=WEIGHT")
        split[found["label"]] = int(found["weight"])
    return {"split": split}


def said(release: dict[str, Any] | None) -> str:
    """Return a release as people read it."""
    if release is None:
        return "nothing answers for the name alone"
    if "default" in release:
        return f"version {release['default']} answers"
    total = sum(release["split"].values())
    parts = [f"{label} {100 * weight / total:.4g} %" for label, weight in release["split"].items()]
    return f"answered by {', '.join(parts)}" + (", by call id" if release["sticky"] else "")


@click.command("versions")
@model_argument
@as_json
@click.pass_context
def versions(ctx: click.Context, name: str, as_json: bool) -> None:
    """List the versions of a model, and which answer for it."""
    found = client_of(ctx).get(f"models/{name}/versions")
    if as_json:
        print_json(found)
        return
    console.print(f"{name}: {said(found['release'])}", markup=False)
    rows = []
    for entry in found["versions"]:
        front = (entry["version"] or "?", str(entry["weight"] or "-"))
        for deployed in entry["deployed"] or [{"name": entry["name"], "state": "not deployed"}]:
            costs = (size(deployed["unique_bytes"]), size(deployed["shared_bytes"])) if "requests" in deployed else ("", "")
            rows.append((*front, deployed["name"], deployed["state"], *costs, str(deployed.get("requests", ""))))
            front = ("", "")
    print_rows(("version", "weight", "deployed as", "state", "own", "shared", "requests"), rows)


@click.command("release")
@model_argument
@click.argument("versions", nargs=-1, required=True, metavar="VERSION | VERSION=WEIGHT...")
@click.option("--sticky", is_flag=True, help="Of a split: have calls of one id answered by one version.")
@click.option("--load/--no-load", default=True, help="Bring what is to answer into memory first.")
@as_json
@click.pass_context
def release(ctx: click.Context, name: str, versions: tuple[str, ...], sticky: bool, load: bool, as_json: bool) -> None:
    """Have a version answer for a name, or several by weight.

    trunkline model release embed 2; trunkline model release embed 1=90 2=10
    """
    asked = _asked(versions)
    if sticky and "split" not in asked:
        raise click.UsageError("--sticky is for several versions")
    body = asked | ({"sticky": True} if sticky else {}) | ({} if load else {"load": False})
    found = client_of(ctx).put(f"models/{name}/release", body)
    if as_json:
        print_json(found)
    else:
        console.print(f"{name}: {said(found['release'])}", markup=False)


@click.command("rm-version")
@model_argument
@click.argument("version", callback=_label)
@as_json
@click.pass_context
def remove_version(ctx: click.Context, name: str, version: str, as_json: bool) -> None:
    """Remove a version that does not answer for the name."""
    found = client_of(ctx).delete(f"models/{name}/versions/{version}")
    if as_json:
        print_json(found)
    else:
        console.print(f"{name}: version {version} removed", markup=False)
