"""Checkpoints of large states: files that never change, and a manifest that names them.

A small state lies whole in the positions row. One that outgrew it is written as *pieces* (the whole
of a part of the state) and *deltas* (what changed since the last checkpoint); the row then holds
the manifest, which commits with the positions and under the same fence. See
docs/adr/0012-checkpoints-in-files.md.
"""

from __future__ import annotations

from causemesh.checkpoints.base import Encode, Pieced
from causemesh.checkpoints.files import CheckpointFiles, LocalFiles
from causemesh.checkpoints.keeper import CheckpointSettings, Save, StateKeeper
from causemesh.checkpoints.objects import open_files

__all__ = [
    "CheckpointFiles",
    "CheckpointSettings",
    "Encode",
    "LocalFiles",
    "Pieced",
    "Save",
    "StateKeeper",
    "open_files",
]
