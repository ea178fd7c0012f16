"""Names in arguments. They become part of a path that is asked for, so they are checked here, too."""

from __future__ import annotations

import click

from sidecar.bundle import MODEL_NAME
from sidecar.tenants import DEPLOYED_NAME
from sidecar.tenants import NAME as TENANT_NAME


def model_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not MODEL_NAME.fullmatch(value):
        raise click.BadParameter(f"{value[:80]!r} is no name of a model: at most 128 of a-z, 0-9, '.', '_' and '-'")
    return value


def deployed_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not DEPLOYED_NAME.fullmatch(value):
        raise click.BadParameter(f"{value[:80]!r} is no name of a deployed model: NAME, or NAME@DOMAIN where there are domains")
    return value


def tenant_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not TENANT_NAME.fullmatch(value):
        raise click.BadParameter(f"{value[:80]!r} is no name of a tenant: at most 63 of a-z, 0-9 and '-'")
    return value
