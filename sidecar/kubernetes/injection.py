"""What a pod lacks to ask the sidecar of its node: a volume and its mounts, or a device; variables; a preference for nodes. Pure.

Only pods with the label ``trunkline: enabled`` are changed, and only by adding: what the pod has of the same name, or at the
same path, is its author's and stays. So a second pass over a pod adds nothing. Whose socket a pod gets, where tenants have their
own, is decided by its namespace, as the API server tells it, and by the operator; nothing in the pod has a say in that.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sidecar.kubernetes.affinity import MOST_MODELS, preferred_terms
from sidecar.kubernetes.jsonpatch import Additions
from sidecar.kubernetes.names import DRIVER, ENABLED, FOLDER, HOST_FOLDER, HOST_TENANTS, LABEL, MODELS, RESOURCE, SOCKET, VOLUME

# By how a function's socket gets into its pod; ``none``: it does not, and the function asks over HTTP.
MODES: Final = ("csi", "pvc", "devicePlugin", "hostPath", "none")
# Those in which each namespace may have a folder of its own.
MODES_OF_TENANTS: Final = ("pvc", "hostPath")
# Proxies that others have put beside the function, and that ask no model.
LEFT_ALONE: Final = ("queue-proxy", "istio-proxy", "linkerd-proxy")
_PREFERRED: Final = "preferredDuringSchedulingIgnoredDuringExecution"
# As functions name models: NAME, or NAME:LABEL for a version.
_MODEL: Final = re.compile(r"(?=.{1,128}$)[A-Za-z0-9._-]+(:[A-Za-z0-9._-]+)?")


class UnreadablePod(ValueError):
    """A pod has another shape than the API server gives it; the message says where."""


@dataclass(frozen=True)
class Injection:
    """What pods are given: by which of ``MODES``, and ``url`` as TRUNKLINE_URL unless it is empty.

    ``tenants`` are those with a socket of their own, by the namespaces whose pods get it (``of``); all others get ``host_path``.
    """

    mode: str
    url: str = ""
    host_path: str = HOST_FOLDER
    claim: str = VOLUME
    left_alone: tuple[str, ...] = LEFT_ALONE
    tenants: Mapping[str, str] = field(default_factory=dict)
    tenants_path: str = HOST_TENANTS
    # A pod may come before the sidecar does; the folder is never made anew, so the socket appears in it.
    host_path_type: str = "DirectoryOrCreate"

    def of(self, namespace: object) -> Injection:
        """Return what pods of a namespace are given."""
        if not isinstance(namespace, str) or (tenant := self.tenants.get(namespace)) is None:
            return self
        # No URL: over HTTP such a tenant is nobody, and would be refused for good instead of waiting for its socket. The folder
        # is the sidecar's to make, with its owner and mode: until it is there the kubelet has the pod wait.
        return replace(self, url="", host_path=posixpath.join(self.tenants_path, tenant), host_path_type="Directory")

    def volume_source(self) -> dict[str, object] | None:
        """Return what the volume is, None where the mode has none."""
        match self.mode:
            case "csi":
                return {"csi": {"driver": DRIVER, "readOnly": True}}
            case "pvc":
                return {"persistentVolumeClaim": {"claimName": self.claim, "readOnly": True}}
            case "hostPath":
                return {"hostPath": {"path": self.host_path, "type": self.host_path_type}}
            case _:
                return None


@dataclass(frozen=True)
class Patch:
    """Operations of a JSON Patch, and what the pod's author should know."""

    operations: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()


def patch_of(pod: Mapping[str, Any], injection: Injection) -> Patch:
    """Return what ``pod`` lacks. Raises UnreadablePod."""
    metadata = _object(pod, "metadata", "pod") or {}
    labels = _object(metadata, "labels", "metadata") or {}
    if labels.get(LABEL) != ENABLED:
        return Patch()
    spec = _object(pod, "spec", "pod")
    if spec is None:
        raise UnreadablePod("the pod has no spec")
    if (_object(spec, "os", "spec") or {}).get("name") == "windows":
        return Patch(warnings=("a Windows pod has no Unix sockets and is left alone",))
    made = Additions()
    containers = [
        (index, container)
        for index, container in enumerate(_objects(spec, "containers", "spec") or ())
        if container.get("name") not in injection.left_alone
    ]
    source, warnings = injection.volume_source(), []
    volumes = _objects(spec, "volumes", "spec")
    named = [volume for volume in volumes or () if volume.get("name") == VOLUME]
    bare = [container for index, container in containers if not _own_mounts(container, f"containers[{index}]")]
    if source is not None and named and not _includes(named[0], source):
        if bare:
            warnings.append(f"there is a volume {VOLUME!r} of another kind, so no socket is mounted; rename it")
        source = None
    if source is not None and bare and not named:
        made.extend(("spec",), "volumes", volumes, [{"name": VOLUME, **source}])
    for index, container in containers:
        _complete(container, f"containers[{index}]", ("spec", "containers", index), injection, source is not None, made)
    models, unfit = _models(metadata, labels)
    _prefer(spec, models, made)
    return Patch(made.operations, (*warnings, *unfit))


