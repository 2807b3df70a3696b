"""The features service over what lies in its topics, and what it answers for every entity then.

usage: python -m benchmarks.windows_run AS_OF_US RESULT_FILE RECORDS WARM

As `service_run`; after the measured end, the vectors of all entities are written as Parquet.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.service_run import At, TimedMetrics
from causemesh import service
from services.features import app
from services.features.handlers import Join


class KnownJoin(Join):
    """A join that can be asked from outside of the service."""

    made: list[Join] = []  # noqa: RUF012 - one process, one run

    def __init__(self, *told: Any, **named: Any) -> None:
        super().__init__(*told, **named)
        self.made.append(self)


class AnsweringMetrics(TimedMetrics):
    """Writes the answers once the last record is in the state."""

    as_of_us = 0
    result = Path()

    def _tell(self, began: At, ended: At) -> None:
        super()._tell(began, ended)
        (join,) = KnownJoin.made
        (state,) = join.state.store.views.values()
        keys = state.index.keys
        matrix = state.answer(keys, np.full(len(keys), self.as_of_us, np.int64))
        columns = {feature.name: matrix[:, at] for at, feature in enumerate(state.view.features)}
        pl.DataFrame({"key": keys, **columns}).write_parquet(self.result)


def main() -> None:
    """Run the service until it has read all."""
    as_of_us, result, records, warm = sys.argv[1:]
    AnsweringMetrics.as_of_us, AnsweringMetrics.result = int(as_of_us), Path(result)
    AnsweringMetrics.group = "features"
    AnsweringMetrics.records, AnsweringMetrics.warm = int(records), int(warm)
    setattr(service, "Metrics", AnsweringMetrics)  # noqa: B010 - what they are to be made of
    setattr(app, "Join", KnownJoin)  # noqa: B010
    service.run_process(app.main)


if __name__ == "__main__":
    main()
