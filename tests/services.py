"""Real services for tests, started on the spot and gone afterwards.

Tests that need what isn't installed are skipped with a reason that ends in `INSTALL`; tests/conftest.py names them in
the last lines, or lets them fail where FEDCOMET_TEST_SERVICES says so.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

INSTALL = "is missing: make test-services installs it"
POSTGRES_MISSING, CHROMIUM_MISSING = f"PostgreSQL {INSTALL}", f"Chromium {INSTALL}"
"""Why tests are skipped."""

PASSWORD = "s3cret/pa:ss@word"
"""Of the database's user; tests look for it where it must not be."""


def postgres_programs() -> Path | None:
    """Folder of initdb and pg_ctl, None where PostgreSQL isn't installed."""
    found = [Path(program).resolve().parent for program in [shutil.which("initdb")] if program]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in found if (folder / "pg_ctl").exists() and (folder / "initdb").exists()), None)


@contextmanager
def postgres(programs: Path) -> Iterator[Path]:
    """Run a PostgreSQL of its own, on a socket in a folder that it gives; user `postgres`, password `PASSWORD`.

    PostgreSQL refuses to run as root: there, the system's user `postgres` or `nobody` runs it.
    """
    folder = Path(tempfile.mkdtemp(prefix="fedcomet-pg-"))
    account: dict[str, Any] = _unprivileged() if os.geteuid() == 0 else {}
    try:
        if account:
            os.chown(folder, account["user"], account["group"])
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)

        _run(folder, str(programs / "initdb"), "-D", str(folder / "data"), "-U", "postgres", "-A", "scram-sha-256",
             "--pwfile", str(password), "-E", "UTF8", "--locale", "C", "-N")  # fmt: skip
        start_postgres(programs, folder)
        try:
            yield folder
        finally:
            stop_postgres(programs, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start_postgres(programs: Path, folder: Path) -> None:
    """Start the server of a folder again."""
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    _run(folder, str(programs / "pg_ctl"), "-D", str(folder / "data"), "-l", str(folder / "log"), "-o", options,
         "-w", "-t", "120", "start")  # fmt: skip


def stop_postgres(programs: Path, folder: Path) -> None:
    """Let the server of a folder end at once, as in a crash, whoever is connected."""
    _run(folder, str(programs / "pg_ctl"), "-D", str(folder / "data"), "-m", "immediate", "-w", "stop")


def postgres_url(folder: Path, database: str = "postgres") -> str:
    """Give the SQLAlchemy URL of a server's database."""
    return f"postgresql+psycopg://postgres:{quote(PASSWORD, safe='')}@/{database}?host={folder}"


def _run(folder: Path, *command: str) -> None:
    account: dict[str, Any] = _unprivileged() if os.geteuid() == 0 else {}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, **account)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def _unprivileged() -> dict[str, Any]:
    for name in ("postgres", "nobody"):
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    raise AssertionError("there is no user 'postgres' or 'nobody' to run PostgreSQL as")
