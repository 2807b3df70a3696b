"""Alembic runs this; causemesh.migrations passes the connection and, for a new one, the target."""

from alembic import context

config = context.config
context.configure(
    connection=config.attributes["connection"],
    target_metadata=config.attributes.get("target"),
    compare_server_default=False,
)
with context.begin_transaction():
    context.run_migrations()
