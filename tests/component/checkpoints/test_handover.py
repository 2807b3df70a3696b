"""Two features processes on shared checkpoint files: partitions move, states go on exactly.

One joins, one is ended by kill -9, and one stops between its files and their commit until another
has its partition. The vectors are those of a recomputation from the events' log.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import pytest
from moto.server import ThreadedMotoServer

from causemesh.checkpoints import CheckpointFiles, open_files
from causemesh.checkpoints.manifest import Manifest
from causemesh.local.ports import choose_ports
from causemesh.local.process import ServerProcess
from tests.chaos.feature_mesh import PARTITIONS, FeatureMesh, Recomputed, opened, until
from tests.chaos.feature_replay import SETTINGS, Replay, last_vectors, rows_committed, settled

pytestmark = [pytest.mark.servers, pytest.mark.timeout(420)]
HOME = Path(".causemesh-test-handover")
ROOT = Path(__file__).parents[3]
ARMS = Path(__file__).parent / "arms"
GROUP = "features"
BOTH = set(range(PARTITIONS))


class Member:
    """A features process of the test's own."""

    def __init__(self, mesh: FeatureMesh, name: str, *, fenced: bool = True) -> None:
        self.flag = mesh.home / f"{name}.pause"
        (self._port,) = choose_ports(mesh.home / f"{name}.port.json", {name: 0}).values()
        self._headers = {"Authorization": f"Bearer {mesh.mesh.token}"}
        environment = {
            **mesh.mesh.environment(),
            "CAUSEMESH_API_PORT": str(self._port),
            "POLARS_MAX_THREADS": "1",
            "PYTHONPATH": os.pathsep.join((str(ARMS), str(ROOT))),
            "CAUSEMESH_TEST_PAUSE": str(self.flag.resolve()),
            "CAUSEMESH_TEST_FENCE": "on" if fenced else "off",
        }
        self.process = ServerProcess(name, mesh.home, environment)
        self.process.start([sys.executable, "-m", "services.features.app"])

    async def owned(self) -> set[int]:
        """The partitions that it has workers for; none while it does not answer."""
        try:
            async with httpx.AsyncClient(headers=self._headers, verify=False, timeout=5) as client:
                answer = await client.get(f"http://127.0.0.1:{self._port}/v1/models")
        except httpx.TransportError:
            return set()
        return {int(number) for number in answer.raise_for_status().json()}

    def signal(self, number: signal.Signals) -> None:
        process = self.process.running()
        assert process is not None
        process.send_signal(number)

    async def stopped(self) -> bool:
        process = self.process.running()
        assert process is not None
        return process.status() == psutil.STATUS_STOPPED

    def end(self) -> None:
        """Whatever it is doing."""
        process = self.process.running()
        if process is not None:
            process.kill()
            process.wait(10)


@dataclass
class Handover:
    """What the test sees of all members: rows in Postgres, and files."""

    mesh: FeatureMesh
    files: CheckpointFiles

    async def lying(self) -> set[str]:
        """The files that are there."""
        folders = [f"{GROUP}/{number:05}" for number in BOTH]
        found = await asyncio.gather(
            *(asyncio.to_thread(self.files.list, folder) for folder in folders)
        )
        return {name for names in found for name in names}

    async def named(self) -> set[str]:
        """The files that count."""
        return {name for one in await self.mesh.manifests() for name in one.files}

    async def unnamed(self, partition: int) -> set[str]:
        """The files of a stopped member's partition that don't count, newer ones among them."""
        mine = f"{GROUP}/{partition:05}/"
        named = await self.named()
        found = {name for name in await self.lying() - named if name.startswith(mine)}
        newest = max(name for name in named if name.startswith(mine))
        assert max(found, default="") > newest, "it stopped before it wrote"
        return found

    async def clean(self, replay: Replay) -> None:
        """Every file is named, and every named file is there.

        Owners sweep when they commit, so they get events meanwhile: what a worker wrote when it was
        just replaced is swept ten seconds later at the most.
        """

        async def equal() -> bool:
            if await self.lying() == await self.named():
                return True
            await replay.span()
            await settled(self.mesh, replay.until_us)
            return False

        await until(equal, 30)

    async def share(self, one: Member, other: Member) -> None:
        """Until each has a partition and has committed under its claim."""

        async def shared() -> bool:
            mine, theirs = await one.owned(), await other.owned()
            return len(mine) == len(theirs) == 1 and mine | theirs == BOTH

        await until(shared, 90)
        await self.committed()

    async def takes_all(self, member: Member) -> None:
        """Until one has all partitions and has committed under its claims."""

        async def all_taken() -> bool:
            return await member.owned() == BOTH

        await until(all_taken, 90)
        await self.committed()

    async def committed(self) -> None:
        """Until every partition was committed from now on."""
        at = {row.partition: row.committed_at for row in await self.mesh.rows()}

        async def again() -> bool:
            rows = await self.mesh.rows()
            return all(row.committed_at > at[row.partition] for row in rows)

        await until(again, 90)

    async def epochs(self) -> dict[int, int]:
        """The claims by partition."""
        return {row.partition: row.epoch for row in await self.mesh.rows()}


