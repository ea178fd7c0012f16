"""The rows of the page's models: state, size, rate, latencies and share of a device, over all devices. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from trunkline.protocol import COPY, HTTP, SEALED

from sidecar.rates import RATE_S, WINDOW_S, History, Totals, added, quantile
from sidecar.units import NONE, duration, percent, rate, size

MODEL_COLUMNS: Final = (
    ("name", "Model"),
    ("state", "State"),
    ("bytes", "Size"),
    ("shared", "Shared"),
    ("rate", "Rate"),
    ("p50", "p50"),
    ("p99", "p99"),
    ("waiting", "Queue"),
    ("transport", "Transport"),
    ("share", "Device time"),
    ("priority", "Priority"),
)
# Of more, the busiest are listed.
MOST_MODELS: Final = 400
_TRANSPORTS: Final = {SEALED: "shared memory", COPY: "shared memory, copied", HTTP: "HTTP"}
_STATES: Final = {"resident": "in memory", "loading": "loading", "stored": "on disk"}


class ModelRows:
    """The models of all devices, and what requests for them take."""

    def __init__(self, devices: Mapping[str, Any], history: History, in_part: Collection[str]) -> None:
        self._devices = devices
        self._in_part = in_part
        self._now = history.before(0)
        self._before = history.before(RATE_S)
        self._window = history.before(WINDOW_S)
        self.bounds_s: Sequence[float] = next(iter(devices.values()))["outcomes"]["bounds_s"]
        self.names = list(dict.fromkeys(name for each in devices.values() for name in each["models"]))
        self._corrupt = sorted({name for each in devices.values() for name in each["corrupt"]})
        self.total = len(self.names) + len(self._corrupt)
        self.listed_count = min(self.total, MOST_MODELS)

    def is_leased(self, name: str) -> bool:
        return any(each["models"].get(name, {}).get("leases") for each in self._devices.values())

    def is_pinned(self, name: str) -> bool:
        return any(each["models"].get(name, {}).get("pinned") for each in self._devices.values())

    def all_rate(self) -> float | None:
        rates = [self._rate(name) for name in (self._now.answered if self._now else ())]
        return sum(each for each in rates if each is not None) if self._before is not None else None

    def all_counts(self) -> list[int]:
        counts: list[int] = []
        for name in self._now.answered if self._now else ():
            counts = added(counts, self._counts(name)[0])
        return counts

    def rows(self) -> list[dict[str, Any]]:
        """Return the models in order of their names, at most as many as are listed: those that are asked, then others."""
        names = self.names
        if self.total > MOST_MODELS:
            asked = sorted(names, key=lambda name: (-(self._rate(name) or 0.0), not self.is_leased(name)))
            names = asked[: max(0, MOST_MODELS - len(self._corrupt))]
        rows = [self._row(name) for name in sorted(names)]
        return rows + [_corrupt_row(name) for name in self._corrupt[:MOST_MODELS]]

    def _row(self, name: str) -> dict[str, Any]:
        own = {device: each["models"][name] for device, each in self._devices.items() if name in each["models"]}
        any_one = next(iter(own.values()))
        state = min((each["state"] for each in own.values()), key=lambda state: list(_STATES).index(state))
        is_used, is_pinned = self.is_leased(name), self.is_pinned(name)
        flags = [state, *(["used"] if is_used else []), *(["pinned"] if is_pinned else [])]
        where = [device for device, each in own.items() if each["state"] == "resident"]
        told = "in use" if is_used else _STATES[state]
        if told == _STATES["stored"] and name in self._in_part:
            told = "in part"
            flags.append("part")
        if len(self._devices) > 1 and where:
            told += f" on {', '.join(where)}"
        shared = any_one["shared_bytes"] / any_one["bytes"] if any_one["bytes"] else 0.0
        asked, failed = self._rate(name), self._failed_rate(name)
        counts, is_recent = self._counts(name)
        p50, p99 = quantile(self.bounds_s, counts, 0.5), quantile(self.bounds_s, counts, 0.99)
        waiting = sum(each["waiting"].get(name, 0) for each in self._devices.values())
        share, came_by = self._share(name), self._transports(name)
        if not is_recent:
            flags.append("quiet")
        return {
            "key": name,
            "cells": [
                name,
                told + (", pinned" if is_pinned else ""),
                size(any_one["bytes"]),
                percent(shared) if any_one["shared_bytes"] else NONE,
                rate(asked) + (f", {rate(failed)} failed" if failed else ""),
                duration(p50),
                duration(p99),
                str(waiting),
                came_by,
                percent(share),
                str(any_one["priority"]),
            ],
            "sort": [
                name,
                told,
                any_one["bytes"],
                round(shared, 4),
                number(asked),
                number(p50),
                number(p99),
                waiting,
                came_by,
                number(share),
                any_one["priority"],
            ],
            "flags": flags,
        }

    def _grown(self, before: Totals | None, name: str) -> list[int]:
        """Return the requests answered since ``before``, by latency."""
        if before is None or self._now is None:
            return []
        return added(self._now.answered.get(name, ()), before.answered.get(name, ()), -1)

    def _rate(self, name: str) -> float | None:
        return self._per_s(sum(self._grown(self._before, name)))

    def _failed_rate(self, name: str) -> float | None:
        if self._now is None or self._before is None:
            return None
        return self._per_s(self._now.failed[name] - self._before.failed[name])

    def _per_s(self, count: float) -> float | None:
        if self._now is None or self._before is None or self._now.at_s <= self._before.at_s:
            return None
        return count / (self._now.at_s - self._before.at_s)

    def _counts(self, name: str) -> tuple[list[int], bool]:
        """Return latencies of the last minute, or where there are none, since the engine's start; and which of them it is."""
        recent = self._grown(self._window, name)
        if sum(recent):
            return recent, True
        counts: list[int] = []
        for each in self._devices.values():
            counts = added(counts, each["outcomes"]["models"].get(name, {}).get("counts", ()))
        return counts, False

    def _transports(self, name: str) -> str:
        """Return how requests of the last minute came, or where there were none, all since the engine's start."""
        if self._now is None or not (counts := self._now.transports.get(name)):
            return NONE
        recent = counts - self._window.transports.get(name, Counter()) if self._window is not None else Counter()
        found = (recent or counts).most_common()
        if len(found) == 1:
            return _TRANSPORTS[found[0][0]]
        total = sum(count for _, count in found)
        return ", ".join(f"{_TRANSPORTS[transport]} {percent(count / total)}" for transport, count in found)

    def _share(self, name: str) -> float | None:
        """Return the part of a device's time that requests for a model take: as often as they come, by what they took of late."""
        now, before = self._now, self._before
        if now is None or before is None or now is before:
            return None
        share = 0.0
        for device, each in self._devices.items():
            asked = self._per_s(now.by_device.get((device, name), 0) - before.by_device.get((device, name), 0)) or 0.0
            share += asked * each["device_s"].get(name, 0.0)
        return share


def _corrupt_row(name: str) -> dict[str, Any]:
    blank = len(MODEL_COLUMNS) - 2
    return {"key": name, "cells": [name, "damaged: push it again", *[NONE] * blank], "sort": [name, "damaged", *[-1] * blank],
            "flags": ["corrupt"]}  # fmt: skip


def number(value: float | None) -> float:
    """Return what to sort by: what is not known is less than all that is."""
    return -1.0 if value is None else round(value, 6)
