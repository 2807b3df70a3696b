"""Ports that are chosen once for a home folder."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Mapping
from pathlib import Path

from causemesh.errors import Fatal

HOST = "127.0.0.1"
_SPARE = range(20_000, 32_000)
"""Below those that outgoing connections get: none takes one while its server is down."""
_TRIES = 100


def choose_ports(saved: Path, defaults: Mapping[str, int]) -> dict[str, int]:
    """The ports chosen before, else the defaults, else free ones; kept in `saved`. A default of 0
    means any free one. Raises Fatal when none is free.

    A home from before a name was added keeps its ports and gets one for the new name.
    """
    kept: dict[str, int] = json.loads(saved.read_text()) if saved.exists() else {}
    missing = sorted(defaults.keys() - kept.keys())
    chosen = dict(kept)
    for name in missing:
        chosen[name] = _free(defaults[name], set(chosen.values()))
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


def _free(default: int, chosen: set[int]) -> int:
    spare = random.sample(_SPARE, _TRIES)
    for port in (default, *spare):
        if port and port not in chosen and _can_be_bound(port):
            return port
    raise Fatal(
        f"port {default} is taken, and so are {_TRIES} others from {_SPARE.start} to"
        f" {_SPARE.stop - 1}: stop what listens there"
    )


def _can_be_bound(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
