"""The tables of what features does with large states: checkpoints and backfills."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Result = Mapping[str, Any]


def checkpoints(result: Result) -> Iterator[str]:
    """The load without and with them, what they write, and the restart."""
    arms = {arm["name"]: arm["figures"] for arm in result["arms"]}
    yield "| | events a CPU second | min to max | events/s |"
    yield "|---|---:|---:|---:|"
    for name in ("without checkpoints", "with checkpoints"):
        rate = arms[name]["events_per_cpu_second"]
        yield (
            f"| {name} | {rate['median']:,.0f} | {rate['min']:,.0f} to {rate['max']:,.0f} |"
            f" {arms[name]['events_per_second']['median']:,.0f} |"
        )
    saving = arms["with checkpoints"]
    cost = saving["cost_percent"]
    yield (
        f"\nThey took {cost['median']:.1f} % of the CPU seconds ({cost['min']:.1f} to"
        f" {cost['max']:.1f} by round, {sum(saving['checkpoints']['rounds']):.0f} checkpoints in"
        f" all); the process had {saving['peak_rss_mb']['max']:,.0f} MB at the most, its load and"
        " the first checkpoint included.\n"
    )
    yield "| what | MiB | files | seconds | CPU seconds | peak MB |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name in ("first checkpoint", "restart"):
        yield _whole(name, arms[name])
    for figure, said in _WRITTEN.items():
        yield f"| {said} | {saving[figure]['median']:.1f} | | | | |"


_WRITTEN = {
    "delta_mib": "a later checkpoint: delta",
    "largest_delta_mib": "the largest delta",
    "pieces_anew_mib": "a later checkpoint: pieces anew",
    "merged_mib": "a later checkpoint: deltas merged",
}


def _whole(name: str, figures: Result) -> str:
    peak = f"{figures['peak_rss_mb']['max']:,.0f}" if "peak_rss_mb" in figures else ""
    seconds, cpu = figures["seconds"], figures["cpu_seconds"]
    return (
        f"| {name} | {figures['mib']['median']:,.0f} | {figures['files']['median']:,.0f} |"
        f" {seconds['median']:.1f} ({seconds['min']:.1f} to {seconds['max']:.1f}) |"
        f" {cpu['median']:.1f} | {peak} |"
    )


def backfill(result: Result) -> Iterator[str]:
    """Each arm's time, and how long the event loop was held meanwhile."""
    yield "| | events | seconds | min to max | CPU seconds | loop held, p99 ms | at most, ms |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for arm in result["arms"]:
        figures = arm["figures"]
        seconds, cpu = figures["seconds"], figures["cpu_seconds"]
        yield (
            f"| {arm['name']} | {figures['events']['median']:,.0f} | {seconds['median']:.1f} |"
            f" {seconds['min']:.1f} to {seconds['max']:.1f} | {cpu['median']:.1f} |"
            f" {figures['loop_held_p99_ms']['median']:.0f} |"
            f" {figures['loop_held_most_ms']['max']:.0f} |"
        )
