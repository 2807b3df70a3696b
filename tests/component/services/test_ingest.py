"""The door as a process: each id once, whatever is retried or killed; its API."""

from __future__ import annotations

import asyncio
import base64
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
import sqlalchemy as sa
from aiokafka import AIOKafkaProducer
from sqlalchemy.ext.asyncio import create_async_engine

from causemesh.local import Endpoints
from tests.component.services.conftest import (
    PREDICTIONS,
    READINGS,
    REJECTS,
    Outside,
    reading,
    until,
)

pytestmark = pytest.mark.servers
COUNT = 2_000
CHUNK = 100
RETRIED = 4  # every fourth id is sent again, to another partition


async def send_chunk(outside: Outside, tenant: str, start: int) -> None:
    """Ids of one chunk by partition, with the retries of its first quarter beside them."""
    by_partition: dict[int, list[dict[str, Any]]] = {number: [] for number in range(4)}
    for n in range(start, start + CHUNK):
        by_partition[n // RETRIED % 4].append(reading(tenant, f"e{n}"))
        if n % RETRIED == 0:
            by_partition[(n // RETRIED + 1) % 4].append(reading(tenant, f"e{n}"))
    for partition, rows in by_partition.items():
        await outside.write("inbox.reading", await outside.values("inbox.reading", rows), partition)


async def raw_count(outside: Outside, tenant: str) -> int:
    """The tenant's readings on the log as they lie there, replays too."""
    now = await outside.reader.ends([READINGS])
    left = {at: span.last for at, span in now.items() if span.last > outside.before[at].last}
    reader = outside.bus.reader({at: outside.before[at].last for at in left})
    count = 0
    try:
        while left:
            for raw in await reader.fetch(20_000, 0.5):
                count += sum(tenant.encode() in (value or b"") for value in raw.values)
                if raw.positions[-1] >= left[raw.topic, raw.partition]:
                    left.pop((raw.topic, raw.partition))
    finally:
        await reader.close()
    return count


_END_OTHERS = sa.text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


async def killed_in_a_unit(outside: Outside, cluster: Endpoints, tenant: str, start: int) -> bool:
    """Send a chunk while no position can be stored; kill -9 once some of it was passed on.

    False when every worker waits at the end of an earlier unit, so that nothing was.
    """
    before = await raw_count(outside, tenant)
    engine = create_async_engine(cluster.database("ingest"))
    try:
        async with engine.begin() as blocker:
            await blocker.execute(sa.text("LOCK TABLE checkpoints IN SHARE MODE"))
            await send_chunk(outside, tenant, start)
            for _ in range(10):
                if await raw_count(outside, tenant) > before:
                    outside.mesh.kill("ingest")
                    # Postgres would still store the position of a client that is gone.
                    await blocker.execute(_END_OTHERS)
                    return True
                await asyncio.sleep(0.1)
            return False
    finally:
        await engine.dispose()


async def test_each_id_once_through_retries_and_a_crash(
    outside: Outside, cluster: Endpoints, tenant: str
) -> None:
    killed = False
    for start in range(0, COUNT, CHUNK):
        if killed or start < 5 * CHUNK:
            await send_chunk(outside, tenant, start)
        else:
            killed = await killed_in_a_unit(outside, cluster, tenant, start)
    assert killed
    rejects = await outside.eventually(REJECTS, tenant, COUNT // RETRIED)
    events = await outside.eventually(READINGS, tenant, COUNT)
    assert Counter(events["event_id"]) == Counter(f"e{n}" for n in range(COUNT))
    assert Counter(rejects["claimed_id"]) == Counter(f"e{n}" for n in range(0, COUNT, RETRIED))
    assert set(rejects["reason"]) == {"duplicate"}
    # No record of the inbox was both passed on and refused, nor was any forgotten.
    causes = [
        (cause["partition"], cause["position"])
        for cause in [*events["cause"].to_list(), *rejects["cause"].to_list()]
    ]
    assert len(set(causes)) == len(causes) == COUNT + COUNT // RETRIED
    # The crash did fall between passing on and storing the position.
    assert await raw_count(outside, tenant) > COUNT


async def test_the_largest_record_of_all_stops_nobody(
    outside: Outside, cluster: Endpoints, tenant: str
) -> None:
    """As large as the broker takes: a reject that held all its bytes could not be written."""
    good = [reading(tenant, f"e{n}") for n in range(10)]
    values = await outside.values("inbox.reading", good)
    largest = tenant.encode() + random.Random(1).randbytes(2_097_000 - len(tenant))
    producer = AIOKafkaProducer(
        bootstrap_servers=cluster.kafka_bootstrap, max_request_size=4 << 20, linger_ms=0
    )
    await producer.start()
    for value in [*values[:5], largest, *values[5:]]:
        await producer.send_and_wait("inbox.reading", value, partition=1)
    await producer.stop()
    events = await outside.eventually(READINGS, tenant, 10)
    assert sorted(events["event_id"]) == [f"e{n}" for n in range(10)]
    place = pl.col("cause").struct
    (reject,) = (
        (await outside.written(REJECTS))
        .filter(place.field("topic") == "inbox.reading", pl.col("original_value").is_null())
        .to_dicts()
    )
    at = events["cause"].struct.field("position").sort().to_list()
    assert (reject["reason"], reject["cause"]["position"]) == ("not_framed", at[4] + 1)
    assert reject["detail"].endswith("the cause says where it lies")


async def test_rejects_are_shown_and_sent_again(outside: Outside, tenant: str) -> None:
    # A little too far ahead, so that the same bytes are good a little later.
    early = reading(tenant, "early", occurred_at=datetime.now(UTC) + timedelta(seconds=304))
    (value,) = await outside.values("inbox.reading", [early])
    await outside.write("inbox.reading", [value], 3)
    await outside.eventually(REJECTS, tenant, 1)
    which = {"tenant_id": tenant, "reason": "from_future"}
    (shown,) = await outside.done("ingest", "GET", "/rejects", params=which)
    assert base64.b64decode(shown["original_value"]) == value
    assert base64.b64decode(shown["original_key"]) == b"k"
    assert (shown["claimed_id"], shown["cause"]["partition"]) == ("early", 3)
    for none in ({"reason": "duplicate"}, {"event_ids": ["other"]}):
        path = "/rejects/replay"
        assert await outside.done("ingest", "POST", path, json=which | none) == {"replayed": 0}
    unknown = await outside.ask("ingest", "POST", "/rejects/replay", json={"reason": "nonsense"})
    assert (unknown.status_code, unknown.json()["type"]) == (
        422,
        "urn:causemesh:problem:misdeclared",
    )

    async def replay(*, dry_run: bool) -> Any:
        body = {**which, "event_ids": ["early"], "dry_run": dry_run}
        return await outside.done("ingest", "POST", "/rejects/replay", json=body)

    assert await replay(dry_run=True) == {"replayed": 1}
    await asyncio.sleep((early["occurred_at"] - datetime.now(UTC)).total_seconds() - 299.5)
    assert (await outside.of(READINGS, tenant)).height == 0
    assert await replay(dry_run=False) == {"replayed": 1}
    (event,) = (await outside.eventually(READINGS, tenant, 1)).to_dicts()
    assert (event["event_id"], event["occurred_at"]) == ("early", early["occurred_at"])


def cloud_event(tenant: str, event_id: str, **more: Any) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": event_id,
        "source": "test",
        "type": "reading",
        "tenantid": tenant,
        "time": datetime.now(UTC).isoformat(),
        "data": {"sensor": "s", "value": 2.5},
        **more,
    }


async def test_cloud_events_are_all_taken_or_none(outside: Outside, tenant: str) -> None:
    single = await outside.ask("ingest", "POST", "/events", json=cloud_event(tenant, "one"))
    assert (single.status_code, single.json()) == (202, {"accepted": 1})
    three = [cloud_event(tenant, f"many-{n}") for n in range(3)]
    headers = {"Content-Type": "application/cloudevents-batch+json"}
    broken = [three[0], three[1] | {"data": {"sensor": "s", "colour": "red"}}, three[2]]
    refused = await outside.ask("ingest", "POST", "/events", json=broken, headers=headers)
    assert refused.status_code == 422
    assert [one["index"] for one in refused.json()["errors"]] == [1]
    assert "colour" in refused.json()["detail"]
    both = await outside.ask("ingest", "POST", "/events", json=three, headers=headers)
    assert (both.status_code, both.json()) == (202, {"accepted": 3})
    found = await outside.eventually(READINGS, tenant, 4)
    # The batch that was refused left nothing behind that would now be a duplicate.
    assert sorted(found["event_id"]) == ["many-0", "many-1", "many-2", "one"]
    assert set(found["value"]) == {2.5}
    assert (await outside.of(REJECTS, tenant)).height == 0


async def test_the_api_asks_for_the_token(outside: Outside, tenant: str) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}):
        event = cloud_event(tenant, "one")
        answer = await outside.ask("ingest", "POST", "/events", json=event, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["type"] == "urn:causemesh:problem:unauthorised"
    await outside.done("ingest", "POST", "/events", json=cloud_event(tenant, "two"))
    found = await outside.eventually(READINGS, tenant, 1)
    assert found["event_id"].to_list() == ["two"]


async def test_a_question_waits_for_its_answer_or_not(
    outside: Outside, lookup: str, tenant: str
) -> None:
    ask = {"tenant_id": tenant, "model": lookup, "version": 1, "inputs": {"row": 3.0}}

    async def predict(request_id: str, query: str, **headers: str) -> Any:
        body = ask | {"request_id": request_id}
        path = f"/predictions?{query}"
        return await outside.ask("ingest", "POST", path, json=body, headers=headers)

    waited = await predict("waited", "wait_ms=20000")
    assert waited.status_code == 200
    told = waited.json()
    assert (told["request_id"], told["outcome"], told["score"]) == ("waited", "predicted", 0.75)
    unwaited = [
        await predict("preferred", "wait_ms=20000", Prefer="respond-async"),
        await predict("at-once", "wait_ms=0"),
    ]
    for answer, name in zip(unwaited, ("preferred", "at-once"), strict=True):
        assert (answer.status_code, answer.json()) == (
            202,
            {"request_id": name, "outcome": None},
        )

    async def all_three() -> bool:
        found = await outside.of(PREDICTIONS, tenant)
        return sorted(found["request_id"]) == ["at-once", "preferred", "waited"]

    await until(all_three)
