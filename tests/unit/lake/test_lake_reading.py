"""Reading the lake: lazily by tenant, time and snapshot, and by SQL; on local files and on S3."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import polars as pl
import pytest
from moto.server import ThreadedMotoServer
from typer.testing import CliRunner

from causemesh.catalogue import Catalogue
from causemesh.cli.app import app
from causemesh.errors import Misdeclared
from causemesh.lake import require_libraries, upkeep
from causemesh.lake.definitions import define_lake
from causemesh.lake.settings import LakeSettings, lake_settings
from causemesh.lake.sql import dataset, query
from tests.unit.lake.mesh import PREDICTIONS, LakeMesh

DECODED = "decoded.inference_predictions_v1"
SECOND, THIRD = datetime(2013, 1, 2, tzinfo=UTC), datetime(2013, 1, 3, tzinfo=UTC)
FLIGHTS = Path(__file__).parents[3] / "examples" / "flights"


@pytest.fixture
async def mesh(tmp_path: Path) -> LakeMesh:
    made = LakeMesh(tmp_path)
    await made.predict(0, 40)  # ten days of four records
    await made.write_all()
    return made


async def test_a_tenant_and_a_span_of_time_are_read_and_other_files_not(mesh: LakeMesh) -> None:
    with mesh.lake() as lake:
        chosen = lake.select(
            PREDICTIONS, tenant="t1", since=SECOND, until=THIRD, columns=["request_id"]
        )
        assert chosen.lazy().collect().to_dict(as_series=False) == {"request_id": ["r5", "r7"]}
        assert chosen.batches().read_all().to_pydict() == {"request_id": ["r5", "r7"]}
        assert chosen.count() == 2
        assert len(list(chosen.scan().plan_files())) == 1
        naive = lake.select("inference.predictions.v1", since=SECOND.replace(tzinfo=None))
        assert naive.count() == 36


async def test_a_selection_stays_as_it_was(mesh: LakeMesh) -> None:
    with mesh.lake() as lake:
        chosen = lake.select(DECODED)
        await mesh.predict(40, 4)
        await mesh.write_all()
        assert chosen.count() == 40
        assert lake.select(DECODED, snapshot_id=chosen.snapshot_id).lazy().collect().height == 40
        assert lake.select(DECODED).count() == 44


async def test_names_that_are_not_there_say_so(mesh: LakeMesh) -> None:
    with mesh.lake() as lake:
        with pytest.raises(Misdeclared, match="causemesh lake tables lists them"):
            lake.select("flights")
        with pytest.raises(Misdeclared, match="nothing was written to it"):
            lake.select("raw.inference_predictions_v1")
        with pytest.raises(Misdeclared, match="no snapshot 7"):
            lake.select(DECODED, snapshot_id=7)


async def test_sql_reads_every_zone_and_the_past(mesh: LakeMesh) -> None:
    with mesh.lake() as lake:
        joined = query(
            lake,
            "SELECT s.tenant_id, count(*) AS n, sum(c.likely) AS likely"
            f" FROM {DECODED} s JOIN curated.predictions c USING (request_id)"
            " WHERE s.tenant_id = 't1' GROUP BY ALL",
        )
        odd = [n for n in range(1, 40, 2) if n % 5]
        assert joined.to_pylist() == [
            {"tenant_id": "t1", "n": len(odd), "likely": pytest.approx(sum(odd) / 10)}
        ]
        before = datetime.now(UTC)
        await mesh.predict(40, 4)
        await mesh.write_all()
        ask = f"SELECT count(*) AS n FROM {DECODED}"
        assert query(lake, ask).to_pylist() == [{"n": 44}]
        assert query(lake, ask, at=before).to_pylist() == [{"n": 40}]
        with pytest.raises(Misdeclared, match="nothing_here"):
            query(lake, "SELECT * FROM nothing_here")
        days = query(lake, f"SELECT DISTINCT occurred_at::date AS day FROM {DECODED} ORDER BY day")
        assert days.to_pylist()[0] == {"day": SECOND.date().replace(day=1)}


async def test_a_query_opens_only_the_files_of_its_tenant_and_day(mesh: LakeMesh) -> None:
    import pyarrow.dataset as ds  # noqa: PLC0415

    with mesh.lake() as lake:
        found = dataset(lake.table(DECODED))
        assert found is not None
        wanted = (ds.field("tenant_id") == "t1") & (ds.field("occurred_at") < SECOND)
        assert len(list(found.get_fragments())) == 20
        assert len(list(found.get_fragments(wanted))) == 1


async def test_the_commands_print_json(mesh: LakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAUSEMESH_LAKE_CATALOG", mesh.settings.catalog)
    monkeypatch.setenv("CAUSEMESH_LAKE_WAREHOUSE", mesh.settings.warehouse)
    monkeypatch.delenv("CAUSEMESH_PROJECT", raising=False)

    def run(*words: str) -> Any:
        shown = CliRunner().invoke(app, ["lake", *words, "--home", "nowhere", "--json"])
        assert shown.exit_code == 0, shown.output
        return json.loads(shown.stdout)

    (table,) = (one for one in run("tables") if one["table"] == DECODED)
    assert (table["records"], table["files"]) == (40, 20)
    assert run("sql", f"SELECT count(*) AS n FROM {DECODED}") == [{"n": 40}]
    summed = run("sql", f"SELECT sum(_position) AS n, 1.5::DECIMAL(3, 1) AS d FROM {DECODED}")
    assert summed == [{"n": 780, "d": "1.5"}]
    await mesh.predict(40, 1)
    assert [one["records"] for one in run("snapshots", PREDICTIONS)][-1] == 40
    assert run("compact", DECODED, "--files", "2") == [
        {"table": DECODED, "partitions": 0, "files_before": 0, "files_after": 0}
    ]
    assert run("expire", DECODED, "--snapshot-days", "0", "--keep", "1")[0]["snapshots"] > 0


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("causemesh.lake.find_spec", lambda name: None if name == "duckdb" else True)
    with pytest.raises(Misdeclared, match=r"needs duckdb.*pip install 'causemesh\[lake\]'"):
        require_libraries()


def test_settings_come_from_the_mesh_and_the_environment() -> None:
    told = lake_settings(
        {
            "CAUSEMESH_POSTGRES_URL": "postgresql+asyncpg://u@h:1",
            "CAUSEMESH_LAKE_WAREHOUSE": "s3://bucket/lake",
            "CAUSEMESH_LAKE_PROPERTIES": '{"s3.region": "eu-west-1"}',
        }
    )
    assert told.catalog == "postgresql+pg8000://u@h:1/lake"
    assert told.properties == {"s3.region": "eu-west-1"}
    with pytest.raises(Misdeclared, match="CAUSEMESH_LAKE_WAREHOUSE must say where"):
        lake_settings({"CAUSEMESH_POSTGRES_URL": "postgresql+asyncpg://u@h:1"})


def test_the_flights_declare_a_lake_of_all_zones() -> None:
    definition = define_lake(Catalogue.load([FLIGHTS]), FLIGHTS)
    assert {one.zone for one in definition.tables.values()} == {"raw", "decoded", "curated"}
    assert definition.table("flight_landed").identifier == "decoded.events_flight_landed"
    assert definition.table("inbox.flight_landed").identifier == "raw.inbox_flight_landed"
    assert definition.table("invoice_lines").identifier == "curated.invoice_lines"
    assert "features.vectors.v1" not in definition.topics


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{topic: nothing}", "not in the catalogue"),
        ("{topic: inbox.requests, columns: {a: model}}", "not among the topics"),
        ("{topic: features.vectors.v1, columns: {a: view}}", "not among the topics"),
        ("{topic: inference.predictions.v1, columns: {tenant_id: model}}", "every table has"),
        ("{topic: inference.predictions.v1, columns: {a: 'avg(score)'}}", "single event"),
        ("{topic: inference.predictions.v1, more: 1}", "unknown"),
    ],
)
def test_a_wrong_table_is_refused_and_named(entry: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "lake.yaml").write_text(f"curated:\n  mine: {entry}\n")
    with pytest.raises(Misdeclared, match=message):
        define_lake(Catalogue.load(), tmp_path)


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """FileIO properties of an S3 that answers on this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    properties = {
        "s3.endpoint": f"http://{host}:{port}",
        "s3.access-key-id": "test",
        "s3.secret-access-key": "test",
        "s3.region": "us-east-1",
    }
    client = boto3.client(
        "s3",
        endpoint_url=properties["s3.endpoint"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="lake")
    client.close()
    yield properties
    server.stop()


async def test_the_lake_lies_on_s3_as_on_files(tmp_path: Path, s3: dict[str, str]) -> None:
    """Against a stand-in that speaks S3's API over HTTP."""
    mesh = LakeMesh(tmp_path)
    mesh.settings = LakeSettings(
        catalog=mesh.settings.catalog, warehouse="s3://lake/tables", properties=s3
    )
    for life in range(3):
        await mesh.predict(life * 8, 8)
        await mesh.write_all()
    assert mesh.rows(DECODED) == mesh.logged(PREDICTIONS)
    limits = upkeep.UpkeepLimits(small_files=2, snapshot_s=0, snapshots=1, orphan_s=-120)
    with mesh.lake() as lake:
        upkeep.compact(lake.catalog, DECODED, limits)
        assert upkeep.expire(lake.catalog, DECODED, limits) > 0
        assert upkeep.sweep(lake.catalog, DECODED, limits) > 0
        assert query(lake, f"SELECT count(*) AS n FROM {DECODED}").to_pylist() == [{"n": 24}]
        assert lake.select(DECODED, tenant="t0").lazy().select(pl.len()).collect().item() == 12
