"""The Stripe stand-in, through the official library over HTTP.

Every idempotency case runs twice: with the keys honoured, and, as control arm, with them ignored,
where the same observation must come out otherwise.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import stripe

from causemesh.clock import SystemClock
from causemesh.local.stripe import create_app, make_server

# The library hands httpx its form as `data=`, which httpx calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Api = Any  # the library's types refuse what these tests pass on purpose
HOUR_S = 3600
honoured_and_ignored = pytest.mark.parametrize("idempotency", [True, False])


class ShiftedClock(SystemClock):
    def __init__(self) -> None:
        self.ahead_s = 0

    def now_us(self) -> int:
        return super().now_us() + self.ahead_s * 1_000_000


@contextmanager
def served(data: Path, **options: Any) -> Iterator[str]:
    """The stand-in in a thread; its URL."""
    server = make_server(create_app(data, **{"faults": True, **options}), 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the stand-in ended while starting"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@asynccontextmanager
async def client_of(url: str, *, retries: int = 0) -> AsyncIterator[Api]:
    http: Any = stripe.HTTPXClient()
    try:
        yield stripe.StripeClient(
            "sk_test_unit",
            base_addresses={"api": url},
            http_client=http,
            max_network_retries=retries,
        )
    finally:
        await http.close_async()


@asynccontextmanager
async def standin(data: Path, **options: Any) -> AsyncIterator[Api]:
    with served(data, **options) as url:
        async with client_of(url) as client:
            yield client


@pytest.fixture(scope="module")
def shared_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("stripe") / "data.db") as url:
        yield url


@pytest.fixture
async def client(shared_url: str) -> AsyncIterator[Api]:
    async with client_of(shared_url) as client:
        yield client


async def fault(client: Api, **wanted: Any) -> None:
    async with httpx.AsyncClient(base_url=client._requestor._options.base_addresses["api"]) as http:
        (await http.post("/_faults", json=wanted)).raise_for_status()


async def report(client: Api) -> dict[str, Any]:
    """How many faults wait, and how calls ended."""
    async with httpx.AsyncClient(base_url=client._requestor._options.base_addresses["api"]) as http:
        return dict((await http.get("/_faults")).raise_for_status().json())


async def create(client: Api, key: str, name: str = "United") -> Any:
    return await client.v1.customers.create_async({"name": name}, {"idempotency_key": key})


async def customers(client: Api) -> list[str]:
    pages = await client.v1.customers.list_async({"limit": 100})
    return [customer.id async for customer in pages.auto_paging_iter()]


async def draft(client: Api, *amounts: int, customer: str | None = None) -> Any:
    """A draft invoice with an item for each amount."""
    if customer is None:
        customer = (await client.v1.customers.create_async({"email": "ua@example.com"})).id
    invoice = await client.v1.invoices.create_async(
        {
            "customer": customer,
            "currency": "usd",
            "auto_advance": False,
            "collection_method": "send_invoice",
            "days_until_due": 30,
            "pending_invoice_items_behavior": "exclude",
        }
    )
    for amount in amounts:
        await item(client, invoice, amount)
    return await client.v1.invoices.retrieve_async(invoice.id)


async def item(client: Api, invoice: Any, amount: int, **more: Any) -> Any:
    fields = {"customer": invoice.customer, "invoice": invoice.id, "currency": "usd", **more}
    return await client.v1.invoice_items.create_async({"amount": amount, **fields})


def _header(raised: pytest.ExceptionInfo[stripe.StripeError], name: str) -> str | None:
    return (raised.value.headers or {}).get(name)


# --- idempotency


@honoured_and_ignored
async def test_a_key_has_one_effect(tmp_path: Path, idempotency: bool) -> None:
    async with standin(tmp_path / "data.db", idempotency=idempotency) as client:
        first, second = await create(client, "k"), await create(client, "k")
        other = await create(client, "k2")
        assert (first.id == second.id) is idempotency
        assert ("idempotent-replayed" in second.last_response.headers) is idempotency
        if idempotency:
            assert second.last_response.body == first.last_response.body
            assert (
                second.last_response.headers["original-request"] == first.last_response.request_id
            )
        assert "idempotent-replayed" not in first.last_response.headers
        assert other.id not in (first.id, second.id)
        assert len(await customers(client)) == (2 if idempotency else 3)


@honoured_and_ignored
async def test_a_key_refuses_other_parameters(tmp_path: Path, idempotency: bool) -> None:
    async with standin(tmp_path / "data.db", idempotency=idempotency) as client:
        await create(client, "k")
        if idempotency:
            with pytest.raises(stripe.IdempotencyError) as refused:
                await create(client, "k", name="Delta")
            assert refused.value.http_status == 400
        else:
            await create(client, "k", name="Delta")


@honoured_and_ignored
async def test_a_key_refuses_another_endpoint(tmp_path: Path, idempotency: bool) -> None:
    async with standin(tmp_path / "data.db", idempotency=idempotency) as client:
        known = await create(client, "k")
        update = client.v1.customers.update_async(
            known.id, {"name": "United"}, {"idempotency_key": "k"}
        )
        if idempotency:
            with pytest.raises(stripe.IdempotencyError, match="same endpoint"):
                await update
        else:
            await update


@honoured_and_ignored
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_500_is_kept_under_its_key(tmp_path: Path, when: str, idempotency: bool) -> None:
    async with standin(tmp_path / "data.db", idempotency=idempotency) as client:
        await fault(client, next=500, when=when)
        with pytest.raises(stripe.APIError):
            await create(client, "k")
        done = 1 if when == "after" else 0
        assert len(await customers(client)) == done
        if idempotency:
            with pytest.raises(stripe.APIError) as replay:
                await create(client, "k")
            assert replay.value.http_status == 500
            assert _header(replay, "idempotent-replayed") == "true"
            assert len(await customers(client)) == done
        else:
            await create(client, "k")
            assert len(await customers(client)) == done + 1


@honoured_and_ignored
async def test_a_lost_answer_is_found_again(tmp_path: Path, idempotency: bool) -> None:
    async with standin(tmp_path / "data.db", idempotency=idempotency) as client:
        await fault(client, next="timeout_after_commit", path="/v1/customers", method="POST")
        with pytest.raises(stripe.APIConnectionError):
            await create(client, "k")
        (made,) = await customers(client)
        again = await create(client, "k")
        assert (again.id == made) is idempotency
        assert len(await customers(client)) == (1 if idempotency else 2)


@honoured_and_ignored
async def test_a_lost_call_that_still_runs_is_in_conflict_with_its_retry(
    tmp_path: Path, idempotency: bool
) -> None:
    """Stripe's 409: the first request under the key goes on after its caller gave up."""
    async with standin(tmp_path / "data.db", idempotency=idempotency) as client:
        await fault(client, next="timeout_while_running", delay_ms=600, method="POST")
        with pytest.raises(stripe.APIConnectionError):
            await create(client, "k")
        assert await customers(client) == [], "it should still run"
        if idempotency:
            with pytest.raises(stripe.APIError) as refused:
                await create(client, "k")
            error = refused.value.json_body["error"]
            assert (refused.value.http_status, error["code"]) == (409, "idempotency_key_in_use")
        else:
            await create(client, "k")
        async with asyncio.timeout(5):
            while len(made := await customers(client)) < 2 - idempotency:  # noqa: ASYNC110 - a server
                await asyncio.sleep(0.02)
        again = await create(client, "k")
        assert ([again.id] == made) is idempotency
        assert len(await customers(client)) == (1 if idempotency else 3)


