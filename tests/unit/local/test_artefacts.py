"""Archives are unpacked by every Python that the package is for."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from causemesh.local.artefacts import unpack


def archive(folder: Path, *names: str) -> Path:
    """A tar file with members of these names."""
    made = folder / "made.tar.gz"
    with tarfile.open(made, "w:gz") as packed:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(b"content")
            packed.addfile(member, io.BytesIO(b"content"))
    return made


@pytest.mark.parametrize("filters", [True, False])
def test_an_archive_is_unpacked_with_and_without_filters(
    filters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not filters:  # as in 3.11.2
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    unpack(archive(tmp_path, "home/lib/one.jar"), tmp_path / "kept")
    assert (tmp_path / "kept" / "home" / "lib" / "one.jar").read_bytes() == b"content"


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python can't filter")
def test_a_member_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    made = archive(tmp_path, "../stranger")
    with pytest.raises(tarfile.FilterError):
        unpack(made, tmp_path / "kept")
    assert not (tmp_path / "stranger").exists()
