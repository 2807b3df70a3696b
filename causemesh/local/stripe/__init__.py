"""A stateful stand-in for the part of Stripe's API that billing uses.

`causemesh up` runs it when no Stripe key is set. It keeps state, numbers, freezes and searches as
Stripe does, and honours idempotency keys; what it does not implement it refuses by name rather than
ignores. `tests/contract/stripe` holds it to Stripe's published API.
"""

from causemesh.local.stripe.app import create_app
from causemesh.local.stripe.serving import make_server

__all__ = ["create_app", "make_server"]
