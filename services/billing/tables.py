"""Billing's tables. Instants are microseconds, quantities millionths, amounts minor units."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

metadata = sa.MetaData()

usage_buckets = sa.Table(
    "usage_buckets",
    metadata,
    sa.Column("tenant_id", sa.Text, primary_key=True),
    sa.Column("meter", sa.Text, primary_key=True),
    sa.Column("aggregation", sa.Text, primary_key=True),
    sa.Column("topic", sa.Text, primary_key=True),
    sa.Column("partition", sa.Integer, primary_key=True),
    sa.Column("hour_us", sa.BigInteger, primary_key=True),
    sa.Column("due_period", sa.Text, primary_key=True),
    sa.Column("usage_period", sa.Text, nullable=False),
    sa.Column("quantity_micro", sa.BigInteger),
    sa.Column("first", sa.BigInteger, nullable=False),
    sa.Column("last", sa.BigInteger, nullable=False),
    sa.Column("at_us", sa.BigInteger, nullable=False),
    sa.Column("at_position", sa.BigInteger, nullable=False),
    sa.Index("usage_buckets_by_due", "due_period", "tenant_id", "usage_period"),
    sa.Index("usage_buckets_by_month", "tenant_id", "usage_period"),
)
"""USAGE_SCHEMA and `due_period`: the month whose invoice the usage is on at the earliest. The
partition is in the key, so workers never wait for each other's rows."""

usage_members = sa.Table(
    "usage_members",
    metadata,
    sa.Column("tenant_id", sa.Text, primary_key=True),
    sa.Column("meter", sa.Text, primary_key=True),
    sa.Column("hour_us", sa.BigInteger, primary_key=True),
    sa.Column("partition", sa.Integer, primary_key=True),
    sa.Column("hash64", sa.BigInteger, primary_key=True),
    sa.Column("due_period", sa.Text, nullable=False),
    sa.Column("usage_period", sa.Text, nullable=False),
    sa.Index("usage_members_by_month", "tenant_id", "usage_period"),
)
"""MEMBER_SCHEMA of `unique` meters; `due_period` is that of the first time it was seen."""

usage_traces = sa.Table(
    "usage_traces",
    metadata,
    sa.Column("due_period", sa.Text, primary_key=True),
    sa.Column("tenant_id", sa.Text, primary_key=True),
    sa.Column("meter", sa.Text, primary_key=True),
    sa.Column("usage_period", sa.Text, primary_key=True),
    sa.Column("traceparent", sa.Text, primary_key=True),
)
"""W3C trace contexts of usage that is due on an invoice of `due_period`; gone once it is closed."""

tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("tenant_id", sa.Text, primary_key=True),
    sa.Column("plan", sa.Text, nullable=False),
    sa.Column("sequence", sa.BigInteger, nullable=False),
)
"""Whom usage was seen of, and the entitlement that was told last."""

terms = sa.Table(
    "terms",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("document", sa.JSON, nullable=False),
)
"""Every billing.yaml that a month was closed with; JSON, since JSONB forgets the order of keys, and
an invoice's lines come in the plan's order."""

closed_months = sa.Table(
    "closed_months",
    metadata,
    sa.Column("period", sa.Text, primary_key=True),
    sa.Column("terms", sa.Text, sa.ForeignKey("terms.digest"), nullable=False),
)
closed_usage = sa.Table(
    "closed_usage",
    metadata,
    sa.Column("period", sa.Text, sa.ForeignKey("closed_months.period"), primary_key=True),
    sa.Column("tenant_id", sa.Text, primary_key=True),
    sa.Column("meter", sa.Text, primary_key=True),
    sa.Column("usage_period", sa.Text, primary_key=True),
    sa.Column("quantity_micro", sa.BigInteger, nullable=False),
    sa.Column("ranges", JSONB, nullable=False),
)
"""What each month was closed on, priced or not; `ranges` are [topic, partition, first, last]."""

billed = sa.Table(
    "billed",
    metadata,
    sa.Column("period", sa.Text, sa.ForeignKey("closed_months.period"), primary_key=True),
    sa.Column("tenant_id", sa.Text, primary_key=True),
    sa.Column("meter", sa.Text, primary_key=True),
    sa.Column("usage_period", sa.Text, primary_key=True),
    sa.Column("quantity_micro", sa.BigInteger, nullable=False),
    sa.Index("billed_by_tenant", "tenant_id", "usage_period"),
)
"""`Billed`: what closing `period` added to what is billed."""

invoices = sa.Table(
    "invoices",
    metadata,
    sa.Column("invoice_id", sa.Text, primary_key=True),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("period", sa.Text, sa.ForeignKey("closed_months.period"), nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("total_minor", sa.BigInteger, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("stripe_id", sa.Text),
    sa.Column("problem", sa.Text),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    sa.Column("traceparent", sa.Text),
    sa.UniqueConstraint("period", "tenant_id"),
    sa.Index("invoices_by_status", "status"),
)
"""`status` is closed, finalised or mismatch; `attempt` numbers Stripe's idempotency keys,
`traceparent` is the trace that pushing goes on with."""

lines = sa.Table(
    "lines",
    metadata,
    sa.Column("line_id", sa.Text, primary_key=True),
    sa.Column("invoice_id", sa.Text, sa.ForeignKey("invoices.invoice_id"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("meter", sa.Text, nullable=False),
    sa.Column("usage_period", sa.Text, nullable=False),
    sa.Column("tier", sa.Integer, nullable=False),
    sa.Column("quantity_micro", sa.BigInteger, nullable=False),
    sa.Column("unit_price", sa.Text, nullable=False),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Column("ranges", JSONB, nullable=False),
    sa.UniqueConstraint("invoice_id", "number"),
)
ledger = sa.Table(
    "ledger",
    metadata,
    sa.Column("line_id", sa.Text, sa.ForeignKey("lines.line_id"), primary_key=True),
    sa.Column("account", sa.Text, primary_key=True),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("period", sa.Text, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Index("ledger_by_tenant", "tenant_id", "period"),
)
"""Double entry: debits are positive, credits negative, a line's two sum to zero."""

customers = sa.Table(
    "customers",
    metadata,
    sa.Column("tenant_id", sa.Text, primary_key=True),
    sa.Column("stripe_id", sa.Text),
    sa.Column("attempt", sa.Integer, nullable=False),
)
