"""The stand-in agrees with Stripe's published API, as stripe-mock enforces it.

The same calls go through the official library to both. stripe-mock checks parameters against the
OpenAPI document and answers with its example objects; it keeps no state, so only what can be said
about one call alone is compared: whether it is accepted, with which status, and the answer's shape.
The stand-in also refuses what only Stripe itself does (an invoice without customer, a long text):
its own tests cover those.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import stripe

# The library hands httpx its form as `data=`, which httpx calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Ids = dict[str, str]
Api = Any  # the library's typed parameters would refuse, here, what the servers are to refuse
Run = Callable[[Api, Ids], Awaitable[Any]]

_INVOICE = {
    "currency": "usd",
    "auto_advance": False,
    "collection_method": "send_invoice",
    "days_until_due": 30,
    "description": "June 2013",
    "pending_invoice_items_behavior": "exclude",
    "metadata": {"causemesh_invoice": "9a7f", "causemesh_tenant": "UA"},
}
_BY_TENANT = {"query": "metadata['causemesh_tenant']:'UA'", "limit": 3}
# In the OpenAPI document, but not in stripe-mock's example of that object.
_PUBLISHED = {"search_result": {"next_page"}}


@dataclass(frozen=True)
class Step:
    """One call; `keeps` names its answer's id for the calls after it."""

    name: str
    run: Run
    keeps: str = ""


def _item(ids: Ids, **more: Any) -> dict[str, Any]:
    return {"customer": ids["customer"], "invoice": ids["invoice"], "currency": "usd", **more}


ACCEPTED = (
    Step(
        "create a customer",
        lambda api, ids: api.customers.create_async(
            {
                "email": "ap@united.example",
                "name": "United",
                "description": "tenant UA",
                "phone": "+1 555",
                "metadata": {"causemesh_tenant": "UA"},
            }
        ),
        "customer",
    ),
    Step("create a bare customer", lambda api, ids: api.customers.create_async({})),
    Step("retrieve a customer", lambda api, ids: api.customers.retrieve_async(ids["customer"])),
    Step(
        "update a customer",
        lambda api, ids: api.customers.update_async(
            ids["customer"], {"name": "United Airlines", "metadata": {"region": "us"}}
        ),
    ),
    Step(
        "clear a customer's metadata key",
        lambda api, ids: api.customers.update_async(ids["customer"], {"metadata": {"region": ""}}),
    ),
    Step(
        "list customers by email",
        lambda api, ids: api.customers.list_async({"email": "ap@united.example", "limit": 5}),
    ),
    Step(
        "list customers after one",
        lambda api, ids: api.customers.list_async({"starting_after": ids["customer"]}),
    ),
    Step("search customers", lambda api, ids: api.customers.search_async(_BY_TENANT)),
    Step(
        "create an invoice",
        lambda api, ids: api.invoices.create_async({"customer": ids["customer"], **_INVOICE}),
        "invoice",
    ),
    Step(
        "create another invoice",
        lambda api, ids: api.invoices.create_async({"customer": ids["customer"], **_INVOICE}),
        "unwanted",
    ),
    Step("retrieve an invoice", lambda api, ids: api.invoices.retrieve_async(ids["invoice"])),
    Step(
        "add an item",
        lambda api, ids: api.invoice_items.create_async(
            _item(
                ids,
                amount=1250,
                description="predictions, tier 1",
                metadata={"causemesh_line": "2013-06/predictions/1"},
                period={"start": 1370044800, "end": 1372636800},
            ),
            {"idempotency_key": "item-1"},
        ),
        "item",
    ),
    Step(
        "add a credit",
        lambda api, ids: api.invoice_items.create_async(_item(ids, amount=-50)),
    ),
    Step("retrieve an item", lambda api, ids: api.invoice_items.retrieve_async(ids["item"])),
    Step(
        "list an invoice's items",
        lambda api, ids: api.invoice_items.list_async({"invoice": ids["invoice"], "limit": 10}),
    ),
    Step("list lines", lambda api, ids: api.invoices.line_items.list_async(ids["invoice"])),
    Step(
        "finalize",
        lambda api, ids: api.invoices.finalize_invoice_async(
            ids["invoice"], {"auto_advance": False}
        ),
    ),
    Step(
        "pay",
        lambda api, ids: api.invoices.pay_async(ids["invoice"], {"paid_out_of_band": True}),
    ),
    Step(
        "list a customer's invoices",
        lambda api, ids: api.invoices.list_async({"customer": ids["customer"], "status": "paid"}),
    ),
    Step("search invoices", lambda api, ids: api.invoices.search_async(_BY_TENANT)),
    Step("delete a draft", lambda api, ids: api.invoices.delete_async(ids["unwanted"])),
    Step(
        "create an invoice to void",
        lambda api, ids: api.invoices.create_async({"customer": ids["customer"], **_INVOICE}),
        "invoice",
    ),
    Step(
        "add an item to it",
        lambda api, ids: api.invoice_items.create_async(_item(ids, amount=1)),
    ),
    Step("finalize it", lambda api, ids: api.invoices.finalize_invoice_async(ids["invoice"])),
    Step("void it", lambda api, ids: api.invoices.void_invoice_async(ids["invoice"])),
)

