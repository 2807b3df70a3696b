"""The task beside the stages that computes pasts, and how it finds the lake.

The log is read in the event loop, as stages read it; all else is done in threads, so that requests
are answered meanwhile. A past is computed anew after a restart: nothing of it is kept on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from causemesh.catalogue import Catalogue
from causemesh.clock import Clock
from causemesh.errors import MeshError, Misdeclared, Retryable
from causemesh.faultpoints import Point, reach
from causemesh.lake import require_libraries
from causemesh.lake.definitions import LAKE_FILE
from causemesh.lake.settings import LakeSettings, catalog_on
from services.features.backfill.book import Backfills
from services.features.backfill.filling import Made, Order
from services.features.backfill.pasts import FindPast, Tell
from services.features.domain.state import PartitionState

_log = structlog.get_logger(__name__)
_LOOK_S = 0.2
_AFTER_S = 10.0  # what failed for an unknown reason is tried again so much later


class Computes(Protocol):
    """What makes pasts (`Pasts` does)."""

    async def compute(self, orders: Sequence[Order], tell: Tell) -> list[Made]:
        """The pasts that are ordered, all of one event topic. Raises Retryable."""


class Orders(Protocol):
    """A partition at work (`Join` is one)."""

    backfills: Backfills
    state: PartitionState


class Backfiller:
    """Computes what any partition of this process lacks, one event topic after the other.

    `partitions()` are those at work now. One that was replaced meanwhile gets nothing: the one in
    its place orders again.
    """

    def __init__(
        self, partitions: Callable[[], Iterable[Orders]], history: Computes, clock: Clock
    ) -> None:
        self._partitions = partitions
        self._history = history
        self._clock = clock

    async def run(self) -> None:
        """Until cancelled; what is away is waited for."""
        while True:
            await self.step()
            await self._clock.sleep(_LOOK_S)

    async def step(self) -> None:
        """Compute what is ordered now."""
        asked = [
            (one.backfills, order)
            for one in self._partitions()
            for order in one.backfills.orders(one.state.aligner.applied_until_us)
        ]
        for topic in sorted({order.topic for _, order in asked}):
            await self._topic([(book, order) for book, order in asked if order.topic == topic])

    async def _topic(self, asked: Sequence[tuple[Backfills, Order]]) -> None:
        def tell(percent: int) -> None:
            for book, order in asked:
                book.tell(order.view.id, percent)

        names = sorted({order.view.id for _, order in asked})
        topic = asked[0][1].topic
        _log.info("backfill_begins", topic=topic, views=names, pasts=len(asked))
        began = self._clock.monotonic()
        try:
            made = await self._history.compute([order for _, order in asked], tell)
        except Exception as error:  # noqa: BLE001 - views that are offered must go on; it is told
            wait_s = error.retry_after if isinstance(error, Retryable) else _AFTER_S
            reason = str(error) if isinstance(error, MeshError) else repr(error)
            _log.warning("backfill_waits", topic=topic, reason=reason)
            for book, order in asked:
                book.tell(order.view.id, 0, reason)
            await self._clock.sleep(wait_s)
            return
        reach(Point.BACKFILL_COMPUTED)
        for (book, order), one in zip(asked, made, strict=True):
            book.deliver(order.view.id, one)
        seconds = round(self._clock.monotonic() - began, 1)
        events = sum(one.events for one in made)
        _log.info("backfill_ends", topic=topic, views=names, events=events, seconds=seconds)


def lake_of(catalogue: Catalogue, project: Path | None, postgres_url: str) -> FindPast | None:
    """How to find what the project's lake holds; None without a lake, or without its libraries."""
    told = LakeSettings()
    if project is None or not (project / LAKE_FILE).exists() or not told.warehouse:
        return None
    try:
        require_libraries()
    except Misdeclared as error:
        _log.warning("backfill_without_lake", reason=str(error))
        return None
    from causemesh.lake.reading import Lake  # noqa: PLC0415 - needs the extra
    from services.features.backfill.lake_past import LakePast, past_in  # noqa: PLC0415 - as well

    if not told.catalog:
        told = told.model_copy(update={"catalog": catalog_on(postgres_url)})

    def find(topic: str) -> LakePast | None:
        # opened for each reading: a lake that is away at the start may come later
        with Lake.open(told, catalogue, project) as lake:
            return past_in(lake, catalogue.topic(topic))

    return find
