"""Runs, their steps, and the reviews that people see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from causemesh.sql import database_errors
from services.agents.domain.review import OPENED, Review, review_of
from services.agents.domain.runs import Run, Step, result_json

metadata = sa.MetaData()

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("workflow", sa.Text, nullable=False),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("request_id", sa.Text, nullable=False),
    sa.Column("origin_topic", sa.Text, nullable=False),
    sa.Column("origin_partition", sa.Integer, nullable=False),
    sa.Column("origin_position", sa.BigInteger, nullable=False),
)
run_steps = sa.Table(
    "run_steps",
    metadata,
    # The key is a second guard: whatever goes wrong above, a run has one step of a number.
    sa.Column("run_id", sa.Text, sa.ForeignKey("runs.run_id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("step", sa.Text, nullable=False),
    sa.Column("occurred_us", sa.BigInteger, nullable=False),
    sa.Column("result", postgresql.JSONB, nullable=False),
)
reviews = sa.Table(
    "reviews",
    metadata,
    sa.Column("review_id", sa.Text, primary_key=True),
    sa.Column("run_id", sa.Text, sa.ForeignKey("runs.run_id"), nullable=False, unique=True),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("request_id", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("score", sa.Double, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("opened_us", sa.BigInteger, nullable=False),
    sa.Column("due_us", sa.BigInteger, nullable=False),
    sa.Column("decision", sa.Text),
    sa.Column("decided_by", sa.Text),
    sa.Column("comment", sa.Text),
    sa.Column("decided_us", sa.BigInteger),
    sa.Index("reviews_by_due", "due_us", "review_id"),
    sa.Index("reviews_open", "due_us", "review_id", postgresql_where=sa.text("status = 'opened'")),
)
"""What `review_of` tells of each run: what changes it is a step, never an update alone."""


def _arrays(table: sa.Table) -> str:
    """The columns of a table as arrays, for one statement of any number of rows."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    casts = [f"CAST(:{one.name} AS {one.type.compile(dialect)}[])" for one in table.columns]
    names = ", ".join(one.name for one in table.columns)
    return f"unnest({', '.join(casts)}) AS given ({names})"


_START = sa.text(
    f"INSERT INTO runs SELECT * FROM {_arrays(runs)} ON CONFLICT DO NOTHING RETURNING run_id"
)
_ADD_STEPS = sa.text(f"INSERT INTO run_steps SELECT * FROM {_arrays(run_steps)}")
_ADD_REVIEWS = sa.text(f"INSERT INTO reviews SELECT * FROM {_arrays(reviews)}")
_END_REVIEWS = sa.text(
    f"""
    UPDATE reviews SET status = given.status, decision = given.decision,
        decided_by = given.decided_by, comment = given.comment, decided_us = given.decided_us
    FROM {_arrays(reviews)} WHERE reviews.review_id = given.review_id
    """
)


@dataclass(frozen=True)
class ReviewFilter:
    """Which reviews a list shows; None means all."""

    status: str | None = None
    tenant_id: str | None = None


