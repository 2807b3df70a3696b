"""Stripe, behind what billing asks of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import stripe

from causemesh.errors import MeshError, Retryable
from causemesh.faultpoints import Point, reach
from services.billing.domain.stripe_calls import (
    INVOICE_KEY,
    LINE_KEY,
    TENANT_KEY,
    StripeCall,
)

_PAGE = 100
_NEWEST_PAGES = 10
_TIMEOUT_S = 30.0
_AWAY_S = 1.0
_BUSY_S = 0.5
_REFUSED_US_S = 30.0  # a wrong key is mended by a person
Params = Mapping[str, object]


class SpentKey(Retryable):
    """The answer kept under the idempotency key is an error: try again under another one."""


class NotTaken(MeshError):
    """Stripe will never take this call as it is."""


@dataclass(frozen=True)
class Bill:
    """An invoice at Stripe; `total_minor` is minor units, `status` Stripe's own word."""

    stripe_id: str
    invoice_id: str | None
    status: str
    total_minor: int


@dataclass(frozen=True)
class Item:
    """A line of an invoice at Stripe."""

    line_id: str | None
    amount_minor: int


class Payments(Protocol):
    """What billing needs of a payment service.

    Every method raises Retryable when the same call may succeed later, SpentKey when it may under
    another idempotency key, and NotTaken when it is refused.
    """

    async def customer_of(self, tenant: str) -> str | None:
        """The id of the tenant's customer."""

    async def bills_of(self, customer: str) -> list[Bill]:
        """All invoices of a customer."""

    async def items_of(self, bill: str) -> list[Item]:
        """All lines of an invoice."""

    async def make(self, call: StripeCall, ids: Mapping[str, str], key: str) -> str:
        """Create an object; `ids` are those of what `call` needs. Returns its id."""

    async def finalise(self, call: StripeCall, stripe_id: str, key: str) -> Bill:
        """Freeze an invoice."""


class StripePayments:
    """The official library; see `Payments`.

    The library's own retries are off: after an error billing looks first, then tries again.
    """

    def __init__(self, client: Any) -> None:
        self._api = client.v1
        self._creates = {
            "customers.create": self._api.customers.create_async,
            "invoices.create": self._api.invoices.create_async,
            "invoiceitems.create": self._api.invoice_items.create_async,
        }

    async def customer_of(self, tenant: str) -> str | None:
        """By search, then among the newest ones: Stripe's search is up to a minute behind."""
        value = tenant.replace("\\", "\\\\").replace("'", "\\'")
        query = f"metadata['{TENANT_KEY}']:'{value}'"
        with _errors():
            found = await self._api.customers.search_async({"query": query, "limit": 1})
        if found.data:
            return str(found.data[0].id)
        newest = _all(self._api.customers.list_async, {}, pages=_NEWEST_PAGES)
        async for customer in newest:
            if _label(customer, TENANT_KEY) == tenant:
                return str(customer.id)
        return None

    async def bills_of(self, customer: str) -> list[Bill]:
        """See `Payments.bills_of`."""
        return [
            _bill(one) async for one in _all(self._api.invoices.list_async, {"customer": customer})
        ]

    async def items_of(self, bill: str) -> list[Item]:
        """See `Payments.items_of`."""
        items = _all(self._api.invoice_items.list_async, {"invoice": bill})
        return [Item(_label(one, LINE_KEY), int(one.amount)) async for one in items]

    async def make(self, call: StripeCall, ids: Mapping[str, str], key: str) -> str:
        """See `Payments.make`."""
        params: dict[str, object] = {**call.params, "metadata": dict(call.metadata)}
        params.update({name: ids[name] for name in call.needs})
        reach(Point.BILLING_MAKING)
        with _errors():
            made = await self._creates[call.operation](params, {"idempotency_key": key})
        reach(Point.BILLING_MADE)
        return str(made.id)

    async def finalise(self, call: StripeCall, stripe_id: str, key: str) -> Bill:
        """See `Payments.finalise`."""
        finalize = self._api.invoices.finalize_invoice_async
        reach(Point.BILLING_FINALISING)
        with _errors():
            bill = _bill(await finalize(stripe_id, dict(call.params), {"idempotency_key": key}))
        reach(Point.BILLING_FINALISED)
        return bill


@asynccontextmanager
async def open_stripe(key: str, url: str | None) -> AsyncIterator[StripePayments]:
    """Stripe, or the stand-in at `url`; connections are closed at the end."""
    http: Any = stripe.HTTPXClient(timeout=_TIMEOUT_S)
    addresses: Any = {} if url is None else {"api": url}
    try:
        yield StripePayments(
            stripe.StripeClient(
                key, base_addresses=addresses, http_client=http, max_network_retries=0
            )
        )
    finally:
        await http.close_async()


async def _all(listed: Any, params: Params, pages: int | None = None) -> AsyncIterator[Any]:
    """Objects of a list, newest first. Lists, unlike searches, are never behind."""
    asked = {**params, "limit": _PAGE}
    for number in count():
        with _errors():
            page = await listed(asked)
        for one in page.data:
            yield one
        if not page.has_more or number + 1 == pages:
            return
        asked["starting_after"] = page.data[-1].id


@contextmanager
def _errors() -> Iterator[None]:
    """Stripe's errors as the mesh's."""
    try:
        yield
    except stripe.RateLimitError as error:
        raise Retryable(f"Stripe: {error}", retry_after=_asked_to_wait(error)) from error
    except stripe.APIConnectionError as error:
        raise Retryable(f"Stripe is away: {error}", retry_after=_AWAY_S) from error
    except (stripe.AuthenticationError, stripe.PermissionError) as error:
        problem = f"Stripe refuses CAUSEMESH_STRIPE_KEY; set one that may write: {error}"
        raise Retryable(problem, retry_after=_REFUSED_US_S) from error
    except stripe.IdempotencyError as error:
        raise SpentKey(f"Stripe: {error}", retry_after=_BUSY_S) from error
    except stripe.InvalidRequestError as error:
        raise NotTaken(f"Stripe: {error}") from error
    except stripe.StripeError as error:
        kind = SpentKey if (error.http_status or 0) >= 500 else Retryable
        raise kind(f"Stripe: {error}", retry_after=_BUSY_S) from error


def _asked_to_wait(error: stripe.RateLimitError) -> float:
    asked = (error.headers or {}).get("retry-after", "")
    return float(asked) if asked.isdecimal() else _AWAY_S


def _bill(invoice: Any) -> Bill:
    return Bill(
        str(invoice.id), _label(invoice, INVOICE_KEY), str(invoice.status), int(invoice.total)
    )


def _label(thing: Any, key: str) -> str | None:
    metadata = thing.metadata or {}
    return str(metadata[key]) if key in metadata else None