@asynccontextmanager
async def moved(
    files: str, *, fenced: bool, stack: list[Member]
) -> AsyncIterator[tuple[Handover, Replay, Member]]:
    """Partitions moved when a second member joined and when the first was killed; then a third one
    stopped with its files written and not committed, and the second took over and did all.

    Yields with the third still stopped.
    """
    rng = random.Random(20261126)
    async with opened(HOME, services=("ingest",), **SETTINGS, CAUSEMESH_CHECKPOINTS=files) as mesh:
        both, replay = Handover(mesh, open_files(files)), Replay(mesh, rng, 0.5)
        try:
            stack.append(first := Member(mesh, "features-first"))
            await until(first.owned, 90)  # it has made its tables
            await replay.span()
            await until(lambda: rows_committed(mesh), 90)
            sending = asyncio.create_task(replay.run())
            await both.takes_all(first)
            before = await both.epochs()

            stack.append(second := Member(mesh, "features-second"))
            await both.share(first, second)
            after = await both.epochs()
            (given,) = await second.owned()
            assert after[given] > before[given]

            (kept,) = await first.owned()
            first.signal(signal.SIGKILL)
            await both.takes_all(second)
            assert (await both.epochs())[kept] > after[kept]

            stack.append(third := Member(mesh, "features-third", fenced=fenced))
            await both.share(second, third)
            (its,) = await third.owned()
            third.flag.touch()
            await until(third.stopped)
            late = await both.unnamed(its)
            await both.takes_all(second)
            replay.stop()
            await sending
            await replay.span()
            await settled(mesh, replay.until_us)
            await both.clean(replay)
            assert not late & await both.lying(), "what was not committed is swept"
            yield both, replay, third
        finally:
            for member in stack:
                member.end()


@pytest.fixture
def bucket() -> Iterator[str]:
    """The URI of a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys
    ).create_bucket(Bucket="checkpoints")
    yield (
        "s3://test:test@checkpoints/state"
        f"?region=us-east-1&scheme=http&endpoint_override={host}:{port}"
    )
    server.stop()


@pytest.mark.parametrize("storage", ["folder", "object storage"])
async def test_states_go_on_exactly_and_a_late_write_changes_nothing(
    storage: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    uri = tmp_path.as_uri() if storage == "folder" else request.getfixturevalue("bucket")
    async with moved(uri, fenced=True, stack=[]) as (both, replay, third):
        third.signal(signal.SIGCONT)

        async def fenced() -> bool:
            rows = await both.mesh.rows()
            assert all(row.watermark_us >= replay.until_us for row in rows), "it went back"
            return f"{GROUP}[" in _fenced(third)

        await until(fenced)
        await replay.span()
        await settled(both.mesh, replay.until_us)
        recomputed = Recomputed(await both.mesh.log("events.reading"))
        vectors = await last_vectors(both.mesh, replay.until_us)
        differ = [
            (view, entity, sequence)
            for view, entity, sequence, vector in vectors
            if recomputed.vector(view, entity, sequence) != vector
        ]
        print(f"\n  {replay.sent} events, {len(vectors)} vectors, epochs {await both.epochs()}")
        assert differ == []
        assert {(view, entity) for view, entity, _, _ in vectors} == recomputed.entities
        await both.clean(replay)


def _fenced(member: Member) -> str:
    """What its log says of workers that were replaced."""
    lines = member.process.log.read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if "worker_fenced" in line)


async def test_control_without_the_fence_the_late_write_names_files_that_are_gone(
    tmp_path: Path,
) -> None:
    async with moved(tmp_path.as_uri(), fenced=False, stack=[]) as (both, replay, third):
        third.signal(signal.SIGCONT)

        async def gone_back() -> Any:
            return [row for row in await both.mesh.rows() if row.watermark_us < replay.until_us]

        (row,) = await until(gone_back)
        assert Manifest.parse(row.state).files - await both.lying()
        assert f"{GROUP}[{row.partition}]" not in _fenced(third)
