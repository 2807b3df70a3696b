"""The words of docs/benchmarks.md: what each table compares, and what is not equal in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """An aim: our rate, or its ratio to a peer's, is at least `least`; or a figure of ours is at
    most `most`, in its unit."""

    said: str
    benchmark: str
    ours: str
    least: float = 0.0
    peer: str | None = None
    figure: str = ""
    most: float | None = None
    unit: str = ""
    digits: int = 1


_OURS = "causemesh features"
TARGETS = (
    Target("features: 200,000 events/s", "features", _OURS, 200_000),
    Target(
        "features: level with Kafka Streams, in memory, committing as often",
        "features",
        _OURS,
        1.0,
        "Kafka Streams, in memory, commit each 2 s",
    ),
    Target(
        "features: level with Kafka Streams as it comes (RocksDB, a commit each 30 s)",
        "features",
        _OURS,
        1.0,
        "Kafka Streams, RocksDB",
    ),
    Target("features: 3 times Quix Streams", "features", _OURS, 3.0, "Quix Streams"),
    Target("features: 40 times Faust", "features", _OURS, 40.0, "Faust"),
    Target("windows: 300,000 events/s", "windows", _OURS, 300_000),
    Target(
        "windows: 2 times Kafka Streams, RocksDB", "windows", _OURS, 2.0, "Kafka Streams, RocksDB"
    ),
    Target("windows: 5 times Quix Streams", "windows", _OURS, 5.0, "Quix Streams"),
    Target("windows: 50 times Faust", "windows", _OURS, 50.0, "Faust"),
    Target(
        "join of 100 requests by 50 features: p99 of 1 ms",
        "join",
        _OURS,
        figure="p99_ms",
        most=1.0,
        unit="ms",
        digits=2,
    ),
    Target(
        "checkpoints of 2,000,000 entities by 10 features: 5 % of the processor time",
        "checkpoints",
        "with checkpoints",
        figure="cost_percent",
        most=5.0,
        unit="%",
    ),
    Target(
        "the same, beside the load: 4 GB of memory",
        "checkpoints",
        "with checkpoints",
        figure="peak_rss_mb",
        most=4000.0,
        unit="MB",
        digits=0,
    ),
    Target(
        "the same, a restart from cold files: 20 s",
        "checkpoints",
        "restart",
        figure="seconds",
        most=20.0,
        unit="s",
    ),
    Target(
        "backfill of a year of flights: 30 s",
        "backfill",
        "year",
        figure="seconds",
        most=30.0,
        unit="s",
    ),
    Target(
        "lake: 200,000 records/s from the broker to snapshots",
        "lake_from_kafka",
        "causemesh lake writer",
        200_000,
    ),
    Target("billing: 100,000 usage records/s", "usage", "causemesh billing", 100_000),
)

HEAD = """\
# Benchmarks

Made by `make bench-docs` from the newest results in `benchmarks/results`; `make bench` measures.
The peers are installed in an environment of their own (`requirements/bench.txt`; Kafka Streams from
Maven Central, pinned by checksum). Arms run in turn, each in a fresh process on the same broker and
data, and the turn is rotated each round. Figures are medians over rounds. A run counts after its
first sixth, and only if its result is proven whole: state, rows and scores must sum to what was
written.

## Targets
"""

FEATURES = """\
Count and sum by sensor over one hour of event time, from one partition of Avro readings (86 bytes
each, lz4 batches) in the embedded Kafka, until the last one is in the state.

Equal: topic, records, broker and machine, lz4, key and aggregates, and one thread of the peer's own
that handles records. Every arm decodes Avro, and every arm's state can be rebuilt after a crash.

Not equal:
- Ours drops replays by their cause and answers any hour up to its last 5 minutes (12 tiles a key);
  the peers keep one tumbling hour.
- Ours commits state and position to Postgres every 20 units of work, at least a second apart. Kafka
  Streams as it comes commits each 30 s, which is longer than a run: its state stays in its record
  cache, and no changelog is written. So it is measured with a commit every two seconds, too.
- Kafka Streams decodes only the two fields it needs. The JVM compiles and collects on other
  threads: look at the CPU column.
- Kafka Streams takes up to 1.3 cores, ours less than one. So it loses more where a machine is busy
  with other work. The last run had the machine to itself.
