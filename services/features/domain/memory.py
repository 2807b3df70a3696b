"""What a view's state costs, before there is any: per entity, and against a budget."""

from __future__ import annotations

from collections.abc import Sequence

from services.features.domain.aggregates import RECORD
from services.features.domain.definitions import FeatureView
from services.features.domain.entities import ENTITY_BYTES
from services.features.domain.failures import DefinitionError
from services.features.domain.layout import layout_of
from services.features.domain.ring import ring_length

CELL_BYTES = 32
# How many cells of a sketch an entity is taken to hit in each of its tiles.
EXPECTED_CELLS = 8


def entity_bytes(view: FeatureView) -> int:
    """Bytes that an entity costs: its row of the ring, its newest records, its key.

    Sketches are counted with EXPECTED_CELLS cells for each tile; what is kept for corrections
    depends on the events and is not counted.
    """
    layout = layout_of(view)
    numbers = 1 + len(layout.sums) + len(layout.mins) + RECORD * len(layout.lasts)
    kept = len(layout.latests) + 1 if layout.latests else 0
    cells = EXPECTED_CELLS * CELL_BYTES * view.tiles * len(layout.sketches)
    return 8 * (ring_length(view.tiles) * numbers + RECORD * kept) + cells + ENTITY_BYTES


def check_budget(views: Sequence[FeatureView], budget_bytes: int) -> None:
    """Raises DefinitionError when the declared entities would not fit, naming the dearest view."""
    costs = {view.id: entity_bytes(view) * view.entities for view in views}
    total = sum(costs.values())
    if total > budget_bytes:
        dearest = max(views, key=lambda view: costs[view.id])
        raise DefinitionError(
            f"view {dearest.id!r} needs {_mib(costs[dearest.id])} MiB for {dearest.entities:,} "
            f"entities of {entity_bytes(dearest):,} bytes, all views {_mib(total)} MiB, more than "
            f"the {_mib(budget_bytes)} MiB of CAUSEMESH_MEMORY_MB: take a longer tile, shorter "
            f"windows or fewer aggregations, or say how many `entities` there are"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
