"""The commands. Each does its work in a module beside this one."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from causemesh.cli import following, running, tracing
from causemesh.cli.context import apis_at
from causemesh.cli.output import Output
from causemesh.errors import MeshError

app = typer.Typer(
    help="Run and look into a Causemesh: an AI mesh in which every event names its cause.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Home = Annotated[
    Path,
    typer.Option("--home", envvar="CAUSEMESH_HOME", help="Folder of the local mesh's data."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
HOME = Path(".causemesh")


@app.command()
def up(
    project: Annotated[Path, typer.Option(help="Folder with catalogue.yaml and service files.")],
    partitions: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Of each topic; fixed once it exists.")
    ] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Start the servers and the services, or what of them does not run."""
    out = Output(as_json=as_json)
    running.up(home, project, out.progress, partitions=partitions)
    out.rows("Running", running.status(home))


@app.command()
def down(home: Home = HOME) -> None:
    """Stop the services and the servers; their data stays."""
    running.down(home, Output().progress)


@app.command()
def status(home: Home = HOME, as_json: Json = False) -> None:
    """What runs, where, and how much memory it takes."""
    Output(as_json=as_json).rows("Local mesh", running.status(home))


@app.command()
def demo(
    months: Annotated[int, typer.Option(min=1, max=12, help="How many months of 2013.")] = 3,
    home: Home = HOME,
    leave: Annotated[bool, typer.Option("--exit", help="Stop at the end.")] = False,
) -> None:
    """Replay real flights through the whole mesh, and check what comes out."""
    sys.exit(running.demo(home, months, leave=leave))


@app.command()
def topics(home: Home = HOME, as_json: Json = False) -> None:
    """Every declared topic and how many records it holds."""
    Output(as_json=as_json).rows("Topics", asyncio.run(following.topics(home)))


@app.command()
def lag(home: Home = HOME, as_json: Json = False) -> None:
    """How far each service is behind the log."""
    Output(as_json=as_json).rows("Lag", asyncio.run(following.lag(home)))


@app.command()
def tail(
    topic: str,
    count: Annotated[int, typer.Option("-n", min=1, help="How many of the last records.")] = 10,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as they come.")] = False,
    home: Home = HOME,
) -> None:
    """Print a topic's records, decoded, one JSON object a line."""
    asyncio.run(following.tail(home, topic, count, follow=follow))


@app.command()
def produce(
    event_type: Annotated[str, typer.Argument(help="An event type, or requests.")],
    file: Annotated[Path, typer.Argument(help="JSON lines; - for standard input.")] = Path("-"),
    home: Home = HOME,
) -> None:
    """Write events, one JSON object a line: the envelope's fields and those of the type."""
    written = asyncio.run(following.produce(home, event_type, following.read_rows(file)))
    Output().line(f"{written} written to inbox.{event_type}")


@app.command()
def trace(
    wanted: Annotated[
        str, typer.Argument(metavar="ID", help="An invoice line, request, event or review id.")
    ],
    verify: Annotated[bool, typer.Option(help="Recompute an invoice line from the log.")] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Walk from an id to its causes and effects; of an invoice line down to the raw events."""
    found = asyncio.run(tracing.trace(home, wanted, verify=verify))
    if as_json:
        Output(as_json=True).document(found.document())
    else:
        tracing.show(found)
    if verify and not found.equal:
        sys.exit(1)


@app.command("replay-rejects")
def replay_rejects(
    reason: Annotated[str | None, typer.Option(help="Only those with this reason.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only those of this tenant.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Count them and write nothing.")] = False,
    home: Home = HOME,
) -> None:
    """Send rejected records through the door again, as they came."""
    ask: dict[str, Any] = {"reason": reason, "tenant_id": tenant, "dry_run": dry_run}
    with apis_at(home).client("ingest") as api:
        answer = api.post("/v1/rejects/replay", json=ask)
    document = answer.json()
    if answer.is_error:
        sys.exit(document["detail"])
    Output().line(f"{document['replayed']} {'would be ' if dry_run else ''}replayed")


def main() -> None:
    """The console script: expected failures are one line, not a traceback."""
    try:
        app()
    except MeshError as error:
        sys.exit(f"causemesh: {error}")
    except httpx.TransportError as error:
        sys.exit(f"causemesh: a service does not answer ({error}); see causemesh status")
    except KeyboardInterrupt:
        sys.exit(130)
