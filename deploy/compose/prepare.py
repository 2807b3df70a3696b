"""Make .env and random secrets for docker-compose.yml; what is there already is kept.

usage: python3 deploy/compose/prepare.py   (nothing but Python's standard library)

Containers run as other users than you and read the secrets by bind mounts, so the files are
readable and the folder, which they never see, is closed to everybody else.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SERVICES = ("ingest", "features", "inference", "agents", "billing", "drift")


def write_secrets(folder: Path) -> Iterator[str]:
    """Write those that are missing; yields their names."""
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    names = ["causemesh_api_token", "postgres_password", "grafana_password"]
    names += [f"postgres_{service}" for service in (*SERVICES, "registry")]
    for name in names:
        yield from _write(folder / name, secrets.token_urlsafe(24))
    password = (folder / "postgres_registry").read_text()
    yield from _write(folder / "registry.properties", f"apicurio.datasource.password={password}\n")


def _write(path: Path, content: str) -> Iterator[str]:
    if not path.exists():
        path.write_text(content)
        path.chmod(0o444)
        yield path.name


def main() -> None:
    """Write, and say what."""
    if not (ROOT / ".env").exists():
        shutil.copyfile(HERE / "env.example", ROOT / ".env")
        (ROOT / ".env").chmod(0o600)
        print("wrote .env: look through it")
    made = list(write_secrets(HERE / "secrets"))
    print(f"wrote {len(made)} secrets to {(HERE / 'secrets').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