async def test_the_stand_in_counts_how_calls_ended(tmp_path: Path) -> None:
    async with standin(tmp_path / "data.db") as client:
        await fault(client, next=500, method="POST")
        await fault(client, next="timeout_after_commit", method="POST")
        await fault(client, next=429, count=9, path="/v1/invoices")
        for key in ("a", "b", "a"):
            with pytest.raises(stripe.StripeError):
                await create(client, key)
        await create(client, "c")
        answers = {"500": 1, "dropped": 1, "500 replayed": 1, "200": 1}
        assert await report(client) == {"waiting": 9, "answers": answers}


@honoured_and_ignored
async def test_a_key_is_in_use_while_its_request_runs(tmp_path: Path, idempotency: bool) -> None:
    async with standin(tmp_path / "data.db", idempotency=idempotency) as client:
        await fault(client, next="slow", delay_ms=300)
        both = await asyncio.gather(
            create(client, "k"), create(client, "k"), return_exceptions=True
        )
        refused: list[Any] = [one for one in both if isinstance(one, stripe.StripeError)]
        assert [(one.http_status, one.json_body["error"]["code"]) for one in refused] == (
            [(409, "idempotency_key_in_use")] if idempotency else []
        )
        assert len(await customers(client)) == (1 if idempotency else 2)


