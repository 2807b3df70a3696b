"""Ports that are chosen once for a home folder."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path

from causemesh.errors import Fatal

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


def require_free(ports: Mapping[str, int], saved: Path) -> None:
    """Raises Fatal when something listens on one of the ports already: another home's server would
    be taken for ours."""
    taken = {name: port for name, port in ports.items() if _listens(port)}
    if taken:
        named = ", ".join(f"{port} ({name})" for name, port in sorted(taken.items()))
        raise Fatal(
            f"port {named} of this home is taken by another program, maybe another home's mesh:"
            f" stop that, or delete {saved} so that free ports are chosen"
        )


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((HOST, port)) == 0


def _free(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
