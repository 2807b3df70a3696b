"""The registry of model versions, their artefacts and schedules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from causemesh.catalogue import NO_TENANT
from causemesh.outbox import Event, add_events
from causemesh.sql import database_errors
from services.inference.domain import Champion, ModelVersion

VERSIONS = "models.versions.v1"
ROLLOUTS = "models.rollouts.v1"

metadata = sa.MetaData()
artefacts = sa.Table(
    "artefacts",
    metadata,
    sa.Column("sha256", sa.Text, primary_key=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
)
model_versions = sa.Table(
    "model_versions",
    metadata,
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("record", sa.Text, nullable=False),
    sa.Column("artefact_sha256", sa.Text, sa.ForeignKey("artefacts.sha256"), nullable=False),
    sa.Column("registered_us", sa.BigInteger, nullable=False),
)
schedules = sa.Table(
    "schedules",
    metadata,
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("schedule", sa.Text, nullable=False),
    sa.Column("sequence", sa.BigInteger, nullable=False),
)
registry_head = sa.Table(
    "registry_head",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("sequence", sa.BigInteger, nullable=False),
)


class ModelStore:
    """Writes go one at a time, so a higher sequence is always a later commit."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def add_artefact(self, sha256: str, content: bytes) -> None:
        """Keep an artefact under its digest; again is no harm."""
        statement = insert(artefacts).values(sha256=sha256, content=content)
        async with database_errors(), self._engine.begin() as connection:
            await connection.execute(statement.on_conflict_do_nothing())

    async def artefact(self, sha256: str) -> bytes | None:
        """The artefact with this digest."""
        statement = sa.select(artefacts.c.content).where(artefacts.c.sha256 == sha256)
        async with database_errors(), self._engine.connect() as connection:
            found = (await connection.execute(statement)).scalar_one_or_none()
        return None if found is None else bytes(found)

    async def version(self, model: str, version: int) -> ModelVersion | None:
        """One version."""
        columns = model_versions.c
        statement = sa.select(columns.record).where(
            columns.model == model, columns.version == version
        )
        async with database_errors(), self._engine.connect() as connection:
            found = (await connection.execute(statement)).scalar_one_or_none()
        return None if found is None else _version(json.loads(found))

    async def versions(self, model: str | None = None) -> list[ModelVersion]:
        """All versions, or those of one model."""
        columns = model_versions.c
        statement = sa.select(columns.record).order_by(columns.model, columns.version)
        if model is not None:
            statement = statement.where(columns.model == model)
        async with database_errors(), self._engine.connect() as connection:
            found = (await connection.execute(statement)).scalars().all()
        return [_version(json.loads(record)) for record in found]

    async def register(self, version: ModelVersion, now_us: int) -> bool:
        """Add a version with its event in one transaction; False when it is there already."""
        async with database_errors(), self._engine.begin() as connection:
            sequence = await _next_sequence(connection)
            record = version.record(sequence)
            added = await connection.execute(
                insert(model_versions)
                .values(
                    model=version.model,
                    version=version.version,
                    record=json.dumps(record),
                    artefact_sha256=version.artefact_sha256,
                    registered_us=now_us,
                )
                .on_conflict_do_nothing()
            )
            if not added.rowcount:
                return False
            event = {**record, "tenant_id": NO_TENANT, "occurred_at": now_us}
            key = f"{version.model}@{version.version}"
            await add_events(connection, [Event(VERSIONS, key, event)])
        return True

    async def schedule(self, model: str) -> list[Champion]:
        """The model's schedule; empty when it has none."""
        statement = sa.select(schedules.c.schedule).where(schedules.c.model == model)
        async with database_errors(), self._engine.connect() as connection:
            found = (await connection.execute(statement)).scalar_one_or_none()
        return [Champion(*entry) for entry in json.loads(found)] if found else []

    async def set_schedule(self, model: str, entries: Sequence[Champion], now_us: int) -> int:
        """Replace the schedule, with its event in one transaction; returns its sequence."""
        async with database_errors(), self._engine.begin() as connection:
            sequence = await _next_sequence(connection)
            values = {
                "schedule": json.dumps([[e.version, e.effective_us] for e in entries]),
                "sequence": sequence,
            }
            statement = insert(schedules).values(model=model, **values)
            await connection.execute(
                statement.on_conflict_do_update(index_elements=["model"], set_=values)
            )
            record = {
                "tenant_id": NO_TENANT,
                "occurred_at": now_us,
                "model": model,
                "schedule": [
                    {"version": e.version, "effective_at": e.effective_us} for e in entries
                ],
                "sequence": sequence,
            }
            await add_events(connection, [Event(ROLLOUTS, model, record)])
        return sequence


async def _next_sequence(connection: AsyncConnection) -> int:
    """The next number, holding the head's lock until the transaction ends."""
    bump = (
        insert(registry_head)
        .values(id=0, sequence=1)
        .on_conflict_do_update(
            index_elements=["id"], set_={"sequence": registry_head.c.sequence + 1}
        )
        .returning(registry_head.c.sequence)
    )
    return int((await connection.execute(bump)).scalar_one())


def _version(record: dict[str, Any]) -> ModelVersion:
    return ModelVersion(
        record["model"],
        record["version"],
        record["lane"],
        tuple(record["features"]),
        tuple(record["required"]),
        record["artefact_sha256"],
        record["label"],
        record["reference"],
        {metric["name"]: metric["value"] for metric in record["metrics"]},
    )
