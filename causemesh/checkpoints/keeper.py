"""Keeps one partition's state: whole in the positions row, or in files that the row names."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import structlog

from causemesh.checkpoints.base import Encode, Pieced, Snapshots, missing_of
from causemesh.checkpoints.files import CheckpointFiles
from causemesh.checkpoints.manifest import Manifest, is_manifest
from causemesh.checkpoints.planning import chosen_pieces, earned, present, resumed
from causemesh.checkpoints.storing import PartitionFiles
from causemesh.errors import Fatal, Misdeclared, Retryable

_REST = 25
"""A checkpoint in files may take one part in so many of the process's time on a processor ..."""
_REST_S = 30.0
"""... but the next one does not wait longer than this, in seconds."""
_ATTEMPTS = 5
_SWEEP_S = 10.0
"""A replaced worker may still write: files are swept again so long after the claim, seconds, ..."""
_SWEEP_LONGEST_S = 3600.0
"""... then after twice as long each time, up to this."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class CheckpointSettings:
    """Where large states go.

    A state of up to `inline_bytes` lies in the positions row, and so do deltas that are no more
    than that together. `check_hashes` is off only in a control arm of the tests.
    """

    files: CheckpointFiles
    inline_bytes: int
    check_hashes: bool = True


@dataclass(frozen=True)
class _Written:
    state: bytes | None
    manifest: Manifest | None = None
    delta_bytes: int = 0
    took_s: float = 0.0


class Save:
    """A state that was taken; its files may still be on their way."""

    def __init__(self, work: asyncio.Task[_Written] | _Written) -> None:
        self.work = work

    def done(self) -> bool:
        """Whether `written` answers at once."""
        return isinstance(self.work, _Written) or self.work.done()

    async def written(self) -> bytes | None:
        """What to store in the row. Raises Retryable when the files can't be written."""
        if not isinstance(self.work, _Written):
            self.work = await self.work
        return self.work.state


