"""The API server of the cluster, as a pod may ask it: by its service account. One thing is asked: the labels of a node.

Labels are set by server-side apply: of a node's labels those are ours that we have set, what we do not name any more goes, and
nobody else's are touched. So what is to be there is all that has to be known, whatever became of an earlier life.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

import requests

from sidecar.errors import ConfigError
from sidecar.kubernetes.names import ACCOUNT

# By which the API server knows whose labels are whose.
_MANAGER: Final = "trunkline"
_TIMEOUT_S: Final = (5.0, 15.0)
# Told of what went wrong, of an answer of any length.
_SHOWN: Final = 200


class ApiFailure(Exception):
    """The API server did not do what it was asked. ``status`` is that of its answer, 0 where there was none."""

    def __init__(self, message: str, status: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class ApiServer:
    """Asks at ``url``. Token and authority are read for each request: the kubelet replaces them while the pod runs."""

    def __init__(self, url: str, account: Path = Path(ACCOUNT)) -> None:
        self._url = url.rstrip("/")
        self._account = account

    @classmethod
    def of_this_cluster(cls, environment: Mapping[str, str] = os.environ, account: Path = Path(ACCOUNT)) -> ApiServer:
        """Return the one that the kubelet tells pods of. Raises ConfigError."""
        host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise ConfigError("KUBERNETES_SERVICE_HOST is not set: run this in a pod, or name the API server with --api-server")
        return cls(f"https://{f'[{host}]' if ':' in host else host}:{port}", account)

    def label_node(self, node: str, labels: Mapping[str, str]) -> None:
        """Have the node carry exactly these labels of ours. Raises ApiFailure."""
        body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node, "labels": dict(labels)}}
        try:
            token = (self._account / "token").read_text("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ApiFailure(f"the service account's token cannot be read ({type(error).__name__}); mount one") from error
        # A session would keep connections that were made with an earlier authority.
        with requests.Session() as session:
            session.trust_env = False
            try:
                answer = session.patch(
                    f"{self._url}/api/v1/nodes/{node}",
                    # Labels that somebody has set by hand with our key become ours.
                    params={"fieldManager": _MANAGER, "force": "true"},
                    # JSON is YAML, too, which is what the API server calls this kind of patch by.
                    data=json.dumps(body).encode(),
                    headers={"Authorization": f"Bearer {token}", "Content-Type": "application/apply-patch+yaml"},
                    verify=str(self._account / "ca.crt"),
                    timeout=_TIMEOUT_S,
                    allow_redirects=False,
                )
            # OSError: there is no such file with an authority.
            except (requests.RequestException, OSError) as error:
                raise ApiFailure(f"the API server at {self._url} is not reached ({type(error).__name__})") from error
        if answer.status_code != 200:
            raise ApiFailure(_told(answer), answer.status_code, _retry_after_s(answer))


def _told(answer: requests.Response) -> str:
    """Return what an answer says of itself: Kubernetes' has a message."""
    try:
        message = str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        message = answer.reason
    return f"{answer.status_code}: {message[:_SHOWN]}"


def _retry_after_s(answer: requests.Response) -> float:
    """Return the seconds after which an answer wants to be asked again, 0 where it does not say."""
    told = answer.headers.get("Retry-After", "")
    if told.isascii() and told.isdigit():
        return float(told[:9])
    try:
        at, now = parsedate_to_datetime(told), parsedate_to_datetime(answer.headers.get("Date", ""))
        return max(0.0, (at - now).total_seconds())
    # TypeError: one of the two names a time zone, and the other none.
    except (ValueError, TypeError):
        return 0.0