@pytest.mark.parametrize(("hours", "replayed"), [(23, True), (25, False)])
async def test_a_key_is_forgotten_after_a_day(tmp_path: Path, hours: int, replayed: bool) -> None:
    clock = ShiftedClock()
    async with standin(tmp_path / "data.db", clock=clock) as client:
        first = await create(client, "k")
        clock.ahead_s = hours * HOUR_S
        assert ((await create(client, "k")).id == first.id) is replayed


async def test_only_what_ran_is_kept_under_a_key(client: Api) -> None:
    """As Stripe: a refused parameter frees the key, a refusal of the endpoint itself stays."""
    key = {"idempotency_key": "only-what-ran"}
    with pytest.raises(stripe.InvalidRequestError):
        await client.v1.customers.create_async({"nmae": "United"}, key)
    await client.v1.customers.create_async({"name": "United"}, key)

    key = {"idempotency_key": "refused-by-the-endpoint"}
    for _ in range(2):
        with pytest.raises(stripe.InvalidRequestError) as refused:
            await client.v1.invoices.create_async({"customer": "cus_none"}, key)
        assert (refused.value.http_status, refused.value.code) == (400, "resource_missing")
    assert _header(refused, "idempotent-replayed") == "true"


async def test_429_is_not_kept_under_its_key(client: Api) -> None:
    await fault(client, next=429, path="/v1/customers", method="POST")
    with pytest.raises(stripe.RateLimitError) as limited:
        await create(client, "limited")
    assert _header(limited, "retry-after") == "1"
    await create(client, "limited")


async def test_the_library_recovers_by_itself(tmp_path: Path) -> None:
    with served(tmp_path / "data.db") as url:
        async with client_of(url, retries=2) as client:
            await fault(client, next="timeout_after_commit", method="POST")
            made = await client.v1.customers.create_async({"name": "United"})
            assert await customers(client) == [made.id]


# --- invoices


async def test_an_invoice_from_draft_to_paid(client: Api) -> None:
    invoice = await draft(client, 1250, 4900)
    assert (invoice.status, invoice.total, invoice.number) == ("draft", 6150, None)
    assert invoice.due_date == invoice.created + 30 * 24 * HOUR_S
    final = await client.v1.invoices.finalize_invoice_async(invoice.id)
    assert (final.status, final.amount_due, final.amount_remaining) == ("open", 6150, 6150)
    assert final.status_transitions.finalized_at is not None
    assert final.number.endswith("-0001")
    with pytest.raises(stripe.InvalidRequestError, match="paid_out_of_band"):
        await client.v1.invoices.pay_async(invoice.id)
    paid = await client.v1.invoices.pay_async(invoice.id, {"paid_out_of_band": True})
    assert (paid.status, paid.amount_paid, paid.amount_remaining) == ("paid", 6150, 0)
    second = await draft(client, 1, customer=invoice.customer)
    assert (await client.v1.invoices.finalize_invoice_async(second.id)).number.endswith("-0002")


async def test_a_finalized_invoice_never_changes(client: Api) -> None:
    invoice = await draft(client, 1250)
    await item(client, invoice, 1)  # the control arm: a draft does change
    assert (await client.v1.invoices.retrieve_async(invoice.id)).total == 1251
    frozen = (await client.v1.invoices.finalize_invoice_async(invoice.id)).last_response.body
    changes = [
        item(client, invoice, 1),
        client.v1.invoices.finalize_invoice_async(invoice.id),
        client.v1.invoices.delete_async(invoice.id),
    ]
    for change in changes:
        with pytest.raises(stripe.InvalidRequestError) as refused:
            await change
        assert (refused.value.http_status, refused.value.code) == (400, "invoice_not_editable")
    await client.v1.customers.update_async(invoice.customer, {"email": "new@example.com"})
    after = await client.v1.invoices.retrieve_async(invoice.id)
    assert after.last_response.body == frozen


