"""Names in arguments: checked, since they become part of a path that is asked for, and completed from what the sidecar has."""

from __future__ import annotations

from typing import Any, Final

import click
from trunkline.errors import TrunklineError

from sidecar.bundle import MODEL_NAME
from sidecar.cli.endpoint import endpoint_of
from sidecar.labels import parted
from sidecar.tenants import DEPLOYED_NAME, unqualified
from sidecar.tenants import NAME as TENANT_NAME

# Whoever presses a key does not wait longer for a sidecar that does not answer.
_COMPLETION_S: Final = 1.0


def model_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Check the name of a model."""
    if not MODEL_NAME.fullmatch(value):
        raise click.BadParameter(f"{value[:80]!r} is no name of a model: at most 128 of a-z, 0-9, '.', '_' and '-'")
    return value


def deployed_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Check the name of a model as it is deployed, which has its domain where there are domains."""
    if not DEPLOYED_NAME.fullmatch(value):
        raise click.BadParameter(
            f"{value[:80]!r} is no name of a deployed model: NAME or NAME:VERSION, and @DOMAIN after it where there are domains"
        )
    return value


def tenant_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Check the name of a tenant."""
    if not TENANT_NAME.fullmatch(value):
        raise click.BadParameter(f"{value[:80]!r} is no name of a tenant: at most 63 of a-z, 0-9 and '-'")
    return value


def job_id(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Check the id of a job."""
    if not value.isalnum() or not value.isascii():
        raise click.BadParameter(f"{value[:80]!r} is no id of a job; `trunkline job ls` lists them")
    return value


def kind_id(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Check the id of what is in quarantine."""
    if value is not None and not (value.isalnum() and value.isascii()):
        raise click.BadParameter(f"{value[:80]!r} is no id; `trunkline quarantine ls` lists them")
    return value


def models_beginning(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    """Return deployed models that may be meant."""
    return [name for name in _names(ctx, "models") if name.startswith(begun)]


def published_beginning(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    """Return models that may be meant, without their versions and the domains they are deployed in."""
    return sorted({parted(unqualified(name)[0])[0] for name in _names(ctx, "models") if name.startswith(begun)})


def tenants_beginning(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    """Return tenants that may be meant."""
    return [name for name in _names(ctx, "tenants") if name.startswith(begun)]


def jobs_beginning(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    """Return jobs that may be meant."""
    return [job_id for job_id in _names(ctx, "jobs", "id") if job_id.startswith(begun)]


def kinds_beginning(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    """Return what is in quarantine and may be meant."""
    return [kind_id for kind_id in _names(ctx, "quarantine", "id") if kind_id.startswith(begun)]


def _names(ctx: click.Context, kind: str, key: str = "name") -> list[str]:
    """Return what the sidecar has of a kind; nothing, and no word of it, where there is none to ask."""
    try:
        with endpoint_of(ctx).client(timeout_s=_COMPLETION_S) as client:
            found: Any = client.get(kind)[kind]
            return [str(entry[key]) for entry in found]
    except (TrunklineError, KeyError, TypeError):
        return []


deployed_argument = click.argument("name", callback=deployed_name, shell_complete=models_beginning)
model_argument = click.argument("name", callback=model_name, shell_complete=published_beginning)
tenant_argument = click.argument("name", callback=tenant_name, shell_complete=tenants_beginning)
job_argument = click.argument("job_id", metavar="ID", callback=job_id, shell_complete=jobs_beginning)
kind_argument = click.argument("kind_id", metavar="[ID]", required=False, callback=kind_id, shell_complete=kinds_beginning)
