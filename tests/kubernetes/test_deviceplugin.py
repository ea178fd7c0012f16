"""The device plugin, and a kubelet that comes and goes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from trunkline import protocol
from trunkline.errors import SidecarUnavailable, Unauthorized

from sidecar.errors import ConfigError
from sidecar.kubernetes import deviceplugin
from sidecar.kubernetes.deviceplugin import DevicePlugin, Sockets, answers_hello
from sidecar.kubernetes.kubelet import deviceplugin_pb2 as messages
from tests.fakes import FakeSource, running_server
from tests.kubernetes.kubelet import kubelet
from tests.kubernetes.programs import ROOT, program
from tests.waiting import PATIENCE_S, until


class Node:
    """A plugin with a sidecar that answers as it is told, and counts how often it was asked."""

    def __init__(self, folder: Path) -> None:
        self.kubelet_dir = folder / "kubelet"
        self.socket = folder / "trunkline.sock"
        self.answers = True
        self.hello_count = 0
        self.socket.touch()
        self.sockets = Sockets(3, "/run/on-host", "http://trunkline:9470")
        self.plugin = DevicePlugin(self.sockets, self.kubelet_dir, str(self.socket), self._hello)

    def _hello(self, path: str) -> bool:
        assert path == str(self.socket)
        self.hello_count += 1
        return self.answers


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.plugin.close()


def test_sockets_are_registered_listed_and_given(node: Node) -> None:
    with kubelet(node.kubelet_dir) as found:
        node.plugin.look()
        (request,) = found.registered
        assert (request.version, request.endpoint, request.resource_name) == ("v1beta1", "trunkline.sock", "trunkline.dev/socket")
        found.until(lambda: found.healths == [{"Healthy"}])
        assert found.ids == ["socket-0", "socket-1", "socket-2"]
        two = [messages.ContainerAllocateRequest(devices_ids=[each]) for each in ("socket-0", "socket-2")]
        answer = found.stub().Allocate(messages.AllocateRequest(container_requests=two), timeout=PATIENCE_S)
        assert len(answer.container_responses) == 2
        for given in answer.container_responses:
            assert dict(given.envs) == {
                "TRUNKLINE_SOCKET": "/run/trunkline/trunkline.sock",
                "TRUNKLINE_URL": "http://trunkline:9470",
            }
            (mount,) = given.mounts
            assert (mount.container_path, mount.host_path, mount.read_only) == ("/run/trunkline", "/run/on-host", True)
        assert found.stub().PreStartContainer(messages.PreStartContainerRequest(), timeout=PATIENCE_S) is not None


@pytest.mark.parametrize("ids", [[], ["socket-3"], ["socket-0", "other"]])
def test_what_was_not_offered_is_not_given(node: Node, ids: list[str]) -> None:
    with kubelet(node.kubelet_dir) as found:
        node.plugin.look()
        request = messages.AllocateRequest(container_requests=[messages.ContainerAllocateRequest(devices_ids=ids)])
        with pytest.raises(grpc.RpcError) as raised:
            found.stub().Allocate(request, timeout=PATIENCE_S)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_nothing_is_registered_twice_with_one_kubelet(node: Node) -> None:
    with kubelet(node.kubelet_dir) as found:
        for _ in range(7):
            node.plugin.look()
        assert len(found.registered) == 1
        found.until(lambda: found.healths == [{"Healthy"}])
    # Of seven looks the first asked, and the fifth.
    assert node.hello_count == 2


def test_a_kubelet_that_comes_later_is_found(node: Node) -> None:
    node.plugin.look()
    with kubelet(node.kubelet_dir) as found:
        node.plugin.look()
        assert len(found.registered) == 1


def test_a_kubelet_that_is_not_ready_is_asked_again_and_told_of_once(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    with kubelet(node.kubelet_dir, refusals=2) as found:
        for count in (0, 0, 1, 1):
            node.plugin.look()
            assert len(found.registered) == count
    assert caplog.text.count("UNAVAILABLE: not yet") == 1


def test_a_kubelet_that_has_hung_up_is_asked_to_call_again(node: Node) -> None:
    with kubelet(node.kubelet_dir) as found:
        node.plugin.look()
        found.until(lambda: found.healths == [{"Healthy"}])
        found.hang_up()
        until(lambda: not node.sockets.is_watched())
        for _ in range(deviceplugin._LOOKS_UNWATCHED):
            node.plugin.look()
        assert len(found.registered) == 1
        node.plugin.look()
        assert len(found.registered) == 2
        found.until(lambda: found.healths == [{"Healthy"}] * 2)
        until(node.sockets.is_watched)
        for _ in range(2 * deviceplugin._LOOKS_UNWATCHED):
            node.plugin.look()
        assert len(found.registered) == 2


def test_with_each_kubelet_it_registers_once_more(node: Node) -> None:
    for _ in range(3):
        with kubelet(node.kubelet_dir) as found:
            node.plugin.look()
            node.plugin.look()
            assert len(found.registered) == 1
            found.until(lambda: found.healths == [{"Healthy"}])
        node.plugin.look()


def test_a_kubelet_that_was_away_for_no_look_is_another_one(node: Node) -> None:
    with kubelet(node.kubelet_dir):
        node.plugin.look()
    with kubelet(node.kubelet_dir) as found:
        node.plugin.look()
        assert len(found.registered) == 1


def test_a_folder_that_was_emptied_is_filled_again(node: Node) -> None:
    with kubelet(node.kubelet_dir):
        node.plugin.look()
    # As the kubelet does when it starts.
    shutil.rmtree(node.kubelet_dir)
    with kubelet(node.kubelet_dir) as found:
        node.plugin.look()
        found.until(lambda: found.healths == [{"Healthy"}])
        # Its own socket alone, under a kubelet that lives.
        (node.kubelet_dir / "trunkline.sock").unlink()
        node.plugin.look()
        found.until(lambda: len(found.healths) == 2)
        assert len(found.registered) == 2
        node.plugin.look()
        assert len(found.registered) == 2


def test_a_socket_that_another_left_behind_is_replaced(node: Node) -> None:
    node.kubelet_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(node.kubelet_dir / "trunkline.sock"))
    with kubelet(node.kubelet_dir) as found:
        node.plugin.look()
        found.until(lambda: found.healths == [{"Healthy"}])


def test_a_sidecar_that_is_down_makes_sockets_unhealthy_until_it_is_back(node: Node) -> None:
    with kubelet(node.kubelet_dir) as found:
        node.plugin.look()
        found.until(lambda: found.healths == [{"Healthy"}])
        node.socket.unlink()
        node.plugin.look()
        found.until(lambda: found.healths == [{"Healthy"}, {"Unhealthy"}])
        # Its socket is back before it answers.
        node.answers = False
        node.socket.touch()
        node.plugin.look()
        node.answers = True
        node.plugin.look()
        found.until(lambda: found.healths == [{"Healthy"}, {"Unhealthy"}, {"Healthy"}])
        assert len(found.registered) == 1


def test_a_sidecar_that_does_not_answer_any_more_is_noticed(node: Node) -> None:
    with kubelet(node.kubelet_dir) as found:
        node.plugin.look()
        node.answers = False
        for _ in range(deviceplugin._LOOKS_PER_HELLO):
            node.plugin.look()
        found.until(lambda: found.healths[-1:] == [{"Unhealthy"}])


def test_at_its_end_streams_end_and_nothing_is_left(node: Node) -> None:
    with kubelet(node.kubelet_dir) as found:
        node.plugin.look()
        found.until(lambda: bool(found.healths))
        node.plugin.close()
        found.until(lambda: found.ended_streams == 1)
    assert not (node.kubelet_dir / "trunkline.sock").exists()


def test_a_folder_that_cannot_be_written_to_is_told(node: Node) -> None:
    with kubelet(node.kubelet_dir):
        (node.kubelet_dir / "trunkline.sock").mkdir()
        with pytest.raises(ConfigError, match="mount the kubelet's folder"):
            node.plugin.look()


def test_what_cannot_go_on_ends_its_streams(node: Node) -> None:
    with kubelet(node.kubelet_dir) as found:
        node.plugin.look()
        found.until(lambda: bool(found.healths))
        (node.kubelet_dir / "trunkline.sock").unlink()
        (node.kubelet_dir / "trunkline.sock").mkdir()
        with pytest.raises(ConfigError):
            node.plugin.run(threading.Event(), 0.0)
        found.until(lambda: found.ended_streams == 1)


def test_a_sidecar_answers_hello(tmp_path: Path) -> None:
    assert not answers_hello(str(tmp_path / "none.sock"))
    with running_server(tmp_path, FakeSource()) as running:
        path = str(running.path)
        assert answers_hello(path)
    assert not answers_hello(path)


def test_to_be_refused_is_to_be_answered_and_silence_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deviceplugin, "_HELLO_S", 0.2)
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        assert not answers_hello(path)
        monkeypatch.setattr(deviceplugin, "_HELLO_S", 30.0)

        (tmp_path / "token").write_text("secret\n")
        monkeypatch.setenv("TRUNKLINE_TOKEN_FILE", str(tmp_path / "token"))
        tokens = []

        def refuse() -> None:
            refusal = Unauthorized("a token is demanded")
            # The first is the one that has gone.
            for _ in range(2):
                with listener.accept()[0] as asked, contextlib.suppress(BrokenPipeError):
                    hello = protocol.decode(asked.recv(protocol.MAX_FRAME_BYTES))
                    assert isinstance(hello, protocol.Hello)
                    tokens.append(hello.token)
                    asked.send(protocol.encode(protocol.Fault(0, refusal.code, refusal.message, False, {})))

        refusing = threading.Thread(target=refuse)
        refusing.start()
        assert answers_hello(path)
        refusing.join(PATIENCE_S)
        assert tokens == [b"", b"secret"]
    (tmp_path / "token").unlink()
    with pytest.raises(SidecarUnavailable, match="TRUNKLINE_TOKEN_FILE"):
        answers_hello(path)


def test_as_a_process_it_withdraws_when_told_and_is_replaced_when_killed(tmp_path: Path) -> None:
    directory = tmp_path / "kubelet"
    with running_server(tmp_path, FakeSource()) as running, kubelet(directory) as found:
        command = ["device-plugin", "--sockets", "2", "--socket", str(running.path), "--kubelet-dir", str(directory)]
        with program(tmp_path / "log", *command) as plugin:
            found.until(lambda: found.healths == [{"Healthy"}])
            assert plugin.stop(signal.SIGKILL) == -signal.SIGKILL
        found.until(lambda: found.ended_streams == 1)
        with program(tmp_path / "log", *command) as plugin:
            found.until(lambda: found.healths == [{"Healthy"}] * 2)
            assert plugin.stop() == 0
        found.until(lambda: found.ended_streams == 2)
        assert os.listdir(directory) == ["kubelet.sock"]
        assert [len(found.ids), len(found.registered)] == [2, 2]


def test_without_grpc_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['grpc'] = None; from sidecar.cli.main import main; main(['device-plugin'])"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=PATIENCE_S)
    assert (done.returncode, b"trunkline[kubernetes]" in done.stderr) == (1, True)
