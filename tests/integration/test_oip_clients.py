"""The Open Inference Protocol as its real clients speak it, against a real sidecar: Triton's, KServe's where it is installed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
import tritonclient.http as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException
from trunkline.client import Model
from trunkline.endpoint import Endpoint
from trunkline.pool import Pool

from sidecar.bundle import write_bundle
from sidecar.export import convert
from tests.bundles import write_adding_bundle
from tests.integration.test_admin_http import free_port
from tests.networks import network
from tests.nodes import until
from tests.sidecar_process import SidecarProcess, sidecar_process

Arrays = dict[str, NDArray[Any]]
DATATYPES = {"float32": "FP32", "int64": "INT64"}


class Counting(torch.nn.Module):
    """Takes and gives integers as well."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.nn.Buffer(torch.tensor([1, -(2**62), 3]))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ids + self.steps, ids.float() / 3


class Served:
    """A sidecar with models, and what its socket answers."""

    def __init__(self, running: SidecarProcess, port: int) -> None:
        self.running = running
        self.address = f"127.0.0.1:{port}"
        self.url = f"http://{self.address}"
        token = (running.run_dir / "admin.token").read_text().strip()
        self.administrator = {"Authorization": f"Bearer {token}"}
        self._pool = Pool(endpoint=Endpoint(str(running.socket)), credential=lambda: b"")

    def over_the_socket(self, name: str, inputs: Arrays) -> Arrays:
        asked = Model(name, self._pool)
        found = asked.call(inputs)
        return found if isinstance(found, dict) else {asked.signature.outputs[0].name: found}

    def close(self) -> None:
        self._pool.close()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Arrays]:
    found = {kind: network(kind).inputs(1) for kind in ("resnet", "bert")}
    return found | {"counting": {"ids": np.array([[5, -7, 2**40]])}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("oip")
    for kind in ("resnet", "bert"):
        made = network(kind).called(kind)
        write_bundle(folder / kind, made.bundle, made.blobs.items())
    packed = convert(Counting(), (torch.zeros(2, 3, dtype=torch.int64),), name="counting")
    write_bundle(folder / "counting", packed.bundle, packed.blobs)
    port = free_port()
    with sidecar_process(folder, "--admin-port", str(port)) as running:
        for kind in ("resnet", "bert", "counting"):
            running.admin.push(folder / kind)
        # Served in one form before that, and perhaps in another after, with other last bits.
        until(lambda: all(running.admin.get(f"models/{kind}")["tried"] for kind in ("resnet", "bert", "counting")))
        made_of = Served(running, port)
        yield made_of
        made_of.close()


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    made = triton.InferenceServerClient(served.address)
    yield made
    made.close()


@pytest.mark.parametrize("name", ["resnet", "bert", "counting"])
@pytest.mark.parametrize("binary", [True, False])
def test_triton_gets_what_the_socket_gives(
    served: Served, client: Any, inputs: dict[str, Arrays], name: str, binary: bool
) -> None:
    expected = served.over_the_socket(name, inputs[name])
    described = client.get_model_metadata(name)
    assert [tensor["name"] for tensor in described["inputs"]] == list(inputs[name])
    asked = []
    for tensor, array in zip(described["inputs"], inputs[name].values(), strict=True):
        asked.append(triton.InferInput(tensor["name"], list(array.shape), tensor["datatype"]))
        asked[-1].set_data_from_numpy(array, binary_data=binary)
    wanted = [triton.InferRequestedOutput(output, binary_data=binary) for output in expected]
    for version in ("", "1"):
        answer = client.infer(name, asked, model_version=version, outputs=wanted, request_id="7", timeout=20_000_000)
        assert answer.get_response()["id"] == "7"
        for output, array in expected.items():
            got = answer.as_numpy(output)
            assert (got.dtype, got.shape) == (array.dtype, array.shape)
            assert got.tobytes() == array.tobytes()
    if binary:
        # What the client sends when no outputs are named.
        answer = client.infer(name, asked)
        assert {output["name"] for output in answer.get_response()["outputs"]} == expected.keys()


def test_triton_looks_around(served: Served, client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("resnet")
    assert client.is_model_ready("resnet", "1")
    assert not client.is_model_ready("resnet", "2")
    assert not client.is_model_ready("none")
    assert client.get_server_metadata()["name"] == "trunkline"
    assert client.get_model_config("bert")["input"][0]["data_type"] == "TYPE_INT64"
    assert {entry["name"]: entry["state"] for entry in client.get_model_repository_index()} == dict.fromkeys(
        ("bert", "counting", "resnet"), "READY"
    )
    assert len(client.get_inference_statistics()["model_stats"]) == 3
    assert client.get_inference_statistics("bert")["model_stats"][0]["name"] == "bert"
    assert client.get_system_shared_memory_status() == []
    with pytest.raises(InferenceServerException, match="cannot register shared memory"):
        client.register_system_shared_memory("r", "/r", 64)
    with pytest.raises(InferenceServerException, match="administrator's token"):
        client.load_model("resnet")

    def is_unloaded() -> bool:
        try:
            client.unload_model("resnet", headers=served.administrator)
        except InferenceServerException as error:
            # The sidecar itself may be bringing it into another form.
            assert "is in use by" in error.message()
            return False
        return True

    until(is_unloaded)
    states = {entry["name"]: entry["state"] for entry in served.running.admin.get("models")["models"]}
    assert states["resnet"] == "stored"
    client.load_model("resnet", headers=served.administrator)
    with pytest.raises(InferenceServerException, match="no model 'none'") as caught:
        client.get_model_metadata("none")
    assert caught.value.status() == "404"


@pytest.mark.parametrize("name", ["resnet", "bert", "counting"])
@pytest.mark.parametrize("binary", [True, False])
def test_kserve_gets_what_the_socket_gives(served: Served, inputs: dict[str, Arrays], name: str, binary: bool) -> None:
    kserve = pytest.importorskip("kserve", reason="needs KServe's client: .venv/bin/pip install --group kserve")
    expected = served.over_the_socket(name, inputs[name])

    async def ask() -> Any:
        client = kserve.InferenceRESTClient(kserve.inference_client.RESTConfig(protocol="v2", retries=0))
        assert await client.is_server_live(served.url)
        assert await client.is_server_ready(served.url)
        assert await client.is_model_ready(served.url, name)
        asked = []
        for tensor, array in inputs[name].items():
            asked.append(kserve.InferInput(tensor, list(array.shape), DATATYPES[array.dtype.name]))
            asked[-1].set_data_from_numpy(array, binary_data=binary)
        outputs = [kserve.protocol.infer_type.RequestedOutput(output, parameters={"binary_data": binary}) for output in expected]
        request = kserve.InferRequest(name, asked, request_id="7", request_outputs=outputs)
        found = await client.infer(served.url, request, model_name=name)
        await client.close()
        return found

    answer = asyncio.run(ask())
    assert answer.id == "7"
    for output, array in expected.items():
        got = next(each for each in answer.outputs if each.name == output).as_numpy()
        assert got.dtype == array.dtype
        assert got.tobytes() == array.tobytes()


def test_the_bodies_that_kserve_sends_by_hand(served: Served) -> None:
    # As its client has written them; it is too large to be installed for every run.
    assert requests.get(f"{served.url}/v2/health/live", timeout=30).json()["live"] is True
    assert requests.get(f"{served.url}/v2/health/ready", timeout=30).json()["ready"] is True
    assert requests.get(f"{served.url}/v2/models/counting/ready", timeout=30).json()["ready"] is True
    body = {
        "id": "5b2d",
        "model_name": "counting",
        "inputs": [{"name": "ids", "shape": [1, 3], "datatype": "INT64", "data": [[5, -7, 2**40]]}],
    }
    answer = requests.post(f"{served.url}/v2/models/counting/infer", json=body, timeout=30).json()
    assert answer["id"] == "5b2d"
    assert answer["outputs"][0]["data"] == [6, -7 - 2**62, 2**40 + 3]


def test_triton_asks_for_versions(served: Served, client: Any, tmp_path: Path) -> None:
    for number in (1, 2):
        write_adding_bundle(tmp_path / str(number), "adding", [number, number])
        served.running.admin.push(tmp_path / str(number), version=str(number))
    served.running.admin.put("models/adding/release", {"split": {"1": 3, "2": 1}})
    x = triton.InferInput("x", [1, 2], "FP32")
    x.set_data_from_numpy(np.zeros((1, 2), np.float32))
    for version in ("1", "2"):
        assert client.is_model_ready("adding", version)
        assert client.get_model_metadata("adding", version)["versions"] == ["1", "2"]
        assert client.get_model_config("adding", version)["name"] == "adding"
        answer = client.infer("adding", [x], model_version=version)
        assert answer.get_response()["model_version"] == version
        assert answer.as_numpy("y").tolist() == [[int(version)] * 2]
    answers = [client.infer("adding", [x]) for _ in range(8)]
    drawn = [answer.get_response()["model_version"] for answer in answers]
    assert sorted(drawn) == ["1"] * 6 + ["2"] * 2
    assert [answer.as_numpy("y")[0, 0] for answer in answers] == [int(version) for version in drawn]
    assert not client.is_model_ready("adding", "9")
    with pytest.raises(InferenceServerException, match="no version 9 of adding"):
        client.infer("adding", [x], model_version="9")
    stats = client.get_inference_statistics("adding", "2")["model_stats"]
    assert [(each["name"], each["version"], each["inference_count"]) for each in stats] == [("adding", "2", 3)]
    index = [(each["name"], each["version"]) for each in client.get_model_repository_index() if each["name"] == "adding"]
    assert index == [("adding", "1"), ("adding", "2")]
    client.unload_model("adding", headers=served.administrator)
    client.load_model("adding", headers=served.administrator)
    served.running.admin.delete("models/adding")
    assert not client.is_model_ready("adding")
