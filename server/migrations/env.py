"""How alembic reaches the ledger: over the connection, and in the transaction, that `server.schema` gives it.

By hand, to write a new revision from what has changed in `server.tables`:
`alembic -c server/migrations/alembic.ini revision --autogenerate --rev-id 0002 -m "what changes"`.
"""

from alembic import context

from server.tables import Base

connection = context.config.attributes.get("connection")
if connection is not None:
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    context.run_migrations()
else:
    from sqlalchemy import create_engine

    with create_engine(context.config.get_main_option("sqlalchemy.url", "")).begin() as made:
        context.configure(connection=made, target_metadata=Base.metadata, render_as_batch=True)
        context.run_migrations()
