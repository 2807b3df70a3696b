"""Where files lie: a folder, and object storage; what is whole is seen, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from causemesh.checkpoints import CheckpointFiles, LocalFiles, objects, open_files
from causemesh.errors import Misdeclared, Retryable

REGION = "eu-central-1"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URI of a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name=REGION,
        aws_access_key_id="test",
        aws_secret_access_key="test",
    ).create_bucket(Bucket="checkpoints", CreateBucketConfiguration={"LocationConstraint": REGION})
    yield (
        "s3://test:test@checkpoints/state"
        f"?region={REGION}&scheme=http&endpoint_override={host}:{port}"
    )
    server.stop()


@pytest.fixture(params=["folder", "object storage"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointFiles:
    if request.param == "folder":
        return open_files(f"{(tmp_path / 'a folder').as_uri()}")
    return open_files(request.getfixturevalue("bucket"))


def test_files_are_written_read_listed_and_removed(files: CheckpointFiles) -> None:
    assert list(files.list("g/0")) == []
    files.write("g/0/1-a", b"content")
    files.write("g/0/2-b", b"")
    assert files.read("g/0/1-a") == b"content"
    assert files.read("g/0/2-b") == b""
    assert sorted(files.list("g/0")) == ["g/0/1-a", "g/0/2-b"]
    files.delete("g/0/1-a")
    files.delete("g/0/1-a")
    files.delete("g/0/2-b")
    with pytest.raises(FileNotFoundError):
        files.read("g/0/1-a")


def test_a_folder_s_file_is_durable_before_it_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = LocalFiles(tmp_path)
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(os.listdir(tmp_path)))
    files.write("a", b"content")
    assert seen == [["a.part"], ["a"]], "the content, then the name"
    files.write("g/0/b", b"content")
    assert len(seen) == 2 + 4, "two folders, the content, the name"


def test_storage_that_does_not_answer_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    files = LocalFiles(tmp_path / "taken")
    with pytest.raises(Retryable, match="the storage of checkpoints, file:///"):
        files.write("g/0/a", b"")
    gone = open_files(
        f"s3://test:test@checkpoints/x?region={REGION}&scheme=http&endpoint_override=127.0.0.1:9"
    )
    with pytest.raises(Retryable, match="the storage of checkpoints, s3://"):
        gone.write("g/0/a", b"content")


def test_the_place_is_a_folder_or_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_files("kept/here").root == (tmp_path / "kept" / "here").as_uri()
    for wrong in ("file://host/folder", "ftp://host/folder"):
        with pytest.raises(Misdeclared):
            open_files(wrong)
    monkeypatch.setattr(objects, "find_spec", lambda _: None)
    with pytest.raises(Misdeclared, match=r"causemesh\[lake\].* EXTRA=objects") as refused:
        open_files("s3://key:secret@bucket/folder")
    assert str(refused.value).startswith("s3://bucket/folder needs pyarrow")
    assert open_files((tmp_path / "x").as_uri()).root == (tmp_path / "x").as_uri()
