"""The data lake: what the topics held, as Iceberg tables in three zones.

`raw` holds records as they lay in the log, `decoded` (the semi-structured zone; "semi" is a word of
SQL) the columns of each topic, `curated` the typed tables that a project declares in its lake.yaml.
Every snapshot carries the progress of the records behind it, so a table and its positions are one
(docs/adr/0011-the-lake.md). The writer is a process of the features service; this package opens,
describes, reads and maintains the tables.

Its libraries are the extra `lake`: this module imports none of them.
"""

from __future__ import annotations

from importlib.util import find_spec

from causemesh.errors import Misdeclared

_LIBRARIES = ("pyiceberg", "pyarrow", "duckdb", "pg8000")


def require_libraries() -> None:
    """Raise Misdeclared, naming the extra, when a library of the lake is not installed."""
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise Misdeclared(
            f"the lake needs {', '.join(missing)}; install them with: pip install 'causemesh[lake]'"
        )
