"""A lake on local files, filled with rows at once instead of by its writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from causemesh.catalogue import Catalogue
from causemesh.codec.columns import frame_schema
from causemesh.lake.commits import Change, commit
from causemesh.lake.definitions import LakeDefinition, define_lake
from causemesh.lake.opening import open_catalog
from causemesh.lake.progress import PartitionProgress, TableProgress
from causemesh.lake.reading import Lake
from causemesh.lake.rows import table_columns
from causemesh.lake.settings import LakeSettings
from causemesh.lake.tables import ensure, write
from services.features.domain.vectors import Vectors

FOREVER_US = 2**62


def settings_of(folder: Path) -> LakeSettings:
    return LakeSettings(
        catalog=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}/tables"
    )


def records(catalogue: Catalogue, topic: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Rows as a table of the decoded zone has them: every column of the record (null where `frame`
    lacks it), and a place in the log by number unless it has one."""
    schema = frame_schema(catalogue.topic(topic).record)
    columns = [
        (frame[name] if name in frame.columns else pl.repeat(None, frame.height, eager=True))
        .cast(dtype)
        .alias(name)
        for name, dtype in schema.items()
    ]
    numbers = np.arange(frame.height)
    place = {"_partition": np.zeros(frame.height, np.int32), "_position": numbers}
    more = [
        frame[name] if name in frame.columns else pl.Series(name, values)
        for name, values in place.items()
    ]
    return pl.DataFrame([*columns, *more]).with_columns(
        pl.lit(0, pl.Int64).cast(pl.Datetime("us", "UTC")).alias("_appended_at")
    )


def fill(
    folder: Path,
    catalogue: Catalogue,
    frames: Mapping[str, pl.DataFrame],
    *,
    whole_before_us: int = FOREVER_US,
) -> None:
    """Write records of topics to their tables; all are whole before one time."""
    definition = LakeDefinition(define_lake(catalogue, None).tables)
    catalog = open_catalog(settings_of(folder))
    for topic, frame in frames.items():
        (decoded,) = (one for one in definition.of_topic(topic) if one.zone == "decoded")
        table = ensure(catalog, decoded, table_columns(decoded, catalogue.topic(topic)))
        rows = records(catalogue, topic, frame)
        files = write(table, rows) if rows.height else []
        promises = [["inbox", 0, whole_before_us]]
        progress = TableProgress({0: PartitionProgress(1, 2**40, [], promises)})
        commit(catalog, decoded.identifier, lambda _, before, p=progress, f=files: Change(p, f))
    catalog.close()


def lake_of(folder: Path, catalogue: Catalogue) -> Lake:
    return Lake.open(settings_of(folder), catalogue, None)


def matrix_of(frame: pl.DataFrame, names: list[str]) -> Vectors:
    return np.stack([frame[name].to_numpy() for name in names], axis=1)
