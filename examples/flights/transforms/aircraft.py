"""Aircraft rotation: what a plane brings along from its leg before."""

from collections.abc import AsyncIterator
from typing import Any

MINUTE_S = 60


async def aircraft_turned(event: Any, table: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """One event a landing, from the plane's second on. `table` is the plane's own."""
    before, landed_s = table.get("last"), event.occurred_at.timestamp()
    table["legs"] = table.get("legs", 0) + 1
    if before is not None:
        yield {
            "tail": event["tail"],
            "flight_id": event["flight_id"],
            "leg": table["legs"],
            "arrival_delay_minutes": event["arrival_delay_minutes"],
            "previous_flight_id": before["flight_id"],
            "previous_delay_minutes": before["delay"],
            "recovered_minutes": before["delay"] - event["arrival_delay_minutes"],
            "between_minutes": (landed_s - before["landed_s"]) / MINUTE_S,
        }
    # landings of two planes' partitions come in any order: an older one is not the last
    if before is None or landed_s >= before["landed_s"]:
        table["last"] = {
            "flight_id": event["flight_id"],
            "delay": event["arrival_delay_minutes"],
            "landed_s": landed_s,
        }
