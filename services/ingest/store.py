"""The ids that were accepted, each with the record that claimed it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.faultpoints import Point, reach
from causemesh.sql import SingleStatements, database_errors

metadata = sa.MetaData()

event_ids = sa.Table(
    "event_ids",
    metadata,
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column("topic", sa.Text, nullable=False),
    sa.Column("partition", sa.Integer, nullable=False),
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("occurred_us", sa.BigInteger, nullable=False),
    # ids come about in order of time, so ranges of pages will do: inserts cost a quarter less
    sa.Index(
        "event_ids_by_age",
        "occurred_us",
        postgresql_using="brin",
        postgresql_with={"autosummarize": "on"},
    ),
)

_CLAIM = """
    INSERT INTO event_ids (digest, topic, partition, position, occurred_us)
    SELECT digest, topic, partition, position, occurred_us
    FROM unnest($1::bytea[], $2::text[], $3::int[], $4::bigint[], $5::bigint[])
         WITH ORDINALITY AS claimed (digest, topic, partition, position, occurred_us, number)
    -- by digest, so that two workers that claim the same ids can't deadlock
    ORDER BY digest, number
    ON CONFLICT DO NOTHING
"""
_LOST = """
    SELECT claimed.topic, claimed.partition, claimed.position
    FROM unnest($1::bytea[], $2::text[], $3::int[], $4::bigint[])
         AS claimed (digest, topic, partition, position)
    LEFT JOIN event_ids AS owner USING (digest)
    WHERE (owner.topic, owner.partition, owner.position)
          IS DISTINCT FROM (claimed.topic, claimed.partition, claimed.position)
"""
Origin = tuple[str, int, int]


@dataclass(frozen=True)
class IdClaims:
    """Records that ask for their ids, by column: the id's digest, where the record lies, and its
    event time in microseconds."""

    digests: list[bytes]
    topics: list[str]
    partitions: list[int]
    positions: list[int]
    occurred_us: list[int]

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def origins(self) -> Iterator[Origin]:
        """Where each record lies."""
        return zip(self.topics, self.partitions, self.positions, strict=True)


class IdStore:
    """Decides once and for good which record owns an id.

    The claim commits before the record is passed on: when the work is repeated after a crash, the
    same record finds itself as the owner, and another one finds it taken.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._single = SingleStatements(engine)  # a claim is one, atomic by itself

    async def claim(self, claims: IdClaims) -> set[Origin]:
        """Claim ids; returns the origins that lost: another record owns their id.

        Raises Retryable.
        """
        if not len(claims):
            return set()
        reach(Point.INGEST_CLAIMING)
        fresh = await self._single.execute(_CLAIM, *vars(claims).values())
        reach(Point.INGEST_CLAIMED)
        if fresh == len(claims):
            return set()
        where = (claims.digests, claims.topics, claims.partitions, claims.positions)
        lost = await self._single.rows(_LOST, *where)
        return {(topic, partition, position) for topic, partition, position in lost}

    async def forget(self, topic: str, before_us: int) -> int:
        """Drop ids of events older than `before_us` (event time); returns how many."""
        columns = event_ids.c
        statement = sa.delete(event_ids).where(
            columns.topic == topic, columns.occurred_us < before_us
        )
        async with database_errors(), self._engine.begin() as connection:
            return int((await connection.execute(statement)).rowcount)
