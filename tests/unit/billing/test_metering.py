"""Usage buckets: exact, the same for any batches, and provable from their position ranges."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causemesh.errors import Misdeclared, Poison
from services.billing.domain.members import MEMBER_SCHEMA, hash_texts, merge_members, meter_members
from services.billing.domain.metering import USAGE_SCHEMA, merge_usage, meter_batch
from services.billing.domain.periods import month_of
from services.billing.domain.plans import Aggregation, Meter
from services.billing.domain.usage import PositionRange, monthly_usage

TOPIC = "events.used"
HOUR = 3600 * 10**6
JANUARY, FEBRUARY = 1_356_998_400 * 10**6, 1_359_676_800 * 10**6
METERS = [
    Meter("calls", TOPIC, "count", "kind = 'paid'"),
    Meter("amount", TOPIC, "sum", "kind = 'paid'", "amount"),
    Meter("peak", TOPIC, "max", None, "amount"),
    Meter("seats", TOPIC, "latest", None, "amount"),
    Meter("users", TOPIC, "unique", None, '"user"'),
]
USERS = METERS[4]
NO_USAGE = USAGE_SCHEMA.to_frame()
NO_MEMBERS = MEMBER_SCHEMA.to_frame()


@dataclass(frozen=True)
class Event:
    tenant: str
    at_us: int
    kind: str
    amount: float
    user: str


events = st.builds(
    Event,
    st.sampled_from(["UA", "AA"]),
    st.one_of(
        st.integers(FEBRUARY - 2 * HOUR, FEBRUARY + 2 * HOUR),
        st.sampled_from([JANUARY, FEBRUARY - 1, FEBRUARY, FEBRUARY + HOUR]),
    ),
    st.sampled_from(["paid", "free"]),
    st.one_of(
        st.floats(0, 1e4, allow_subnormal=False), st.sampled_from([0.1, 0.0000005, 0.0000015, 7])
    ),
    st.sampled_from(["u1", "u2", "user-with-a-longer-name", ""]),
)
# A log: for each of two partitions its events, with gaps between positions.
logs = st.lists(st.lists(events, max_size=10), min_size=2, max_size=2)
cuts = st.lists(st.integers(0, 10), max_size=2)


def frame_of(part: list[Event]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "tenant_id": [e.tenant for e in part],
            "occurred_at": pl.Series([e.at_us for e in part], dtype=pl.Int64).cast(
                pl.Datetime("us", "UTC")
            ),
            "kind": [e.kind for e in part],
            "amount": [float(e.amount) for e in part],
            "user": [e.user for e in part],
        },
        schema_overrides={
            "tenant_id": pl.String,
            "kind": pl.String,
            "amount": pl.Float64,
            "user": pl.String,
        },
    )


def positions_of(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(count, dtype=np.int64) * 3 + 10


def chunks(part: list[Event], at: list[int]) -> list[slice]:
    edges = sorted({0, len(part), *(c for c in at if c < len(part))})
    return [slice(a, b) for a, b in pairwise(edges)]


def metered(log: list[list[Event]], at: list[int]) -> list[tuple[pl.DataFrame, pl.DataFrame]]:
    """Usage and members of every chunk of the log."""
    found = []
    for partition, part in enumerate(log):
        frame, positions = frame_of(part), positions_of(len(part))
        for piece in chunks(part, at):
            rows, here = frame[piece], positions[piece]
            usage = [meter_batch(meter, rows, TOPIC, partition, here) for meter in METERS]
            found.append((pl.concat(usage), meter_members(USERS, rows)))
    return found


def merged(parts: list[tuple[pl.DataFrame, pl.DataFrame]]) -> tuple[pl.DataFrame, pl.DataFrame]:
    usage = reduce(merge_usage, [u for u, _ in parts], NO_USAGE)
    return usage, reduce(merge_members, [m for _, m in parts], NO_MEMBERS)


def micro(value: float) -> int:
    # The product in float64 is part of the definition; rounding it is done in decimals here.
    return int(Decimal(value * 1e6).quantize(Decimal(1), ROUND_HALF_EVEN))


def plain(log: list[list[Event]]) -> dict[tuple[str, str, str], int]:
    """Each tenant's meter and month, straight from the events."""
    seen: dict[tuple[str, str, str], list[tuple[int, int, int, Event]]] = defaultdict(list)
    for partition, part in enumerate(log):
        for position, event in zip(positions_of(len(part)).tolist(), part, strict=True):
            for meter in METERS:
                if meter.filter is None or event.kind == "paid":
                    key = (event.tenant, meter.name, month_of(event.at_us))
                    seen[key].append((event.at_us, position, partition, event))
    answer = {}
    for (tenant, name, month), rows in seen.items():
        aggregation = next(m.aggregation for m in METERS if m.name == name)
        answer[tenant, name, month] = {
            "count": len(rows) * 10**6,
            "sum": sum(micro(e.amount) for *_, e in rows),
            "max": max(micro(e.amount) for *_, e in rows),
            "latest": micro(max(rows, key=lambda row: row[:3])[3].amount),
            "unique": len({e.user for *_, e in rows}) * 10**6,
        }[aggregation]
    return answer


