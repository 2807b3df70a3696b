"""Training sets by command: `python -m services.features.offline.app`."""

from __future__ import annotations

import sys

from causemesh.errors import MeshError
from causemesh.lake import require_libraries


def main() -> None:
    """Expected failures are one line, not a traceback."""
    try:
        require_libraries()
        from services.features.offline.commands import app  # noqa: PLC0415 - needs the extra

        app()
    except MeshError as error:
        sys.exit(f"causemesh: {error}")


if __name__ == "__main__":
    main()
