"""The device plugin: the kubelet gives a function's container the sidecar's socket as it would give it a device.

A container that has ``trunkline.dev/socket: 1`` among its limits gets the socket's folder mounted, read-only, and a variable that
says where. Nothing of it stands in the pod, so no namespace's rules and no flag of Knative's are concerned, and the scheduler
sends such pods only to nodes whose sidecar answers.

The kubelet forgets its plugins, and empties their folder, when it starts: a plugin has to come again by itself. So once a second
it looks whether ``kubelet.sock`` and its own socket are still those that they were.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
from trunkline.connection import Connection
from trunkline.errors import TransportError, TrunklineError
from trunkline.pool import read_token

from sidecar.errors import ConfigError
from sidecar.kubernetes.kubelet import deviceplugin_pb2 as messages
from sidecar.kubernetes.kubelet import deviceplugin_pb2_grpc as services
from sidecar.kubernetes.names import FOLDER, RESOURCE, SOCKET

log = logging.getLogger("trunkline.kubernetes")

_VERSION: Final = "v1beta1"
_HEALTHY, _UNHEALTHY = "Healthy", "Unhealthy"
_OWN_NAME: Final = "trunkline.sock"
# The kubelet has one stream under way, and calls that are answered at once; one stream more while it changes connections.
_THREADS: Final = 8
_REGISTER_S: Final = 5.0
_HELLO_S: Final = 4.0
_STOP_S: Final = 2.0
# A hello costs the sidecar a session, so it is asked at every so many looks only, and whenever its socket is another.
_LOOKS_PER_HELLO: Final = 5
# A kubelet that has registered a plugin calls back at once; one that could not, or has hung up, does not try again by itself.
_LOOKS_UNWATCHED: Final = 15

_Identity = tuple[int, int, int] | None


def answers_hello(path: str) -> bool:
    """Say whether a sidecar answers at the socket. That it refuses whoever has no token is an answer, too.

    Asked with the token that functions would find in this container. Raises SidecarUnavailable when that cannot be read.
    """
    token = read_token()
    try:
        Connection(path, token=token, deadline=time.monotonic() + _HELLO_S).close()
    except TransportError:
        return False
    except TrunklineError:
        return True
    return True


class Sockets(services.DevicePluginServicer):
    """What the kubelet asks a plugin. Any thread."""

    def __init__(self, count: int, host_path: str, url: str = "") -> None:
        """Offer ``count`` sockets, which are all the one in the folder ``host_path`` of the host."""
        self._ids = [f"socket-{number}" for number in range(count)]
        self._host_path = host_path
        self._url = url
        self._changed = threading.Condition()
        self._is_healthy = False
        self._is_ended = False
        self._streams = 0

    def is_watched(self) -> bool:
        """Say whether a kubelet is being told."""
        return bool(self._streams)

    def tell(self, is_healthy: bool) -> None:
        """Have the kubelet know whether new containers may be given a socket."""
        with self._changed:
            if is_healthy != self._is_healthy:
                self._is_healthy = is_healthy
                self._changed.notify_all()

    def end(self) -> None:
        """End all streams."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def GetDevicePluginOptions(self, request: object, context: object) -> Any:
        """Say that nothing optional is done here."""
        return messages.DevicePluginOptions()

    def ListAndWatch(self, request: object, context: grpc.ServicerContext) -> Iterator[Any]:
        """Tell all sockets with their health, and again whenever that changes."""
        # A kubelet that is gone would else hold a thread for ever.
        context.add_callback(self._look)
        with self._changed:
            self._streams += 1
        try:
            yield from self._lists(context)
        finally:
            with self._changed:
                self._streams -= 1

    def Allocate(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Return for each container the mount and the variables that it gets."""
        known = set(self._ids)
        answer = messages.AllocateResponse()
        for asked in request.container_requests:
            if not asked.devices_ids or not known.issuperset(asked.devices_ids):
                context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT, f"there are the sockets {self._ids[0]} to {self._ids[-1]}, and no others"
                )
            given = answer.container_responses.add()
            given.envs["TRUNKLINE_SOCKET"] = SOCKET
            if self._url:
                given.envs["TRUNKLINE_URL"] = self._url
            given.mounts.add(container_path=FOLDER, host_path=self._host_path, read_only=True)
        return answer

    def PreStartContainer(self, request: object, context: object) -> Any:
        """Do nothing: it is not asked for."""
        return messages.PreStartContainerResponse()

    def _lists(self, context: grpc.ServicerContext) -> Iterator[Any]:
        told: bool | None = None
        while True:
            with self._changed:
                while told == self._is_healthy and not self._is_ended and context.is_active():
                    self._changed.wait()
                if self._is_ended or not context.is_active():
                    return
                told = self._is_healthy
            health = _HEALTHY if told else _UNHEALTHY
            yield messages.ListAndWatchResponse(devices=[messages.Device(ID=each, health=health) for each in self._ids])

    def _look(self) -> None:
        with self._changed:
            self._changed.notify_all()


class DevicePlugin:
    """Keeps the sockets registered with whichever kubelet is there. One thread looks; gRPC has its own to answer."""

    def __init__(self, sockets: Sockets, folder: Path, sidecar: str, answers: Callable[[str], bool] = answers_hello) -> None:
        """``folder`` is the kubelet's, for plugins; ``sidecar`` the socket that is offered, as this process sees it."""
        self._sockets = sockets
        self._kubelet = folder / "kubelet.sock"
        self._own = folder / _OWN_NAME
        self._sidecar = Path(sidecar)
        self._answers = answers
        self._server: grpc.Server | None = None
        self._served: _Identity = None
        self._registered: _Identity = None
        self._answered: _Identity = None
        self._refusal: str | None = None
        self._looks = 0
        self._looks_unwatched = 0

    def look(self) -> None:
        """Look once at the sidecar, at the kubelet, and at the own socket; do what follows from it."""
        self._check_health()
        kubelet = _identity(self._kubelet)
        if kubelet is None:
            self._registered = None
            return
        if self._server is None or _identity(self._own) != self._served:
            self._registered = None
            self._serve()
        self._looks_unwatched = 0 if self._sockets.is_watched() else self._looks_unwatched + 1
        if self._looks_unwatched > _LOOKS_UNWATCHED:
            self._registered = None
        if kubelet != self._registered and self._register():
            self._registered, self._looks_unwatched = kubelet, 0

    def run(self, stopped: threading.Event, pause_s: float) -> None:
        """Look every ``pause_s`` seconds until ``stopped``, then withdraw; also when looking raises."""
        try:
            while not stopped.is_set():
                self.look()
                stopped.wait(pause_s)
        finally:
            # Threads that have streams would keep this process from its end.
            self.close()

    def close(self) -> None:
        """End the streams, by which the kubelet knows that there are no sockets any more."""
        self._sockets.end()
        self._stop()

    def _check_health(self) -> None:
        self._looks += 1
        found = _identity(self._sidecar)
        if found is not None and found == self._answered and self._looks % _LOOKS_PER_HELLO:
            return
        is_healthy = found is not None and self._answers(str(self._sidecar))
        # One that did not answer is asked again at the next look.
        self._answered = found if is_healthy else None
        self._sockets.tell(is_healthy)

    def _serve(self) -> None:
        """Listen in the kubelet's folder, anew where the socket was removed."""
        # Before there is another: what ends removes its socket, by name.
        self._stop()
        server = grpc.server(ThreadPoolExecutor(_THREADS, "kubelet"))
        services.add_DevicePluginServicer_to_server(self._sockets, server)
        try:
            server.add_insecure_port(f"unix:{self._own}")
        except RuntimeError as error:
            server.stop(None)
            raise ConfigError(
                f"the device plugin cannot listen in {self._own.parent}; mount the kubelet's folder there, and run as root",
                folder=str(self._own.parent),
            ) from error
        server.start()
        self._server, self._served = server, _identity(self._own)

    def _stop(self) -> None:
        if self._server is not None:
            self._server.stop(_STOP_S).wait()
            self._server, self._served = None, None

    def _register(self) -> bool:
        request = messages.RegisterRequest(
            version=_VERSION, endpoint=_OWN_NAME, resource_name=RESOURCE, options=messages.DevicePluginOptions()
        )
        with grpc.insecure_channel(f"unix:{self._kubelet}") as channel:
            try:
                services.RegistrationStub(channel).Register(request, timeout=_REGISTER_S)
            except grpc.RpcError as error:
                # Tried at every look, and told when it is another.
                if (refusal := error.code().name) != self._refusal:
                    log.warning("the kubelet does not take %s yet (%s: %s)", RESOURCE, refusal, error.details())
                self._refusal = refusal
                return False
        self._refusal = None
        log.info("the kubelet offers %s to pods", RESOURCE)
        return True


def _identity(path: Path) -> _Identity:
    """Return what tells a socket from another that was put in its place; None where there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    # Numbers of inodes are used again, and at once on some file systems.
    return stat.st_dev, stat.st_ino, stat.st_ctime_ns
