"""Waiting for the mesh to get there, with a reason when it does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from causemesh.errors import Fatal
from causemesh.local.mesh import Mesh
from examples.flights.following import Outcomes

_POLL_S = 0.5
_STUCK_S = 120.0


class Waiting:
    """Waits as long as something moves; gives up when nothing did for two minutes."""

    def __init__(self, mesh: Mesh, progress: Callable[[str, str], None]) -> None:
        self._mesh = mesh
        self._progress = progress

    async def outcomes(self, outcomes: Outcomes, count: int) -> None:
        """Until there are `count` outcomes. Raises Fatal when none came for too long."""
        seen, since = -1, time.monotonic()
        while outcomes.frame.height < count:
            if outcomes.count != seen:
                seen, since = outcomes.count, time.monotonic()
            if time.monotonic() - since > _STUCK_S:
                raise Fatal(f"{seen:,} of {count:,} outcomes, and none came for {_STUCK_S:.0f} s")
            await asyncio.sleep(_POLL_S)

    async def settled(self, periods: Sequence[str], last_day: str) -> None:
        """Until every month is invoiced at Stripe, every day up to `last_day` judged, and no review
        open. Raises Fatal, saying what is missing, when nothing moved for too long."""
        since, seen = time.monotonic(), ""
        self._progress("closing", f"months {', '.join(periods)}; days; reviews")
        while True:
            state = [self._invoices(periods), self._reviews(), self._drift(last_day)]
            missing = [one for one in state if one is not None]
            if not missing:
                return
            if str(missing) != seen:
                seen, since = str(missing), time.monotonic()
            if time.monotonic() - since > _STUCK_S:
                raise Fatal(f"nothing moved for {_STUCK_S:.0f} s; missing: {missing}")
            await asyncio.sleep(_POLL_S)

    def _get(self, service: str, path: str, **params: Any) -> Any:
        """An answer, or None while the service, or its database, is being started again."""
        try:
            with self._mesh.client(service) as api:
                answer = api.get(path, params=params)
        except httpx.TransportError:
            return None
        if answer.status_code == 503:
            return None
        if answer.is_error:
            raise Fatal(f"{service} answered {answer.status_code} to {path}: {answer.text[:300]}")
        return answer.json()

    def _invoices(self, periods: Sequence[str]) -> str | None:
        for period in periods:
            page = self._get("billing", "/v1/invoices", period=period, limit=500)
            if page is None or not page["items"]:
                return f"invoices of {period}"
            left = [one for one in page["items"] if one["status"] != "finalised"]
            if left:
                return f"{len(left)} invoices of {period} at Stripe"
        return None

    def _reviews(self) -> str | None:
        page = self._get("agents", "/v1/reviews", status="opened", limit=500)
        if page is None:
            return "agents"
        return f"{len(page['items'])} open reviews" if page["items"] else None

    def _drift(self, last_day: str) -> str | None:
        page = self._get("drift", "/v1/models")
        if page is None:
            return "drift"
        closed = max((one["last_closed_day"] or "" for one in page["items"]), default="")
        return None if closed >= last_day else f"days after {closed or 'the beginning'}"
