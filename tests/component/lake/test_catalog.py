"""The catalog's sessions on Postgres."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import sqlalchemy as sa

from causemesh.errors import Retryable
from causemesh.lake import opening
from causemesh.lake.opening import away, open_catalog
from causemesh.lake.settings import LakeSettings
from tests.component.lake.lake_writer import Plan

pytestmark = pytest.mark.servers
ONE = sa.text("SELECT 1")


@pytest.mark.parametrize(("limit_s", "ended"), [(1, True), (60, False)])
def test_a_writer_frozen_in_a_commit_keeps_its_table_no_longer_than_the_limit(
    limit_s: int, ended: bool, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_IDLE_S", limit_s)
    catalog = open_catalog(LakeSettings(catalog=plan.catalog, warehouse=plan.warehouse))
    with catalog.engine.connect() as connection:
        connection.execute(ONE)
        time.sleep(2.0)
        with pytest.raises(Retryable) if ended else nullcontext(), away():
            connection.execute(ONE)
    catalog.close()