- Quix Streams and Faust read the first part of the topic only (see settings), for time's sake.

"""

WINDOWS = """\
Count, sum, mean, min, max, std, first and last by sensor over one, two and three hours. Six hours
of event time, 100,000 sensors drawn evenly, one partition of Avro readings in the embedded Kafka.

Equal: topic, records, broker and machine, and the result. What an arm says of the windows that the
last record is in is compared with the readings for every sensor and window: whole numbers bit for
bit, means and deviations to one part in a million. Each peer keeps one state of seven numbers a
window, not eight aggregations, which is its fastest form.

Not equal:
- Ours slides: it keeps tiles of five minutes (36 an entity) and answers as of any time. The peers'
  windows tumble.
- Ours drops replays by their cause, and stores state and position where the settings say; Kafka
  Streams as it comes commits each 30 s, which is longer than a run. The second arm commits as
  seldom.
- Kafka Streams decodes only the two fields it needs. The JVM compiles and collects on threads of
  its own.
- Quix Streams and Faust read the first part of the topic only (see settings), for time's sake. It
  lies in the first window of each length.

"""

JOIN = """\
Fifty features for 100 requests, in process. Ours computes them from tiles as of the requests' time;
Feast looks the same numbers up that were written to its online store before, through its own
`get_online_features`. All answers of all arms are compared. Redis is Debian's, on this machine,
without persistence. Feast's answers hold further timestamps and statuses, and its features could be
of any type.

The middle join takes 0.78 ms, nearly all of it processor time, of which gathering and adding up the
tiles of 36 ages takes half, making the fifty numbers a fifth, and finding a hundred keys in two
views an eighth. The machine counts: the same code's p99 was 1.11 ms (1.07 to 1.35) on another hour
of the same day.

"""

ENTITIES = """\
One process, a view of ten features (five aggregations over 6 and 24 hours), entities drawn evenly:
the worst case, as no two events of a unit share a tile. From a thousand entities to two million.

From 100,000 on the cost hardly grows. Below, all rows and tiles that a unit touches are in a cache
of the processor, which is what makes it less. Rows are found by the keys' hashes in columns; by a
dictionary, which follows pointers, two million entities cost 1.39 us an event, 0.99 of it to find
the rows.

"""

CHECKPOINTS = """\
One partition of two million entities and ten features, its checkpoints in a folder of this machine.
The load without and with them, in turn in one process: 20,000 events a unit, entities drawn evenly,
the worst case, as every event touches another entity. Checkpoints are due as the service's are, and
a round with them goes from a commit to a commit. To make the events is not counted; the thread that
writes is. What checkpoints cost is the processor time of taking and writing them, as a part of all:
by round the two rates differ more than that, since each round meets another part of a tile. To note
what was touched is in the rate with them. The row with the manifest is a variable, so what Postgres
does is not in it. A restart is a process of its own, whose files are in no cache; every vector is
compared with those before.

"""

BACKFILL = """\
A year of flights as the past of new views, from lake and log to the states of four partitions, by
the service's own code. "Year": five views that see all of it; the same without a lake; "example":
the six views of the example, which see 14 days at most. How many events went into the states is
compared with a recount. A task beside it notes how much later than it should the event loop goes
on: so long would a request wait.

"""

LAKE = """\
The lake's writer as it ships, from the embedded Kafka to committed Iceberg snapshots of 200,000
rows on local disk, its catalog in Postgres; 100 tenants. Counted from the first snapshot to the
last full one. Every record must be in the table once. It was 215,841 records/s before facts were
decoded by blocks, and while a worker that was behind waited for more records all the same.

"""

LATENCY = """\
Requests over the topics at a fixed rate, whether or not earlier ones were answered, through ingest,
features, inference and Triton; each latency counts from the moment the request was due. The echo
writes and reads bare records of 200 bytes on the same broker. The hops are between broker time
stamps, which are whole milliseconds.