async def test_nothing_due_is_paid_at_once(client: Api) -> None:
    for amounts in ((), (500, -500)):
        invoice = await draft(client, *amounts)
        final = await client.v1.invoices.finalize_invoice_async(invoice.id)
        assert (final.status, final.amount_due) == ("paid", 0)


async def test_credit_is_taken_off_the_next_invoice(client: Api) -> None:
    credit = await draft(client, -300)
    final = await client.v1.invoices.finalize_invoice_async(credit.id)
    assert (final.status, final.amount_due, final.ending_balance) == ("paid", 0, -300)
    bill = await draft(client, 1000, customer=credit.customer)
    final = await client.v1.invoices.finalize_invoice_async(bill.id)
    assert (final.total, final.amount_due, final.starting_balance) == (1000, 700, -300)
    assert (await client.v1.customers.retrieve_async(credit.customer)).balance == 0
    void = await client.v1.invoices.void_invoice_async(bill.id)
    assert void.status == "void"
    assert (await client.v1.customers.retrieve_async(credit.customer)).balance == -300


async def test_a_deleted_draft_is_gone(client: Api) -> None:
    invoice = await draft(client, 1, 2)
    items = await client.v1.invoice_items.list_async({"invoice": invoice.id})
    assert [one.amount for one in items.data] == [2, 1]
    assert (await client.v1.invoices.delete_async(invoice.id)).deleted
    for gone in (
        client.v1.invoices.retrieve_async(invoice.id),
        client.v1.invoices.finalize_invoice_async(invoice.id),
        client.v1.invoice_items.retrieve_async(items.data[0].id),
    ):
        with pytest.raises(stripe.InvalidRequestError) as refused:
            await gone
        assert (refused.value.http_status, refused.value.code) == (404, "resource_missing")


async def test_lines_are_the_items(client: Api) -> None:
    invoice = await draft(client)
    made = [
        await item(
            client,
            invoice,
            n,
            description=f"tier {n}",
            metadata={"causemesh_line": str(n)},
            period={"start": 100, "end": 200},
        )
        for n in range(12)
    ]
    shown = (await client.v1.invoices.retrieve_async(invoice.id)).lines
    assert (len(shown.data), shown.has_more) == (10, True)
    pages = await client.v1.invoices.line_items.list_async(invoice.id, {"limit": 5})
    lines = [line async for line in pages.auto_paging_iter()]
    assert [line.metadata["causemesh_line"] for line in lines] == [
        str(n) for n in range(11, -1, -1)
    ]
    assert [line.parent.invoice_item_details.invoice_item for line in reversed(lines)] == [
        one.id for one in made
    ]
    assert (lines[0].description, lines[0].period.end) == ("tier 11", 200)


async def test_an_invoice_takes_250_items(client: Api) -> None:
    invoice = await draft(client, *[1] * 250)
    with pytest.raises(stripe.InvalidRequestError, match="250"):
        await item(client, invoice, 1)


async def test_items_must_fit_their_invoice(client: Api) -> None:
    invoice = await draft(client)
    with pytest.raises(stripe.InvalidRequestError, match="currency"):
        await item(client, invoice, 1, currency="eur")
    stranger = await client.v1.customers.create_async({})
    with pytest.raises(stripe.InvalidRequestError, match="another customer"):
        await item(client, invoice, 1, customer=stranger.id)


# --- finding


async def test_search_by_metadata(client: Api) -> None:
    tenants = {}
    for tenant in ("UA", "D'L", 'A"A'):
        made = await client.v1.customers.create_async(
            {"metadata": {"causemesh_tenant": tenant, "region": "us"}}
        )
        tenants[tenant] = made.id
    for tenant, wanted in tenants.items():
        quoted = tenant.replace("'", "\\'")
        found = await client.v1.customers.search_async(
            {"query": f"metadata['causemesh_tenant']:'{quoted}' AND metadata['region']:'us'"}
        )
        assert [one.id for one in found.data] == [wanted]
    none = await client.v1.customers.search_async(
        {"query": "metadata['causemesh_tenant']:'UA' AND metadata['region']:'eu'"}
    )
    assert none.data == []


