"""Start the image's service, or the command that is given, with the mounted secrets as settings.

Every file of /run/secrets becomes the environment variable of its name in capitals, unless that
is set: `causemesh_api_token` gives CAUSEMESH_API_TOKEN, `pgpassword` the database's password.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

SECRETS = Path("/run/secrets")


def with_secrets(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The environment and what the folder's files add to it; a line end at the end is no part."""
    files = [path for path in sorted(folder.glob("*")) if path.is_file()]
    return {path.name.upper(): path.read_text().rstrip("\n") for path in files} | dict(environment)


def command(words: list[str], environment: Mapping[str, str]) -> list[str]:
    """What to run: the words given, else the service."""
    return words or [sys.executable, "-m", f"services.{environment['SERVICE']}.app"]


if __name__ == "__main__":
    told = with_secrets(os.environ, SECRETS)
    run = command(sys.argv[1:], told)
    os.execvpe(run[0], run, told)