def totals(usage: pl.DataFrame, members: pl.DataFrame) -> dict[tuple[str, str, str], int]:
    return {
        (tenant, row.meter, row.usage_period): row.quantity_micro
        for tenant, rows in monthly_usage(usage, members).items()
        for row in rows
    }


@settings(max_examples=25, deadline=None)
@given(logs, cuts, st.randoms(use_true_random=False))
def test_any_batches_in_any_order_of_merging_give_the_same_usage(
    log: list[list[Event]], at: list[int], random: Any
) -> None:
    usage, members = merged(metered(log, []))
    assert usage.schema == USAGE_SCHEMA
    assert members.schema == MEMBER_SCHEMA
    parts = metered(log, at)
    random.shuffle(parts)
    middle = random.randint(0, len(parts))
    left, right = merged(parts[:middle]), merged(parts[middle:])
    assert merge_usage(left[0], right[0]).equals(usage)
    assert merge_members(left[1], right[1]).equals(members)
    assert totals(usage, members) == plain(log)


@settings(max_examples=12, deadline=None)
@given(logs, cuts)
def test_a_range_covers_its_bucket_exactly(log: list[list[Event]], at: list[int]) -> None:
    usage, _ = merged(metered(log, at))
    for bucket in usage.iter_rows(named=True):
        part = log[bucket["partition"]]
        positions = positions_of(len(part))
        inside = (positions >= bucket["first"]) & (positions <= bucket["last"])
        meter = next(m for m in METERS if m.name == bucket["meter"])
        again = meter_batch(
            meter, frame_of(part).filter(inside), TOPIC, bucket["partition"], positions[inside]
        ).filter(tenant_id=bucket["tenant_id"], hour_us=bucket["hour_us"])
        assert again.row(0, named=True) == bucket


def test_control_adding_up_where_it_does_not_add_up_is_wrong() -> None:
    """The same log in two batches: what naive merging would make of it."""
    january = [
        Event("UA", JANUARY + 50, "paid", 5.0, "u1"),
        Event("UA", JANUARY + 10, "paid", 3.0, "u1"),
    ]
    parts = metered([january, []], [1])
    added = pl.concat([u for u, _ in parts]).group_by("meter").agg(pl.col("quantity_micro").sum())
    by_arrival = pl.concat([u for u, _ in parts]).group_by("meter").last()
    right = totals(*merged(parts))
    assert dict(added.iter_rows())["peak"] != right["UA", "peak", "2013-01"] == 5_000_000
    last = dict(by_arrival.select("meter", "quantity_micro").iter_rows())
    assert last["seats"] != right["UA", "seats", "2013-01"] == 5_000_000
    per_batch = sum(m.height for _, m in parts) * 10**6
    assert per_batch != right["UA", "users", "2013-01"] == 1_000_000


def test_control_float_sums_depend_on_the_batches() -> None:
    values = [0.1, 0.2, 0.3]
    assert (values[0] + values[1]) + values[2] != values[0] + (values[1] + values[2])
    log = [[Event("UA", JANUARY, "paid", v, "u") for v in values], []]
    assert totals(*merged(metered(log, [1])))["UA", "amount", "2013-01"] == 600_000
    assert totals(*merged(metered(log, [2])))["UA", "amount", "2013-01"] == 600_000


