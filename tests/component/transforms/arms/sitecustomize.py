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

    async def _ahead(self: stream._Consumer) -> None:
        """As from an offset of Faust's own that was committed before the tables were stored."""
        await super(stream._Consumer, self).perform_seek()
        for tp in self.assignment():
            position = self.app.position_of(tp.topic, tp.partition)
            if position is not None:
                await self.seek(tp, position + 2)

    if os.environ["CAUSEMESH_TEST_ARM"] == "marks":
        Row.seen = lambda self, source, mark: False  # type: ignore[method-assign]
    if os.environ["CAUSEMESH_TEST_ARM"] == "fence":
        TransformWorker._still_ours = _ours  # type: ignore[method-assign]
    if os.environ["CAUSEMESH_TEST_ARM"] == "positions":
        stream._Consumer.perform_seek = _ahead  # type: ignore[method-assign]
        stream.Stream._following = _as_given  # type: ignore[method-assign]
