"""Which versions the model server has, and putting them there when it has not."""

from __future__ import annotations

import asyncio

from causemesh.errors import Misdeclared
from services.inference.domain import ModelVersion
from services.inference.gateways import ModelServer
from services.inference.store import ModelStore


class Deployments:
    """Loads each version once in this process's life, and again when the server forgot it."""

    def __init__(self, store: ModelStore, server: ModelServer) -> None:
        self._store = store
        self._server = server
        self._loaded: dict[tuple[str, int], ModelVersion] = {}
        self._lock = asyncio.Lock()

    async def ensure(self, model: str, version: int) -> ModelVersion | None:
        """The version, loaded; None when it is not registered.

        Raises Retryable when the server is away, ModelError when it can't serve the artefact.
        """
        known = self._loaded.get((model, version))
        if known is not None:
            return known
        async with self._lock:
            if (model, version) in self._loaded:
                return self._loaded[(model, version)]
            found = await self._store.version(model, version)
            if found is not None:
                await self.load(found)
        return found

    async def load(self, version: ModelVersion) -> None:
        """Load a version whatever is believed about it."""
        content = await self._store.artefact(version.artefact_sha256)
        if content is None:
            raise Misdeclared(f"no artefact {version.artefact_sha256}; upload it first")
        await self._server.load(version.deployment, content, len(version.features))
        self._loaded[(version.model, version.version)] = version

    def forget(self, model: str, version: int) -> None:
        """The server has lost the version: load it at the next call."""
        self._loaded.pop((model, version), None)
