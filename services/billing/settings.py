"""Settings of billing, beside the common ones. What is billed is in the project's billing.yaml."""

from __future__ import annotations

from pydantic import Field, SecretStr

from causemesh.errors import Misdeclared
from causemesh.settings import ServiceSettings

_STAND_IN_KEY = "sk_test_local"


class BillingSettings(ServiceSettings):
    """See the fields; read from CAUSEMESH_*."""

    stripe_key: SecretStr = Field(
        default=SecretStr(_STAND_IN_KEY), description="Stripe's secret key."
    )
    stripe_url: str | None = Field(
        default=None, description="Another place than Stripe itself: the local stand-in."
    )
    close_poll_s: float = Field(default=1.0, gt=0, description="How often months are looked for.")
    push_poll_s: float = Field(default=1.0, gt=0, description="How often invoices are looked for.")

    report_poll_s: float = Field(
        default=15.0, gt=0, description="How often the books are counted for the metrics."
    )

    def payments_key(self) -> str:
        """Stripe's key. Raises Misdeclared when real Stripe would get the stand-in's."""
        key = self.stripe_key.get_secret_value()
        if self.stripe_url is None and key == _STAND_IN_KEY:
            raise Misdeclared(
                "set CAUSEMESH_STRIPE_KEY to your Stripe secret key, or CAUSEMESH_STRIPE_URL to the"
                " address of the stand-in (python -m causemesh.local.stripe)"
            )
        return key
