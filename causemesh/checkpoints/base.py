"""What a processor offers whose state can be written piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

Encode = Callable[[], bytes]
"""Makes the bytes of something taken out of the state. It is called in another thread while the
state changes (so it holds copies, or what is never changed in place), and again if a write failed.
"""


@runtime_checkable
class Pieced(Protocol):
    """State in named pieces, which together are all of it.

    Bodies are applied in the order in which they were made: of one checkpoint the delta before the
    pieces. A delta may add to what was there (so it must come after all before it); a piece takes
    the place of all that was known of it. A delta may be applied before a piece that it is
    about was: what it says of that piece is then replaced, and must do no harm.

    Such a processor writes nothing in the unit's transaction: its checkpoint may commit some units
    after the one that it was taken in.
    """

    def pieces(self) -> Sequence[str]:
        """The names of all pieces; a name keeps its meaning, in later versions of the code too."""

    def piece(self, name: str) -> Encode:
        """The whole of one piece as it is now."""

    def track(self) -> None:
        """Begin to note what changes, for the first `delta`."""

    def replaced(self) -> bool:
        """Whether `delta` could not tell what changed, because a part of the state was put in the
        place of another since the last call, or since `track`: then all pieces are written."""

    def delta(self) -> Encode:
        """What changed since the last call, or since `track`."""

    def apply(self, body: bytes) -> None:
        """Take over a body that `piece` or `delta` made, into a state that was restored to nothing.

        Raises Fatal when it is none of ours, Misdeclared when it is of another definition.
        """

    def applied(self) -> None:
        """All bodies were applied; called before any unit."""

    def committed(self) -> None:
        """What was last taken (by `snapshot`, `delta` or `piece`) is committed."""


def missing_of(processor: object) -> list[str]:
    """The names of `Pieced` that a processor lacks, in order."""
    named = [name for name in vars(Pieced) if not name.startswith("_")]
    return [name for name in named if not hasattr(processor, name)]


class Snapshots(Protocol):
    """State that can be written whole; see `Processor`."""

    def snapshot(self) -> bytes | None:
        """All of the state."""

    def restore(self, state: bytes | None) -> None:
        """Go back to a stored state; None starts empty."""