class RunStore:
    """What runs have done. Methods that take a transaction leave its commit to the caller.

    `row_locks=False` is the control arm of the tests: two decisions may then both be taken.
    """

    def __init__(self, engine: AsyncEngine, *, row_locks: bool = True) -> None:
        self._engine = engine
        self._row_locks = row_locks

    async def start(self, transaction: AsyncConnection, started: Sequence[Run]) -> list[Run]:
        """Store runs with their first steps; returns those whose id was not known yet."""
        if not started:
            return []
        found = await transaction.execute(
            _START, _columns(runs, [_run_row(run) for run in started])
        )
        new = set(found.scalars())
        fresh = [run for run in started if run.run_id in new]
        await self._add_steps(transaction, fresh)
        await transaction.execute(_ADD_REVIEWS, _review_columns(fresh))
        return fresh

    async def append(self, transaction: AsyncConnection, moved: Sequence[Run]) -> None:
        """Store the newest step of each run, and its review as it is now."""
        await self._add_steps(transaction, moved)
        await transaction.execute(_END_REVIEWS, _review_columns(moved))

    async def of_review(self, transaction: AsyncConnection, review_id: str) -> Run | None:
        """The run of a review, locked until the transaction ends."""
        chosen = sa.select(runs).join(reviews).where(reviews.c.review_id == review_id)
        found = await self._with_histories(transaction, self._locked(chosen))
        return found[0] if found else None

    async def due(self, transaction: AsyncConnection, until_us: int, limit: int) -> list[Run]:
        """Runs of open reviews due at `until_us` (event time), longest due first, locked."""
        columns = reviews.c
        chosen = (
            sa.select(runs)
            .join(reviews)
            .where(columns.status == OPENED, columns.due_us <= until_us)
            .order_by(columns.due_us, columns.review_id)
            .limit(limit)
        )
        return await self._with_histories(transaction, self._locked(chosen))

    async def run(self, run_id: str) -> Run | None:
        """One run with its history. Raises Retryable."""
        async with database_errors(), self._engine.connect() as connection:
            chosen = sa.select(runs).where(runs.c.run_id == run_id)
            found = await self._with_histories(connection, chosen)
        return found[0] if found else None

    async def review(self, review_id: str) -> Review | None:
        """One review. Raises Retryable."""
        async with database_errors(), self._engine.connect() as connection:
            found = await connection.execute(
                sa.select(reviews).where(reviews.c.review_id == review_id)
            )
            row = found.mappings().one_or_none()
        return None if row is None else Review(**row)

    async def reviews(
        self, chosen: ReviewFilter, *, after: tuple[int, str] | None, limit: int
    ) -> list[Review]:
        """Reviews by (due_us, review_id), those beyond `after`. Raises Retryable."""
        columns = reviews.c
        statement = sa.select(reviews).order_by(columns.due_us, columns.review_id).limit(limit)
        if chosen.status is not None:
            statement = statement.where(columns.status == chosen.status)
        if chosen.tenant_id is not None:
            statement = statement.where(columns.tenant_id == chosen.tenant_id)
        if after is not None:
            statement = statement.where(sa.tuple_(columns.due_us, columns.review_id) > after)
        async with database_errors(), self._engine.connect() as connection:
            return [Review(**row) for row in (await connection.execute(statement)).mappings()]

    def _locked(self, statement: sa.Select[Any]) -> sa.Select[Any]:
        # The review's row, not the run's: after a wait Postgres looks again only at rows that it
        # locks, and it is the status that another decision changed.
        return statement.with_for_update(of=reviews) if self._row_locks else statement

    @staticmethod
    async def _add_steps(transaction: AsyncConnection, moved: Sequence[Run]) -> None:
        rows = [_step_row(run.run_id, run.newest) for run in moved]
        await transaction.execute(_ADD_STEPS, _columns(run_steps, rows))

    @staticmethod
    async def _with_histories(connection: AsyncConnection, chosen: sa.Select[Any]) -> list[Run]:
        rows = (await connection.execute(chosen)).all()
        if not rows:
            return []
        # A statement of its own, so that it sees what was committed while the first one waited.
        steps = await connection.execute(
            sa.select(run_steps)
            .where(run_steps.c.run_id.in_([row.run_id for row in rows]))
            .order_by(run_steps.c.run_id, run_steps.c.number)
        )
        histories: dict[str, list[Step]] = {}
        for step in steps:
            taken = Step(step.number, step.step, step.occurred_us, step.result)
            histories.setdefault(step.run_id, []).append(taken)
        return [_run(row, histories[row.run_id]) for row in rows]


def _columns(table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {one.name: [row[one.name] for row in rows] for one in table.columns}


def _review_columns(of: Sequence[Run]) -> dict[str, list[Any]]:
    return _columns(reviews, [asdict(review_of(run)) for run in of])


def _run_row(run: Run) -> dict[str, Any]:
    topic, partition, position = run.origin
    return {
        "run_id": run.run_id,
        "workflow": run.workflow,
        "tenant_id": run.tenant_id,
        "request_id": run.request_id,
        "origin_topic": topic,
        "origin_partition": partition,
        "origin_position": position,
    }


def _step_row(run_id: str, step: Step) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "number": step.number,
        "step": step.name,
        "occurred_us": step.occurred_us,
        "result": result_json(step.result),
    }


def _run(row: Any, history: Sequence[Step]) -> Run:
    origin = (row.origin_topic, row.origin_partition, row.origin_position)
    return Run(
        row.run_id, row.workflow, row.tenant_id, row.request_id, origin, history=tuple(history)
    )
