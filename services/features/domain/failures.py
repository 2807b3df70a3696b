"""What is wrong with a feature definition."""

from __future__ import annotations

from causemesh.errors import Misdeclared


class DefinitionError(Misdeclared):
    """A feature view does not make sense; the message names the view and what to change."""
