"""Every error that can reach a function or cross the wire.

One class per situation, each with a stable ``code``, the HTTP status that an endpoint answers with, and whether
repeating the same call may help. ``details`` holds plain numbers and strings, so that a program can act on
what a person reads in the message. This module imports nothing but the standard library.
"""

from __future__ import annotations

from typing import ClassVar

Detail = int | float | str | bool


class TrunklineError(Exception):
    """Base of all errors.

    ``code`` is stable across releases; ``message`` is for people and carries the numbers; ``details`` repeats them
    for programs. Only plain values are allowed in ``details``.
    """

    code: ClassVar[str] = "trunkline_error"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, **details: Detail) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Detail] = details

    def to_dict(self) -> dict[str, object]:
        """Return the one JSON shape in which errors are shown: code, message, retryable, details."""
        return {
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
            "details": dict(self.details),
        }


class TransportError(TrunklineError):
    """The way to the sidecar is missing or broke."""

    code = "transport_error"
    http_status = 503


class SidecarUnavailable(TransportError):
    """No sidecar answers at any of the known addresses."""

    code = "sidecar_unavailable"
    retryable = True


class ConnectionLost(TransportError):
    """The connection ended while a reply was outstanding. Inference is pure, so the call may be repeated."""

    code = "connection_lost"
    retryable = True


class DeadlineExceeded(TransportError):
    """The caller's deadline passed before the answer was there."""

    code = "deadline_exceeded"
    http_status = 504


class ProtocolError(TrunklineError):
    """The other side does not speak the protocol."""

    code = "protocol_error"
    http_status = 502


class VersionMismatch(ProtocolError):
    """Function and sidecar share no protocol version."""

    code = "version_mismatch"


class FrameTooLarge(ProtocolError):
    """A header does not fit into one message."""

    code = "frame_too_large"
    http_status = 400


class MalformedFrame(ProtocolError):
    """A header breaks the schema: wrong type, arity, range or encoding."""

    code = "malformed_frame"
    http_status = 400


class FdMissing(ProtocolError):
    """The welcome message came without the two arena descriptors it promises."""

    code = "fd_missing"


class RequestError(TrunklineError):
    """The caller asked for something that cannot be answered."""

    code = "request_error"
    http_status = 400


class InvalidInput(RequestError):
    """For handlers: the body of the HTTP request is not what the function takes."""

    code = "invalid_input"


class BodyTooLarge(RequestError):
    """The body of the HTTP request is longer than the function allows."""

    code = "body_too_large"
    http_status = 413


class UnknownModel(RequestError):
    """The sidecar holds no model of this name."""

    code = "unknown_model"
    http_status = 404


class SignatureMismatch(RequestError):
    """Names, dtypes or shapes of the inputs are not those of the model."""

    code = "signature_mismatch"


class UnsupportedTensor(RequestError):
    """An array has a dtype or layout that cannot travel."""

    code = "unsupported_tensor"


class ValueOutOfBounds(RequestError):
    """An integer input holds a value outside the bounds its model declares, or leads to an index outside of what it is for."""

    code = "value_out_of_bounds"


class Unauthorized(RequestError):
    """The credential is missing or wrong."""

    code = "unauthorized"
    http_status = 401


class CapacityError(TrunklineError):
    """There is no room for the request now."""

    code = "capacity_error"
    http_status = 503


class ArenaFull(CapacityError):
    """The tensors of one call need more shared memory than one connection may have."""

    code = "arena_full"
    http_status = 413


class QueueFull(CapacityError):
    """Too many requests or connections are waiting already."""

    code = "queue_full"
    retryable = True


class QuotaExceeded(CapacityError):
    """The function has as much as its operator allows it at a time. ``details`` say after how many seconds to try again."""

    code = "quota_exceeded"
    retryable = True
    http_status = 429


class DeadlineUnreachable(CapacityError):
    """The answer would come after the deadline, by what others like it took; nothing was computed.

    Another node may be faster, or this one later: ``details`` have the prediction, and the seconds after which to try again.
    """

    code = "deadline_unreachable"
    retryable = True


class BudgetExceeded(CapacityError):
    """The model does not fit into the memory budget, now or ever; the numbers tell which."""

    code = "budget_exceeded"
    http_status = 507


class Draining(CapacityError):
    """The sidecar takes no new work: it is shutting down, or an operator has stopped it for a while."""

    code = "draining"
    retryable = True


class Quarantined(CapacityError):
    """The sidecar's engine ended twice while it computed this tenant's requests for this model; for a while they are refused.

    ``details`` say after how many seconds to try again: then one is let through.
    """

    code = "quarantined"
    retryable = True


class SidecarFault(TrunklineError):
    """Something broke inside the sidecar. The cause is in its log, under the incident id."""

    code = "sidecar_fault"


class ModelCorrupt(SidecarFault):
    """Stored bytes of the model do not match their checksum; nothing is computed from them."""

    code = "model_corrupt"


class DeviceFault(SidecarFault):
    """The device refused: no room for a weight, or an operator failed."""

    code = "device_fault"


class DeviceOutOfMemory(DeviceFault):
    """The device had no room to compute this request, not even by itself and with all gone that nobody uses."""

    code = "device_out_of_memory"
    retryable = True
    http_status = 503


def _concrete(base: type[TrunklineError]) -> list[type[TrunklineError]]:
    found = [base]
    for child in base.__subclasses__():
        found.extend(_concrete(child))
    return found


def from_wire(code: str, message: str, details: dict[str, Detail]) -> TrunklineError:
    """Rebuild an error from its wire form. An unknown code (a newer sidecar) becomes ``SidecarFault``."""
    for kind in _concrete(TrunklineError):
        if kind.code == code:
            error = kind(message)
            error.details.update(details)
            return error
    error = SidecarFault(f"{code}: {message}")
    error.details.update(details)
    return error
