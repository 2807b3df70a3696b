"""`/v1/customers`."""

from __future__ import annotations

import secrets
import string

from causemesh.local.stripe import listing
from causemesh.local.stripe.operations import Call, Operation, new_id
from causemesh.local.stripe.params import METADATA, PAGING, SEARCH, Param, merged
from causemesh.local.stripe.store import Json, Wanted

_PREFIX_ALPHABET = string.ascii_uppercase + string.digits
_PLAIN = {
    "description": Param(clearable=True),
    "email": Param(clearable=True, max_length=512),
    "name": Param(clearable=True, max_length=256),
    "phone": Param(clearable=True, max_length=20),
}
_FIELDS = {**_PLAIN, "metadata": METADATA}


def _create(call: Call) -> Json:
    return call.store.add(
        {
            "id": new_id("cus"),
            "object": "customer",
            "address": None,
            "balance": 0,
            "created": call.now_s,
            "currency": None,
            "default_source": None,
            "delinquent": False,
            "discount": None,
            "invoice_prefix": "".join(secrets.choice(_PREFIX_ALPHABET) for _ in range(8)),
            "invoice_settings": {
                "custom_fields": None,
                "default_payment_method": None,
                "footer": None,
                "rendering_options": None,
            },
            "livemode": False,
            "metadata": merged({}, call.params.get("metadata", {})),
            "next_invoice_sequence": 1,
            "preferred_locales": [],
            "shipping": None,
            "tax_exempt": "none",
            "test_clock": None,
            **{name: call.params.get(name) for name in _PLAIN},
        }
    )


def _update(call: Call) -> Json:
    customer = call.subject("customer")
    change = dict(call.params)
    if "metadata" in change:
        change["metadata"] = merged(customer["metadata"], change["metadata"])
    return call.store.replace({**customer, **change})


def _list(call: Call) -> Json:
    fields = {"email": call.params["email"]} if "email" in call.params else {}
    return listing.listed(call.store, call.path, Wanted("customer", fields), call.params)


def _search(call: Call) -> Json:
    wanted = listing.query("customer", call.params["query"], {"email", "name", "phone"})
    return listing.found(call.store, call.path, wanted, call.params)


OPERATIONS = (
    Operation("POST", "/v1/customers", _create, _FIELDS),
    Operation("GET", "/v1/customers", _list, {**PAGING, "email": Param()}),
    Operation("GET", "/v1/customers/search", _search, SEARCH),
    Operation("GET", "/v1/customers/{id}", lambda call: call.subject("customer")),
    Operation("POST", "/v1/customers/{id}", _update, _FIELDS),
)
