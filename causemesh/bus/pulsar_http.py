"""What the clients of Pulsar's admin API share."""

from __future__ import annotations

import ssl
from functools import cache

import httpx


@cache
def tls() -> ssl.SSLContext:
    """httpx's own context, made once a process: each one reads all authorities, 25 ms of CPU."""
    return httpx.create_ssl_context()
