"""outbox age and trace"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "drift_0002"
down_revision = "drift_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("outbox_rows", sa.Column("traceparent", sa.Text(), nullable=True))
    op.add_column(
        "outbox_rows",
        sa.Column(
            "added_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
    )


def downgrade() -> None:
    op.drop_column("outbox_rows", "added_at")
    op.drop_column("outbox_rows", "traceparent")
