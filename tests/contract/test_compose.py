"""docker-compose.yml says nothing that the product does not, and leaves nothing open.

Each rule is a function from the document to what is wrong with it, and each has a control arm: the
document with that one thing spoiled.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from causemesh.catalogue import SERVICES
from causemesh.checkpoints import open_files
from causemesh.errors import Retryable
from causemesh.settings import API_PORTS, ServiceSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
ONCE = {"provision", "databases", "cli"}
# Their images hold no shell and no client that a health check could run.
BARE = {"collector", "tempo", "loki"}
Document = dict[str, Any]


def document() -> Document:
    read: Document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return read


def settings_of(service: str) -> type[ServiceSettings]:
    module = importlib.import_module(f"services.{service}.settings")
    (found,) = [
        one
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, ServiceSettings) and one is not ServiceSettings
    ]
    return found


def every_service_is_there(compose: Document) -> Iterator[str]:
    folders = {path.parent.name for path in (ROOT / "services").glob("*/app.py")}
    assert folders == set(SERVICES)
    yield from folders - compose["services"].keys()
    for name in folders & compose["services"].keys():
        if compose["services"][name].get("build", {}).get("args") != {"SERVICE": name}:
            yield f"{name} is not built from its own folder"


def images_are_pinned(compose: Document) -> Iterator[str]:
    for name, service in compose["services"].items():
        image = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", service.get("image", ""))
        tag = image.rpartition(":")[2] if ":" in image else ""
        if not re.search(r"\d+\.\d+", tag):
            yield f"{name}: {image}"
        if "build" in service and tag != VERSION:
            yield f"{name}: {image} is not the product's version {VERSION}"


def ports_are_local(compose: Document) -> Iterator[str]:
    for name, service in compose["services"].items():
        for port in service.get("ports", []):
            if not str(port).startswith("127.0.0.1:"):
                yield f"{name}: {port}"


def health_is_asked(compose: Document) -> Iterator[str]:
    for name, service in compose["services"].items():
        check = service.get("healthcheck", {})
        if name in ONCE | BARE:
            if check != {"disable": True}:
                yield f"{name} cannot be asked"
        elif not {"test", "interval", "timeout", "retries", "start_period"} <= check.keys():
            yield name


def resources_are_limited(compose: Document) -> Iterator[str]:
    for name, service in compose["services"].items():
        limits = service.get("deploy", {}).get("resources", {}).get("limits", {})
        if not {"cpus", "memory", "pids"} <= limits.keys():
            yield name


def all_come_back_and_logs_are_rotated(compose: Document) -> Iterator[str]:
    for name, service in compose["services"].items():
        if service.get("restart") != ("no" if name in ONCE else "unless-stopped"):
            yield f"{name}: restart {service.get('restart')}"
        if not {"max-size", "max-file"} <= service.get("logging", {}).get("options", {}).keys():
            yield f"{name}: its log grows without end"


def no_secret_is_plain(compose: Document) -> Iterator[str]:
    secret = re.compile(r"PASSWORD|TOKEN|SECRET|_KEY$")
    for name, service in compose["services"].items():
        for key, value in service.get("environment", {}).items():
            if secret.search(key) and value is not None and "/run/secrets/" not in str(value):
                yield f"{name}: {key}"
            if re.search(r"://[^/@]*:[^/@]*@", str(value)):
                yield f"{name}: {key} holds a password"
    for name, source in compose["secrets"].items():
        if set(source) != {"file"}:
            yield f"secret {name}"


def settings_are_the_products(compose: Document) -> Iterator[str]:
    for name, service in compose["services"].items():
        of = settings_of(name) if name in SERVICES else ServiceSettings
        known = {f"CAUSEMESH_{field.upper()}" for field in of.model_fields}
        asked = {key for key in service.get("environment", {}) if key.startswith("CAUSEMESH_")}
        yield from (f"{name}: {key}" for key in asked - known)


def services_have_their_own_ports_and_databases(compose: Document) -> Iterator[str]:
    for name in SERVICES:
        service = compose["services"].get(name, {})
        environment = service.get("environment", {})
        port = API_PORTS[name]
        if environment.get("CAUSEMESH_API_PORT") != port:
            yield f"{name} does not listen on {port}"
        published = f"127.0.0.1:${{{name.upper()}_PORT:-{port}}}:{port}"
        if service.get("ports") != [published]:
            yield f"{name} is not published as {published}"
        url = f"postgresql+asyncpg://{name}@postgres:5432"
        if environment.get("CAUSEMESH_POSTGRES_URL") != url:
            yield f"{name} does not use {url}"
        password = {"source": f"postgres_{name}", "target": "pgpassword"}
        if service.get("secrets") != ["causemesh_api_token", password]:
            yield f"{name} has other secrets than its own"
    if set(compose["services"]["databases"]["environment"]["DATABASES"].split()) != {
        *SERVICES,
        "registry",
    }:
        yield "databases"


RULES: dict[Callable[[Document], Iterator[str]], Callable[[Document], object]] = {
    every_service_is_there: lambda all_: all_.pop("drift"),
    images_are_pinned: lambda all_: all_["kafka"].update(image="apache/kafka:latest"),
    ports_are_local: lambda all_: all_["kafka"].update(ports=["19092:19092"]),
    health_is_asked: lambda all_: all_["agents"].pop("healthcheck"),
    resources_are_limited: lambda all_: all_["triton"]["deploy"]["resources"]["limits"].pop("pids"),
    all_come_back_and_logs_are_rotated: lambda all_: all_["postgres"].pop("logging"),
    no_secret_is_plain: lambda all_: all_["postgres"]["environment"].update(POSTGRES_PASSWORD="x"),
    settings_are_the_products: lambda all_: all_["drift"]["environment"].update(CAUSEMESH_X="x"),
    services_have_their_own_ports_and_databases: lambda all_: all_["drift"].update(
        secrets=all_["billing"]["secrets"]
    ),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_file_keeps_to_it_and_a_spoiled_one_is_found(
    rule: Callable[[Document], Iterator[str]],
) -> None:
    compose = document()
    assert list(rule(compose)) == []
    spoiled = deepcopy(compose)
    RULES[rule](spoiled["services"])
    assert list(rule(spoiled)) != []


def test_a_second_plain_secret_and_another_version_are_found() -> None:
    compose = document()
    url = "postgresql+asyncpg://drift:secret@postgres:5432"
    compose["services"]["drift"]["environment"]["CAUSEMESH_POSTGRES_URL"] = url
    assert list(no_secret_is_plain(compose)) == ["drift: CAUSEMESH_POSTGRES_URL holds a password"]
    compose["services"]["drift"]["image"] = "causemesh/drift:9.9.9"
    assert len(list(images_are_pinned(compose))) == 1


def test_the_example_environment_names_every_variable_and_no_other() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    asked = set(re.findall(r"\$\{(\w+)", text))
    passed_on = {
        key
        for service in document()["services"].values()
        for key, value in service.get("environment", {}).items()
        if value is None
    }
    example = (DEPLOY / "compose" / "env.example").read_text()
    named = set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))
    assert named - {"COMPOSE_PROFILES"} == (asked | passed_on) - {"CAUSEMESH_VERSION"}
    assert re.search(r"^COMPOSE_PROFILES=\$\{CAUSEMESH_BUS\},stand-in$", example, re.MULTILINE)


def test_brokers_and_extras_are_profiles() -> None:
    profiles = {
        name: service["profiles"]
        for name, service in document()["services"].items()
        if "profiles" in service
    }
    assert profiles.pop("kafka") == ["kafka"]
    assert profiles.pop("pulsar") == ["pulsar"]
    assert profiles.pop("stripe") == ["stand-in"]
    assert profiles.pop("cli") == ["cli"]
    assert {tuple(one) for one in profiles.values()} == {("observability",)}
    assert profiles.keys() == {"prometheus", "alertmanager", "grafana", *BARE}


def test_prepare_writes_every_secret_once_and_closes_the_folder(tmp_path: Path) -> None:
    prepare = script("compose/prepare.py")
    wanted = {Path(one["file"]).name for one in document()["secrets"].values()}
    folder = tmp_path / "secrets"
    assert set(prepare.write_secrets(folder)) == wanted
    first = {path.name: path.read_text() for path in folder.iterdir()}
    assert first["registry.properties"].strip().endswith(first["postgres_registry"])
    assert len(set(first.values())) == len(first)
    assert min(map(len, first.values())) >= 32
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(prepare.write_secrets(folder)) == []
    assert {path.name: path.read_text() for path in folder.iterdir()} == first
    assert set(prepare.SERVICES) == set(SERVICES)


def test_prometheus_asks_every_service_under_the_names_that_the_rules_use() -> None:
    read = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    jobs = {one["job_name"]: one["static_configs"][0]["targets"] for one in read["scrape_configs"]}
    assert sorted(jobs["causemesh"]) == sorted(f"{name}:{API_PORTS[name]}" for name in SERVICES)
    rules = (DEPLOY / "prometheus" / "rules.yml").read_text()
    assert set(re.findall(r'job="(\w+)"', rules)) == {"causemesh", "triton"} <= jobs.keys()
    hosts = {target.split(":")[0] for targets in jobs.values() for target in targets}
    assert hosts - {"localhost"} <= document()["services"].keys()


def test_dashboards_use_the_provisioned_source() -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    sources = yaml.safe_load((folder / "datasources" / "causemesh.yaml").read_text())["datasources"]
    uids = {source["uid"] for source in sources}
    for path in (DEPLOY / "grafana" / "dashboards").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            assert panel["datasource"]["uid"] in uids


def test_the_gpu_overlay_reserves_devices_for_triton_alone() -> None:
    overlay = yaml.safe_load((DEPLOY / "compose" / "gpu.yml").read_text())
    assert overlay["services"].keys() == {"triton"} <= document()["services"].keys()
    (device,) = overlay["services"]["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_the_overlay_of_object_storage_adds_the_library_the_place_and_the_keys() -> None:
    overlay = yaml.safe_load((DEPLOY / "compose" / "objects.yml").read_text())
    assert overlay["services"].keys() == {"features"}
    features, base = overlay["services"]["features"], document()["services"]["features"]
    assert features["image"] == f"{base['image']}-objects"
    assert features["build"] == {"args": {"EXTRA": "objects"}}
    assert features["environment"].keys() == {"CAUSEMESH_CHECKPOINTS"}
    assert set(features["secrets"]) == set(overlay["secrets"]) == set(KEYS)
    asked = re.findall(r"/requirements/\$\{EXTRA\}\.txt", (DEPLOY / "Dockerfile").read_text())
    assert len(asked) == 1
    copied = re.findall(r"^COPY requirements/.*", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert any("requirements/objects.txt" in line for line in copied)
    assert set(pins("objects.txt")) == {"pyarrow"}
    assert "pyarrow" not in pins("runtime.txt"), "the images without it are that much lighter"


KEYS = {"aws_access_key_id": "KEYFROMAFILE", "aws_secret_access_key": "a secret"}


def test_object_storage_is_asked_with_the_keys_of_the_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the container: files of secrets, then settings, then a signed request."""
    for name, value in KEYS.items():
        (tmp_path / name).write_text(f"{value}\n")
        monkeypatch.delenv(name.upper(), raising=False)
    asked: list[str] = []

    class Storage(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_PUT = do_HEAD = do_POST

        def log_message(self, format: str, *args: object) -> None: ...

    for name, value in script("container/start.py").with_secrets({}, tmp_path).items():
        monkeypatch.setenv(name, value)
    with ThreadingHTTPServer(("127.0.0.1", 0), Storage) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        place = f"region=eu-central-1&scheme=http&endpoint_override=127.0.0.1:{server.server_port}"
        files = open_files(f"s3://bucket/folder?{place}")
        with pytest.raises(Retryable):
            files.write("g/0/a", b"content")
        server.shutdown()
    assert asked
    assert all(f"Credential={KEYS['aws_access_key_id']}/" in one for one in asked)


def test_image_locks_pin_what_the_tests_run_on() -> None:
    """The same versions as requirements/dev.txt, all hashed, and no registry's name."""
    tested = pins("dev.txt")
    runtime, inference, billing = map(pins, ("runtime.txt", "inference.txt", "billing.txt"))
    for found in (runtime, inference, billing):
        assert runtime.items() <= found.items() <= tested.items()
    assert pins("objects.txt").items() <= tested.items()
    assert "stripe" in billing.keys() - inference.keys()
    assert "tritonclient" in inference.keys() - billing.keys()
    for name in (
        "runtime.txt",
        "inference.txt",
        "billing.txt",
        "objects.txt",
        "build.txt",
        "triton-image.txt",
    ):
        text = (ROOT / "requirements" / name).read_text()
        assert "://" not in text, name
        assert len(pins(name)) == len(re.findall(r"==\S+.*\\\n +--hash=sha256:", text)), name


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / name).read_text()
    return dict(re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==(\S+)", text, re.MULTILINE))


def script(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, DEPLOY / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_secrets_become_settings_unless_they_are_set(tmp_path: Path) -> None:
    start = script("container/start.py")
    (tmp_path / "causemesh_api_token").write_text("from the file\n")
    (tmp_path / "pgpassword").write_text("pass word ")
    told = {"SERVICE": "ingest", "PGPASSWORD": "from outside"}
    assert start.with_secrets(told, tmp_path) == {
        **told,
        "CAUSEMESH_API_TOKEN": "from the file",
    }
    assert start.with_secrets(told, tmp_path / "nowhere") == told
    assert start.command([], told)[1:] == ["-m", "services.ingest.app"]
    assert start.command(["causemesh", "lag"], told) == ["causemesh", "lag"]


@pytest.mark.parametrize("name", SERVICES)
def test_readiness_is_asked_where_the_service_listens(name: str) -> None:
    ready = script("container/ready.py")
    assert ready.port({"SERVICE": name}) == API_PORTS[name]
    assert ready.port({"SERVICE": name, "CAUSEMESH_API_PORT": "9999"}) == 9999
