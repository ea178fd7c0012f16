"""What the page shows: the engine's numbers as texts, rows and bars, made once for all who render them, here or in a browser.

Rows are ``{key, cells, sort, flags}``: texts in the order of the columns, what to sort them by, and words that say how a row is
drawn. Nothing is as long as there are requests or weights; of very many models the busiest are listed. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.modelrows import ModelRows, number
from sidecar.moves import FETCH
from sidecar.rates import RATE_S, WINDOW_S, History, quantile
from sidecar.units import NONE, duration, percent, rate, size

TENANT_COLUMNS: Final = (
    ("name", "Tenant"),
    ("waiting", "Queue"),
    ("running", "Running"),
    ("wait", "Would wait"),
    ("share", "Device time"),
    ("connections", "Connections"),
)
_MOST_TENANTS: Final = 100
# A budget's line is drawn a little before the end of its bar, so that it is seen.
_HEADROOM: Final = 1.06
_REASONS: Final = {
    "room": "to make room",
    "ttl": "idle for too long",
    "operator": "as told",
    "removed": "with its model",
    "failed": "could not be read",
    "memory": "for room to compute",
    "quota": "beyond a quota",
}


@dataclass(slots=True)
class Seen:
    """What an engine has told: metrics and pictures by device, connections, and moves, the latest last."""

    metrics: Mapping[str, Any]
    pictures: Mapping[str, Any]
    connections: Mapping[str, Any]
    moves: Sequence[Mapping[str, Any]] = field(default_factory=list)


def state_of(seen: Seen, drawing: Mapping[str, Any], history: History) -> dict[str, Any]:
    """Return all that changes from second to second. ``history`` ends with what is seen."""
    runs = _runs(seen, drawing)
    # Of models that are not whole in memory, those that are in part.
    in_part = {
        lane["name"]
        for run, percent in zip(drawing["runs"], runs["resident"], strict=True)
        if percent
        for lane in drawing["lanes"][run["first"] : run["first"] + run["lanes"]]
    }
    found = ModelRows(seen.metrics, history, in_part)
    first = next(iter(seen.metrics.values()))
    return {
        "draining": bool(first["engine"]["draining"]),
        "texts": _texts(seen, found, history),
        "tiers": [tier for device, each in seen.metrics.items() for tier in _tiers(device, each, len(seen.metrics) > 1)],
        "models": found.rows(),
        "tenants": _tenants(seen, history),
        "moves": [_move(move) for move in reversed(seen.moves)],
        "runs": {**runs, "flags": _flags(drawing, found)},
    }


def _texts(seen: Seen, found: ModelRows, history: History) -> dict[str, str]:
    devices = seen.metrics.values()
    engine = next(iter(devices))["engine"]
    logical = sum(each["memory"]["logical_bytes"] for each in devices)
    saved = sum(each["memory"]["saved_bytes"] for each in devices)
    waiting = sum(each["requests"]["waiting"] for each in devices)
    running = sum(each["requests"]["running"] for each in devices)
    moved, found_part = _moved(history)
    all_counts = found.all_counts()
    listed = found.listed_count
    return {
        "devices": ", ".join(seen.metrics),
        "engine": f"engine {engine['generation']}" + (f", torch {engine['torch']}" if "torch" in engine else ""),
        "rate": rate(found.all_rate()),
        "p99": duration(quantile(found.bounds_s, all_counts, 0.99)),
        "p50": duration(quantile(found.bounds_s, all_counts, 0.5)),
        "waiting": str(waiting),
        "running": str(running),
        "saved": size(saved),
        "alone": f"Each by itself, the models in memory would take {size(logical)}." if saved else "",
        "saved_part": percent(saved / logical if logical else None),
        "moved": moved,
        "found": found_part,
        "sessions": f"{seen.connections['connections']} of {seen.connections['connection_limit']}",
        "models_note": "" if found.total == listed else f"The {listed} busiest of {found.total} models are listed.",
        "models_count": str(found.total),
        "awaited": _awaited(max(each["awaited_count"] for each in devices)),
    }


def _awaited(count: int) -> str:
    return f"{count} more are deployed when they are asked for, or when nobody asks." if count else ""


def _moved(history: History) -> tuple[str, str]:
    """Return the bytes fetched a second, and which part of the weights that requests need was found in memory."""
    now, before = history.before(0), history.before(RATE_S)
    window = history.before(WINDOW_S)
    if now is None or before is None or window is None or now is before:
        return NONE, NONE
    fetched = (now.fetched_bytes - before.fetched_bytes) / (now.at_s - before.at_s)
    hits, misses = now.hits - window.hits, now.misses - window.misses
    return f"{size(max(0.0, fetched))}/s", percent(hits / (hits + misses) if hits + misses else None)


def _tenants(seen: Seen, history: History) -> list[dict[str, Any]]:
    now, before = history.before(0), history.before(RATE_S)
    loads: dict[str, list[Mapping[str, Any]]] = {}
    for each in seen.metrics.values():
        for name, load in each["queues"]["tenants"].items():
            loads.setdefault(name, []).append(load)
    rows = []
    for name, own in loads.items():
        waiting, running = (sum(load[key] for load in own) for key in ("waiting", "running"))
        # A request more would go where it waits least.
        wait_s = min(load["wait_s"] for load in own)
        share = None
        if now is not None and before is not None and now.at_s > before.at_s:
            share = (now.tenant_s[name] - before.tenant_s[name]) / (now.at_s - before.at_s)
        connections = seen.connections["tenants"].get(name, {}).get("connections", 0)
        cells = [name, str(waiting), str(running), duration(wait_s), percent(share), str(connections)]
        sort = [name, waiting, running, wait_s, number(share), connections]
        rows.append({"key": name, "cells": cells, "sort": sort, "flags": []})
    rows.sort(key=lambda row: (-row["sort"][4], row["key"]))
    return rows[:_MOST_TENANTS]


def _tiers(device: str, each: Mapping[str, Any], are_several: bool) -> list[dict[str, Any]]:
    """Return the bars of a device's memories: what is in them by kind, in thousandths of the bar, and where the budget is."""
    memory = each["memory"]
    named = f" of {device}" if are_several else ""
    pinned = memory["pinned_bytes"]
    tiers = [
        _tier(
            f"{device}/device",
            f"Device memory{named}" if "host_budget_bytes" in memory or are_several else "Memory for weights",
            memory["budget_bytes"],
            {"pinned": pinned, "resident": memory["resident_bytes"] - pinned, "spare": memory.get("spare_bytes", 0)},
        )
    ]
    if "host_budget_bytes" in memory:
        parts = {"host": memory["host_weight_bytes"], "spare": memory["host_spare_bytes"]}
        tiers.append(_tier(f"{device}/host", f"Host memory{named}", memory["host_budget_bytes"], parts))
    if "block_files_limit_bytes" in memory:
        parts = {"disk": memory["block_files_taken_bytes"]}
        tiers.append(_tier(f"{device}/disk", f"Block files on disk{named}", memory["block_files_limit_bytes"], parts))
    return tiers