class StateKeeper:
    """Between a worker and its processor's state. One save at a time, all calls from one task.

    Raises Misdeclared when files are set for a processor that is not `Pieced`: all its state would
    go to the row, however large.
    """

    def __init__(
        self,
        processor: Snapshots,
        settings: CheckpointSettings | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        missing = missing_of(processor)
        if settings is not None and missing:
            raise Misdeclared(
                f"checkpoints in files are set, but {type(processor).__name__} has no"
                f" {', '.join(missing)}: see causemesh.checkpoints.Pieced"
            )
        self._processor = processor
        self._pieced = processor if isinstance(processor, Pieced) else None
        self._settings = settings
        self._monotonic = monotonic
        self._place: PartitionFiles | None = None
        self._committed: Manifest | None = None
        self._save: Save | None = None
        self._credit = 0
        self._took_s = 0.0  # the last checkpoint in files, on a processor
        self._committed_at = (0.0, 0.0)  # by the clock, and on a processor
        self._garbage: set[str] = set()
        self._removing: asyncio.Task[None] | None = None
        self._sweep_again = (0.0, _SWEEP_S)  # when, and how long that was in coming

    @property
    def rests(self) -> bool:
        """Whether it is too early for another save, so costly was the last one."""
        used_s = time.process_time() - self._committed_at[1]
        waited_s = self._monotonic() - self._committed_at[0]
        return used_s < self._took_s * (_REST - 1) and waited_s < _REST_S

    async def restore(self, state: bytes | None, group: str, partition: int, epoch: int) -> None:
        """Bring the processor to a stored state. Raises Fatal when a file is not as it was."""
        if self._settings is not None:
            self._place = PartitionFiles(
                self._settings.files,
                f"{group}/{partition:05}",
                epoch,
                self._settings.inline_bytes,
                self._settings.check_hashes,
            )
        if state is None or not is_manifest(state):
            self._processor.restore(state)
        else:
            await self._read(Manifest.parse(state))
        if self._place is not None:
            self._removing = asyncio.create_task(self._sweep(self._place, self._committed))
            self._sweep_again = (self._monotonic() + _SWEEP_S, _SWEEP_S)

    async def save(self) -> Save:
        """Take the state as it is now; it may change when this returns."""
        place, last = self._place, self._committed
        if last is not None:
            assert self._pieced is not None
            assert place is not None
            if self._pieced.replaced():
                self._save = Save(await self._first(place, last.sequence + 1))
            else:
                self._save = Save(self._next(last))
            return self._save
        state = self._processor.snapshot()
        if place is not None and state is not None and len(state) > place.inline_bytes:
            self._save = Save(await self._first(place, 1))
        else:
            self._save = Save(_Written(state))
        return self._save

    def committed(self) -> None:
        """The last save is committed: what only its predecessor named is garbage."""
        assert self._save is not None
        written, self._save = self._save.work, None
        assert isinstance(written, _Written)
        if self._pieced is not None:
            self._pieced.committed()
        if written.manifest is None:
            return
        before, self._committed = self._committed, written.manifest
        if before is not None:
            self._garbage |= before.files - written.manifest.files
        self._credit += earned(written.manifest, written.delta_bytes)
        self._took_s = written.took_s
        self._committed_at = (self._monotonic(), time.process_time())
        self._clear()

    async def close(self) -> None:
        """Wait for threads that are under way, whatever comes of them."""
        save = None if self._save is None else self._save.work
        tasks = [task for task in (save, self._removing) if isinstance(task, asyncio.Task)]
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, manifest: Manifest) -> None:
        if self._place is None or self._pieced is None:
            raise Fatal(
                f"the state lies in files, written by {manifest.host} under {manifest.root}:"
                " set CAUSEMESH_CHECKPOINTS"
            )
        began_s = self._monotonic()
        self._processor.restore(None)
        bodies = self._place.bodies(manifest)
        body = await asyncio.to_thread(_next_of, bodies)
        while body is not None:
            coming = asyncio.create_task(asyncio.to_thread(_next_of, bodies))
            await asyncio.sleep(0)  # the next one is read while this one is applied
            try:
                self._pieced.apply(body)
            finally:
                body = await coming
        self._pieced.applied()
        self._pieced.track()
        self._committed = resumed(manifest, self._pieced.pieces())
        mib = (manifest.piece_bytes + manifest.delta_bytes) / 2**20
        _log.info(
            "state_read",
            files=len(manifest.files),
            mib=round(mib, 1),
            seconds=round(self._monotonic() - began_s, 2),
        )

    async def _first(self, place: PartitionFiles, sequence: int) -> _Written:
        """Write all pieces, one by one, while the state stands still."""
        assert self._pieced is not None
        manifest = place.first(sequence)
        for number, name in enumerate(self._pieced.pieces()):
            encode = self._pieced.piece(name)
            manifest = await asyncio.to_thread(_piece, place, manifest, name, number, encode)
        self._pieced.track()
        return _Written(manifest.dump(), manifest)

    def _next(self, last: Manifest) -> asyncio.Task[_Written]:
        """Take a delta, and some pieces; writes them in a thread."""
        assert self._pieced is not None
        assert self._place is not None
        began_s = time.thread_time()
        names = self._pieced.pieces()
        pieces = present(last, names)
        chosen, self._credit = chosen_pieces(pieces, names, self._credit)
        delta = self._pieced.delta()
        anew = {name: self._pieced.piece(name) for name in chosen}
        taken_s = time.thread_time() - began_s
        last = replace(last, pieces=pieces)
        write = functools.partial(_follow, self._place, last, delta, anew, taken_s)
        return asyncio.create_task(_patiently(write))

    def _clear(self) -> None:
        """Begin to remove what is garbage, unless that is under way."""
        assert self._place is not None
        if self._removing is not None and not self._removing.done():
            return
        when, after_s = self._sweep_again
        if self._monotonic() >= when:
            after_s = min(2 * after_s, _SWEEP_LONGEST_S)
            self._sweep_again = (self._monotonic() + after_s, after_s)
            self._removing = asyncio.create_task(self._sweep(self._place, self._committed))
        elif self._garbage:
            self._removing = asyncio.create_task(self._remove(self._place))

    async def _sweep(self, place: PartitionFiles, manifest: Manifest | None) -> None:
        try:
            count = await asyncio.to_thread(place.sweep, manifest)
        except Retryable as error:  # the next claim sweeps
            _log.warning("checkpoint_sweep_failed", reason=str(error))
        else:
            if count:
                _log.info("checkpoint_files_swept", count=count)

    async def _remove(self, place: PartitionFiles) -> None:
        names = set(self._garbage)
        try:
            await asyncio.to_thread(place.remove, names)
        except Retryable as error:  # the next commit tries again
            _log.warning("checkpoint_files_stay", reason=str(error))
        else:
            self._garbage -= names


async def _patiently(write: Callable[[], _Written]) -> _Written:
    """In a thread, and again when the storage was away: to start over costs more."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return await asyncio.to_thread(write)
        except Retryable as error:
            _log.warning("checkpoint_waits", reason=str(error))
            await asyncio.sleep(error.retry_after)
    return await asyncio.to_thread(write)


def _follow(
    place: PartitionFiles,
    last: Manifest,
    delta: Encode,
    pieces: Mapping[str, Encode],
    taken_s: float,
) -> _Written:
    """In a thread: write what follows on `last`."""
    began_s = time.thread_time()
    body = delta()
    manifest = place.advanced(last, body, pieces)
    took_s = taken_s + time.thread_time() - began_s
    return _Written(manifest.dump(), manifest, len(body), took_s)


def _piece(
    place: PartitionFiles, manifest: Manifest, name: str, number: int, encode: Encode
) -> Manifest:
    return place.with_piece(manifest, name, number, encode())


def _next_of(bodies: Iterator[bytes]) -> bytes | None:
    return next(bodies, None)
