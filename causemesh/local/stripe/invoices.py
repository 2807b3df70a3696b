"""`/v1/invoices`: a draft, then frozen when finalized, then paid or void."""

from __future__ import annotations

from causemesh.local.stripe import invoiceitems, listing
from causemesh.local.stripe.invoice_draft import drafted
from causemesh.local.stripe.operations import Call, Operation
from causemesh.local.stripe.params import METADATA, PAGING, SEARCH, Param
from causemesh.local.stripe.refusals import Refused, not_editable
from causemesh.local.stripe.store import Json, Wanted

_DAY_S = 86_400
_STATUSES = ("draft", "open", "paid", "uncollectible", "void")
_MANUAL = Param("boolean")


def _create(call: Call) -> Json:
    _check_manual(call.params)
    collection = call.params.get("collection_method", "charge_automatically")
    days = call.params.get("days_until_due")
    if (collection == "send_invoice") != (days is not None):
        raise Refused(
            "days_until_due goes with collection_method=send_invoice, and only with it",
            param="days_until_due",
        )
    customer = call.named("customer", "customer")
    invoice = drafted(call, customer["id"])
    invoice |= _addressee(customer) | {
        "collection_method": collection,
        "due_date": None if days is None else call.now_s + days * _DAY_S,
    }
    return _shown(call, call.store.add(invoice))


def _check_manual(params: Json) -> None:
    if params.get("auto_advance"):
        raise Refused(
            "This stand-in advances no invoice by itself: pass auto_advance=false and finalize it",
            param="auto_advance",
        )


def _addressee(customer: Json) -> Json:
    names = ("address", "email", "name", "phone", "shipping", "tax_exempt")
    return {f"customer_{name}": customer[name] for name in names}


def _shown(call: Call, invoice: Json) -> Json:
    """The kept invoice with what follows from it: totals and the first lines."""
    total = invoice["subtotal"]
    due = max(0, total + invoice["starting_balance"])
    return {
        **invoice,
        "amount_due": due,
        "amount_remaining": due - invoice["amount_paid"],
        "subtotal_excluding_tax": total,
        "total": total,
        "total_excluding_tax": total,
        "lines": invoiceitems.shown_lines(call.store, invoice["id"]),
    }


def _retrieve(call: Call) -> Json:
    return _shown(call, call.subject("invoice"))


def _lines(call: Call) -> Json:
    return invoiceitems.lines(call.store, call.subject("invoice")["id"], call.params)


def _shown_page(call: Call, page: Json) -> Json:
    return {**page, "data": [_shown(call, invoice) for invoice in page["data"]]}


def _list(call: Call) -> Json:
    fields = {}
    if "customer" in call.params:
        fields["customer"] = call.named("customer", "customer")["id"]
    if "status" in call.params:
        fields["status"] = call.params["status"]
    wanted = Wanted("invoice", fields)
    return _shown_page(call, listing.listed(call.store, call.path, wanted, call.params))


def _search(call: Call) -> Json:
    fields = {"customer", "currency", "number", "status"}
    wanted = listing.query("invoice", call.params["query"], fields)
    return _shown_page(call, listing.found(call.store, call.path, wanted, call.params))


def _finalize(call: Call) -> Json:
    _check_manual(call.params)
    invoice = call.subject("invoice")
    if invoice["status"] != "draft":
        raise not_editable("This invoice is already finalized, only a draft can be")
    customer = call.store.find("customer", invoice["customer"])
    assert customer is not None  # customers are never removed
    # A negative total is credit: it stays on the customer and is taken off later invoices.
    balance = customer["balance"] + invoice["subtotal"]
    waits = invoice["due_date"] and invoice["due_date"] - invoice["created"]
    invoice |= _addressee(customer) | {
        "due_date": waits and call.now_s + waits,
        "effective_at": call.now_s,
        "ending_balance": min(0, balance),
        "number": f"{customer['invoice_prefix']}-{customer['next_invoice_sequence']:04d}",
        "starting_balance": customer["balance"],
        "status": "open" if balance > 0 else "paid",
    }
    invoice["status_transitions"]["finalized_at"] = call.now_s
    if balance <= 0:
        invoice["status_transitions"]["paid_at"] = call.now_s
        invoice["attempted"] = True
    customer["balance"] = min(0, balance)
    customer["next_invoice_sequence"] += 1
    call.store.replace(customer)
    return _shown(call, call.store.replace(invoice))


def _open(call: Call, verb: str) -> Json:
    invoice = call.subject("invoice")
    if invoice["status"] != "open":
        raise Refused(f"Only an open invoice can be {verb}; this one is {invoice['status']}")
    return invoice


def _pay(call: Call) -> Json:
    invoice = _open(call, "paid")
    if not call.params.get("paid_out_of_band"):
        raise Refused(
            "There is no default payment method set on this Customer or Invoice, and this stand-in "
            "keeps none: pass paid_out_of_band=true"
        )
    invoice |= {"status": "paid", "attempted": True}
    invoice["amount_paid"] = _shown(call, invoice)["amount_due"]
    invoice["status_transitions"]["paid_at"] = call.now_s
    return _shown(call, call.store.replace(invoice))


def _void(call: Call) -> Json:
    invoice = _open(call, "voided")
    customer = call.store.find("customer", invoice["customer"])
    assert customer is not None  # customers are never removed
    customer["balance"] += invoice["starting_balance"] - invoice["ending_balance"]
    call.store.replace(customer)
    invoice["status"] = "void"
    invoice["status_transitions"]["voided_at"] = call.now_s
    return _shown(call, call.store.replace(invoice))


def _delete(call: Call) -> Json:
    invoice = call.subject("invoice")
    if invoice["status"] != "draft":
        raise not_editable("Only a draft invoice can be deleted: void this one instead")
    call.store.remove(Wanted("invoiceitem", {"invoice": invoice["id"]}))
    call.store.remove(Wanted("invoice", {"id": invoice["id"]}))
    return {"id": invoice["id"], "object": "invoice", "deleted": True}


_CREATE = {
    "customer": Param(required=True),
    "currency": Param(max_length=invoiceitems.CURRENCY_LENGTH),
    "auto_advance": _MANUAL,
    "collection_method": Param(choices=("charge_automatically", "send_invoice")),
    "days_until_due": Param("integer", least=0),
    "metadata": METADATA,
    "description": Param(max_length=1500),
    "pending_invoice_items_behavior": Param(choices=("exclude",)),
}

OPERATIONS = (
    Operation("POST", "/v1/invoices", _create, _CREATE),
    Operation(
        "GET",
        "/v1/invoices",
        _list,
        {**PAGING, "customer": Param(), "status": Param(choices=_STATUSES)},
    ),
    Operation("GET", "/v1/invoices/search", _search, SEARCH),
    Operation("GET", "/v1/invoices/{id}", _retrieve),
    Operation("DELETE", "/v1/invoices/{id}", _delete),
    Operation("GET", "/v1/invoices/{id}/lines", _lines, PAGING),
    Operation("POST", "/v1/invoices/{id}/finalize", _finalize, {"auto_advance": _MANUAL}),
    Operation("POST", "/v1/invoices/{id}/pay", _pay, {"paid_out_of_band": Param("boolean")}),
    Operation("POST", "/v1/invoices/{id}/void", _void),
)
