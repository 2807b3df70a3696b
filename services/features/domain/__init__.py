"""The feature engine: windows over events, joined to requests at a point in time.

Everything here is pure: no I/O and no clock. An answer is a function of the *set* of events, never
of their order of arrival, of the size of a batch or of where a snapshot was taken.

Values
    An input is rounded to its view's grid when it is read: `q = round(x / resolution)`, an integer.
    Sums of integers are exact, so any grouping gives the same bits. Null and NaN inputs are
    skipped by the aggregates of their column; `count` without a column counts every event.

Windows
    A window is a run of whole tiles. As of time `s` (microseconds) a window of `n` tiles of
    length `h` holds the tiles `k` with `K - n < k <= K`, `K = floor((s - 1) / h)`: the current,
    partial tile and the `n - 1` before it. Only events with `occurred_at < s` count.
    Nothing in a window: `count` and `sum` are 0, everything else is NaN. `std` has ddof 0.

Last and latest
    `last` is the newest value inside a window, `latest` the newest value whatever its age (up to
    the view's `retention`, where it has one), `age` the seconds since the entity's newest event.
    Equal times are broken by `(source, position)`, the highest wins.

Replay
    A request that occurred at `t` is answered as of `s = floor(t / slice) * slice`: it sees
    exactly the events before the start of its slice, whatever the partitioning or the speed.

Live
    A request is answered as of `t + 1` microsecond with what has arrived. Events that were
    already *applied* are in the tiles: one later than `t` but in the tile of `t` is included.

Late events
    An event older than what was already applied still reaches its tile while the tile is in the
    ring; after that no window can see it, so it is dropped and counted. It reaches `latest` in
    any case.
"""
