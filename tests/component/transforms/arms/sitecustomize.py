"""Loaded by every Python process whose PYTHONPATH names this folder: a transforms process in which
one protection is off. The control arms; nothing else may load it."""

import os
import sys

if "services.features.transforms.app" in sys.orig_argv:
    from services.features.transforms import stream
    from services.features.transforms.rows import Row
    from services.features.transforms.worker import TransformWorker

    async def _as_given(_: object, worker: object, number: int, messages: list) -> list:  # type: ignore[type-arg]
        return messages

    async def _ours(*_: object) -> bool:
        return True

    class _Soon(stream.TransformApp):
        """Its own offsets run ahead of the tables sooner."""

        def __init__(self, *given: object, **settings: object) -> None:
            super().__init__(*given, broker_commit_interval=0.1, **settings)

    if os.environ["CAUSEMESH_TEST_ARM"] == "marks":
        Row.seen = lambda self, source, mark: False  # type: ignore[method-assign]
    if os.environ["CAUSEMESH_TEST_ARM"] == "fence":
        TransformWorker._still_ours = _ours  # type: ignore[method-assign]
    if os.environ["CAUSEMESH_TEST_ARM"] == "positions":
        stream.TransformApp = _Soon  # type: ignore[misc]
        del stream._Consumer.perform_seek
        del stream._Consumer._commit
        stream.Stream._following = _as_given  # type: ignore[method-assign]
