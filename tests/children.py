"""Test programs that run as processes of their own and are ended whatever happens."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any


@asynccontextmanager
async def child(
    module: str, plan: Any, log: Path, fault: str = ""
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m module PLAN` (a dataclass, as JSON), with a fault point armed; output to `log`."""
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, json.dumps(asdict(plan)),
            env={**os.environ, "CAUSEMESH_FAULT": fault, "PYTHONUNBUFFERED": "1"},
            stdout=output, stderr=output,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