Wanted at 200 requests/s: p50 10 ms, p99 40 ms. Not met. A request takes four hops (inbox, requests,
tasks, predictions), and four bare echoes in a row alone are 6.8 ms at that rate. And there both
cores are full. A request that comes alone costs the three stages 4.5 ms of processor time without
any broker (features 2.9: six views and 19 columns; `benchmarks.lone_request`), and as much again
for sockets, wakings and Postgres (`benchmarks.request_cost`); client, Kafka and Triton take the
rest. What falls into one unit of work shares its cost, so the delay grows until units are large
enough: with one partition a topic instead of two, and so half as many units, an earlier commit had
77 ms (p50) and 135 ms (p99) at 200 requests/s, where two partitions gave 128 and 226 in the minutes
before. The rounds differ by as much as 1.5 times at the higher rates, where the processor is the
limit.

"""

PREDICTIONS = """\
The same ONNX model everywhere, on one thread: 150 boosted trees over 19 columns.

Not equal, in the peers' favour: the direct calls and FastAPI go from rows in memory to scores in
memory. Ours reads tasks from Kafka, decodes them, drops replays, calls Triton, and writes one
acknowledged prediction a task with its vector, cause and position. FastAPI's model runs in its own
process, without Triton; its client shares the two cores with it.

"""

USAGE = """\
Billing reads records from Kafka, decodes them, drops replays, meters them into hourly buckets by
tenant with their position ranges, and commits buckets and position in one transaction. The bounds
start from rows in memory and keep one row a record: they read no broker, decode nothing and
aggregate nothing.

"""

TRANSFORMS = """\
A user's function on Faust: count and total by sensor, and one event of each reading. One partition
of Avro readings in the embedded Kafka. Counted from the first reading taken to the last whose event
and table the broker has acknowledged, not from a sixth on. Tables and events of every arm must sum
to what was written, with one event a reading.

Equal: topic, broker, machine, Faust and its version, the function and the table's values, Avro in
and out.

Not equal:
- Ours brings the readings together by key on a topic of its own first, as inputs of several types
  or by another key need it. Faust has its readings by key already in its first arm; the second
  brings them together, too.
- Ours writes with each event its id, cause, tenant and time, and with each table the causes that
  were applied to it. It waits for its batches to be acknowledged, and looks its claim up in
  Postgres, once for at most 500 events.
- Faust alone commits the offset of an event whose agent raised, and of one whose table change may
  not have reached the broker; after a crash events are lost to a table, or applied to it twice,
  and what is sent again has nothing to be told by (ADR 15). Nothing crashes here, so nothing was
  lost.

"""

MESH = """\
The flights example, from raw events through features, predictions, reviews and drift to finalised
invoices, and the lake's tables beside them; two partitions a topic, all servers and services on
the machine; `make demo`'s checks must pass. One run a size. The longer ones train a second model
version on the way, while the replay waits. Processor time runs from ready to the end of the
checks, so their recount is part of it.

Wanted: 5,000 predictions/s with invoices. Met by half a year with one model version. Not met by
shorter runs, which end as the last month is closed and begin with empty caches, nor where a version
is trained on the way: the replay waits for that with nothing to do. Both cores are full in most
seconds. Of about 50 s of processor time Postgres has 9, features 8, the lake's writer 7, billing,
Kafka, ingest, drift and the producer 4 to 5 each (`benchmarks.mesh_processes`). The lake's writer
has half the weight of the others on the processors, and may be behind when the last invoice is
there.

"""

PROFILES = """\
py-spy at 150 samples a second while a service works off a full topic, without its start; a sample
counts for the first part its stack fits. Boxes: orange Causemesh, blue Polars and NumPy, grey the
rest. The model runs in Triton's process and is not in the picture.

"""

SECTIONS = (
    ("features", "Feature updates", FEATURES),
    ("windows", "Windowed aggregates", WINDOWS),
    ("join", "A join beside Feast", JOIN),
    ("entities", "Cost by entities", ENTITIES),
    ("checkpoints", "Checkpoints of a large state", CHECKPOINTS),
    ("backfill", "The past of new views", BACKFILL),
    ("lake_from_kafka", "To the lake", LAKE),
    ("latency", "Request to prediction", LATENCY),
    ("predictions", "Predictions", PREDICTIONS),
    ("usage", "Metered usage", USAGE),
    ("transforms", "Custom transforms", TRANSFORMS),
    ("mesh", "The whole mesh", MESH),
    ("profiles", "Where the time goes", PROFILES),
)
"""Results by name, the title they stand under, and the words before them."""
