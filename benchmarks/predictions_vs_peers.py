"""Predictions a second: inference over topics beside direct calls of the same Triton and FastAPI.

usage: python -m benchmarks.predictions_vs_peers [--rounds 5] [--records 120000]

The model is one of 150 boosted trees over 19 columns, the same ONNX file everywhere. Ours reads
tasks from Kafka and ends with one acknowledged prediction a task, causes and positions kept; the
others go from rows in memory to scores in memory. Every arm's scores must sum to the same.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import math
import socket
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from sklearn.ensemble import HistGradientBoostingClassifier
from sqlalchemy.ext.asyncio import create_async_engine
from threadpoolctl import threadpool_limits

from benchmarks.harness import (
    PEER_PYTHON,
    Arm,
    Figures,
    peer_versions,
    rated,
    rounds,
    run_command,
    save,
    show,
    table,
    versions,
)
from benchmarks.readings import Place, place
from causemesh.bus.base import Outbound
from causemesh.bus.kafka import KafkaBus
from causemesh.codec.decode import Decoder
from causemesh.codec.encode import RegistryEncoders
from causemesh.codec.registry import HttpRegistry
from causemesh.local.artefacts import KAFKA
from causemesh.log import LogReader, Span
from causemesh.migrations import migrate
from examples.flights import export
from services.inference.domain import ModelVersion
from services.inference.gateways import Triton
from services.inference.store import ModelStore

_HOME = Path(".causemesh-bench-predictions")
_PEERS = Path(__file__).parent / "peers"
_TASKS, _PREDICTIONS = "inference.tasks.realtime.v1", "inference.predictions.v1"
_COLUMNS, _UNIT, _MODEL = 19, 4_000, "late"
_SERVERS = ("kafka", "registry", "postgres", "triton")
Vectors = npt.NDArray[np.float32]


def model_and_vectors(rows: int) -> tuple[bytes, Vectors]:
    """A boosted-trees model, and rows for it."""
    rng = np.random.default_rng(7)
    vectors = rng.normal(size=(rows, _COLUMNS)).astype(np.float32)
    known = rng.normal(size=(20_000, _COLUMNS)).astype(np.float32)
    labels = (known[:, :5].sum(axis=1) + rng.normal(size=len(known)) > 0).astype(np.int64)
    classifier = HistGradientBoostingClassifier(
        max_iter=150, max_leaf_nodes=15, early_stopping=False, random_state=7
    )
    with threadpool_limits(1, user_api="openmp"):
        classifier.fit(known, labels)
    return export.gradient_boosting(classifier, _COLUMNS), vectors


class Bench:
    """The place, the model and the rows, and what every arm is checked by."""

    def __init__(self, where: Place, folder: Path, rows: int) -> None:
        self.where = where
        self.onnx, self.vectors = model_and_vectors(rows)
        self.model_file, self.vector_file = folder / "model.onnx", folder / "vectors.npy"
        self.model_file.write_bytes(self.onnx)
        np.save(self.vector_file, self.vectors)
        self.scores = export.score(self.onnx, self.vectors)
        content = hashlib.sha256(self.onnx).hexdigest()
        names = tuple(f"input.c{number}" for number in range(_COLUMNS))
        self.version = ModelVersion(_MODEL, 1, "realtime", names, (), content, None, [], {})

    async def load(self) -> None:
        """Put the model into Triton."""
        server = Triton(
            self.where.endpoints.triton_url, Path(self.where.endpoints.triton_models), 30.0
        )
        await server.load(self.version.deployment, self.onnx, _COLUMNS)
        await server.close()

    async def register(self) -> None:
        """Forget what inference has done, and make the version known to it."""
        await self.where.fresh_database("inference")
        engine = create_async_engine(self.where.endpoints.database("inference"))
        await migrate("inference", engine)
        store = ModelStore(engine)
        await store.add_artefact(self.version.artefact_sha256, self.onnx)
        await store.register(self.version, 0)
        await engine.dispose()

    async def fill(self) -> None:
        """Write one task a row."""
        bus = KafkaBus(self.where.endpoints.kafka_bootstrap)
        registry = HttpRegistry(self.where.endpoints.registry_url)
        producer = bus.producer("benchmark")
        topic = self.where.catalogue.topic(_TASKS)
        encoder = await RegistryEncoders(registry).encoder(topic.subject, topic.record)
        for frame in self.tasks():
            keys = [name.encode() for name in frame["request_id"].to_list()]
            await producer.send([Outbound(_TASKS, 0, keys, encoder.encode(frame))])
        await producer.close()
        await registry.close()
        await bus.close()

    def tasks(self) -> Iterator[pl.DataFrame]:
        """The rows as features hands them to inference."""
        at = pl.lit(1_767_225_600_000_000).cast(pl.Datetime("us", "UTC"))
        for start in range(0, len(self.vectors), _UNIT):
            part = self.vectors[start : start + _UNIT]
            numbers = np.arange(start, start + len(part))
            causes = [
                {"topic": "inference.requests.v1", "partition": 0, "position": n, "index": 0,
                 "origin": None}
                for n in numbers.tolist()
            ]  # fmt: skip
            yield pl.DataFrame(
                {
                    "event_id": [f"00000000-0000-5000-8000-{n:012d}" for n in numbers],
                    "tenant_id": pl.Series(numbers % 100).cast(pl.String),
                    "cause": causes,
                    "request_id": pl.Series(numbers).cast(pl.String),
                    "vector": [row.tobytes() for row in part],
                }
            ).with_columns(
                at.alias("occurred_at"),
                at.alias("features_as_of"),
                pl.lit(_MODEL).alias("model"),
                pl.lit(1, pl.Int32).alias("version"),
                pl.lit(None, pl.String).alias("failure"),
                pl.lit(None, pl.Datetime("us", "UTC")).alias("expires_at"),
            )

    async def ends(self) -> Any:
        """Where the predictions end now."""
        return await self._log(lambda log: log.ends([_PREDICTIONS]))

    async def predicted(self, before: Any) -> dict[str, float]:
        """How many rows were predicted since `before`, and the sum of their scores."""

        async def read(log: LogReader) -> dict[str, float]:
            now = await log.ends([_PREDICTIONS])
            spans = {source: Span(before[source].last, span.last) for source, span in now.items()}
            frames = [batch.frame async for batch in log.read(spans)]
            whole = pl.concat(frames).filter(pl.col("outcome") == "predicted")
            return {"count": whole["request_id"].n_unique(), "sum": float(whole["score"].sum())}

        return dict(await self._log(read))

    async def _log(self, ask: Any) -> Any:
        bus = KafkaBus(self.where.endpoints.kafka_bootstrap)
        registry = HttpRegistry(self.where.endpoints.registry_url)
        try:
            return await ask(LogReader(bus, self.where.catalogue, Decoder(registry)))
        finally:
            await registry.close()
            await bus.close()

    def checked(self, figures: Figures, rows: int) -> Figures:
        """Figures with rates. Raises RuntimeError when the scores are not the model's."""
        expected = float(self.scores[:rows].sum())
        if not math.isclose(figures["sum"], expected, rel_tol=1e-5):
            raise RuntimeError(f"scores sum to {figures['sum']}, not {expected}")
        return rated({name: figures[name] for name in figures.keys() - {"sum", "count"}})


