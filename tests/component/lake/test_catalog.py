"""The catalog's sessions on Postgres."""

from __future__ import annotations

import time

import pytest
import sqlalchemy as sa

from causemesh.errors import Retryable
from causemesh.lake import opening
from causemesh.lake.opening import away, open_catalog
from causemesh.lake.settings import LakeSettings
from tests.component.lake.lake_writer import Plan

pytestmark = pytest.mark.servers
ONE = sa.text("SELECT 1")


def test_a_writer_frozen_in_a_commit_keeps_its_table_no_longer_than_the_limit(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_IDLE_S", 1)
    catalog = open_catalog(LakeSettings(catalog=plan.catalog, warehouse=plan.warehouse))
    for pause_s in (0.0, 2.0):
        with catalog.engine.connect() as connection:
            connection.execute(ONE)
            time.sleep(pause_s)
            if pause_s:
                with pytest.raises(Retryable), away():
                    connection.execute(ONE)
            else:
                connection.execute(ONE)
    catalog.close()
