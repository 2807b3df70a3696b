"""Feast: 50 features for 100 entities by its own `get_online_features`.

usage: python feast_join.py sqlite|redis VALUES.parquet FOLDER JOINS [REDIS_PORT]

VALUES has the column `k` and the features. They are written to the online store by Feast; then
random entities are asked for, JOINS times, and every answer must be what was written. Prints one
JSON object: milliseconds by the wall and of this process's processor.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

# Nothing leaves this machine; Feast asks before its first import only.
os.environ["FEAST_USAGE"] = "False"

import numpy as np
import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource
from feast.repo_config import RepoConfig
from feast.types import Float32
from feast.value_type import ValueType

_ROWS = 100
_WARM = 20
_PART = 2_000  # entities in one write


def store_in(folder: Path, kind: str, port: str) -> FeatureStore:
    """A Feast store of its own."""
    online = {
        "sqlite": {"type": "sqlite", "path": str(folder / "online.db")},
        "redis": {"type": "redis", "connection_string": f"127.0.0.1:{port}"},
    }[kind]
    config = RepoConfig(
        project="join",
        provider="local",
        registry=str(folder / "registry.db"),
        online_store=online,
        offline_store={"type": "file"},
        entity_key_serialization_version=3,
    )
    return FeatureStore(config=config)


def main() -> None:
    """Fill the store, ask, compare, tell."""
    kind, values, folder, joins, *port = sys.argv[1:]
    written = pd.read_parquet(values)
    names = [name for name in written.columns if name != "k"]
    written["event_timestamp"] = datetime.now(UTC)
    offline = Path(folder) / "offline.parquet"
    written.head(1).to_parquet(offline)
    store = store_in(Path(folder), kind, *(port or ["0"]))
    entity = Entity(name="k", join_keys=["k"], value_type=ValueType.STRING)
    view = FeatureView(
        name="v",
        entities=[entity],
        ttl=timedelta(0),
        schema=[Field(name=name, dtype=Float32) for name in names],
        source=FileSource(path=str(offline), timestamp_field="event_timestamp"),
    )
    store.apply([entity, view])
    for start in range(0, len(written), _PART):
        store.write_to_online_store("v", written.iloc[start : start + _PART])
    truth = written[names].to_numpy(np.float32)
    keys, rng = written["k"].tolist(), np.random.default_rng(3)
    asked = [f"v:{name}" for name in names]
    took, spent = [], []
    for _ in range(int(joins) + _WARM):
        at = rng.integers(0, len(keys), _ROWS)
        rows = [{"k": keys[one]} for one in at.tolist()]
        cpu, began = time.process_time(), time.perf_counter()
        answer = store.get_online_features(features=asked, entity_rows=rows)
        took.append(time.perf_counter() - began)
        spent.append(time.process_time() - cpu)
        found = answer.to_dict()
        matrix = np.array([found[name] for name in names], np.float32).T
        if not np.array_equal(matrix, truth[at], equal_nan=True):
            raise RuntimeError("Feast answered something else than was written")
    ms, cpu_ms = np.array(took[_WARM:]) * 1e3, np.array(spent[_WARM:]) * 1e3
    figures = {
        "joins_per_second": 1e3 / ms.mean(),
        "p50_ms": np.percentile(ms, 50),
        "p99_ms": np.percentile(ms, 99),
        "cpu_ms": cpu_ms.mean(),
    }
    print(json.dumps({"figures": figures}), flush=True)


if __name__ == "__main__":
    main()