async def test_search_pages(client: Api) -> None:
    made = []
    for _ in range(5):
        invoice = await draft(client)
        made.append(invoice.id)
        await client.v1.invoices.finalize_invoice_async(invoice.id)
    wanted = {"query": "status:'paid'", "limit": 2}
    pages = await client.v1.invoices.search_async(wanted)
    found = [one.id async for one in pages.auto_paging_iter()]
    assert found[:5] == made[::-1]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "query",
    ["status:'paid' OR status:'open'", "total>5", "metadata['a']", "nick:'x'", "-status:'x'"],
)
async def test_search_refuses_what_it_does_not_know(client: Api, query: str) -> None:
    with pytest.raises(stripe.InvalidRequestError, match="Invalid query"):
        await client.v1.invoices.search_async({"query": query})


async def test_lists_filter_and_page(client: Api) -> None:
    made = [(await client.v1.customers.create_async({"email": "d@l.com"})).id for _ in range(5)]
    pages = await client.v1.customers.list_async({"email": "d@l.com", "limit": 2})
    assert [one.id async for one in pages.auto_paging_iter()] == made[::-1]
    invoice = await draft(client, customer=made[0])
    listed = await client.v1.invoices.list_async({"customer": made[0], "status": "draft"})
    assert [one.id for one in listed.data] == [invoice.id]
    with pytest.raises(stripe.InvalidRequestError, match="No such"):
        await client.v1.customers.list_async({"starting_after": "cus_none"})


async def test_metadata_merges(client: Api) -> None:
    made = await client.v1.customers.create_async({"metadata": {"a": "1", "b": "2"}, "name": "U"})
    await client.v1.customers.update_async(made.id, {"metadata": {"b": "", "c": "3"}, "name": ""})
    after = await client.v1.customers.retrieve_async(made.id)
    assert (after.metadata.to_dict(), after.name) == ({"a": "1", "c": "3"}, None)
    await client.v1.customers.update_async(made.id, {"metadata": ""})
    cleared = await client.v1.customers.retrieve_async(made.id)
    assert cleared.metadata.to_dict() == {}


# --- refusals


@pytest.mark.parametrize(
    ("form", "code", "param"),
    [
        ({"customer": "c", "nick": "x"}, "parameter_unknown", "nick"),
        ({"currency": "usd"}, "parameter_missing", "customer"),
        ({"customer": ""}, "parameter_invalid_empty", "customer"),
        ({"customer": "c", "days_until_due": "ten"}, "parameter_invalid_integer", "days_until_due"),
        ({"customer": "c", "auto_advance": "maybe"}, None, "auto_advance"),
        ({"customer": "c", "auto_advance": "true"}, None, "auto_advance"),
        ({"customer": "c", "collection_method": "barter"}, None, "collection_method"),
        ({"customer": "c", "collection_method": "send_invoice"}, None, "days_until_due"),
        ({"customer": "c", "metadata": "x"}, None, "metadata"),
        ({"customer": "c", f"metadata[{'k' * 41}]": "x"}, None, f"metadata[{'k' * 41}]"),
        ({"customer[id]": "c"}, None, "customer"),
        ({"customer": "c", "description": "a" * 1501}, None, "description"),
        ({"customer": "c"}, "resource_missing", "customer"),
    ],
)
def test_wrong_parameters_are_named(
    shared_url: str, form: dict[str, str], code: str | None, param: str
) -> None:
    bearer = {"Authorization": "Bearer sk_test_1"}
    answer = httpx.post(f"{shared_url}/v1/invoices", data=form, headers=bearer)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error.get("code"), error.get("param")) == (code, param)
    assert error["message"]