@pytest.mark.parametrize("amounts", [(1.0, 2.0), (2.0, 1.0)])
def test_the_latest_of_two_partitions_does_not_depend_on_the_order_of_buckets(
    amounts: tuple[float, float],
) -> None:
    """Same time, same position: the higher partition wins, whatever order SQL gives the rows in."""
    usage, members = merged(
        metered([[Event("UA", JANUARY, "paid", amount, "u")] for amount in amounts], [])
    )
    for rows in (usage, usage.reverse()):
        assert totals(rows, members)["UA", "seats", "2013-01"] == micro(amounts[1])


def test_ranges_are_kept_for_each_partition() -> None:
    log = [[Event("UA", JANUARY + i * HOUR, "paid", 1.0, "u") for i in range(3)] for _ in range(2)]
    log[1].append(Event("UA", FEBRUARY, "paid", 1.0, "u"))
    rows = monthly_usage(*merged(metered(log, [2])))["UA"]
    calls = [row for row in rows if row.meter == "calls"]
    assert [(row.usage_period, row.quantity_micro) for row in calls] == [
        ("2013-01", 6_000_000),
        ("2013-02", 1_000_000),
    ]
    assert calls[0].ranges == (PositionRange(TOPIC, 0, 10, 16), PositionRange(TOPIC, 1, 10, 16))
    assert calls[1].ranges == (PositionRange(TOPIC, 1, 19, 19),)


@pytest.mark.parametrize(
    ("amount", "says"),
    [
        (None, "is null"),
        (float("nan"), "is NaN or infinite"),
        (float("inf"), "is NaN or infinite"),
        (-0.5, "is negative"),
        (1e10, "is beyond 9007199254 units"),
    ],
)
@pytest.mark.parametrize("aggregation", ["sum", "max", "latest"])
def test_values_that_cannot_be_billed_are_poison(
    amount: float | None, says: str, aggregation: Aggregation
) -> None:
    part = [Event("UA", JANUARY, kind, 1.0, "u") for kind in ("free", "paid", "paid")]
    frame = frame_of(part).with_columns(pl.Series("amount", [amount, 1.0, amount]))
    meter = Meter("amount", TOPIC, aggregation, "kind = 'paid'", "amount")
    with pytest.raises(Poison) as poison:
        meter_batch(meter, frame, TOPIC, 0, positions_of(3))
    # Row 0 is as bad, but the meter's filter does not let it through.
    assert list(poison.value.rows) == [2]
    assert says in poison.value.rows[2]
    good = frame.filter(pl.Series([True, True, False]))
    assert meter_batch(meter, good, TOPIC, 0, positions_of(2))["quantity_micro"].item() == 10**6


def test_a_member_without_a_value_or_a_time_is_poison() -> None:
    frame = frame_of([Event("UA", JANUARY, "paid", 1.0, "u"), Event("UA", -1, "paid", 1.0, "u")])
    frame = frame.with_columns(pl.Series("user", [None, "u"], dtype=pl.String))
    with pytest.raises(Poison) as poison:
        meter_members(USERS, frame)
    assert '"user" is null' in poison.value.rows[0]
    assert "no occurred_at in the years 1970" in poison.value.rows[1]


@pytest.mark.parametrize(
    ("meter", "says"),
    [
        (Meter("m", TOPIC, "count", "nosuch = 1"), 'unable to find column "nosuch"'),
        (Meter("m", TOPIC, "count", "amount + 1"), "does not fit topic events.used"),
        (Meter("m", TOPIC, "sum", None, "kind"), "sum needs numbers; 'kind' over events.used"),
        (Meter("m", TOPIC, "unique", None, "amount"), "unique needs text or whole numbers"),
    ],
)
def test_an_expression_that_does_not_fit_the_topic_stops_the_service(
    meter: Meter, says: str
) -> None:
    frame = frame_of([Event("UA", JANUARY, "paid", 1.0, "u")])
    with pytest.raises(Misdeclared, match=r"billing.yaml: meters\.m") as refusal:
        meter_batch(meter, frame, TOPIC, 0, positions_of(1))
    assert says in str(refusal.value)


