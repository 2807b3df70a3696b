"""The embedded Triton runs ONNX models, isolates bad requests and survives kill -9."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import onnx
import psutil
import pytest
from onnx import TensorProto, helper
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from causemesh.local import Cluster
from causemesh.triton_models import write_model
from tests.triton_metrics import TRITON

pytestmark = pytest.mark.servers

Rows = npt.NDArray[np.float32]
TABLE_SIZE = 4


def _graph(
    nodes: list[onnx.NodeProto], constants: dict[str, npt.NDArray[Any]], *outputs: str
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = helper.make_opsetid("", 17)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString())


def _sigmoid(a: float, b: float) -> bytes:
    """score = sigmoid(a + b * x0), a single output [rows, 1]."""
    weights = np.array([[b], [0], [0]], np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "b", "a"], ["linear"]),
        helper.make_node("Sigmoid", ["linear"], ["s"]),
    ]
    return _graph(nodes, {"b": weights, "a": np.array([a], np.float32)}, "s")


def _lookup() -> bytes:
    """probabilities = [1 - table[x0], table[x0]]; ONNX Runtime raises for an x0 outside it."""
    table = np.linspace(0, 0.75, TABLE_SIZE, dtype=np.float32)
    nodes = [
        helper.make_node("Gather", ["x", "column"], ["x0"], axis=1),
        helper.make_node("Cast", ["x0"], ["row"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "row"], ["probabilities"], axis=0),
    ]
    constants = {"table": np.stack([1 - table, table], axis=1), "column": np.array(0)}
    return _graph(nodes, constants, "x0", "probabilities")


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("triton"), ("triton",))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture
def models(triton: Cluster) -> Path:
    return Path(triton.endpoints.triton_models)


@pytest.fixture
async def client(triton: Cluster) -> AsyncIterator[InferenceServerClient]:
    async with InferenceServerClient(triton.endpoints.triton_url) as client:
        yield client


async def _scores(client: InferenceServerClient, model: str, rows: Rows) -> Rows:
    features = InferInput("features", list(rows.shape), "FP32").set_data_from_numpy(rows)
    found: Rows = (await client.infer(model, [features])).as_numpy("score")
    return found


def _rows(*first_column: float) -> Rows:
    return np.array([[x0, 0, 0] for x0 in first_column], np.float32)


async def test_two_models_answer_batches(client: InferenceServerClient, models: Path) -> None:
    write_model(models, "sigmoid", _sigmoid(0.5, -2.0), inputs=3)
    write_model(models, "lookup", _lookup(), inputs=3)
    await client.load_model("sigmoid")
    await client.load_model("lookup")
    x0 = np.linspace(-3, 3, 256, dtype=np.float32)
    scores = await _scores(client, "sigmoid", _rows(*x0))
    assert scores.shape == (256, 1)
    np.testing.assert_allclose(scores[:, 0], 1 / (1 + np.exp(-0.5 + 2 * x0)), rtol=1e-4)
    assert (await _scores(client, "lookup", _rows(3, 0, 1))).tolist() == [[0.75], [0], [0.25]]


async def test_the_metrics_that_dashboards_show_are_there(
    client: InferenceServerClient, models: Path
) -> None:
    write_model(models, "metered", _sigmoid(0, 1), inputs=3)
    await client.load_model("metered")
    await _scores(client, "metered", _rows(0, 1))
    port = json.loads((models.parents[1] / "ports.json").read_text())["triton_metrics"]
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
    exported = {line.partition("{")[0] for line in text.splitlines() if 'model="metered"' in line}
    assert exported >= TRITON, TRITON - exported


async def _outcomes(client: InferenceServerClient, model: str) -> tuple[list[bool], list[bool]]:
    """Who failed, of 64 concurrent requests: the sound ones, and those ONNX Runtime cannot run."""
    bad = [n % 8 == 7 for n in range(64)]
    answers = await asyncio.gather(
        *(_scores(client, model, _rows(TABLE_SIZE + 9 if one else 1)) for one in bad),
        return_exceptions=True,
    )
    for answer in answers:
        if isinstance(answer, BaseException):
            assert isinstance(answer, InferenceServerException), answer
            assert "out of data bounds" in str(answer)
        else:
            assert answer.tolist() == [[0.25]]
    failed = [isinstance(answer, BaseException) for answer in answers]
    return (
        [one for one, is_bad in zip(failed, bad, strict=True) if not is_bad],
        [one for one, is_bad in zip(failed, bad, strict=True) if is_bad],
    )


async def test_a_request_that_fails_fails_alone(
    client: InferenceServerClient, models: Path
) -> None:
    write_model(models, "isolated", _lookup(), inputs=3)
    await client.load_model("isolated")
    sound, bad = await _outcomes(client, "isolated")
    assert not any(sound)
    assert all(bad)


async def test_without_isolation_one_request_fails_its_neighbours(
    client: InferenceServerClient, models: Path
) -> None:
    """The control arm: the requests of the test above do share runs."""
    write_model(models, "unprotected", _lookup(), inputs=3)
    source = models / "unprotected" / "1" / "model.py"
    isolation = "return [self._alone(part) for part in parts]"
    assert isolation in source.read_text()
    source.write_text(source.read_text().replace(isolation, "raise"))
    await client.load_model("unprotected")
    sound, bad = await _outcomes(client, "unprotected")
    assert any(sound)
    assert all(bad)


async def test_a_request_of_the_wrong_width_is_refused_alone(
    client: InferenceServerClient, models: Path
) -> None:
    write_model(models, "narrow", _sigmoid(0, 1), inputs=3)
    await client.load_model("narrow")
    wide = np.zeros((1, 5), np.float32)
    answers = await asyncio.gather(
        _scores(client, "narrow", _rows(0)),
        _scores(client, "narrow", wide),
        _scores(client, "narrow", _rows(0)),
        return_exceptions=True,
    )
    assert isinstance(answers[1], InferenceServerException)
    assert [one.tolist() for one in (answers[0], answers[2]) if isinstance(one, np.ndarray)] == [
        [[0.5]],
        [[0.5]],
    ]


async def test_a_graph_with_no_score_does_not_load(
    client: InferenceServerClient, models: Path
) -> None:
    nodes = [helper.make_node("Sigmoid", ["x"], ["a"]), helper.make_node("Neg", ["x"], ["b"])]
    write_model(models, "vague", _graph(nodes, {}, "a", "b"), inputs=3)
    with pytest.raises(InferenceServerException, match="it needs one named probabilities"):
        await client.load_model("vague")


async def test_a_new_version_of_a_model_takes_over_when_loaded(
    client: InferenceServerClient, models: Path
) -> None:
    write_model(models, "changing", _sigmoid(0, 0), inputs=3)
    await client.load_model("changing")
    write_model(models, "changing", _sigmoid(50, 0), inputs=3)
    assert (await _scores(client, "changing", _rows(0))).tolist() == [[0.5]]
    await client.load_model("changing")
    assert (await _scores(client, "changing", _rows(0))).tolist() == [[1.0]]


async def _load_and_score(cluster: Cluster) -> list[list[float]]:
    async with InferenceServerClient(cluster.endpoints.triton_url) as client:
        await client.load_model("kept")
        scores: list[list[float]] = (await _scores(client, "kept", _rows(0))).tolist()
        return scores


def _shared_memory(server: psutil.Process) -> set[Path]:
    """The regions of a live server's models, by the prefix it was given."""
    (flag,) = (part for part in server.cmdline() if "shm-region-prefix-name=" in part)
    return set(Path("/dev/shm").glob(f"{flag.rsplit('=', 1)[-1]}*"))


