"""Errors of the sidecar's own work: configuration, store, memory, bundles, conversion.

They share the base class, and so the JSON shape, of the errors that cross the wire, but functions never meet them:
they reach publishers and operators through the command line and the admin endpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from trunkline.errors import Detail, TrunklineError

E = TypeVar("E", bound=TrunklineError)


def anew(error: E) -> E:
    """Return an error as another object, which does not hold on to the frames that it came through, nor to what is in them."""
    return type(error)(error.message, **error.details)


class ConfigError(TrunklineError):
    """A setting has a value that cannot be used; the message names source, key and accepted range."""

    code = "config_error"
    http_status = 400


class Forbidden(TrunklineError):
    """Whoever asks is known, and may not do this."""

    code = "forbidden"
    http_status = 403


class TooManyAttempts(TrunklineError):
    """Too many requests came without a token that counts. Those that have one are let in as ever."""

    code = "too_many_attempts"
    retryable = True
    http_status = 429


class StoreError(TrunklineError):
    """The blob store could not do what was asked."""

    code = "store_error"


class BlobMissing(StoreError):
    """A model names weights that were not pushed."""

    code = "blob_missing"
    http_status = 409


class BlobCorrupt(StoreError):
    """Bytes do not match their digest, checksum or declared size."""

    code = "blob_corrupt"
    http_status = 422


class EntriesUnusable(StoreError):
    """Weights kept on disk in the form they are needed in cannot be read; they can be made anew from the store."""

    code = "entries_unusable"

    def __init__(self, message: str, keys: Iterable[str] = (), **details: Detail) -> None:
        super().__init__(message, **details)
        self.keys = tuple(keys)


class StoreFull(StoreError):
    """The disk is full; nothing that was stored before is harmed."""

    code = "store_full"
    http_status = 507


class NoRoom(TrunklineError):
    """Bytes do not fit into the memory that weights are kept in; the numbers tell why."""

    code = "no_room"
    http_status = 507


class BundleError(TrunklineError):
    """A bundle breaks the format: the message names the file and the place in it."""

    code = "bundle_error"
    http_status = 422


class UnknownJob(TrunklineError):
    """No job of this id is known, or not any more."""

    code = "unknown_job"
    http_status = 404


class NotQuarantined(TrunklineError):
    """Nothing is held against requests of this id, or not any more."""

    code = "not_quarantined"
    http_status = 404


class JobLost(TrunklineError):
    """The process that worked on the job ended before the job did."""

    code = "job_lost"
    retryable = True


class OriginRefused(TrunklineError):
    """A model may not be pulled from there: the operator has not listed it, or it leads somewhere else."""

    code = "origin_refused"
    http_status = 403


class OriginFailed(TrunklineError):
    """The origin cannot be reached, fell silent, or broke off; what was received whole is kept."""

    code = "origin_failed"
    retryable = True
    http_status = 502


class NotAtOrigin(TrunklineError):
    """The origin does not have a file that the reference, or what it names, asks for."""

    code = "not_at_origin"
    http_status = 404


class NotTrusted(TrunklineError):
    """No signer that the operator trusts has signed the model."""

    code = "not_trusted"
    http_status = 403


class ExportError(TrunklineError):
    """A model cannot be converted."""

    code = "export_error"
    http_status = 422


class UnsupportedOperator(ExportError):
    """The model uses an operator that bundles do not allow; operator, module and source line are named."""

    code = "unsupported_operator"


class UnsupportedModel(ExportError):
    """The model as a whole cannot be captured: data-dependent control flow, mutated state, unsupported inputs."""

    code = "unsupported_model"


class NumericsMismatch(ExportError):
    """The converted graph computes something else than the original; both figures are in the message."""

    code = "numerics_mismatch"
