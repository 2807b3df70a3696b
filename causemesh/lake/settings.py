"""Where the lake is, read from `CAUSEMESH_LAKE_*`."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from causemesh.errors import Misdeclared

_PREFIX = "CAUSEMESH_LAKE_"
_POSTGRES = "CAUSEMESH_POSTGRES_URL"


class LakeSettings(BaseSettings):
    """Catalog, warehouse and how files are reached."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="ignore", env_ignore_empty=True)

    catalog: str = Field(
        default="",
        description="SQLAlchemy URL of the catalog's database: Postgres"
        " (postgresql+pg8000://...) or, for one machine, SQLite (sqlite:////folder/catalog.db).",
    )
    warehouse: str = Field(
        default="",
        description="Where tables lie: file:///folder, s3://bucket/folder or"
        " abfs://container@account.dfs.core.windows.net/folder.",
    )
    properties: dict[str, str] = Field(
        default_factory=dict,
        description="JSON object of pyiceberg FileIO properties, such as s3.endpoint,"
        " s3.access-key-id, s3.region or adls.account-key.",
    )

    def checked(self) -> LakeSettings:
        """These settings. Raises Misdeclared when one is missing."""
        for name, value in (("CATALOG", self.catalog), ("WAREHOUSE", self.warehouse)):
            if not value:
                raise Misdeclared(f"{_PREFIX}{name} must say where the lake is")
        return self


def lake_settings(environment: Mapping[str, str]) -> LakeSettings:
    """The lake's settings out of an environment such as `Mesh.environment`.

    Without a catalog it is the database `lake` of the mesh's Postgres.
    """
    told = {
        name.removeprefix(_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(_PREFIX) and value
    }
    if "catalog" not in told and environment.get(_POSTGRES):
        told["catalog"] = catalog_on(environment[_POSTGRES])
    properties = json.loads(told.pop("properties", "{}"))
    return LakeSettings.model_validate({**told, "properties": properties}).checked()


def catalog_on(postgres_url: str) -> str:
    """The catalog's URL on a Postgres server (SQLAlchemy URL without a database)."""
    return f"{postgres_url.replace('+asyncpg', '+pg8000')}/lake"
