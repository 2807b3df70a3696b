"""Iceberg tables of the lake: made, widened, and filled with Parquet files."""

from __future__ import annotations

import polars as pl
import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import (
    CommitFailedException,
    NamespaceAlreadyExistsError,
    NoSuchTableError,
    TableAlreadyExistsError,
    ValidationError,
)
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.transforms import DayTransform, IdentityTransform

from causemesh.errors import Misdeclared
from causemesh.lake.definitions import TableDefinition
from causemesh.lake.files import FileWriter

TENANT, DAY = "tenant_id", "occurred_at_day"
TOPIC_PROPERTY = "causemesh.topic"
NO_RETRIES = "commit.retry.num-retries"
_PROPERTIES = {
    # pyiceberg repeats a commit that lost a race on top of the winner, as it stands: that would
    # let a replaced writer through. `commits` repeats it itself, after looking at the epoch again.
    NO_RETRIES: "0",
    "write.parquet.compression-codec": "zstd",
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "20",
}


def load(catalog: Catalog, identifier: str) -> Table | None:
    """The table as it is now; None when there is none."""
    try:
        return catalog.load_table(identifier)
    except NoSuchTableError:
        return None


def ensure(catalog: Catalog, definition: TableDefinition, columns: pl.Schema) -> Table:
    """The table, made or given the columns it lacks.

    Raises Misdeclared when a column changed its type.
    """
    table = load(catalog, definition.identifier)
    if table is None:
        _create_namespace(catalog, definition.zone)
        properties = {**_PROPERTIES, TOPIC_PROPERTY: definition.topic}
        try:
            with (
                catalog.create_table_transaction(
                    definition.identifier, schema=_arrow(columns), properties=properties
                ) as making,
                making.update_spec() as spec,
            ):
                spec.add_field(TENANT, IdentityTransform(), TENANT)
                spec.add_field("occurred_at", DayTransform(), DAY)
            return catalog.load_table(definition.identifier)
        except TableAlreadyExistsError:  # by another process, just now
            table = catalog.load_table(definition.identifier)
    return widen(table, columns)


def widen(table: Table, columns: pl.Schema) -> Table:
    """Add the columns (also those inside of structs) that the table lacks.

    Columns that are only in the table stay, and are null in new rows. Raises Misdeclared when a
    column changed its type.
    """
    wanted = _arrow(columns)
    while True:
        try:
            with table.update_schema() as update:
                update.union_by_name(wanted)
            return table
        except CommitFailedException:  # another process widened it first
            table.refresh()
        except (ValueError, ValidationError) as error:
            raise Misdeclared(
                f"{'.'.join(table.name())}: {error}; a table keeps the type of its columns: give"
                " the column another name"
            ) from None


def write(table: Table, frame: pl.DataFrame) -> list[DataFile]:
    """The rows as Parquet files, one a tenant and day; nobody sees them before a commit.

    A file without a commit is an orphan: `upkeep` sweeps it.
    """
    return FileWriter(table).write(frame)


def _create_namespace(catalog: Catalog, name: str) -> None:
    try:
        catalog.create_namespace_if_not_exists(name)
    except NamespaceAlreadyExistsError:
        return


def _arrow(columns: pl.Schema) -> pa.Schema:
    """All columns are nullable: one may come later, and a table outlives many versions."""
    return pl.DataFrame(schema=columns).to_arrow().schema
