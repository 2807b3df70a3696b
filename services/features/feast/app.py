"""Feature views to and from Feast: `python -m services.features.feast.app export|import`.

export writes a Feast repository from the project's features.yaml and the events in the lake; import
writes a features.yaml from what `feast registry-dump` prints.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
import yaml

from causemesh.catalogue import Catalogue
from causemesh.cli.context import settings_at
from causemesh.cli.lake import lake_at
from causemesh.cli.output import Output
from causemesh.errors import MeshError, Misdeclared
from services.features.domain.durations import parse_duration
from services.features.domain.parsing import parse_views
from services.features.feast.importing import imported

app = typer.Typer(help="Feature views to and from Feast.", no_args_is_help=True)


@app.command("export")
def export_repository(  # noqa: PLR0917 - typer has no other way
    out: Annotated[Path, typer.Option(help="The folder of the Feast repository to write.")],
    name: Annotated[str, typer.Option(help="The name of the Feast project.")] = "causemesh",
    every: Annotated[str, typer.Option(help="Time between two rows of an entity.")] = "1d",
    since: Annotated[datetime | None, typer.Option(help="Events from then on count (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(help="Events before then count (UTC).")] = None,
    view: Annotated[list[str] | None, typer.Option(help="Only these views, as name@vN.")] = None,
    home: Annotated[Path, typer.Option(help="Folder of the local mesh's data.")] = Path(
        ".causemesh"
    ),
) -> None:
    """Write the project's views as a Feast repository, with their vectors over time."""
    with lake_at(home) as lake:
        from services.features.feast.events import view_events  # noqa: PLC0415 - needs the extra
        from services.features.feast.exporting import export  # noqa: PLC0415
        from services.features.feast.history import vector_history  # noqa: PLC0415

        settings = settings_at(home)
        catalogue = Catalogue.load(
            [settings.project] if settings.project else [], partitions=settings.partitions
        )
        views = parse_views(yaml.safe_load(settings.project_file("features.yaml").read_text()))
        unknown = set(view or ()) - {one.id for one in views}
        if unknown:
            raise Misdeclared(f"no such views: {sorted(unknown)}; use name@vN")
        chosen = [one for one in views if not view or one.id in view]
        rows = export(
            out,
            name,
            chosen,
            {
                one.id: vector_history(
                    one,
                    view_events(lake, catalogue, one, _utc(since), _utc(until)),
                    parse_duration(every),
                )
                for one in chosen
            },
        )
    Output().rows("Exported", [{"view": name, "rows": count} for name, count in rows.items()])


@app.command("import")
def import_registry(
    dump: Annotated[Path, typer.Argument(help="What `feast registry-dump` printed.")],
    out: Annotated[Path, typer.Option(help="The features.yaml to write.")],
    event: Annotated[
        list[str] | None, typer.Option(help="source=event type, where they differ.")
    ] = None,
) -> None:
    """Write the simple feature views of a Feast registry as a features.yaml."""
    events = dict(_pair(one) for one in event or ())
    found = imported(dump.read_text(), events)
    out.write_text(yaml.safe_dump(found.document, sort_keys=False))
    left = [{"left out": name, "because": reason} for name, reason in found.left_out.items()]
    Output().rows("Left out", left)


def _pair(text: str) -> tuple[str, str]:
    source, equals, event = text.partition("=")
    if not (source and equals and event):
        raise Misdeclared(f"{text!r} is not source=event type")
    return source, event


def _utc(at: datetime | None) -> datetime | None:
    return None if at is None else at.replace(tzinfo=UTC)


def main() -> None:
    """Run a command; what is wrong with what was asked is said in one line."""
    try:
        app(prog_name="python -m services.features.feast.app")
    except MeshError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
