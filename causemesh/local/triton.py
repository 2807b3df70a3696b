"""Triton on the CPU, with its Python backend; models are loaded over gRPC when they are asked for.

The server is the one inside the nvidia-pytriton wheel. It starts with no model loaded, after a
crash too: who needs a model loads it.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from causemesh.errors import Misdeclared
from causemesh.local import artefacts
from causemesh.local.artefacts import Progress
from causemesh.local.process import ServerProcess
from causemesh.local.servers import HOST, port_open

_SHARED_MEMORY = Path("/dev/shm")
_STUB = "triton_python_backend_stub"  # the process that runs one model


class Triton:
    """A Triton server with gRPC and metrics doors."""

    def __init__(self, home: Path, port: int, metrics_port: int) -> None:
        self.port = port
        self._metrics_port = metrics_port
        self._models = self.models_under(home)
        # Shared memory is one folder for the whole machine: each home has names of its own there.
        digest = hashlib.sha256(str(home).encode()).hexdigest()[:12]
        self._memory_prefix = f"causemesh-triton-{digest}-"
        self.process = ServerProcess("triton", home)

    @staticmethod
    def models_under(home: Path) -> Path:
        """The model repository of a home."""
        return home / "triton" / "models"

    def start(self, progress: Progress) -> None:
        """See `Server.start`."""
        venv = artefacts.triton_venv(progress)
        packages = venv / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        self._models.mkdir(parents=True, exist_ok=True)
        if self.process.running() is None:
            self._drop_leftovers()
        progress("triton", "starting")
        self.process.environment = _environment(venv, packages)
        self.process.start(self._argv(packages / "pytriton" / "tritonserver"))
        self.process.wait_ready(self._answers, 30)

    def stop(self) -> None:
        """See `Server.stop`."""
        self.process.stop()
        self._drop_leftovers()

    def _argv(self, folder: Path) -> list[str | Path]:
        return [
            folder / "bin" / "tritonserver",
            f"--model-repository={self._models}",
            "--model-control-mode=explicit",
            "--disable-auto-complete-config",  # configs are whole; completing costs 1 s a load
            f"--backend-directory={folder / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={self._memory_prefix}",
            "--allow-http=false",
            f"--grpc-address={HOST}",
            f"--grpc-port={self.port}",
            f"--metrics-address={HOST}",
            f"--metrics-port={self._metrics_port}",
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            "--exit-timeout-secs=5",  # below the time a stop waits before it kills
        ]

    def _drop_leftovers(self) -> None:
        """End the model processes of a killed server, then free their shared memory.

        They mean to end by themselves, but one can wait for ever on a lock the server held.
        """
        processes = psutil.process_iter(["cmdline"])
        stubs = [one for one in processes if self._is_stub(one.info["cmdline"] or [])]
        for stub in stubs:
            with suppress(psutil.NoSuchProcess):
                stub.kill()
        psutil.wait_procs(stubs, timeout=10)
        for region in _SHARED_MEMORY.glob(f"{self._memory_prefix}*"):
            region.unlink(missing_ok=True)

    def _is_stub(self, cmdline: Sequence[str]) -> bool:
        return (
            bool(cmdline)
            and Path(cmdline[0]).name == _STUB
            and any(part.startswith(self._memory_prefix) for part in cmdline)
        )

    def _answers(self) -> bool:
        """The metrics door opens last."""
        try:
            answer = httpx.get(f"http://{HOST}:{self._metrics_port}/metrics", timeout=2)
        except httpx.TransportError:
            return False
        return answer.status_code == 200 and port_open(self.port)


def _environment(venv: Path, packages: Path) -> dict[str, str]:
    libraries = Path(sysconfig.get_config_var("LIBDIR"))
    needed = f"libpython{sysconfig.get_python_version()}.so.1.0"
    if not (libraries / needed).exists():
        raise Misdeclared(f"Triton needs {needed} in {libraries}: use a Python built with --shared")
    return {
        # The backend's interpreter takes the environment of the first python3 on the path.
        "PATH": f"{venv / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": "",
        "PYTHONNOUSERSITE": "1",
        "LD_LIBRARY_PATH": f"{packages / 'nvidia_pytriton.libs'}:{libraries}",
        "CUDA_VISIBLE_DEVICES": "",
        # Every loaded model is a process; numpy would start a thread per core in each.
        "OPENBLAS_NUM_THREADS": "1",
    }