def ours(bench: Bench) -> Figures:
    """The inference service as it ships, from an empty database."""
    asyncio.run(bench.register())
    before = asyncio.run(bench.ends())
    rows = len(bench.vectors)
    argv = [sys.executable, "-m", "benchmarks.service_run", "inference"]
    more = ["--group", "inference-realtime", "--records", str(rows), "--warm", str(rows // 6)]
    figures = run_command([*argv, *more], bench.where.environment())
    found = asyncio.run(bench.predicted(before))
    if found["count"] != rows:
        raise RuntimeError(f"{found['count']} of {rows} tasks were predicted")
    return bench.checked({**figures, **found}, rows)


def direct(bench: Bench, rows: int, batch: int, callers: int) -> Figures:
    """tritonclient alone."""
    where = [bench.where.endpoints.triton_url, bench.version.deployment, str(bench.vector_file)]
    settings = [str(rows), str(batch), str(callers)]
    argv: list[str | Path] = [PEER_PYTHON, _PEERS / "triton_direct.py", *where, *settings]
    return bench.checked(run_command(argv), rows)


def fastapi(bench: Bench, rows: int, batch: int, callers: int) -> Figures:
    """A FastAPI endpoint over ONNX Runtime."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [PEER_PYTHON, _PEERS / "fastapi_onnx.py", bench.model_file, bench.vector_file]
    return bench.checked(run_command([*argv, str(rows), str(batch), str(callers), str(port)]), rows)


def arms(bench: Bench) -> list[Arm]:
    """All sides; those that take a row a call score fewer rows."""
    rows = len(bench.vectors)
    few = rows // 60
    return [
        Arm(
            "causemesh inference",
            partial(ours, bench),
            {"rows a call": "at most 256", "calls at once": 4, "commit": "every 0.2 s"},
        ),
        Arm(
            "Triton direct, a row a call, one caller",
            partial(direct, bench, few, 1, 1),
            {"rows a call": 1, "calls at once": 1, "rows": few},
        ),
        Arm(
            "Triton direct, a row a call, 32 callers",
            partial(direct, bench, few * 5, 1, 32),
            {"rows a call": 1, "calls at once": 32, "rows": few * 5},
        ),
        Arm(
            "Triton direct, 256 rows a call",
            partial(direct, bench, rows, 256, 4),
            {"rows a call": 256, "calls at once": 4},
        ),
        Arm(
            "FastAPI + ONNX, a row a call, 32 callers",
            partial(fastapi, bench, few * 5, 1, 32),
            {"rows a call": 1, "calls at once": 32, "rows": few * 5, "processes": 1},
        ),
        Arm(
            "FastAPI + ONNX, 256 rows a call",
            partial(fastapi, bench, rows, 256, 4),
            {"rows a call": 256, "calls at once": 4, "processes": 1},
        ),
    ]


def main() -> None:
    """Fill the tasks, run the rounds, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--records", type=int, default=120_000)
    parser.add_argument("--only", help="arms whose name contains this; nothing is written")
    told = parser.parse_args()
    with place(_HOME, _SERVERS) as where, tempfile.TemporaryDirectory() as folder:
        bench = Bench(where, Path(folder), told.records)
        asyncio.run(bench.load())
        asyncio.run(bench.fill())
        chosen = [arm for arm in arms(bench) if (told.only or "") in arm.name]
        found = rounds(chosen, told.rounds)
    show(chosen, found)
    if told.only is None:
        names = ("tritonclient", "fastapi", "uvicorn", "onnxruntime", "orjson", "aiohttp")
        of = {**versions("polars", "aiokafka"), **peer_versions(*names), "kafka": KAFKA}
        about = {
            "rows": told.records,
            "model": "150 boosted trees, 19 columns",
            "rounds": told.rounds,
        }
        save("predictions", {"arms": table(chosen, found)}, about=about, of=of)


if __name__ == "__main__":
    main()
