"""Feature views as a Feast repository: definitions in Python, settings, and an offline file a view.

Feast 0.40 and later can `apply` it; `get_historical_features` reads the offline files. Feast looks
values up, it does not compute windows: a view's file holds its vectors over time, so a training set
made with Feast equals Causemesh's own at the whole multiples of the time between two rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from causemesh.errors import Misdeclared
from services.features.domain.definitions import FeatureView, by_reference
from services.features.feast.history import TIMESTAMP, key_columns

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_HEAD = '''"""The feature views of {project}, exported by Causemesh. Made anew by each export."""

from datetime import timedelta

from feast import Entity, FeatureView, Field, FileSource
from feast.types import Float32
from feast.value_type import ValueType
'''
_ENTITY = """
{variable} = Entity(name={name}, join_keys=[{name}], value_type=ValueType.STRING)
"""
_VIEW = """
{variable} = FeatureView(
    name={name},
    entities=[{entities}],
    ttl=timedelta(0),
    schema=[
{fields}
    ],
    source=FileSource(
        name={source},
        path={path},
        timestamp_field={timestamp},
    ),
    tags={tags},
)
"""
_SETTINGS = """\
project: {project}
provider: local
registry: data/registry.db
online_store:
  type: sqlite
  path: data/online_store.db
offline_store:
  type: file
entity_key_serialization_version: 3
"""


def feast_names(views: Iterable[FeatureView]) -> dict[str, str]:
    """Feast's name of each view by its id: without the version where it is the lowest one.

    Raises Misdeclared when two views would have one name.
    """
    found: dict[str, str] = {}
    for reference, view in by_reference(views).items():
        lowest = reference == view.name
        if lowest or view.id not in found:
            found[view.id] = view.name if lowest else f"{view.name}_v{view.version}"
    if len(set(found.values())) < len(found):
        raise Misdeclared(f"two views would have one name in Feast: {sorted(found.values())}")
    return found


def definitions(views: Sequence[FeatureView], project: str) -> str:
    """The text of the repository's Python file."""
    if not _NAME.match(project):
        raise Misdeclared(f"{project!r} is no name of a Feast project: letters, digits and _ only")
    entities = dict.fromkeys(name for view in views for name in key_columns(view))
    parts = [_HEAD.format(project=project)]
    parts += [_ENTITY.format(variable=_entity(name), name=_text(name)) for name in entities]
    names = feast_names(views)
    parts += [_view(view, names[view.id]) for view in views]
    return "".join(parts)


def export(
    folder: Path,
    project: str,
    views: Sequence[FeatureView],
    histories: Mapping[str, Iterable[pl.DataFrame]],
) -> dict[str, int]:
    """Write a repository; `histories` are the `vector_history` of each view by its id.

    Returns the rows of each view's offline file by Feast's name of it.
    """
    text = definitions(views, project)
    names = feast_names(views)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows = {
        names[view.id]: _write(folder / _path(names[view.id]), view, histories[view.id])
        for view in views
    }
    (folder / "feature_store.yaml").write_text(_SETTINGS.format(project=project))
    (folder / "definitions.py").write_text(text)
    return rows


def _view(view: FeatureView, name: str) -> str:
    fields = "\n".join(
        f"        Field(name={_text(feature.name)}, dtype=Float32)," for feature in view.features
    )
    return _VIEW.format(
        variable=f"view_{name}",
        name=_text(name),
        entities=", ".join(map(_entity, key_columns(view))),
        fields=fields,
        source=_text(f"{name}_vectors"),
        path=_text(_path(name)),
        timestamp=_text(TIMESTAMP),
        tags=json.dumps({"causemesh_view": view.id, "causemesh_fingerprint": view.fingerprint}),
    )


def _write(path: Path, view: FeatureView, history: Iterable[pl.DataFrame]) -> int:
    """The frames as one Parquet file; written beside it first, so that it is whole or not there."""
    schema = pa.schema(
        [
            *((name, pa.string()) for name in key_columns(view)),
            (TIMESTAMP, pa.timestamp("us", tz="UTC")),
            *((feature.name, pa.float32()) for feature in view.features),
        ]
    )
    count, partial = 0, path.with_suffix(".partial")
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for frame in _gathered(history):
            writer.write_table(frame.to_arrow().cast(schema))
            count += frame.height
    partial.rename(path)
    return count


def _gathered(history: Iterable[pl.DataFrame], rows: int = 100_000) -> Iterator[pl.DataFrame]:
    """Many small frames as few large ones: each becomes a row group."""
    held: list[pl.DataFrame] = []
    for frame in history:
        held.append(frame)
        if sum(one.height for one in held) >= rows:
            yield pl.concat(held)
            held = []
    if held:
        yield pl.concat(held)


def _path(name: str) -> str:
    return f"data/{name}.parquet"


def _entity(name: str) -> str:
    return f"entity_{re.sub(r'[^A-Za-z0-9_]', '_', name)}"


def _text(value: str) -> str:
    return json.dumps(value)
