"""docs/benchmarks.md and its plot from the newest results: `python -m benchmarks.report`.

Only figures and their settings come from the results; what is equal between arms, and what is not,
is said here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cost_plot, report_features
from benchmarks.harness import RESULTS
from benchmarks.report_text import HEAD, SECTIONS, TARGETS, Target

Result = Mapping[str, Any]
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
PLOT = PAGE.with_name("mesh-cost.svg")
ENTITIES_PLOT = PAGE.with_name("feature-cost.svg")


def newest(benchmark: str) -> Result | None:
    """The newest results of a benchmark; None when there are none."""
    found = sorted(RESULTS.glob(f"{benchmark}-2*.json"))
    return json.loads(found[-1].read_text()) if found else None


def page() -> str:
    """The whole document."""
    parts = [_section(*section) for section in SECTIONS]
    return "\n".join([HEAD, _targets(), *parts])


def _section(benchmark: str, title: str, text: str) -> str:
    result = newest(benchmark)
    lines = ["Not measured yet.\n"] if result is None else [text, *_BODIES[benchmark](result)]
    return "\n".join([f"## {title}\n", *lines])


def _targets() -> str:
    """What was aimed at, and what was measured."""
    rows = ["| target | measured | met |", "|---|---|---|"]
    for target in TARGETS:
        result = newest(target.benchmark)
        rates = {} if result is None else {one["name"]: _median(one) for one in result["arms"]}
        if not {target.ours, target.peer} - {None} <= rates.keys():
            rows.append(f"| {target.said} | not measured | |")
            continue
        told, met = _measured(target, result or {}, rates)
        rows.append(f"| {target.said} | {told} | {'yes' if met else '**no**'} |")
    return "\n".join(rows) + "\n"


def _measured(target: Target, result: Result, rates: Mapping[str, float]) -> tuple[str, bool]:
    if target.most is not None:
        (arm,) = (one for one in result["arms"] if one["name"] == target.ours)
        value = float(arm["figures"][target.figure]["median"])
        return f"{value:,.{target.digits}f} {target.unit}", value <= target.most
    value = rates[target.ours] / (rates[target.peer] if target.peer else 1)
    return f"{value:.2f} x" if target.peer else f"{value:,.0f}/s", value >= target.least


def _median(arm: Result) -> float:
    return float(arm["figures"][arm["rate"]]["median"])


def _arms(result: Result) -> Iterator[str]:
    rows = result["arms"]
    ours = _median(rows[0])
    yield "| | records/s, median | min to max | records a CPU second | peak MB | x ours |"
    yield "|---|---:|---:|---:|---:|---:|"
    for arm in rows:
        rate, figures = arm["figures"][arm["rate"]], arm["figures"]
        cpu, rss = figures.get("records_per_cpu_second"), figures.get("peak_rss_mb")
        cells = [
            arm["name"],
            f"{rate['median']:,.0f}",
            f"{rate['min']:,.0f} to {rate['max']:,.0f}",
            f"{cpu['median']:,.0f}" if cpu else "",
            f"{rss['median']:,.0f}" if rss else "",
            f"{rate['median'] / ours:.2f}",
        ]
        yield "| " + " | ".join(cells) + " |"
    yield from _settings(rows)
    yield "\n" + _where(result)
    yield from _earlier(result["benchmark"])


def _join(result: Result) -> Iterator[str]:
    yield "| | p50 ms | p99 ms | min to max | CPU ms | x ours (p50) |"
    yield "|---|---:|---:|---:|---:|---:|"
    rows = result["arms"]
    ours = rows[0]["figures"]["p50_ms"]["median"]
    for arm in rows:
        p50, p99, cpu = (arm["figures"][name] for name in ("p50_ms", "p99_ms", "cpu_ms"))
        yield (
            f"| {arm['name']} | {p50['median']:.2f} | {p99['median']:.2f} |"
            f" {p99['min']:.2f} to {p99['max']:.2f} | {cpu['median']:.2f} |"
            f" {p50['median'] / ours:.1f} |"
        )
    yield from _settings(rows)
    yield "\n" + _where(result)


def _entities(result: Result) -> Iterator[str]:
    yield "| entities | us an event | read | find rows | apply | bytes an entity | peak MB |"
    yield "|---:|---:|---:|---:|---:|---:|---:|"
    for run in result["runs"]:
        yield (
            f"| {run['entities']:,} | {run['us_per_event']:.2f} | {run['read_us']:.2f} |"
            f" {run['encode_us']:.2f} | {run['apply_us']:.2f} | {run['bytes_per_entity']:,.0f} |"
            f" {run['peak_rss_mb']:,.0f} |"
        )
    yield f"\n![Cost against entities]({ENTITIES_PLOT.name})\n"
    yield _where(result)


def _with_where(body: Callable[[Result], Iterator[str]]) -> Callable[[Result], Iterator[str]]:
    def lines(result: Result) -> Iterator[str]:
        yield from body(result)
        yield "\n" + _where(result)

    return lines


def _settings(rows: Sequence[Result]) -> Iterator[str]:
    yield "\nSettings: "
    for arm in rows:
        told = "; ".join(f"{name} {_told(value)}" for name, value in arm["settings"].items())
        yield f"- {arm['name']}: {told}"


def _earlier(benchmark: str) -> Iterator[str]:
    """The medians of runs before the newest."""
    for path in sorted(RESULTS.glob(f"{benchmark}-2*.json"))[-2::-1]:
        result = json.loads(path.read_text())
        told = "; ".join(f"{arm['name']} {_median(arm):,.0f}" for arm in result["arms"])
        yield f"Before, {result['measured_at']}, commit {result['commit']}: {told}.\n"


def _told(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _latency(result: Result) -> Iterator[str]:
    yield "| requests/s | what | p50 ms | min to max | p99 ms | min to max |"
    yield "|---:|---|---:|---:|---:|---:|"
    for row in result["rows"]:
        p50, p99 = row["p50_ms"], row["p99_ms"]
        yield (
            f"| {row['rate']:g} | {row['name']} | {p50['median']:.1f} |"
            f" {p50['min']:.1f} to {p50['max']:.1f} | {p99['median']:.1f} |"
            f" {p99['min']:.1f} to {p99['max']:.1f} |"
        )
    yield "\n" + _where(result)


def _mesh(result: Result) -> Iterator[str]:
    columns = {
        "records": "records",
        "predictions": "predictions",
        "invoices": "invoices",
        "replay_seconds": "seconds",
        "training_seconds": "of it training",
        "predictions_per_second": "predictions/s",
        "records_per_second": "records/s",
        "services_cpu_seconds": "CPU s, services",
        "servers_cpu_seconds": "CPU s, servers",
        "services_cpu_us_per_record": "services' CPU us a record",
        "services_peak_rss_mb": "peak MB, services",
        "servers_peak_rss_mb": "peak MB, servers",
    }
    runs = result["runs"]
    heads = [f"{run['days']} days" + ("" if run["trains"] else ", one version") for run in runs]
    yield "| | " + " | ".join(heads) + " |"
    yield "|---|" + "---:|" * len(runs)
    for name, label in columns.items():
        cells = [
            f"{run[name]:,.1f}" if isinstance(run[name], float) else f"{run[name]:,}"
            for run in runs
        ]
        yield f"| {label} | " + " | ".join(cells) + " |"
    yield f"\n![Cost against work]({PLOT.name})\n"
    yield _where(result)


def _profiles(result: Result) -> Iterator[str]:
    for one in result["services"]:
        told = ", ".join(f"{part} {share:.0%}" for part, share in one["parts"].items())
        name = one["service"]
        yield f"- [{name}](profiles/{name}.svg), {one['samples']:,} samples: {told}."
    yield "\n" + _where(result)


def _where(result: Result) -> str:
    """Which machine, when, what."""
    machine = result["machine"]
    about = ", ".join(f"{name} {_told(value)}" for name, value in result["about"].items())
    versions = ", ".join(f"{name} {_short(value)}" for name, value in result["versions"].items())
    return (
        f"<sub>{result['measured_at']}, commit {result['commit']}; {machine['cpu']},"
        f" {machine['cores']} cores, {machine['memory_gib']} GiB, Linux {machine['kernel']},"
        f" Python {machine['python']}; {about}; {versions}</sub>\n"
    )


def _short(version: str) -> str:
    return version.rsplit(":", 1)[-1].replace('"', "")


def plot(runs: Sequence[Result]) -> str:
    """Processor time and memory of the services against the records, as SVG: of the runs that are
    alike but for their size."""
    runs = [one for one in runs if one["trains"]]
    panels = (
        ("CPU seconds, services", "services_cpu_seconds"),
        ("peak MB, services", "services_peak_rss_mb"),
    )
    drawn = "".join(
        _panel(runs, label, name, 60 + number * 390) for number, (label, name) in enumerate(panels)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="800" height="280" viewBox="0 0 800 280"'
        ' font-family="sans-serif" font-size="12">\n'
        f'<rect width="800" height="280" fill="#ffffff"/>\n{drawn}</svg>\n'
    )


def entities_plot(runs: Sequence[Result]) -> str:
    """What an event costs and an entity holds, against the entities, as SVG."""
    panels = (("CPU us an event", "us_per_event"), ("bytes an entity", "bytes_per_entity"))
    return cost_plot.plot(runs, "entities", panels)


def _panel(runs: Sequence[Result], label: str, name: str, left: float) -> str:
    """One pair of axes from zero."""
    width, height, top = 300.0, 190.0, 40.0
    most_x = max(run["records"] for run in runs)
    most_y = max(run[name] for run in runs)
    bottom = top + height

    def at(x: float, y: float) -> tuple[float, float]:
        return left + width * x / most_x, bottom - height * y / most_y

    places = [at(run["records"], run[name]) for run in runs]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [
        f'<text x="{left}" y="24" font-size="14">{label}</text>',
        f'<path d="M{left} {top} V{bottom} H{left + width}" fill="none" stroke="#555"/>',
        f'<polyline points="{line}" fill="none" stroke="#c8792a" stroke-width="2"/>',
    ]
    for run, (x, y) in zip(runs, places, strict=True):
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#c8792a"/>',
            f'<text x="{x - 6:.1f}" y="{y - 9:.1f}" text-anchor="end">{run[name]:,.0f}</text>',
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">'
            f"{run['records'] / 1000:,.0f}k</text>",
        ]
    parts.append(
        f'<text x="{left + width / 2}" y="{bottom + 36}" text-anchor="middle">records</text>'
    )
    return "\n".join(parts) + "\n"


_BODIES: Mapping[str, Callable[[Result], Iterator[str]]] = {
    "features": _arms,
    "windows": _arms,
    "join": _join,
    "entities": _entities,
    "checkpoints": _with_where(report_features.checkpoints),
    "backfill": _with_where(report_features.backfill),
    "lake_from_kafka": _arms,
    "latency": _latency,
    "predictions": _arms,
    "usage": _arms,
    "transforms": _arms,
    "mesh": _mesh,
    "profiles": _profiles,
}


def main() -> None:
    """Write the page and its plot."""
    PAGE.write_text(page())
    measured = newest("mesh")
    if measured is not None:
        PLOT.write_text(plot(measured["runs"]))
    sized = newest("entities")
    if sized is not None:
        ENTITIES_PLOT.write_text(entities_plot(sized["runs"]))


if __name__ == "__main__":
    main()