_KINDS: Final = {"pinned": "pinned", "resident": "", "host": "", "disk": "", "spare": "kept for the next"}


def _tier(key: str, label: str, budget: int, parts: Mapping[str, int]) -> dict[str, Any]:
    used = sum(size_bytes for kind, size_bytes in parts.items() if kind != "spare")
    scale = max(budget, sum(parts.values()), 1) * _HEADROOM
    told = [f"{size(used)} of {size(budget)}"]
    told += [f"{size(parts[kind])} {word}" for kind, word in _KINDS.items() if word and parts.get(kind)]
    return {
        "key": key,
        "cells": [label, " · ".join(told)],
        "parts": [[kind, round(1000 * max(0, size_bytes) / scale, 1)] for kind, size_bytes in parts.items()],
        "budget": round(1000 * budget / scale, 1),
    }


def _move(move: Mapping[str, Any]) -> dict[str, Any]:
    models = move["models"]
    named = ", ".join(models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else "")
    weights = f"{move['weights']} weight{'s' if move['weights'] > 1 else ''}"
    is_fetch = move["reason"] == FETCH
    what = f"{size(move['bytes'])} {'for' if is_fetch else 'of'} {named or 'no model'}"
    why = weights if is_fetch else f"{weights}, {_REASONS.get(move['reason'], move['reason'])}"
    return {
        "key": str(move["id"]),
        "cells": [move["at"], "fetched" if is_fetch else "evicted", what, why],
        "flags": ["fetched" if is_fetch else "evicted"],
    }


def _runs(seen: Seen, drawing: Mapping[str, Any]) -> dict[str, Any]:
    """Return how much of each run is in memory, on the device that has most of it."""
    pictures = [each for each in seen.pictures.values() if len(each["resident"]) == len(drawing["runs"])]
    return {
        "version": drawing["version"],
        "resident": [_most(each) for each in zip(*(picture["resident"] for picture in pictures), strict=True)],
        "host": [_most(each) or 0 for each in zip(*(picture["host"] for picture in pictures), strict=True)],
    }


def _flags(drawing: Mapping[str, Any], found: ModelRows) -> list[int]:
    """Return of each run 1 if it is in use, and 2 more if it is pinned."""
    lanes = drawing["lanes"]
    used = [found.is_leased(lane["name"]) for lane in lanes]
    pinned = [found.is_pinned(lane["name"]) for lane in lanes]
    flags = []
    for run in drawing["runs"]:
        own = slice(run["first"], run["first"] + run["lanes"])
        flags.append(any(used[own]) + 2 * any(pinned[own]))
    return flags


def _most(percents: Sequence[int | None]) -> int | None:
    return max((each for each in percents if each is not None), default=None)
