"""How older ledgers become those that the software knows: alembic's revisions, in order."""