REFUSED = (
    Step("unknown of a customer", lambda api, ids: api.customers.create_async({"nick": "UA"})),
    Step(
        "unknown of a customer's update",
        lambda api, ids: api.customers.update_async(ids["customer"], {"nick": "UA"}),
    ),
    Step("unknown of a list", lambda api, ids: api.customers.list_async({"nick": "UA"})),
    Step("a limit in words", lambda api, ids: api.customers.list_async({"limit": "ten"})),
    Step("metadata as text", lambda api, ids: api.customers.create_async({"metadata": "UA"})),
    Step("a search without query", lambda api, ids: api.customers.search_async({"limit": 1})),
    Step("another without", lambda api, ids: api.invoices.search_async({"limit": 1})),
    Step("unknown of a search", lambda api, ids: api.invoices.search_async({**_BY_TENANT, "x": 1})),
    Step(
        "unknown of an invoice",
        lambda api, ids: api.invoices.create_async({"customer": ids["customer"], "total": 1}),
    ),
    Step(
        "days in words",
        lambda api, ids: api.invoices.create_async(
            {"customer": ids["customer"], **_INVOICE, "days_until_due": "thirty"}
        ),
    ),
    Step(
        "half a day",
        lambda api, ids: api.invoices.create_async(
            {"customer": ids["customer"], **_INVOICE, "days_until_due": "0.5"}
        ),
    ),
    Step(
        "an unknown collection method",
        lambda api, ids: api.invoices.create_async(
            {"customer": ids["customer"], **_INVOICE, "collection_method": "barter"}
        ),
    ),
    Step(
        "a customer as a hash",
        lambda api, ids: api.invoices.create_async({"customer": {"id": ids["customer"]}}),
    ),
    Step("an unknown status", lambda api, ids: api.invoices.list_async({"status": "lost"})),
    Step(
        "unknown of finalize",
        lambda api, ids: api.invoices.finalize_invoice_async(ids["invoice"], {"number": "A-1"}),
    ),
    Step(
        "unknown of void",
        lambda api, ids: api.invoices.void_invoice_async(ids["invoice"], {"why": "late"}),
    ),
    Step(
        "an amount in words",
        lambda api, ids: api.invoice_items.create_async(_item(ids, amount="ten")),
    ),
    Step(
        "a fraction of a cent",
        lambda api, ids: api.invoice_items.create_async(_item(ids, amount="12.5")),
    ),
    Step(
        "half a period",
        lambda api, ids: api.invoice_items.create_async(_item(ids, amount=1, period={"start": 1})),
    ),
    Step(
        "unknown of an item",
        lambda api, ids: api.invoice_items.create_async(_item(ids, amount=1, line=1)),
    ),
)


