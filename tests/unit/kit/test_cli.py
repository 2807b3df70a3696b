"""The command: help everywhere, one-line errors, and output that other programs can read."""

from __future__ import annotations

import io
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from causemesh import cli
from causemesh.catalogue import SERVICES
from causemesh.cli.app import app
from causemesh.cli.context import apis_at
from causemesh.cli.following import read_rows
from causemesh.cli.output import Output, cell, readable
from causemesh.cli.tracing import Step, Traced, show
from causemesh.errors import Misdeclared

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]
ROWS = [
    {"topic": "inbox.t", "written": 1_234_567, "share": 0.5, "owner": None},
    {"topic": "events.t", "written": 0, "share": 12.0, "owner": "ingest"},
]


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[Any, str, str]:
    """The console script in this process: what it exits with, its output and its errors."""
    monkeypatch.setattr(sys, "argv", ["causemesh", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_the_commands_are_those_of_the_guides() -> None:
    started = ["demo", "down", "status", "up"]
    looked_into = ["lag", "produce", "replay-rejects", "tail", "topics", "trace"]
    assert sorted(started + looked_into) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"])
    assert shown.exit_code == 0
    about = get_command(app).commands[name].help  # type: ignore[attr-defined]
    assert about
    assert about.split(".")[0].split("\n")[0][:40] in " ".join(shown.output.split())
    assert "--home" in shown.output


@pytest.mark.parametrize(
    "words",
    [("lag",), ("trace", "an-id"), ("replay-rejects",), ("up", "--project", "no-project")],
)
def test_an_unknown_home_is_one_line_and_status_1(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = tmp_path / "nowhere"
    code, out, _ = run(monkeypatch, capsys, *words, "--home", str(home))
    # The interpreter prints such a message on standard error and ends with status 1.
    assert isinstance(code, str)
    assert code.startswith("causemesh: ")
    assert ("no mesh runs from" in code) or ("is no project" in code)
    assert "\n" not in code
    assert out == ""
    assert not home.exists()


def test_without_a_local_mesh_the_environment_says_where_the_services_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAUSEMESH_API_TOKEN", "a-token-of-elsewhere")
    apis = apis_at(tmp_path / "nowhere")
    assert apis.services == SERVICES
    with apis.client("billing") as api:
        assert api.base_url == "http://127.0.0.1:8105"
        assert api.headers["authorization"] == "Bearer a-token-of-elsewhere"
    monkeypatch.setenv("CAUSEMESH_SERVICE_URL", "https://{service}.mesh.example/api")
    with apis_at(tmp_path / "nowhere").client("drift") as api:
        assert api.base_url == "https://drift.mesh.example/api/"
    assert not (tmp_path / "nowhere").exists()


def test_a_mesh_that_was_stopped_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = {"project": str(tmp_path), "services": ["ingest"], "extra": {}}
    (tmp_path / "mesh.json").write_text(json.dumps(plan))
    (tmp_path / "service-ports.json").write_text(json.dumps({"ingest": 1}))
    for words in (("lag",), ("replay-rejects", "--dry-run")):
        code, _, _ = run(monkeypatch, capsys, *words, "--home", str(tmp_path))
        assert isinstance(code, str)
        assert code.startswith("causemesh: a service does not answer")
        assert "causemesh status" in code


def test_a_wrong_option_is_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, capsys, "status", "--jsonn")[0] == 2


def test_a_home_where_nothing_runs_has_an_empty_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = ("--home", str(tmp_path))
    assert run(monkeypatch, capsys, "status", *home)[:2] == (0, "Local mesh: none\n")
    assert run(monkeypatch, capsys, "status", "--json", *home)[:2] == (0, "[]\n")
    monkeypatch.setenv("CAUSEMESH_HOME", str(tmp_path))
    assert run(monkeypatch, capsys, "status")[:2] == (0, "Local mesh: none\n")


def test_in_a_pipe_a_table_is_tab_separated(capsys: pytest.CaptureFixture[str]) -> None:
    Output().rows("Topics", ROWS)
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()] == [
        ["topic", "written", "share", "owner"],
        ["inbox.t", "1,234,567", "0.500", "-"],
        ["events.t", "0", "12.000", "ingest"],
    ]


def test_json_is_json_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(as_json=True)
    out.progress("kafka", "starting")
    out.line("for people")
    out.rows("Topics", ROWS)
    shown = capsys.readouterr()
    assert json.loads(shown.out) == ROWS
    assert shown.err == "kafka: starting\n"
    out.document({"at": datetime(2013, 7, 1, tzinfo=UTC), "key": b"\x01\xff"})
    read = json.loads(capsys.readouterr().out)
    assert read == {"at": "2013-07-01T00:00:00+00:00", "key": "01ff"}


def test_cells_and_values_that_json_does_not_know() -> None:
    assert [cell(value) for value in (None, 1_000, 1.5, True, "x")] == [
        "-",
        "1,000",
        "1.500",
        "True",
        "x",
    ]
    assert readable(b"\x00") == "00"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1}\n{broken\n', "line 2 is not JSON"),
        ('{"a": 1}\n\n[1]\n', "line 3 is not a JSON object"),
        ("5", "line 1 is not a JSON object"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "rows").write_text(text)
    with pytest.raises(Misdeclared, match=says):
        read_rows(tmp_path / "rows")


def test_rows_come_from_a_file_or_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows").write_text('{"a": "line\u2028separator"}\r\n\n{"a": 2}')
    assert read_rows(tmp_path / "rows") == [{"a": "line\u2028separator"}, {"a": 2}]
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"a": 3}\n'))
    assert read_rows(Path("-")) == [{"a": 3}]


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(Misdeclared, match="gone can't be read"):
        read_rows(tmp_path / "gone")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Misdeclared, match="binary can't be read"):
        read_rows(tmp_path / "binary")


def test_a_trace_is_a_tree_for_people_and_a_document_for_programs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    below = Step("because of inbox.t[0]@7", {"sensor": "a[b]", "count": 3})
    found = Traced(Step("invoice line l1", {"amount_minor": 120}, [below]), equal=True)
    show(found)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "invoice line l1  amount_minor=120"
    assert shown[1].endswith("because of inbox.t[0]@7  sensor=a[b] count=3")
    assert shown[2] == "the log gives the same line"
    assert found.document() == {
        "equal": True,
        "tree": {
            "title": "invoice line l1",
            "amount_minor": 120,
            "below": [
                {"title": "because of inbox.t[0]@7", "sensor": "a[b]", "count": 3, "below": []}
            ],
        },
    }
    show(Traced(Step("line"), equal=False))
    assert "ANOTHER LINE" in capsys.readouterr().out
