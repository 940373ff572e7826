"""Ledgers in both kinds of databases."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine, text

from server.ledger import Ledger
from tests import services


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Path]:
    """The folder of a PostgreSQL server."""
    programs = services.postgres_programs()
    if programs is None:
        pytest.skip(services.POSTGRES_MISSING)
    with services.postgres(programs) as folder:
        yield folder


@pytest.fixture
def postgres_url(postgres_server: Path) -> Iterator[str]:
    """The URL of an empty database."""
    engine = create_engine(services.postgres_url(postgres_server), isolation_level="AUTOCOMMIT", poolclass=NullPool)
    name = f"ledger_{uuid.uuid4().hex}"
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield services.postgres_url(postgres_server, name)
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, ram_path: Path) -> str:
    """Where a ledger can begin."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgres_url")
    return f"sqlite:///{ram_path / 'federation.sqlite'}"


@pytest.fixture
def opened(place: str) -> Iterator[Callable[[], Ledger]]:
    """Opens that ledger, as often as is wanted, each time for another process or thread to play."""
    ledgers: list[Ledger] = []

    def again() -> Ledger:
        ledgers.append(Ledger.open(place, patience_s=20.0))
        return ledgers[-1]

    yield again
    for ledger in ledgers:
        ledger.close()
