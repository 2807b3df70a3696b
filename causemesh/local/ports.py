"""Ports that are chosen once for a home folder."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path

HOST = "127.0.0.1"


def choose_ports(saved: Path, defaults: Mapping[str, int]) -> dict[str, int]:
    """The ports chosen before, else the defaults, else free ones; kept in `saved`.

    A home from before a name was added keeps its ports and gets one for the new name.
    """
    kept: dict[str, int] = json.loads(saved.read_text()) if saved.exists() else {}
    missing = sorted(defaults.keys() - kept.keys())
    chosen = kept | {name: _free(defaults[name]) for name in missing}
    if missing:
        saved.write_text(json.dumps(chosen))
    return chosen


def _free(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
