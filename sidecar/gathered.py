"""What the engines of several devices tell, as one document: counts are added up, models are described once. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

Documents = Mapping[str, Any]

# What every device of a machine tells of the same memory.
_SAME: Final = ("total_bytes",)
# Of ages, the one that tells most: where something left memory soonest after it was used.
_LEAST: Final = ("lru_age_s",)
# What one model is described by is the same on all devices, but for these.
_STATES: Final = ("resident", "loading", "stored")


def added(found: Sequence[Any]) -> Any:
    """Return documents of one form as one: numbers are added, objects field by field; of all else, the first counts.

    What one device does not know (None) the others may.
    """
    known = [each for each in found if each is not None]
    if known and all(isinstance(each, dict) for each in known):
        keys = dict.fromkeys(key for each in known for key in each)
        return {key: _field(key, [each[key] for each in known if key in each]) for key in keys}
    if known and all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in known):
        return sum(known)
    return known[0] if known else None


def _field(key: str, values: Sequence[Any]) -> Any:
    if key in _SAME:
        return values[0]
    if key in _LEAST:
        return min((each for each in values if each is not None), default=None)
    return added(values)


def models(found: Documents) -> list[dict[str, Any]]:
    """Return the models of several devices, each once; ``resident_on`` names the devices that have all of one in memory."""
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for device, described in found.items():
        for each in described:
            by_name.setdefault(each["name"], {})[device] = each
    return [model(each) for each in by_name.values()]


def model(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what several devices tell of one model."""
    first, each = next(iter(found.values())), found.values()
    if any("leases" not in one for one in each):
        # It cannot be served, or is deployed in several domains.
        return first
    used = [one["last_used_s"] for one in each if one.get("last_used_s") is not None]
    states = [one["state"] for one in each]
    return first | {
        "state": min(states, key=lambda state: _STATES.index(state) if state in _STATES else len(_STATES)),
        "pinned": any(one.get("pinned", False) for one in each),
        "leases": sum(one.get("leases", 0) for one in each),
        "requests": sum(one.get("requests", 0) for one in each),
        "last_used_s": min(used, default=None),
        "resident_on": [device for device, one in found.items() if one["state"] == "resident"],
        # Each device has a copy of its own: what tells how far a load is, is the one that has most.
        **({"resident_bytes": max(one["resident_bytes"] for one in each)} if "resident_bytes" in first else {}),
        # A trial that is still to come may have it computed in another form.
        **({"tried": all(one["tried"] for one in each)} if "tried" in first else {}),
        **({"freed_bytes": sum(one["freed_bytes"] for one in each)} if "freed_bytes" in first else {}),
    }


def status(found: Documents) -> dict[str, Any]:
    """Return the node's status; ``devices`` has what is told of each."""
    by_device = {
        device: {key: value for key, value in each.items() if key not in ("engine", "models", "sessions")}
        for device, each in found.items()
    }
    first = next(iter(found.values()))
    return {
        "engine": first["engine"] | {"device": ", ".join(found)},
        **added(
            [
                {key: value for key, value in each.items() if key not in ("engine", "models", "sessions")}
                for each in found.values()
            ]
        ),
        "sessions": first["sessions"],
        "models": models({device: each["models"] for device, each in found.items()}),
        "devices": by_device,
    }


def memory(found: Documents) -> dict[str, Any]:
    """Return the memory of all devices together; ``devices`` has that of each."""
    return {**added(list(found.values())), "devices": dict(found)}


def queues(found: Documents) -> dict[str, Any]:
    """Return what waits on all devices; one request more would go where it waits least."""
    tenants = {}
    for name in dict.fromkeys(name for each in found.values() for name in each["tenants"]):
        own = [each["tenants"][name] for each in found.values() if name in each["tenants"]]
        tenants[name] = added(own) | {"wait_s": min(each["wait_s"] for each in own)}
    worst = max((each["forecast"] for each in found.values()), key=lambda each: each["actual_p99_s"])
    return {"forecast": worst, "tenants": tenants, "devices": dict(found)}


def apart(found: Documents) -> dict[str, Any]:
    """Return what each device tells under its name; nothing is added up, since whoever reads that can."""
    return {"devices": {device: each["devices"][device] for device, each in found.items()}}


def intake(found: Documents) -> dict[str, Any]:
    """Return whether requests are taken on any device, and whether all that were taken are answered."""
    each = list(found.values())
    return {
        "draining": all(one["draining"] for one in each),
        "drained": all(one["drained"] for one in each),
        "waiting": sum(one["waiting"] for one in each),
        "running": sum(one["running"] for one in each),
    }


# By command: what makes one document of those that the devices give.
MERGES: Final[Mapping[str, Callable[[Documents], Any]]] = {
    "status": status,
    "models": lambda found: {"models": models({device: each["models"] for device, each in found.items()})},
    "memory": memory,
    "queues": queues,
    **dict.fromkeys(("metrics", "picture", "leases", "residency", "relieve"), apart),
    **dict.fromkeys(("drain", "resume", "intake"), intake),
}
