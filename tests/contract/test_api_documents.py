"""The published AsyncAPI and OpenAPI documents say what the code says, and are valid."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastavro
import pytest
import yaml

from causemesh.admin import create_app
from causemesh.asyncapi import document, render
from causemesh.catalogue import SERVICES, Catalogue
from causemesh.local import artefacts
from causemesh.service import Service
from deploy import openapi_docs
from tests.contract.test_service_topics import Touched, opener

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "examples" / "flights"
PARSER = "3.6.3"
_INSTALL_S = 240
_ERROR = 0
# AsyncAPI's own parser, which checks the form of Avro schemas too; prints each document's errors.
_VALIDATE = f"""
const {{ Parser }} = require('@asyncapi/parser');
const documents = JSON.parse(require('fs').readFileSync(0, 'utf8'));
(async () => {{
  const errors = {{}};
  for (const [name, text] of Object.entries(documents)) {{
    const found = await new Parser().validate(text);
    errors[name] = found.filter(one => one.severity === {_ERROR})
      .map(one => one.path.join('/') + ': ' + one.message);
  }}
  process.stdout.write(JSON.stringify(errors));
}})();
"""
Validate = Callable[[dict[str, str]], dict[str, list[str]]]


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.load()


@pytest.fixture(scope="session")
def validate() -> Validate:
    """AsyncAPI's validator. Skipped only without npm and Node."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip(f"npm and Node are not installed, so AsyncAPI's parser {PARSER} cannot run")
    home = _installed(npm)

    def errors_of(documents: dict[str, str]) -> dict[str, list[str]]:
        done = subprocess.run(
            [node, "--input-type=commonjs", "-e", _VALIDATE],
            cwd=home,
            input=json.dumps(documents),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"the validator failed:\n{done.stderr}"
        errors: dict[str, list[str]] = json.loads(done.stdout)
        return errors

    return errors_of


def _installed(npm: str) -> Path:
    """The folder with the parser, installed once into the cache."""
    home = artefacts.cache() / f"asyncapi-parser-{PARSER}"
    if home.exists():
        return home
    partial = home.with_name(f"{home.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    argv = [npm, "install", "--prefix", str(partial), "--ignore-scripts", "--no-audit", "--no-fund"]
    argv += [f"@asyncapi/parser@{PARSER}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_INSTALL_S)
    assert done.returncode == 0, f"AsyncAPI's parser was not installed:\n{done.stderr}"
    try:
        partial.rename(home)  # whole or not there, should two install at once
    except OSError:
        shutil.rmtree(partial)
    return home


def test_the_asyncapi_document_is_current(catalogue: Catalogue) -> None:
    assert (ROOT / "docs" / "asyncapi.yaml").read_text() == render(catalogue), "run `make docs`"


def test_a_changed_topic_changes_the_asyncapi_document(catalogue: Catalogue) -> None:
    topic = catalogue.topic("ingest.rejects.v1")
    changes: tuple[dict[str, Any], ...] = (
        {"partitions": 5},
        {"retention_days": 1},
        {"form": "state"},
        {"consumers": ("people", "drift")},
        {"about": "Changed."},
        {"compatibility": "BACKWARD"},
        {"record": {**topic.record, "fields": topic.record["fields"][:-1]}},
    )
    for change in changes:
        topics = {**catalogue.topics, topic.name: replace(topic, **change)}
        assert render(replace(catalogue, topics=topics)) != render(catalogue), change


def test_every_record_can_be_read_back_from_the_asyncapi_document(catalogue: Catalogue) -> None:
    read = yaml.safe_load((ROOT / "docs" / "asyncapi.yaml").read_text())
    assert list(read["channels"]) == list(catalogue.topics)
    for name, topic in catalogue.topics.items():
        channel = read["channels"][name]
        assert channel["messages"][topic.record["name"]]["payload"]["schema"] == topic.record
        fastavro.parse_schema(deepcopy(topic.record))
        assert channel["bindings"]["kafka"]["partitions"] == topic.partitions
        operations = read["operations"].items()
        ours = {key for key, one in operations if one["channel"]["$ref"] == f"#/channels/{name}"}
        sends = {f"{party}.send.{name}" for party in topic.producers}
        assert ours == sends | {f"{party}.receive.{name}" for party in topic.consumers}


def test_asyncapi_finds_no_error(validate: Validate) -> None:
    with_project = render(Catalogue.load([PROJECT]))
    assert "inbox.flight" in with_project
    committed = (ROOT / "docs" / "asyncapi.yaml").read_text()
    errors = validate({"committed": committed, "with a project": with_project})
    assert errors == {"committed": [], "with a project": []}


def test_asyncapi_finds_what_is_wrong(validate: Validate, catalogue: Catalogue) -> None:
    name = "ingest.rejects.v1"
    whole = document(replace(catalogue, topics={name: catalogue.topic(name)}))
    broken = {part: deepcopy(whole) for part in ("action", "channel", "avro", "partitions")}
    operation = f"ingest.send.{name}"
    broken["action"]["operations"][operation]["action"] = "sends"
    broken["channel"]["operations"][operation]["channel"]["$ref"] = "#/channels/nowhere"
    rejects = broken["avro"]["channels"][name]["messages"]["EventRejected"]
    rejects["payload"]["schema"]["fields"][0]["type"] = {"type": "array"}
    kafka = broken["partitions"]["channels"][name]["bindings"]["kafka"]
    kafka["partitions"] = 0
    given = {"whole": whole, **broken}
    errors = validate({part: json.dumps(one) for part, one in given.items()})
    assert {part for part, found in errors.items() if found} == set(broken)


@pytest.mark.parametrize("service", SERVICES)
async def test_the_openapi_document_is_what_the_service_serves(
    service: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The composition root itself says which routes are served; the generator only read `api`."""
    served: list[str] = []

    async def serve(self: Service, routers: Any = (), tasks: Any = ()) -> None:
        registry = self.metrics.registry
        app = create_app(self.name, self.settings.token(), registry, self._missing, routers)
        served.append(openapi_docs.render(app))

    async def nothing(*_: Any) -> None:
        """There is no database."""

    monkeypatch.setenv("CAUSEMESH_PROJECT", str(PROJECT))
    monkeypatch.setenv("CAUSEMESH_API_TOKEN", "a-token-for-the-roots")
    monkeypatch.setenv("CAUSEMESH_TRITON_MODELS", str(tmp_path))
    monkeypatch.setenv("CAUSEMESH_STRIPE_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(Service, "serve", serve)
    root = importlib.import_module(f"services.{service}.app")
    monkeypatch.setattr(root, "open_service", opener(Touched(), Catalogue.load([PROJECT])))
    monkeypatch.setattr(root, "announce_changes", nothing, raising=False)
    await root.main()
    committed = (ROOT / "docs" / "openapi" / f"{service}.json").read_text()
    assert served == [committed], "run `make docs`"


def test_openapi_documents_are_current(tmp_path: Path) -> None:
    openapi_docs.main(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "docs" / "openapi").iterdir()}
    assert kept == made, "run `make docs`"


def test_a_changed_route_changes_the_openapi_document() -> None:
    app = openapi_docs.application("features")
    before = openapi_docs.render(app)

    @app.get("/v1/added")
    async def added() -> None: ...

    app.openapi_schema = None  # FastAPI keeps what it made
    assert openapi_docs.render(app) != before
