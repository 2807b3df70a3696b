"""The replay: events and prediction requests in the form that producers send."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl

from causemesh.errors import Misdeclared
from examples.flights.raw import read_flights, read_weather

MODEL = "late-arrival"
WEATHER_TENANT = "weather"
LEAD_MINUTES = 30
"""How long before its scheduled departure a flight is asked about."""
DUPLICATE_EVERY = 2_000
NAMELESS_EVERY = 5_000
_HOUR_US = 3_600_000_000
_WEATHER_FIELDS = {
    "temp_f": "temp",
    "dew_point_f": "dewp",
    "humidity_percent": "humid",
    "wind_speed_mph": "wind_speed",
    "precipitation_in": "precip",
    "visibility_miles": "visib",
    "pressure_mb": "pressure",
}


@dataclass(frozen=True)
class Replay:
    """Frames in the external form (event_id, tenant_id, occurred_at, fields), in event order.

    A frame of an event type has the columns of its `inbox` topic; `requests` those of
    `inbox.requests`.
    """

    departed: pl.DataFrame
    landed: pl.DataFrame
    weather: pl.DataFrame
    requests: pl.DataFrame

    @property
    def frames(self) -> dict[str, pl.DataFrame]:
        """The frames by kind: the topic of kind `k` is `inbox.k`."""
        return {
            "flight_departed": self.departed,
            "flight_landed": self.landed,
            "weather_observed": self.weather,
            "requests": self.requests,
        }


@dataclass(frozen=True)
class Defects:
    """How many rows `with_defects` spoiled, so how many the door must refuse, by reason."""

    duplicates: int
    nameless: int


def load(months: int, days: int | None = None) -> Replay:
    """The first `months` months of 2013 (1 to 12), by the local date of scheduled departure; of
    those the first `days` days of event time, when given.

    Every flight has a request, cancelled ones too; it departed if its departure is known, and
    landed if its arrival delay is. Raises Misdeclared for other months, or without the data.
    """
    if not 1 <= months <= 12:
        raise Misdeclared(f"months must be 1 to 12, not {months}")
    flights = _with_ids(read_flights(months))
    whole = Replay(
        departed=_flights(flights, "dep-", "departed_at", departure_delay_minutes="dep_delay"),
        landed=_flights(flights, "arr-", "arrived_at", arrival_delay_minutes="arr_delay"),
        weather=_weather(read_weather(months)),
        requests=_requests(flights),
    )
    return whole if days is None else _first_days(whole, days)


def _first_days(replay: Replay, days: int) -> Replay:
    end = pl.lit(datetime(2013, 1, 1, tzinfo=UTC) + timedelta(days=days))
    early = {
        name: frame.filter(pl.col("occurred_at") < end) for name, frame in vars(replay).items()
    }
    return Replay(**early)


def slices(replay: Replay, hours: int = 6) -> Iterator[tuple[int, dict[str, pl.DataFrame]]]:
    """Event time in order: (until_us, rows by kind), whole hours of UTC apart.

    The rows of a slice occurred before `until_us`, those of later slices did not, so `until_us` is
    the watermark to send after it. Every slice has every kind, with no rows if there are none.
    """
    if hours < 1:
        raise Misdeclared(f"slices are at least an hour long, not {hours}")
    step = hours * _HOUR_US
    frames = replay.frames
    times = {kind: f["occurred_at"].to_physical().to_numpy() for kind, f in frames.items()}
    every = np.concatenate(list(times.values()))
    first, last = int(every.min()) // step, int(every.max()) // step
    sent = dict.fromkeys(frames, 0)
    for until_us in range((first + 1) * step, (last + 1) * step + 1, step):
        ends = {kind: int(np.searchsorted(at, until_us)) for kind, at in times.items()}
        yield until_us, {kind: f[sent[kind] : ends[kind]] for kind, f in frames.items()}
        sent = ends


def with_defects(frame: pl.DataFrame) -> tuple[pl.DataFrame, Defects]:
    """Spoil a frame for the door to refuse, always the same rows, and say how many.

    Every 2,000th row comes twice with the same event_id; every 5,000th has an empty tenant_id.
    """
    row = pl.int_range(pl.len())
    twice = row % DUPLICATE_EVERY == DUPLICATE_EVERY - 1
    # one row before the end of its stretch: no row is ever both a duplicate and nameless
    nameless = row % NAMELESS_EVERY == NAMELESS_EVERY - 2
    counts = frame.select(duplicates=twice.sum(), nameless=nameless.sum()).row(0, named=True)
    tenant = pl.when(nameless).then(pl.lit("")).otherwise("tenant_id").alias("tenant_id")
    repeats = frame.select(pl.when(twice).then(2).otherwise(1)).to_series()
    rows = np.repeat(np.arange(frame.height), repeats.to_numpy())
    return frame.with_columns(tenant)[rows], Defects(**counts)


def _with_ids(flights: pl.DataFrame) -> pl.DataFrame:
    date = pl.date("year", "month", "day").dt.strftime("%Y%m%d")
    flight = pl.concat_str("carrier", "flight")
    return flights.with_columns(flight_id=pl.concat_str(flight, date, "origin", separator="-"))


def _flights(flights: pl.DataFrame, prefix: str, moment: str, **delay: str) -> pl.DataFrame:
    """The events of one type: those flights whose delay (its name there and here) is known."""
    return (
        flights.filter(pl.col(column).is_not_null() for column in delay.values())
        .select(
            event_id=prefix + pl.col("flight_id"),
            tenant_id="carrier",
            occurred_at=moment,
            flight_id="flight_id",
            carrier="carrier",
            origin="origin",
            dest="dest",
            tail="tailnum",
            distance_miles="distance",
            scheduled_at="scheduled_at",
            **delay,
        )
        .sort("occurred_at", "event_id")
    )


def _weather(observed: pl.DataFrame) -> pl.DataFrame:
    hour = pl.col("observed_at").dt.strftime("%Y%m%dT%H")
    return observed.select(
        event_id=pl.concat_str(pl.lit("wx"), "origin", hour, separator="-"),
        tenant_id=pl.lit(WEATHER_TENANT),
        occurred_at="observed_at",
        origin="origin",
        **_WEATHER_FIELDS,
    ).sort("occurred_at", "event_id")


def _requests(flights: pl.DataFrame) -> pl.DataFrame:
    # The first entity routes the request; a flight that has no plane yet goes by its own id.
    key = pl.coalesce("tailnum", "flight_id")
    entities = {"tail": key, **{name: pl.col(name) for name in ("origin", "dest", "carrier")}}
    inputs = {name: pl.col(name) for name in ("departure_hour", "weekday")}
    inputs["distance_miles"] = pl.col("distance").cast(pl.Float64)
    return flights.select(
        event_id="flight_id",
        tenant_id="carrier",
        occurred_at=pl.col("scheduled_at") - pl.duration(minutes=LEAD_MINUTES),
        model=pl.lit(MODEL),
        version=pl.lit(None, pl.Int32),
        entities=_named(flights, entities),
        inputs=_named(flights, inputs),
        mode=pl.lit("replay"),
        expires_at=pl.lit(None, pl.Datetime("us", "UTC")),
    ).sort("occurred_at", "event_id")


def _named(frame: pl.DataFrame, values: dict[str, pl.Expr]) -> pl.Series:
    """A list of {name, value} for each row, as the request's arrays are.

    Made flat and cut into rows: a list of structs by expression takes fifteen times as long.
    """
    names = pl.Series(list(values)).gather(np.tile(np.arange(len(values)), frame.height))
    flat = frame.select(pl.concat_list(list(values.values()))).to_series().explode()
    pairs = pl.DataFrame({"name": names, "value": flat}).to_struct()
    return pairs.reshape((frame.height, len(values))).arr.to_list()
