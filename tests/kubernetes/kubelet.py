"""A kubelet, as far as a device plugin sees it: takes registrations, calls back, and watches what it is told."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from sidecar.kubernetes.kubelet import deviceplugin_pb2 as messages
from sidecar.kubernetes.kubelet import deviceplugin_pb2_grpc as services
from tests.waiting import PATIENCE_S


class Kubelet(services.RegistrationServicer):
    """Listens at ``kubelet.sock`` in its folder. ``healths`` has the set of healths of each list that it was told."""

    def __init__(self, folder: Path, refusals: int = 0) -> None:
        self.folder = folder
        self.refusals = refusals
        self.registered: list[Any] = []
        self.healths: list[set[str]] = []
        self.ids: list[str] = []
        self.ended_streams = 0
        self._changed = threading.Condition()
        self._watching: list[threading.Thread] = []
        self._channels: list[grpc.Channel] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._server = grpc.server(ThreadPoolExecutor(4))
        services.add_RegistrationServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{folder}/kubelet.sock")
        self._server.start()

    def Register(self, request: Any, context: grpc.ServicerContext) -> Any:
        if self.refusals:
            self.refusals -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        channel = grpc.insecure_channel(f"unix:{self.folder}/{request.endpoint}")
        stub = services.DevicePluginStub(channel)
        options = stub.GetDevicePluginOptions(messages.Empty(), timeout=PATIENCE_S)
        assert not options.pre_start_required
        self._channels.append(channel)
        with self._changed:
            self.registered.append(request)
            self._changed.notify_all()
        watching = threading.Thread(target=self._watch, args=(stub,))
        watching.start()
        self._watching.append(watching)
        return messages.Empty()

    def _watch(self, stub: services.DevicePluginStub) -> None:
        with contextlib.suppress(grpc.RpcError):
            for told in stub.ListAndWatch(messages.Empty()):
                with self._changed:
                    self.ids = [device.ID for device in told.devices]
                    self.healths.append({device.health for device in told.devices})
                    self._changed.notify_all()
        with self._changed:
            self.ended_streams += 1
            self._changed.notify_all()

    def stub(self) -> services.DevicePluginStub:
        return services.DevicePluginStub(self._channels[-1])

    def hang_up(self) -> None:
        """End all calls, and stay."""
        for channel in self._channels:
            channel.close()

    def until(self, holds: Any) -> None:
        """Wait until something holds that is told here."""
        with self._changed:
            assert self._changed.wait_for(holds, PATIENCE_S)

    def close(self) -> None:
        """End as the kubelet does: its socket goes, and its connections."""
        self._server.stop(None).wait()
        for channel in self._channels:
            channel.close()
        for thread in self._watching:
            thread.join()


@contextlib.contextmanager
def kubelet(folder: Path, refusals: int = 0) -> Iterator[Kubelet]:
    running = Kubelet(folder, refusals)
    try:
        yield running
    finally:
        running.close()