async def test_it_survives_a_crash(triton: Cluster, models: Path) -> None:
    write_model(models, "kept", _sigmoid(0, 1), inputs=3)
    assert await _load_and_score(triton) == [[0.5]]
    (before,) = triton.status()
    assert before.rss_bytes > 10 << 20

    triton.kill("triton")
    assert triton.status()[0].pid is None
    assert triton.up() == triton.endpoints
    assert triton.status()[0].pid not in {None, before.pid}
    assert await _load_and_score(triton) == [[0.5]]


@pytest.mark.parametrize("then", [Cluster.up, Cluster.down])
async def test_model_processes_do_not_outlive_a_killed_server(
    triton: Cluster, models: Path, then: Callable[[Cluster], object]
) -> None:
    triton.up()
    write_model(models, "kept", _sigmoid(0, 1), inputs=3)
    assert await _load_and_score(triton) == [[0.5]]
    stubs = psutil.Process(triton.status()[0].pid).children(recursive=True)
    for stub in stubs:
        stub.suspend()  # as one that hangs: it cannot end by itself
    triton.kill("triton")
    # The control arm: they are still there.
    assert stubs
    assert all(stub.is_running() for stub in stubs)

    then(triton)
    _, alive = psutil.wait_procs(stubs, timeout=5)
    assert alive == []
    triton.up()
    assert await _load_and_score(triton) == [[0.5]]


async def test_a_model_sends_no_usage_data(triton: Cluster, models: Path) -> None:
    """Left on, ONNX Runtime's reporting shows as an open onnxruntime.db and sockets of its own."""
    write_model(models, "kept", _sigmoid(0, 1), inputs=3)
    assert await _load_and_score(triton) == [[0.5]]
    stubs = psutil.Process(triton.status()[0].pid).children(recursive=True)
    assert stubs
    for stub in stubs:
        assert [file.path for file in stub.open_files() if "onnxruntime.db" in file.path] == []
        assert stub.net_connections("inet") == []


async def test_a_start_frees_what_a_crash_of_the_machine_left(
    triton: Cluster, models: Path
) -> None:
    write_model(models, "kept", _sigmoid(0, 1), inputs=3)
    assert await _load_and_score(triton) == [[0.5]]
    server = psutil.Process(triton.status()[0].pid)
    regions = _shared_memory(server)
    stubs = server.children(recursive=True)
    for process in (*stubs, server):
        process.kill()
    psutil.wait_procs([server, *stubs], timeout=10)
    # The control arm: with its processes gone, nothing else frees them.
    assert regions
    assert all(region.exists() for region in regions)

    triton.up()
    assert not any(region.exists() for region in regions)
    assert await _load_and_score(triton) == [[0.5]]


def test_a_stop_leaves_nothing(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, ("triton",))
    try:
        cluster.up()
        pid = cluster.status()[0].pid
        assert pid is not None
        server = psutil.Process(pid)
        models = str(tmp_path / "triton" / "models")
        assert cluster.endpoints.environment()["CAUSEMESH_TRITON_MODELS"] == models
        listening = [one.laddr for one in server.net_connections("inet") if one.status == "LISTEN"]
        assert len(listening) == 2  # gRPC and metrics
        assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    finally:
        cluster.down()
    assert [status.pid for status in cluster.status()] == [None]
    assert not server.is_running()