@pytest.mark.parametrize("key", [None, "sk_live_1", "sk_test"])
def test_only_test_keys_are_let_in(shared_url: str, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{shared_url}/v1/customers", headers=headers).status_code == 401
    headers = {"Authorization": "Bearer sk_test_1"}
    assert httpx.get(f"{shared_url}/v1/customers", headers=headers).status_code == 200


def test_calls_are_counted_and_faults_closed_unless_asked(tmp_path: Path) -> None:
    bearer = {"Authorization": "Bearer sk_test_1"}
    with served(tmp_path / "a.db") as url:
        httpx.get(f"{url}/v1/customers/cus_1", headers=bearer)
        httpx.get(f"{url}/v1/customers/cus_2", headers=bearer)
        assert httpx.get(f"{url}/_calls").json() == {"GET /v1/customers/{id}": 2}
    with served(tmp_path / "b.db", faults=False) as url:
        assert httpx.get(f"{url}/_calls").status_code == 404
        assert httpx.post(f"{url}/_faults", json={"next": 500}).status_code == 404


# --- durability


@contextmanager
def process(data: Path, host: str = "") -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`python -m causemesh.local.stripe`, as `causemesh up` runs it, or with another host."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "causemesh.local.stripe", "--port", str(port)]
    argv += ["--host", host] if host else []
    with (data.parent / "log").open("ab") as log:
        running = subprocess.Popen(
            argv, env={**os.environ, "CAUSEMESH_STRIPE_DATA": str(data)}, stdout=log, stderr=log
        )
    url = f"http://{host or '127.0.0.1'}:{port}"
    try:
        _wait_until_it_answers(url, running)
        yield url, running
    finally:
        running.kill()
        running.wait()


def _wait_until_it_answers(url: str, running: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        assert running.poll() is None, "the stand-in ended while starting"
        assert time.monotonic() < deadline, "the stand-in did not start"
        try:
            httpx.get(f"{url}/v1/customers", timeout=1)
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return


def test_it_listens_on_the_host_it_is_told_and_no_other(tmp_path: Path) -> None:
    for host, other in (("", "127.0.0.2"), ("127.0.0.2", "127.0.0.1")):
        with process(tmp_path / f"data{host}.db", host) as (url, _):
            port = url.rsplit(":", 1)[1]
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"http://{other}:{port}/v1/customers", timeout=1)


async def _write_until_killed(
    url: str, running: subprocess.Popen[bytes], lane: int, acknowledged: dict[str, str]
) -> list[str]:
    """The keys tried; `acknowledged` maps those answered to the customer."""
    tried: list[str] = []
    async with client_of(url) as client:
        while True:
            tried.append(f"{lane}-{len(tried)}")
            try:
                acknowledged[tried[-1]] = (await create(client, tried[-1])).id
            except stripe.APIConnectionError:
                return tried
            if len(acknowledged) == 40:
                running.send_signal(signal.SIGKILL)


async def test_kill_9_loses_nothing_acknowledged(tmp_path: Path) -> None:
    data = tmp_path / "data.db"
    acknowledged: dict[str, str] = {}
    with process(data) as (url, running):
        lanes = (_write_until_killed(url, running, lane, acknowledged) for lane in range(4))
        tried = [key for lane in await asyncio.gather(*lanes) for key in lane]
    assert len(acknowledged) >= 40
    assert len(tried) > len(acknowledged), "no call was in flight when it was killed"
    async with standin(data) as client:
        kept = await customers(client)
        assert set(acknowledged.values()) <= set(kept)
        again = {key: (await create(client, key)).id for key in tried}
        assert acknowledged.items() <= again.items()
        assert sorted(await customers(client)) == sorted(again.values())
    async with standin(data, idempotency=False) as client:  # the control arm: it would show
        await create(client, tried[0])
        assert len(await customers(client)) == len(tried) + 1


async def test_a_restart_keeps_everything(tmp_path: Path) -> None:
    async with standin(tmp_path / "data.db") as client:
        invoice = await draft(client, 700)
        before = await client.v1.invoices.finalize_invoice_async(invoice.id)
    async with standin(tmp_path / "data.db") as client:
        after = await client.v1.invoices.retrieve_async(invoice.id)
        assert after.last_response.body == before.last_response.body
        following = await draft(client, 1, customer=invoice.customer)
        final = await client.v1.invoices.finalize_invoice_async(following.id)
        assert final.number.endswith("-0002")
    async with standin(tmp_path / "other.db") as client:  # the control arm: a fresh file has none
        with pytest.raises(stripe.InvalidRequestError):
            await client.v1.invoices.retrieve_async(invoice.id)
