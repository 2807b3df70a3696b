"""`/v1/invoiceitems`, and the same items seen as an invoice's lines."""

from __future__ import annotations

from causemesh.local.stripe import listing
from causemesh.local.stripe.operations import Call, Operation, new_id
from causemesh.local.stripe.params import METADATA, PAGING, Param, merged
from causemesh.local.stripe.refusals import Refused, no_such, not_editable
from causemesh.local.stripe.store import Json, Store, Wanted

CURRENCY_LENGTH = 3
# Stripe's own limit; a stand-in without it would let billing pass a bill that Stripe refuses.
_MOST_ITEMS = 250
_LINES_SHOWN = 10


def _create(call: Call) -> Json:
    customer = call.named("customer", "customer")
    invoice = call.named("invoice", "invoice")
    currency = call.params["currency"].lower()
    _check_fits(call.store, invoice, customer["id"], currency)
    item = call.store.add(_shape(call, customer["id"], invoice["id"], currency))
    invoice["subtotal"] += item["amount"]
    call.store.replace(invoice)
    return item


def _check_fits(store: Store, invoice: Json, customer: str, currency: str) -> None:
    if invoice["status"] != "draft":
        raise not_editable("The specified invoice is finalized and can no longer be edited")
    if invoice["customer"] != customer:
        raise Refused("The invoice belongs to another customer", param="invoice")
    if invoice["currency"] != currency:
        raise Refused(
            f"The item's currency ({currency}) differs from the invoice's ({invoice['currency']})",
            param="currency",
        )
    if store.count(Wanted("invoiceitem", {"invoice": invoice["id"]})) >= _MOST_ITEMS:
        raise Refused(f"An invoice can have up to {_MOST_ITEMS} items", param="invoice")


def _shape(call: Call, customer: str, invoice: str, currency: str) -> Json:
    amount = call.params["amount"]
    return {
        "id": new_id("ii"),
        "object": "invoiceitem",
        "amount": amount,
        "currency": currency,
        "customer": customer,
        "date": call.now_s,
        "description": call.params.get("description"),
        "discountable": amount >= 0,
        "discounts": [],
        "invoice": invoice,
        "livemode": False,
        "metadata": merged({}, call.params.get("metadata", {})),
        "net_amount": amount,
        "parent": None,
        "period": call.params.get("period", {"start": call.now_s, "end": call.now_s}),
        "pricing": {"type": "price_details", "unit_amount_decimal": str(amount)},
        "proration": False,
        "quantity": 1,
        "tax_rates": [],
        "test_clock": None,
    }


def _list(call: Call) -> Json:
    fields: dict[str, str] = {}
    for kind in ("customer", "invoice"):
        if kind in call.params:
            fields[kind] = call.named(kind, kind)["id"]
    return listing.listed(call.store, call.path, Wanted("invoiceitem", fields), call.params)


def lines(store: Store, invoice: str, params: Json) -> Json:
    """An invoice's items as Stripe's list of line items, newest first."""
    after = params.get("starting_after")
    if after is not None:
        if not after.startswith("il_"):
            raise no_such("line_item", after, param="starting_after")
        params = {**params, "starting_after": f"ii_{after.removeprefix('il_')}"}
    items = listing.listed(
        store, f"/v1/invoices/{invoice}/lines", Wanted("invoiceitem", {"invoice": invoice}), params
    )
    return {**items, "data": [_line(item) for item in items["data"]]}


def shown_lines(store: Store, invoice: str) -> Json:
    """The lines that come inside an invoice: the first page."""
    return lines(store, invoice, {"limit": _LINES_SHOWN})


def _line(item: Json) -> Json:
    same = ("amount", "currency", "description", "discountable", "discounts", "invoice")
    return {
        "id": f"il_{item['id'].removeprefix('ii_')}",
        "object": "line_item",
        **{name: item[name] for name in same},
        "discount_amounts": [],
        "livemode": False,
        "metadata": item["metadata"],
        "parent": {
            "type": "invoice_item_details",
            "invoice_item_details": {
                "invoice_item": item["id"],
                "proration": False,
                "proration_details": {"credited_items": None},
                "subscription": None,
            },
            "subscription_item_details": None,
        },
        "period": item["period"],
        "pretax_credit_amounts": [],
        "pricing": item["pricing"],
        "quantity": item["quantity"],
        "subscription": None,
        "taxes": [],
    }


OPERATIONS = (
    Operation(
        "POST",
        "/v1/invoiceitems",
        _create,
        {
            "customer": Param(required=True),
            "invoice": Param(required=True),
            "amount": Param("integer", required=True),
            "currency": Param(required=True, max_length=CURRENCY_LENGTH),
            "description": Param(),
            "metadata": METADATA,
            "period": Param("period"),
        },
    ),
    Operation(
        "GET", "/v1/invoiceitems", _list, {**PAGING, "customer": Param(), "invoice": Param()}
    ),
    Operation("GET", "/v1/invoiceitems/{id}", lambda call: call.subject("invoiceitem")),
)
