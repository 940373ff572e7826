"""Real services for tests, started on the spot and gone afterwards."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

        def run(*command: str) -> None:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, **account)
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

        data, options = str(folder / "data"), f"-k {folder} -c listen_addresses= -c fsync=off"
        run(str(programs / "initdb"), "-D", data, "-U", "postgres", "-A", "scram-sha-256", "--pwfile", str(password),
            "-E", "UTF8", "--locale", "C", "-N")  # fmt: skip
        run(str(programs / "pg_ctl"), "-D", data, "-l", str(folder / "log"), "-o", options, "-w", "-t", "120", "start")
        try:
            yield folder
        finally:
            run(str(programs / "pg_ctl"), "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unprivileged() -> dict[str, Any]:
    for name in ("postgres", "nobody"):
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    raise AssertionError("there is no user 'postgres' or 'nobody' to run PostgreSQL as")
