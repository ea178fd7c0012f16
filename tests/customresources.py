"""Schemas of the custom resources that the chart renders, of the fields that it uses, after their published references.

Those of Kubernetes itself come with a package; these are of other projects: the Prometheus operator, Kyverno, cert-manager. A
field that is not here is refused, so that one more must be looked up.
"""

from __future__ import annotations

from typing import Any, Final

Schema = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string", "minLength": 1}
_LABELS: Final[Schema] = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def _list(items: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": items}


def _enum(*values: str) -> Schema:
    return {"enum": list(values)}


_SELECTOR: Final = _object(
    matchLabels=_LABELS,
    matchExpressions=_list(
        _object(("key", "operator"), key=_TEXT, operator=_enum("In", "NotIn", "Exists", "DoesNotExist"), values=_list(_TEXT))
    ),
)
_KEY_OF_SECRET: Final = _object(("name", "key"), name=_TEXT, key=_TEXT)


def _resource(api_version: str, kind: str, spec: Schema, *, is_namespaced: bool = True) -> tuple[tuple[str, str], Schema]:
    metadata = _object(("name",), name=_TEXT, labels=_LABELS, annotations=_LABELS)
    if is_namespaced:
        metadata["properties"]["namespace"] = _TEXT
        metadata["required"].append("namespace")
    schema = _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )
    return (api_version, kind), schema


# https://prometheus-operator.dev/docs/api-reference/api/#monitoring.coreos.com/v1.PodMonitor
_POD_MONITOR: Final = _resource(
    "monitoring.coreos.com/v1",
    "PodMonitor",
    _object(
        ("selector", "podMetricsEndpoints"),
        selector=_SELECTOR,
        namespaceSelector=_object(any={"type": "boolean"}, matchNames=_list(_TEXT)),
        podMetricsEndpoints=_list(
            _object(
                ("port",),
                port=_TEXT,
                path=_TEXT,
                interval={"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                scheme=_enum("http", "https"),
                authorization=_object(type=_TEXT, credentials=_KEY_OF_SECRET),
                tlsConfig=_object(ca=_object(secret=_KEY_OF_SECRET), serverName=_TEXT),
            )
        ),
    ),
)

# https://kyverno.io/docs/reference/crd/: kyverno.io/v1, ClusterPolicy.
_CONDITIONS: Final = _object(
    all=_list(
        _object(
            ("key", "operator", "value"),
            key=_TEXT,
            operator=_enum("Equals", "NotEquals", "AnyIn", "AllIn", "AnyNotIn", "AllNotIn"),
            value={"type": ["integer", "string", "array"]},
        )
    )
)
_RESOURCES: Final = _object(
    any=_list(
        _object(
            ("resources",),
            resources=_object(
                kinds=_list(_TEXT),
                operations=_list(_enum("CREATE", "UPDATE", "DELETE", "CONNECT")),
                namespaces=_list(_TEXT),
                selector=_SELECTOR,
                namespaceSelector=_SELECTOR,
            ),
        )
    )
)
_CLUSTER_POLICY: Final = _resource(
    "kyverno.io/v1",
    "ClusterPolicy",
    _object(
        ("rules",),
        background={"type": "boolean"},
        webhookConfiguration=_object(failurePolicy=_enum("Ignore", "Fail"), timeoutSeconds={"type": "integer", "maximum": 30}),
        rules=_list(
            _object(
                ("name", "match", "mutate"),
                name=_TEXT | {"maxLength": 63},
                match=_RESOURCES,
                exclude=_RESOURCES,
                preconditions=_CONDITIONS,
                mutate=_object(
                    patchStrategicMerge={"type": "object"},
                    foreach=_list(
                        _object(("list",), list=_TEXT, preconditions=_CONDITIONS, patchStrategicMerge={"type": "object"})
                    ),
                ),
            )
        ),
    ),
    is_namespaced=False,
)

# https://cert-manager.io/docs/reference/api-docs/#cert-manager.io/v1
_ISSUER: Final = _resource(
    "cert-manager.io/v1", "Issuer", _object(selfSigned={"type": "object"}, ca=_object(("secretName",), secretName=_TEXT))
)
_CERTIFICATE: Final = _resource(
    "cert-manager.io/v1",
    "Certificate",
    _object(
        ("secretName", "issuerRef"),
        secretName=_TEXT,
        dnsNames=_list(_TEXT),
        commonName={"type": "string", "maxLength": 64},
        isCA={"type": "boolean"},
        duration={"type": "string", "pattern": "^[0-9]+h$"},
        privateKey=_object(
            algorithm=_enum("RSA", "ECDSA", "Ed25519"), size={"type": "integer"}, rotationPolicy=_enum("Always", "Never")
        ),
        issuerRef=_object(("name",), name=_TEXT, kind=_enum("Issuer", "ClusterIssuer"), group=_TEXT),
    ),
)

SCHEMAS: Final[dict[tuple[str, str], Schema]] = dict([_POD_MONITOR, _CLUSTER_POLICY, _ISSUER, _CERTIFICATE])