def _own_mounts(container: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """Return the mounts of a container that are of our name or at our path, whoever has put them there."""
    mounts = _objects(container, "volumeMounts", place) or ()
    return [each for each in mounts if each.get("name") == VOLUME or _is_folder(each.get("mountPath"))]


def _complete(
    container: Mapping[str, Any],
    place: str,
    path: tuple[str | int, ...],
    injection: Injection,
    mounts_volume: bool,
    made: Additions,
) -> None:
    own = _own_mounts(container, place)
    if mounts_volume and not own:
        mounts = _objects(container, "volumeMounts", place)
        made.extend(path, "volumeMounts", mounts, [{"name": VOLUME, "mountPath": FOLDER, "readOnly": True}])
    if injection.mode == "devicePlugin" and not own:
        _limit(container, place, path, made)
    # With a device the kubelet sets it. Where the author has mounted another volume, the client looks there by itself.
    wanted = {"TRUNKLINE_SOCKET": SOCKET} if mounts_volume and (not own or _is_mounted(own)) else {}
    if injection.url:
        wanted["TRUNKLINE_URL"] = injection.url
    variables = _objects(container, "env", place)
    present = [each.get("name") for each in variables or ()]
    missing = [{"name": name, "value": value} for name, value in wanted.items() if name not in present]
    made.extend(path, "env", variables, missing)


def _limit(container: Mapping[str, Any], place: str, path: tuple[str | int, ...], made: Additions) -> None:
    """Have a container ask for one socket, as a limit, unless it asks for some itself."""
    resources = _object(container, "resources", place)
    if resources is None:
        made.put(path, "resources", {"limits": {RESOURCE: "1"}})
        return
    limits = _object(resources, "limits", f"{place}.resources")
    if RESOURCE not in (limits or {}):
        made.update((*path, "resources"), "limits", limits, {RESOURCE: "1"})


def _is_mounted(own: Sequence[Mapping[str, Any]]) -> bool:
    return any(each.get("name") == VOLUME and _is_folder(each.get("mountPath")) for each in own)


def _models(metadata: Mapping[str, Any], labels: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the models that a pod names, and warnings."""
    told = (_object(metadata, "annotations", "metadata") or {}).get(MODELS, labels.get(MODELS))
    if not isinstance(told, str):
        return [], []
    names = list(dict.fromkeys(told.replace(",", " ").split()))
    models = [name for name in names if _MODEL.fullmatch(name)]
    warnings = [f"{MODELS} names {name[:40]!r}, which is no model's name" for name in names if not _MODEL.fullmatch(name)][:1]
    if len(models) > MOST_MODELS:
        warnings.append(f"{MODELS} names {len(models)} models; the first {MOST_MODELS} decide where the pod should run")
    return models[:MOST_MODELS], warnings


def _prefer(spec: Mapping[str, Any], models: Sequence[str], made: Additions) -> None:
    """Add the terms for ``models`` to the pod's affinity, but for those whose labels its author has terms on."""
    affinity = _object(spec, "affinity", "spec")
    nodes = _object(affinity or {}, "nodeAffinity", "affinity")
    present = _objects(nodes or {}, _PREFERRED, "nodeAffinity")
    known = [
        each.get("key")
        for term in present or ()
        for each in _objects(_object(term, "preference", _PREFERRED) or {}, "matchExpressions", "preference") or ()
    ]
    terms = [term for term in preferred_terms(models) if term["preference"]["matchExpressions"][0]["key"] not in known]
    if not terms:
        return
    if affinity is None:
        made.put(("spec",), "affinity", {"nodeAffinity": {_PREFERRED: terms}})
    elif nodes is None:
        made.put(("spec", "affinity"), "nodeAffinity", {_PREFERRED: terms})
    else:
        made.extend(("spec", "affinity", "nodeAffinity"), _PREFERRED, present, terms)


def _is_folder(path: object) -> bool:
    return isinstance(path, str) and posixpath.normpath(path) == FOLDER


def _includes(given: object, asked: object) -> bool:
    """Say whether an object has all members of another, and theirs; the API server's defaults may stand beside them."""
    if not isinstance(given, dict) or not isinstance(asked, dict):
        return given == asked
    return all(_includes(given.get(key), value) for key, value in asked.items())


def _object(parent: Mapping[str, Any], key: str, place: str) -> dict[str, Any] | None:
    """Return a member that is an object; None where there is none, or null."""
    value = parent.get(key)
    if value is not None and not isinstance(value, dict):
        raise UnreadablePod(f"{place}: {key} is no object")
    return value


def _objects(parent: Mapping[str, Any], key: str, place: str) -> list[dict[str, Any]] | None:
    """Return a member that is a list of objects; None where there is none, or null."""
    value = parent.get(key)
    if value is not None and not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
        raise UnreadablePod(f"{place}: {key} is no list of objects")
    return value
