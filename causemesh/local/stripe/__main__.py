"""`python -m causemesh.local.stripe --port 18121 --data <file>`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from causemesh.local.stripe import create_app, make_server
from causemesh.local.stripe.serving import HOST


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="causemesh.local.stripe", description=__doc__)
    parser.add_argument("--host", default=HOST, help="where to listen; 0.0.0.0 in a container")
    parser.add_argument("--port", type=int, default=18121)
    parser.add_argument("--data", default=os.environ.get("CAUSEMESH_STRIPE_DATA"))
    parser.add_argument("--faults", action="store_true", help="open /_faults and /_calls")
    chosen = parser.parse_args()
    if not chosen.data:
        parser.error("say where to keep the data: --data <file> or CAUSEMESH_STRIPE_DATA")
    app = create_app(Path(chosen.data), faults=chosen.faults)
    make_server(app, chosen.port, chosen.host).run()


if __name__ == "__main__":
    main()
