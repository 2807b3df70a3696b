"""A training set as a value and as a Parquet file that says what it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from causemesh.errors import Misdeclared
from services.features.offline.reading import TableRead

METADATA = "causemesh.training_set"
"""The key of a file's metadata: JSON."""


@dataclass(frozen=True)
class TrainingSet:
    """Rows, and what they were made from (JSON-ready)."""

    frame: pl.DataFrame
    about: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """As a Parquet file; `about` goes with it under METADATA."""
        self.frame.write_parquet(path, metadata={METADATA: json.dumps(self.about)})


def made_now(
    frame: pl.DataFrame, about: Mapping[str, Any], tables: Mapping[str, TableRead]
) -> TrainingSet:
    """A set with the time, its size and the tables of the lake that were read."""
    more = {
        "made_at": datetime.now(UTC).isoformat(),
        "rows": frame.height,
        "lake": {name: vars(table) for name, table in sorted(tables.items())},
    }
    return TrainingSet(frame, {**about, **more})


def about(path: Path) -> dict[str, Any]:
    """What a file of a training set says it was made from. Raises Misdeclared for another file."""
    told = pl.read_parquet_metadata(path).get(METADATA)
    if told is None:
        raise Misdeclared(f"{path} is no training set: it has no metadata {METADATA}")
    document: dict[str, Any] = json.loads(told)
    return document
