"""The names that Kubernetes knows us by, and the path at which functions see the socket. Pure."""

from __future__ import annotations

from typing import Final

# The pod label that switches injection, and its value.
LABEL: Final = "trunkline"
ENABLED: Final = "enabled"
# The annotation, or label, in which a pod names the models it asks.
MODELS: Final = "trunkline.dev/models"
# Of the labels that a node has for its models.
MODEL_PREFIX: Final = "model.trunkline.dev/"
DRIVER: Final = "csi.trunkline.dev"
RESOURCE: Final = "trunkline.dev/socket"
VOLUME: Final = "trunkline"
# The folder of the socket in functions; and on nodes, where its parent has what is the sidecar's alone.
FOLDER: Final = "/run/trunkline"
HOST_FOLDER: Final = "/run/trunkline/public"
# Where the folders of tenants are on nodes that have sockets of their own.
HOST_TENANTS: Final = "/run/trunkline/tenants"
SOCKET: Final = f"{FOLDER}/trunkline.sock"
# Where the kubelet puts a pod's token, and the authority of the API server's certificate.
ACCOUNT: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
