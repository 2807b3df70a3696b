"""Metering, rating and invoicing. Everything here is pure: no I/O and no clock.

From an event to money
    events -> hourly buckets with position ranges (`metering`, `members`) -> a month's usage of a
    tenant (`usage`) -> rated lines (`rating`) -> an invoice and its ledger entries (`invoicing`)
    -> planned Stripe calls (`stripe_calls`). `plans` is the configuration, `periods` the calendar.

Quantities
    Integer millionths of the meter's unit (`quantity_micro`): an event's value is rounded once,
    half to even, and integers add up to the same whatever the batches.

Money
    `Decimal` prices, integer minor units, rounded half to even once a line.

Months
    Usage belongs to the UTC month of its event time. What arrives after a month was closed goes on
    the next invoice, at the price of the difference, so the sum over all invoices depends on the
    usage alone, never on when it arrived.
"""
