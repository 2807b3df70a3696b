"""The broker that the settings name."""

from __future__ import annotations

from causemesh.bus.base import Bus
from causemesh.bus.kafka import KafkaBus
from causemesh.errors import Misdeclared
from causemesh.settings import ServiceSettings


def open_bus(settings: ServiceSettings) -> Bus:
    """The bus that CAUSEMESH_BUS names. Raises Misdeclared when its client is not installed."""
    if settings.bus == "kafka":
        return KafkaBus(
            settings.kafka_bootstrap,
            session_timeout_ms=settings.session_timeout_ms,
            replication=settings.replication,
        )
    try:
        from causemesh.bus.pulsar import PulsarBus  # noqa: PLC0415 - an extra of its own
    except ImportError as error:
        raise Misdeclared("CAUSEMESH_BUS=pulsar needs the extra: causemesh[pulsar]") from error
    return PulsarBus(settings.pulsar_url, settings.pulsar_admin_url)
