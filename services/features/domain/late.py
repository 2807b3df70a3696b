"""Which events come behind what was applied, and whether their view still takes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.features.domain.definitions import FeatureView
from services.features.domain.events import Ints


@dataclass(frozen=True)
class Behind:
    """Events that came behind what was applied already.

    rows: their places among the events given, rising; taken: which of them the view takes all the
    same, from the next slice on. The others are in none of its answers.
    """

    rows: Ints
    taken: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def missed(self) -> Ints:
        """The places of those that the view does not take."""
        return self.rows[~self.taken]


_ON_TIME = Behind(np.empty(0, np.int64), np.empty(0, np.bool_))


def behind_of(view: FeatureView, applied_until_us: int | None, occurred_at_us: Ints) -> Behind:
    """Those of events at these times that came behind; before any time was applied none does."""
    if applied_until_us is None:
        return _ON_TIME
    rows = np.flatnonzero(occurred_at_us < applied_until_us)
    if not len(rows):
        return _ON_TIME
    return Behind(rows, occurred_at_us[rows] >= view.taken_from_us(applied_until_us))
