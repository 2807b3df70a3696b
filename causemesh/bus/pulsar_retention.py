"""How long Pulsar keeps a topic, and whether it still holds what follows a stored position."""

from __future__ import annotations

import json
from typing import Any

import httpx
import structlog

from causemesh.bus.pulsar_http import tls
from causemesh.bus.pulsar_ids import unpacked
from causemesh.catalogue import Topic
from causemesh.errors import Gone, Misdeclared, Retryable

_log = structlog.get_logger(__name__)
_MINUTES_A_DAY = 1_440
_EVER = -1
NOT_ALLOWED = 405


def minutes_of(topic: Topic) -> int:
    """How long a topic's records are kept; -1 for ever: Pulsar does not keep the newest of each key
    by itself."""
    return _EVER if topic.compacted else topic.retention_days * _MINUTES_A_DAY


def policy(minutes: int) -> dict[str, int]:
    """A retention as the admin API has it: by time alone."""
    return {"retentionTimeInMinutes": minutes, "retentionSizeInMB": _EVER}


def check_namespace(kept: dict[str, Any] | None, topic: Topic) -> None:
    """Whether a namespace's retention will do for a topic whose own can't be set.

    `kept` is the namespace's policy; None when it has none, and the broker's default holds, which
    can't be asked for. Raises Misdeclared when it is known to be too short.
    """
    wanted = minutes_of(topic)
    if kept is None:
        _log.warning("retention_unknown", topic=topic.name, wanted_minutes=wanted)
        return
    found, size = int(kept["retentionTimeInMinutes"]), int(kept["retentionSizeInMB"])
    long_enough = found == _EVER or (wanted != _EVER and found >= wanted)
    if not long_enough or size != _EVER:
        raise Misdeclared(
            f"{topic.name} is to be kept for {wanted} minutes, the namespace keeps {found} minutes"
            f" and {size} MB (-1: no limit); turn on topicLevelPoliciesEnabled, or have the"
            " namespace keep more"
        )


class HeldPositions:
    """Asks, before a reader begins, whether the log goes on where it stopped. Calls block."""

    def __init__(self, admin_url: str, transport: httpx.BaseTransport | None = None) -> None:
        base = f"{admin_url}/admin/v2/persistent/public/default/"
        self._http = httpx.Client(base_url=base, timeout=10.0, verify=tls(), transport=transport)

    def check(self, name: str, at: int) -> None:
        """Raises Gone when records behind position `at` of a partition were deleted.

        Pulsar deletes whole ledgers, so a position whose ledger is there lost nothing. One whose
        ledger is gone lost nothing either if it was the last record ever written, which the broker
        knows until it loads the topic anew; when it no longer does and the log is empty, nobody can
        tell, and the log says so.
        """
        stats = self._stats(name)
        # The position just before the first of a ledger, from where spans are read, lies in none.
        following, _, _ = unpacked(at + 1)
        if following in {one["ledgerId"] for one in stats["ledgers"]}:
            return
        ledger, entry, _ = unpacked(at)
        if stats["lastConfirmedEntry"] == f"{ledger}:{entry}":
            return
        if not stats["numberOfEntries"]:
            _log.warning("position_unchecked", partition=name, ledger=ledger)
            return
        raise Gone(
            f"the log no longer holds the stored position: ledger {ledger} of {name} was deleted;"
            " retention is shorter than the time this service was away"
        )

    def _stats(self, name: str) -> dict[str, Any]:
        try:
            answer = self._http.get(f"{name}/internalStats")
        except httpx.TransportError as error:
            raise Retryable(f"Pulsar is away: {error!r}", retry_after=1.0) from error
        if not answer.is_success:
            raise Retryable(f"Pulsar has no statistics of {name} (yet): {answer.text[:200]}")
        stats: dict[str, Any] = json.loads(answer.text)
        return stats

    def close(self) -> None:
        """Close the connection."""
        self._http.close()