def test_a_row_that_breaks_an_expression_does_not_stop_the_service() -> None:
    """A failed cast is the row's fault; the runner finds it because it is no MeshError."""
    meter = Meter("m", TOPIC, "sum", None, 'cast("user" as double)')
    frame = frame_of([Event("UA", JANUARY, "paid", 1.0, user) for user in ("1.5", "x")])
    with pytest.raises(pl.exceptions.InvalidOperationError):
        meter_batch(meter, frame, TOPIC, 0, positions_of(2))
    usage = meter_batch(meter, frame[:1], TOPIC, 0, positions_of(1))
    assert usage["quantity_micro"].item() == 1_500_000


def test_a_sum_beyond_int64_is_refused_and_not_wrapped() -> None:
    frame = frame_of([Event("UA", JANUARY, "paid", 9e9, "u")] * 1030)
    values = pl.Series([9 * 10**15] * 1030)
    assert values.sum() < 0, "the control: polars wraps in silence"
    with pytest.raises(Misdeclared, match="beyond 9223372036854 units; divide"):
        meter_batch(METERS[1], frame, TOPIC, 0, positions_of(1030))


def test_a_meter_that_changed_its_aggregation_is_refused() -> None:
    frame = frame_of([Event("UA", JANUARY, "paid", 1.0, "u")])
    was, now = (Meter("m", TOPIC, kind, None, "amount") for kind in ("sum", "max"))
    both = merge_usage(
        meter_batch(was, frame, TOPIC, 0, positions_of(1)),
        meter_batch(now, frame, TOPIC, 0, positions_of(1) + 1),
    )
    with pytest.raises(Misdeclared, match="'m' was max and sum in 2013-01"):
        monthly_usage(both, NO_MEMBERS)


HASHES = [
    0,
    2518982036275827739,
    -196187312423245768,
    8251894009033926814,
    2488120207454061803,
    2518982036275827739,
]


def test_hashes_stay_what_they_were() -> None:
    """Members are stored: another value here would bill known users again."""
    texts = pl.Series(["", "u1", "12345678", "123456789", "Zürich", "u1"])
    hashes = hash_texts(texts)
    assert hashes.tolist() == HASHES
    assert hash_texts(pl.Series(["123456789"])).tolist() == [HASHES[3]]
    assert hash_texts(texts.clear()).tolist() == []


def test_hashes_tell_near_texts_apart() -> None:
    near = [f"{'x' * pad}{i}" for pad in range(20) for i in range(2000)]
    near += ["\0" * n for n in range(1, 30)]
    assert len(set(hash_texts(pl.Series(near)).tolist())) == len(near)


def plain_hash(text: str) -> int:
    """The same definition over Python integers."""
    mask = 2**64 - 1

    def mix(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        return state ^ (state >> 31)

    octets = text.encode()
    state = mix(len(octets) * 0x9E3779B97F4A7C15 & mask)
    for start in range(0, len(octets), 8):
        word = int.from_bytes(octets[start : start + 8].ljust(8, b"\0"), "little")
        state = mix(((state ^ word) + 0x9E3779B97F4A7C15) & mask)
    return state - 2**64 if state >= 2**63 else state


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=20))
def test_the_hash_is_its_definition(texts: list[str]) -> None:
    assert hash_texts(pl.Series(texts, dtype=pl.String)).tolist() == [plain_hash(t) for t in texts]


def test_a_large_log_in_many_batches() -> None:
    random = np.random.default_rng(5)
    part = [
        Event(
            random.choice(["UA", "AA"]),
            int(FEBRUARY + random.integers(-3 * HOUR, 3 * HOUR)),
            random.choice(["paid", "free"]),
            float(random.random() * 1e3),
            f"u{random.integers(0, 300)}",
        )
        for _ in range(4000)
    ]
    whole = merged(metered([part, part[:1000]], []))
    assert totals(*whole) == plain([part, part[:1000]])
    pieces = merged(metered([part, part[:1000]], list(range(0, 4000, 173))))
    assert pieces[0].equals(whole[0])
    assert pieces[1].equals(whole[1])
