"""A model in the repository is whole, written once, and replaced when it differs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from causemesh.errors import Misdeclared
from causemesh.triton_models import write_model


def _files(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_ino
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_writing_the_same_again_touches_nothing(tmp_path: Path) -> None:
    write_model(tmp_path, "late", b"graph", inputs=15)
    before = _files(tmp_path / "late")
    write_model(tmp_path, "late", b"graph", inputs=15)
    assert _files(tmp_path / "late") == before
    assert set(before) == {"config.pbtxt", "1/model.py", "1/model.onnx"}
    assert "dims: [ 15 ]" in (tmp_path / "late" / "config.pbtxt").read_text()


@pytest.mark.parametrize(("onnx", "inputs"), [(b"other", 15), (b"graph", 16)])
def test_a_model_that_differs_is_replaced(tmp_path: Path, onnx: bytes, inputs: int) -> None:
    write_model(tmp_path, "late", b"graph", inputs=15)
    before = _files(tmp_path / "late")
    write_model(tmp_path, "late", onnx, inputs)
    assert (tmp_path / "late" / "1" / "model.onnx").read_bytes() == onnx
    assert f"dims: [ {inputs} ]" in (tmp_path / "late" / "config.pbtxt").read_text()
    assert set(_files(tmp_path / "late")) == set(before)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["late"]


def test_what_a_crash_left_is_not_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / ".late.partial" / "1").mkdir(parents=True)
    (tmp_path / ".late.partial" / "1" / "stray").touch()
    (tmp_path / "late").mkdir()
    write_model(tmp_path, "late", b"graph", inputs=1)
    assert set(_files(tmp_path / "late")) == {"config.pbtxt", "1/model.py", "1/model.onnx"}


def test_writers_of_one_model_take_turns(tmp_path: Path) -> None:
    graphs = [b"a" * 100_000, b"b" * 100_000]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_model(tmp_path, "late", graphs[n % 2], 1), range(64)))
    assert (tmp_path / "late" / "1" / "model.onnx").read_bytes() in graphs


@pytest.mark.parametrize("name", ["../late", "", ".late", "a/b", 'a"', "a\n"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Misdeclared, match="cannot name a model"):
        write_model(tmp_path / "models", name, b"graph", inputs=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("inputs", "max_batch"), [(0, 1), (1, 0)])
def test_a_model_of_nothing_is_refused(tmp_path: Path, inputs: int, max_batch: int) -> None:
    with pytest.raises(Misdeclared, match="at least one"):
        write_model(tmp_path, "late", b"graph", inputs, max_batch)