@asynccontextmanager
async def client_of(url: str, key: str = "sk_test_contract") -> AsyncIterator[Api]:
    http: Any = stripe.HTTPXClient()
    try:
        yield stripe.StripeClient(
            key, base_addresses={"api": url}, http_client=http, max_network_retries=0
        ).v1
    finally:
        await http.close_async()


async def _accepted(url: str) -> dict[str, dict[str, Any]]:
    """Each step's answer."""
    ids: Ids = {}
    answers = {}
    async with client_of(url) as api:
        for step in ACCEPTED:
            answer = await step.run(api, ids)
            answers[step.name] = json.loads(answer.last_response.body)
            if step.keeps:
                ids[step.keeps] = answer.id
    return answers


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Fields of ours that theirs does not have, or has with another type. Nulls say nothing."""
    if ours is None or theirs is None:
        return []
    if type(ours) is not type(theirs):
        return [f"{where} is {type(ours).__name__}, should be {type(theirs).__name__}"]
    if not isinstance(ours, dict):
        return []
    known = theirs.keys() | _PUBLISHED.get(theirs.get("object", ""), set())
    unknown = [f"{where}.{name} is not Stripe's" for name in ours if name not in known]
    both = ours.keys() & theirs.keys()
    typed = [
        f"{where}.{name} is {type(ours[name]).__name__}, should be {type(theirs[name]).__name__}"
        for name in sorted(both)
        if None not in (ours[name], theirs[name]) and type(ours[name]) is not type(theirs[name])
    ]
    return unknown + typed


def _objects(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The answer, and the first of each list in it."""
    found = {answer["object"]: answer}
    for part in (answer, answer.get("lines", {})):
        if part.get("data"):
            found |= _objects(part["data"][0])
    return found


async def test_what_stripe_accepts_is_accepted_and_looks_alike(
    mock_url: str, standin_url: str
) -> None:
    theirs, ours = await _accepted(mock_url), await _accepted(standin_url)
    compared = set()
    wrong = []
    for name, answer in ours.items():
        known = _objects(theirs[name])
        for kind, body in _objects(answer).items():
            assert kind in known, f"{name}: answered a {kind}, Stripe {list(known)}"
            compared.add(kind)
            wrong += differences(body, known[kind], f"{name}: {kind}")
    assert not wrong, "\n".join(wrong)
    kinds = {"customer", "invoice", "invoiceitem", "line_item", "list", "search_result"}
    assert compared == kinds


@pytest.mark.parametrize("step", REFUSED, ids=lambda step: step.name)
async def test_what_stripe_refuses_is_refused(mock_url: str, standin_url: str, step: Step) -> None:
    assert await _refusal(standin_url, step) == await _refusal(mock_url, step)


async def _refusal(url: str, step: Step) -> tuple[int, str]:
    async with client_of(url) as api:
        customer = (await api.customers.create_async({})).id
        invoice = (await api.invoices.create_async({"customer": customer, **_INVOICE})).id
        with pytest.raises(stripe.InvalidRequestError) as refused:
            await step.run(api, {"customer": customer, "invoice": invoice})
    error: Any = refused.value
    return error.http_status, error.json_body["error"]["type"]


@pytest.mark.parametrize("key", ["sk_live_contract", "nonsense"])
async def test_other_keys_are_refused(mock_url: str, standin_url: str, key: str) -> None:
    for url in (mock_url, standin_url):
        async with client_of(url, key) as api:
            with pytest.raises(stripe.AuthenticationError) as refused:
                await api.customers.create_async({})
        assert refused.value.http_status == 401


def test_a_difference_is_seen() -> None:
    theirs = {"object": "invoice", "total": 1, "paid": False, "lines": {}, "number": None}
    assert differences({"object": "invoice", "number": "A-1", "total": 5}, theirs) == []
    assert differences({"object": "invoice", "sum": 5}, theirs) == [".sum is not Stripe's"]
    assert differences({"paid": 0}, theirs) == [".paid is int, should be bool"]
    assert differences({"lines": []}, theirs) == [".lines is list, should be dict"]
