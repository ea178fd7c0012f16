"""Pulling ahead: the models of a list that the operator has written are brought into the store, before anybody asks for them.

The list is a text file with a reference in each line. It is looked at again and again, and so may be changed while the sidecar
runs. What is in the store as listed is not asked of an origin again; what cannot be had is tried again, later each time, no two
nodes alike. Of the processes of the admin endpoint one does this, the one that holds the lock; when it ends, another goes on.
What has come of it stands in a file, for metrics, and for whoever goes on. Must not import torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from trunkline.errors import InvalidInput, ModelCorrupt, TrunklineError, UnknownModel

from sidecar import failures
from sidecar.bundle import manifest_bytes
from sidecar.disk import opened
from sidecar.errors import ConfigError, OriginRefused
from sidecar.jsonfile import read_json, replace_json
from sidecar.origins import Policy, Reference, parse_reference
from sidecar.store import Store

log = logging.getLogger("trunkline.admin")

# PRESENT: in the store, and the engine knows; FAILED: it was tried, and will be again.
PRESENT: Final = "present"
WAITING: Final = "waiting"
FAILED: Final = "failed"
STATES: Final = (PRESENT, WAITING, FAILED)
_LARGEST_BYTES: Final = 1 << 20
# A kubelet takes a minute to bring a list that was changed.
_LOOK_S: Final = 5.0
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 300.0


class Fetched(Protocol):
    """What a pull has brought (``sidecar.pulling.Pulled``)."""

    @property
    def fetched_count(self) -> int: ...
    @property
    def blob_count(self) -> int: ...
    @property
    def fetched_bytes(self) -> int: ...


def read_list(path: Path, policy: Policy) -> tuple[Reference, ...]:
    """Return the references of a list, in its order. Raises ConfigError that names the line."""
    found: dict[str, Reference] = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            reference = parse_reference(text)
            policy.check(reference.origin)
        except (InvalidInput, OriginRefused) as error:
            raise ConfigError(f"{path} line {number}: {error.message}", line=number) from error
        if found.setdefault(reference.name, reference) != reference:
            raise ConfigError(f"{path} line {number}: {reference.name} is listed before, as something else", line=number)
    return tuple(found.values())


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({os.strerror(error.errno or 0)})") from error
    if len(content) > _LARGEST_BYTES:
        raise ConfigError(f"{path} has more than the {_LARGEST_BYTES} bytes that a list of models may have")
    return content.decode("utf-8", "replace")


def is_stored(reference: Reference, store: Store) -> bool:
    """Say whether the store has just this model, under its own name and with all its weights. Raises StoreError."""
    try:
        bundle = store.model(reference.name)
    except (UnknownModel, ModelCorrupt):
        return False
    digest = hashlib.sha256(manifest_bytes(bundle)).hexdigest()
    return digest == reference.digest and not store.missing(weight.digest for weight in bundle.graph.weights)


def told_of(state_file: Path) -> Mapping[str, Any]:
    """Return how many models are in which of ``STATES``, and the bytes that were fetched; nothing where nobody knows."""
    try:
        found = read_json(state_file, {"models": {}, "fetched_bytes": 0})
        states = [each["state"] for each in found["models"].values()]
        return {"models": {state: states.count(state) for state in STATES}, "fetched_bytes": int(found["fetched_bytes"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _present(models: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {text for text, each in models.items() if each["state"] == PRESENT}


class Prepull:
    """Brings the models of a list in. One thread; ``step`` says when it wants to be called again."""

    def __init__(
        self,
        path: Path,
        state_file: Path,
        policy: Policy,
        *,
        stored: Callable[[Reference], bool],
        pull: Callable[[Reference], Fetched],
        tell: Callable[[str], object],
        clock: Callable[[], float],
        chance: Callable[[], float] = random.random,
    ) -> None:
        """``stored`` says whether a model is there already, ``pull`` fetches it; ``tell`` has the engine know of it, by its name.

        All three may raise. ``chance`` returns numbers of 0 to 1, by which nodes differ.
        """
        self._path = path
        self._state_file = state_file
        self._policy = policy
        self._stored = stored
        self._pull = pull
        self._tell = tell
        self._clock = clock
        self._chance = chance
        self._listed: tuple[Reference, ...] | None = None
        self._problem = ""
        self._fetched_bytes = 0
        self._pause_s = _FIRST_PAUSE_S
        self._try_s = clock()
        # By the text of a reference: its state, and the code of what was wrong last.
        self._models: dict[str, dict[str, str | None]] = {}

    def step(self) -> float:
        """Look at the list, and try what is due; return the seconds after which to look again."""
        self._look()
        due = [each for each in self._listed or () if self._models[str(each)]["state"] != PRESENT]
        if not due:
            return _LOOK_S
        if (early_s := self._try_s - self._clock()) > 0:
            return min(_LOOK_S, early_s)
        failed_count = 0
        for reference in due:
            failed_count += not self._try(reference)
            self._write()
        # Between half of it and all.
        pause_s = self._pause_s * (1 + self._chance()) / 2
        self._try_s = self._clock() + pause_s
        # Where some came, the others are worth another look soon.
        self._pause_s = _FIRST_PAUSE_S if failed_count < len(due) else min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if not failed_count:
            log.info("the models of %s are here: %d", self._path, len(self._models))
            return _LOOK_S
        log.warning(
            "%d of %d models of %s are not here; tried again in %.0f s", failed_count, len(self._models), self._path, pause_s
        )
        return min(_LOOK_S, pause_s)

    def run(self, lock: Path, stopped: threading.Event) -> None:
        """Do so until ``stopped``, as soon as no other process does."""
        with opened(lock, os.O_RDWR | os.O_CREAT) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            pause_s = 0.0
            while not stopped.wait(pause_s):
                pause_s = self.step()

    def _look(self) -> None:
        """Go by the list as it is now; where that cannot be read, by the one before."""
        try:
            listed = read_list(self._path, self._policy)
        except ConfigError as error:
            if error.message != self._problem:
                log.error("the list of models cannot be followed as it is now, so that before stays in force: %s", error.message)
            self._problem = error.message
            return
        self._problem = ""
        if listed == self._listed:
            return
        # In the beginning, what this sidecar has done before: the engine was told of it, or has found it when it was started.
        known = _present(self._models) if self._listed is not None else self._known()
        self._listed = listed
        self._models = {str(each): {"state": WAITING, "error": None} for each in listed}
        for reference in listed:
            text = str(reference)
            if text in known and self._is_stored(reference):
                self._models[text]["state"] = PRESENT
        self._pause_s, self._try_s = _FIRST_PAUSE_S, self._clock()
        self._write()

    def _known(self) -> set[str]:
        try:
            return _present(read_json(self._state_file, {"models": {}})["models"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return set()

    def _is_stored(self, reference: Reference) -> bool:
        try:
            return self._stored(reference)
        except TrunklineError:
            return False

    def _try(self, reference: Reference) -> bool:
        try:
            if self._stored(reference):
                log.info("%s is here already", reference)
            else:
                found = self._pull(reference)
                self._fetched_bytes += found.fetched_bytes
                log.info(
                    "%s is pulled: %d of %d weights, %d bytes",
                    *(reference, found.fetched_count, found.blob_count, found.fetched_bytes),
                )
            self._tell(reference.name)
        except Exception as error:  # noqa: BLE001 - one model must not keep the others away; what nobody foresaw is an incident
            plain = failures.told(error, "").body["error"]
            assert isinstance(plain, dict)
            log.warning("%s is not here yet: %s: %s", reference, plain["code"], plain["message"])
            self._models[str(reference)] = {"state": FAILED, "error": plain["code"]}
            return False
        self._models[str(reference)] = {"state": PRESENT, "error": None}
        return True

    def _write(self) -> None:
        try:
            replace_json(self._state_file, {"models": self._models, "fetched_bytes": self._fetched_bytes})
        except OSError as error:
            # No reason to stop: metrics are behind, and whoever goes on tells the engine once more.
            log.error("what has come of %s cannot be written down (%s)", self._path, os.strerror(error.errno or 0))
