"""The composition root of the lake's writer: `python -m services.features.lake.app`."""

from __future__ import annotations

import os

from causemesh.catalogue import LAKE
from causemesh.lake import require_libraries
from causemesh.service import open_service, run_process
from services.features.lake.settings import LakeWriterSettings

_NICE = 10  # nobody waits for the lake: on a busy machine the services come first


async def main() -> None:
    """Wire and serve."""
    require_libraries()
    from services.features.lake.wiring import serve  # noqa: PLC0415 - needs the extra

    settings = LakeWriterSettings()
    async with open_service(LAKE, settings, migrated=False) as service:
        await serve(service, settings)


if __name__ == "__main__":
    os.nice(_NICE)
    run_process(main)
