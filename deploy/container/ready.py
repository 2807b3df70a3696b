"""Ask this container's service whether it is ready: exit status 0, or 1 and what is missing."""

from __future__ import annotations

import http.client
import os
import sys


def port(environment: dict[str, str]) -> int:
    """Where the service's API listens."""
    told = environment.get("CAUSEMESH_API_PORT")
    if told:
        return int(told)
    # Only then, because it takes a good part of a second.
    from causemesh.settings import API_PORTS  # noqa: PLC0415

    return API_PORTS[environment["SERVICE"]]


def main() -> None:
    """Ask once."""
    asked = http.client.HTTPConnection("127.0.0.1", port(dict(os.environ)), timeout=4)
    try:
        asked.request("GET", "/ready")
        answer = asked.getresponse()
        body = answer.read().decode()
    except OSError as error:
        sys.exit(f"not answering: {error}")
    if answer.status != 200:
        sys.exit(body)


if __name__ == "__main__":
    main()
