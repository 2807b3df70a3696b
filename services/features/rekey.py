"""The re-keying processor: events in, inputs of views that are keyed otherwise out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from causemesh.runner import Batch, Emission
from services.features.domain.definitions import FeatureView
from services.features.plan import event_frame
from services.features.reading import Read, read_views
from services.features.rekeying import inputs_of


class Rekey:
    """Feeds views that are keyed by another entity than their event."""

    takes_bad_rows = False
    stateful = False

    def __init__(self, views: Sequence[FeatureView]) -> None:
        self._views = [view for view in views if view.placement == "rekeyed"]

    async def process(
        self, batches: Sequence[Batch], watermark_us: int, transaction: Any
    ) -> Emission:
        """See `Processor.process`."""
        found = [(batch, *self._read(batch)) for batch in batches]
        outgoing = [inputs_of(batch, events) for batch, events, _ in found]
        return Emission(outgoing, refused=[(batch, bad) for batch, _, bad in found if bad])

    def _read(self, batch: Batch) -> tuple[list[Read], dict[int, str]]:
        frame = event_frame(batch)
        views = [view for view in self._views if f"events.{view.event_type}" == batch.topic]
        return read_views(views, frame)

    def snapshot(self) -> bytes | None:
        """No state."""
        return None

    def restore(self, state: bytes | None) -> None:
        """No state."""
