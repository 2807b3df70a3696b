"""causemesh lake: look into the data lake, and keep it in order."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from causemesh.catalogue import Catalogue
from causemesh.cli.context import settings_at
from causemesh.cli.output import Output
from causemesh.errors import Misdeclared
from causemesh.lake import require_libraries
from causemesh.lake.settings import lake_settings
from causemesh.local.mesh import mesh_of

if TYPE_CHECKING:  # the extra may not be installed
    from causemesh.lake.reading import Lake
    from causemesh.lake.upkeep import UpkeepLimits

app = typer.Typer(
    help="Look into the data lake: every topic as Iceberg tables, kept in order.",
    no_args_is_help=True,
)
Home = Annotated[
    Path,
    typer.Option("--home", envvar="CAUSEMESH_HOME", help="Folder of the local mesh's data."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Name = Annotated[str, typer.Argument(help="A table (decoded.x), a topic or an event type.")]
Maybe = Annotated[
    str | None, typer.Argument(help="A table, a topic or an event type; all tables if left out.")
]
HOME = Path(".causemesh")


def lake_at(home: Path) -> Lake:
    """The lake of the mesh under `home`, else of the CAUSEMESH_* environment.

    Raises Misdeclared when the extra is missing or no lake is told of.
    """
    require_libraries()
    from causemesh.lake.reading import Lake  # noqa: PLC0415 - an extra

    mesh = mesh_of(home)
    environment: Mapping[str, str] = os.environ if mesh is None else mesh.environment()
    settings = settings_at(home)
    projects = [settings.project] if settings.project else []
    catalogue = Catalogue.load(projects, partitions=settings.partitions)
    return Lake.open(lake_settings(environment), catalogue, settings.project)


@app.command()
def tables(home: Home = HOME, as_json: Json = False) -> None:
    """Every table: its records, files, snapshots, and before which event time it is whole."""
    with lake_at(home) as lake:
        Output(as_json=as_json).rows("Lake", lake.overview())


@app.command()
def snapshots(name: Name, home: Home = HOME, as_json: Json = False) -> None:
    """The snapshots of a table that can still be read, the oldest first."""
    with lake_at(home) as lake:
        Output(as_json=as_json).rows(name, lake.snapshots(name))


@app.command()
def sql(
    statement: Annotated[str, typer.Argument(help='Such as "SELECT count(*) FROM decoded.x".')],
    at: Annotated[
        datetime | None, typer.Option(help="As the tables were at this instant, UTC.")
    ] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Ask the tables a question in SQL (DuckDB): raw.x, decoded.x and curated.x, read in place."""
    require_libraries()
    from causemesh.lake.sql import query, rows_of  # noqa: PLC0415 - an extra

    with lake_at(home) as lake:
        answer = query(lake, statement, at=at.replace(tzinfo=UTC) if at else None)
    Output(as_json=as_json).rows("Answer", rows_of(answer))


@app.command()
def compact(
    name: Maybe = None,
    files: Annotated[
        int, typer.Option(min=2, help="So many small files of a tenant and day are rewritten.")
    ] = 4,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Rewrite many small files of a tenant and day as one; readers and writers go on."""
    out = Output(as_json=as_json)
    require_libraries()
    from causemesh.lake import upkeep  # noqa: PLC0415 - an extra

    limits = upkeep.UpkeepLimits(small_files=files)
    rows = []
    with lake_at(home) as lake:
        for table in _chosen(lake, name):
            done = upkeep.compact(lake.catalog, table, limits, partial(out.progress, table))
            rows.append({"table": table, **vars(done)})
    out.rows("Compacted", rows)


@app.command()
def expire(  # noqa: PLR0917 - typer has no other way
    name: Maybe = None,
    snapshot_days: Annotated[
        float, typer.Option(min=0, help="Snapshots stay readable for so long.")
    ] = 3.0,
    keep: Annotated[int, typer.Option(min=1, help="And never fewer than so many.")] = 10,
    orphan_hours: Annotated[
        float,
        typer.Option(min=1, help="Files that belong to no snapshot are removed when so old."),
    ] = 24.0,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Take out days past their retention, forget old snapshots, remove files of no snapshot."""
    out = Output(as_json=as_json)
    require_libraries()
    from causemesh.lake.upkeep import UpkeepLimits  # noqa: PLC0415 - an extra

    limits = UpkeepLimits(
        snapshot_s=snapshot_days * 86_400, snapshots=keep, orphan_s=orphan_hours * 3_600
    )
    rows = []
    with lake_at(home) as lake:
        for table in _chosen(lake, name):
            out.progress(table, "expiring")
            rows.append({"table": table, **_expired(lake, table, limits)})
    out.rows("Expired", rows)


def _expired(lake: Lake, table: str, limits: UpkeepLimits) -> dict[str, Any]:
    from causemesh.lake import upkeep  # noqa: PLC0415 - an extra

    return {
        "records": upkeep.retain(lake.catalog, lake.definition.table(table)),
        "snapshots": upkeep.expire(lake.catalog, table, limits),
        "orphans": upkeep.sweep(lake.catalog, table, limits),
    }


def _chosen(lake: Lake, name: str | None) -> list[str]:
    there = [definition.identifier for definition, _ in lake.tables()]
    if name is None:
        return there
    wanted = lake.definition.table(name).identifier
    if wanted not in there:
        raise Misdeclared(f"{wanted} is not there yet; nothing was written to it")
    return [wanted]
