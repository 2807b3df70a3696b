"""Model versions, schedules, and what becomes of a task. Pure: no I/O and no clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from causemesh.errors import Misdeclared
from causemesh.series import filled_int64s, null_mask

Float64s = npt.NDArray[np.float64]
Objects = npt.NDArray[np.object_]
_NEVER_US = 2**62
_CARRIED = ("tenant_id", "occurred_at", "request_id", "model", "version")


@dataclass(frozen=True)
class ModelVersion:
    """What a version promises; it never changes once registered.

    `features` name the vector's columns in order (view.feature or input.name), `required` those
    that must not be missing. `label`, `reference` and `metrics` travel to drift as they are.
    """

    model: str
    version: int
    lane: str
    features: tuple[str, ...]
    required: tuple[str, ...]
    artefact_sha256: str
    label: Mapping[str, str] | None
    reference: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, float]

    @property
    def deployment(self) -> str:
        """The name of this version in the model server."""
        return f"{self.model}.v{self.version}"

    def check(self) -> None:
        """Raise Misdeclared, saying what to change, when the parts do not fit together."""
        if not self.features:
            raise Misdeclared("a version needs at least one feature")
        twice = {name for name in self.features if self.features.count(name) > 1}
        if twice:
            raise Misdeclared(f"features named twice: {sorted(twice)}")
        plain = [name for name in self.features if "." not in name]
        if plain:
            raise Misdeclared(f"features are named view.feature or input.name, not {plain}")
        unknown = sorted(set(self.required) - set(self.features))
        if unknown:
            raise Misdeclared(f"required columns that are no features: {unknown}")

    def record(self, sequence: int) -> dict[str, Any]:
        """The fields of ModelVersionRegistered, less the envelope."""
        return {
            "model": self.model,
            "version": self.version,
            "lane": self.lane,
            "features": list(self.features),
            "required": list(self.required),
            "artefact_sha256": self.artefact_sha256,
            "label": self.label,
            "reference": list(self.reference),
            "metrics": [{"name": name, "value": value} for name, value in self.metrics.items()],
            "sequence": sequence,
        }


@dataclass(frozen=True)
class Champion:
    """`version` answers requests that occurred at `effective_us` (microseconds) or later."""

    version: int
    effective_us: int


def checked_schedule(entries: Sequence[Champion], versions: Sequence[int]) -> list[Champion]:
    """The schedule by time. Raises Misdeclared for unknown versions or equal times."""
    unknown = sorted({entry.version for entry in entries} - set(versions))
    if unknown:
        raise Misdeclared(f"versions {unknown} are not registered; known: {sorted(versions)}")
    times = [entry.effective_us for entry in entries]
    if len(set(times)) != len(times):
        raise Misdeclared("two entries of a schedule have one effective_at")
    return sorted(entries, key=lambda entry: entry.effective_us)


@dataclass
class Outcomes:
    """What became of each task of a batch, by row; every row gets exactly one outcome."""

    outcome: Objects
    reason: Objects
    score: Float64s
    compute_ms: Float64s

    @classmethod
    def of(cls, tasks: pl.DataFrame, now_us: int) -> Outcomes:
        """Outcomes that need no model: failed before, or past its deadline (wall clock)."""
        count = tasks.height
        made = cls(
            np.full(count, None, dtype=object),
            np.full(count, None, dtype=object),
            np.full(count, np.nan),
            np.zeros(count),
        )
        failed = ~null_mask(tasks["failure"])
        expired = ~failed & (filled_int64s(tasks["expires_at"], _NEVER_US) <= now_us)
        if failed.any():
            made.outcome[failed] = "failed"
            made.reason[failed] = tasks["failure"].drop_nulls().to_list()
        made.outcome[expired] = "expired"
        made.reason[expired] = "expired: the deadline passed before a model was called"
        return made

    @property
    def open(self) -> npt.NDArray[np.bool_]:
        """Rows that have no outcome yet."""
        return np.array([one is None for one in self.outcome], dtype=bool)

    def predict(self, rows: npt.NDArray[np.int64], scores: Float64s, share_ms: float) -> None:
        """Enter scores; one that is no number fails its row."""
        good = np.isfinite(scores)
        self.outcome[rows[good]] = "predicted"
        self.score[rows[good]] = scores[good]
        self.fail(rows[~good], "not_a_number: the model answered NaN or infinity")
        self.compute_ms[rows] = share_ms

    def fail(self, rows: npt.NDArray[np.int64], reason: str) -> None:
        """Enter failures."""
        self.outcome[rows] = "failed"
        self.reason[rows] = reason

    def frame(self, tasks: pl.DataFrame, lane: str, now_us: int) -> pl.DataFrame:
        """The columns of PredictionMade, one row a task."""
        scores = pl.Series("score", self.score)
        now = pl.Series("predicted_at", [now_us], dtype=pl.Int64).cast(pl.Datetime("us", "UTC"))
        return pl.DataFrame(
            [
                *(tasks[name] for name in _CARRIED),
                pl.Series("outcome", self.outcome.tolist(), dtype=pl.String),
                scores.fill_nan(None) if np.isnan(self.score).any() else scores,
                pl.Series("reason", self.reason.tolist(), dtype=pl.String),
                tasks["vector"],
                pl.Series("lane", [lane]).new_from_index(0, tasks.height),
                pl.Series("compute_ms", self.compute_ms),
                now.new_from_index(0, tasks.height),
            ]
        )


def groups(
    tasks: pl.DataFrame, rows: npt.NDArray[np.int64], at_most: int
) -> Iterator[tuple[str, int, npt.NDArray[np.int64]]]:
    """Rows by (model, version), in pieces of at most `at_most`."""
    names, numbers = tasks["model"].to_list(), tasks["version"].to_list()
    rows_of: dict[tuple[str, int], list[int]] = {}
    for row in rows.tolist():
        rows_of.setdefault((names[row], numbers[row]), []).append(row)
    for (model, version), mine in rows_of.items():
        for start in range(0, len(mine), at_most):
            yield model, version, np.array(mine[start : start + at_most], dtype=np.int64)


def matrix(vectors: Sequence[bytes], width: int) -> npt.NDArray[np.float32]:
    """Float32 little-endian vectors of `width` columns as rows."""
    return np.frombuffer(b"".join(vectors), dtype="<f4").reshape(len(vectors), width)
