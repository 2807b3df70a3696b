"""The commands that make training sets and describe them."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import polars as pl
import typer
from polars.exceptions import PolarsError

from causemesh.cli.context import settings_at
from causemesh.cli.lake import lake_at
from causemesh.cli.output import Output
from causemesh.errors import Misdeclared
from causemesh.lake.reading import Lake
from causemesh.lake.sql import query
from services.features.offline.definitions import Definitions
from services.features.offline.logged import Logged, logged_training_set
from services.features.offline.sets import TrainingSet, about
from services.features.offline.training import training_set

app = typer.Typer(
    help="Training sets out of the lake.", no_args_is_help=True, pretty_exceptions_enable=False
)
Home = Annotated[
    Path,
    typer.Option("--home", envvar="CAUSEMESH_HOME", help="Folder of the local mesh's data."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Out = Annotated[Path, typer.Option(help="The Parquet file to write.")]
HOME = Path(".causemesh")


@app.command("training-set")
def point_in_time(  # noqa: PLR0917 - typer has no other way
    features: Annotated[
        str, typer.Option(help="Features (view.feature) or whole views, by comma.")
    ],
    out: Out,
    entities: Annotated[
        Path | None,
        typer.Option(help="Parquet or CSV: occurred_at, the entities, tenant_id, your labels."),
    ] = None,
    sql: Annotated[
        str | None, typer.Option(help="Or the same as a question to the tables of the lake.")
    ] = None,
    slice_seconds: Annotated[
        float, typer.Option(min=0, help="As of the start of slices this long; 0: of the instant.")
    ] = 60.0,
    incomplete: Annotated[
        bool, typer.Option(help="Also for times that the lake does not hold whole yet.")
    ] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Join features to rows as the stream would have answered at each row's time."""
    output = Output(as_json=as_json)
    names = [name.strip() for name in features.split(",") if name.strip()]
    began = time.monotonic()
    with lake_at(home) as lake:
        made = training_set(
            _asked(lake, entities, sql),
            names,
            lake,
            _definitions(home),
            slice_us=round(slice_seconds * 1e6),
            incomplete=incomplete,
            told=lambda text: output.progress("lake", text),
        )
    _written(made, out, output, began)


@app.command("logged-set")
def as_served(  # noqa: PLR0917 - typer has no other way
    model: Annotated[str, typer.Option(help="The model that was asked.")],
    version: Annotated[int, typer.Option(min=1, help="Its version.")],
    out: Out,
    since: Annotated[datetime | None, typer.Option(help="Event time, UTC, inclusive.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Event time, UTC, exclusive.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """The vectors that a model version was asked with, as they were served."""
    output = Output(as_json=as_json)
    began = time.monotonic()
    wanted = Logged(model, version, _utc(since), _utc(until))
    with lake_at(home) as lake:
        made = logged_training_set(lake, wanted, told=lambda text: output.progress("lake", text))
    _written(made, out, output, began)


@app.command("about")
def described(file: Annotated[Path, typer.Argument(help="A training set.")]) -> None:
    """What a training set was made from: views, snapshots of the lake, when."""
    if not file.exists():
        raise Misdeclared(f"{file} is not there")
    Output().document(about(file))


def _asked(lake: Lake, entities: Path | None, sql: str | None) -> pl.DataFrame:
    """The rows to join features to. Raises Misdeclared unless they are told of in one way."""
    if (entities is None) == (sql is None):
        raise Misdeclared("name the rows by --entities FILE or by --sql STATEMENT")
    if entities is not None:
        return _rows(entities)
    found = pl.from_arrow(query(lake, str(sql)))
    assert isinstance(found, pl.DataFrame)
    return found


def _rows(path: Path) -> pl.DataFrame:
    """Raises Misdeclared when the file is not there or is neither Parquet nor CSV."""
    if not path.exists():
        raise Misdeclared(f"{path} is not there")
    try:
        if path.suffix == ".csv":
            return pl.read_csv(path, try_parse_dates=True)
        return pl.read_parquet(path)
    except PolarsError as error:
        raise Misdeclared(f"{path} can't be read: {error}") from None


def _definitions(home: Path) -> Definitions:
    settings = settings_at(home)
    if settings.project is None:
        raise Misdeclared("CAUSEMESH_PROJECT must name the folder that holds features.yaml")
    return Definitions.of(settings.project, partitions=settings.partitions)


def _written(made: TrainingSet, out: Path, output: Output, began: float) -> None:
    made.write(out)
    took_s = time.monotonic() - began
    if output.as_json:
        output.document({"file": str(out), "rows": made.frame.height, "seconds": took_s})
        return
    output.line(
        f"{made.frame.height:,} rows of {made.frame.width} columns in {took_s:.1f} s: {out}"
    )


def _utc(at: datetime | None) -> datetime | None:
    return at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at
