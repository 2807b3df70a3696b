"""A new invoice as Stripe shows one without tax, discounts, subscription or payment method."""

from __future__ import annotations

from causemesh.local.stripe.operations import Call, new_id
from causemesh.local.stripe.params import merged
from causemesh.local.stripe.store import Json

_ZERO = (
    "amount_overpaid",
    "amount_paid",
    "amount_shipping",
    "attempt_count",
    "post_payment_credit_notes_amount",
    "pre_payment_credit_notes_amount",
    "starting_balance",
    "subtotal",
)
_NULL = (
    "account_name",
    "account_tax_ids",
    "application",
    "automatically_finalizes_at",
    "custom_fields",
    "default_payment_method",
    "default_source",
    "effective_at",
    "ending_balance",
    "footer",
    "from_invoice",
    "hosted_invoice_url",
    "invoice_pdf",
    "last_finalization_error",
    "latest_revision",
    "next_payment_attempt",
    "number",
    "on_behalf_of",
    "parent",
    "receipt_number",
    "rendering",
    "shipping_cost",
    "shipping_details",
    "statement_descriptor",
    "test_clock",
    "webhooks_delivered_at",
)
_NONE_YET = (
    "customer_tax_ids",
    "default_tax_rates",
    "discounts",
    "total_discount_amounts",
    "total_pretax_credit_amounts",
    "total_taxes",
)


def drafted(call: Call, customer: str) -> Json:
    """The draft, without what `invoices` derives: the addressee, the totals, the lines."""
    return {
        **dict.fromkeys(_NULL),
        **dict.fromkeys(_ZERO, 0),
        **{name: [] for name in _NONE_YET},
        **_settings(),
        "id": new_id("in"),
        "object": "invoice",
        "billing_reason": "manual",
        "created": call.now_s,
        "currency": call.params.get("currency", "usd").lower(),
        "customer": customer,
        "description": call.params.get("description"),
        "livemode": False,
        "metadata": merged({}, call.params.get("metadata", {})),
        "period_end": call.now_s,
        "period_start": call.now_s,
        "status": "draft",
        "status_transitions": dict.fromkeys(
            ("finalized_at", "marked_uncollectible_at", "paid_at", "voided_at")
        ),
    }


def _settings() -> Json:
    """What the account and the customer would set, all at Stripe's defaults."""
    return {
        "account_country": "US",
        "attempted": False,
        "auto_advance": False,
        "automatic_tax": {
            "disabled_reason": None,
            "enabled": False,
            "liability": None,
            "provider": None,
            "status": None,
        },
        "issuer": {"type": "self"},
        "payment_settings": {
            "default_mandate": None,
            "payment_method_options": None,
            "payment_method_types": None,
        },
    }
