"""What a tenant may do, as told on billing.entitlements.v1."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncEngine

from causemesh.clock import Clock
from causemesh.outbox import Event, add_events
from causemesh.sql import database_errors
from services.billing.domain.plans import BillingConfig
from services.billing.store import UsageStore

ENTITLEMENTS = "billing.entitlements.v1"
SHARD = 1024
"""The outbox shard of what is not about one partition; a topic has at most 1,024 of them."""


def entitlement(
    tenant: str,
    plan: str,
    *,
    sequence: int = 1,
    occurred_us: int,
    origin: tuple[str, int, int] | None = None,
) -> Event:
    """The event; every plan covers all models so far."""
    record = {
        "tenant_id": tenant,
        "occurred_at": occurred_us,
        "plan": plan,
        "active": True,
        "models": ["*"],
        "sequence": sequence,
    }
    return Event(ENTITLEMENTS, tenant, record, origin)


async def announce_changes(engine: AsyncEngine, config: BillingConfig, clock: Clock) -> None:
    """Tell the plans that billing.yaml has changed since the service last ran. Raises Retryable."""
    async with database_errors(), engine.begin() as transaction:
        changed = await UsageStore.change_plans(transaction, lambda name: config.plan_of(name).name)
        now_us = clock.now_us()
        events = [
            entitlement(tenant, config.plan_of(tenant).name, sequence=sequence, occurred_us=now_us)
            for tenant, sequence in changed.items()
        ]
        await add_events(transaction, events, shard=SHARD)
