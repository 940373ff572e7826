"""A coordinator's home: the folder that `fedcomet coordinator init` makes, and the settings in it.

    coordinator.toml          name, address, ports, database
    ca.key, ca.crt            the federation's authority; the key may be encrypted by a passphrase
    server.key, server.crt    what sites see when they connect
    runs/                     runs, and the key that signs their requests (`server.app`)
    ledger.sqlite             the ledger, unless [database] names another
    flower/, logs/            what the daemons keep

Everything is the owner's alone. What is missing after a crash in the middle of `init` is the whole home.
"""

import logging
import os
import stat
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from json import dumps
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from federation import calls, pki
from federation.identity import Identity
from server.authority import Authority
from tokenizer import durable
from tokenizer.errors import ConfigError, FedcometError
from tokenizer.settings import explain

PASSPHRASE = "FEDCOMET_CA_PASSPHRASE"
SETTINGS = "coordinator.toml"
_LAST_YEAR = 365
_Port = Annotated[int, Field(ge=0, le=65535)]

_log = logging.getLogger(__name__)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Federation(_Section):
    """Its name, the host name or IP address that sites dial, and other names of the same machine."""

    name: Annotated[str, Field(min_length=1, max_length=50)]
    address: Annotated[str, Field(min_length=1)]
    also: Annotated[
        tuple[str, ...], BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given)
    ] = ()


class Ports(_Section):
    """Where the coordinator listens, the last two on loopback; 0 lets the system choose, for tests."""

    fleet: _Port = calls.FLEET_PORT
    control: _Port = calls.CONTROL_PORT
    enrol: _Port = calls.ENROL_PORT
    ui: _Port = calls.UI_PORT
    health: _Port = 8447
    runtime: _Port = 8448


class Listen(_Section):
    """The network interface: 0.0.0.0 is all of them."""

    host: str = "0.0.0.0"


class Log(_Section):
    """How much log of the daemon is kept."""

    megabytes: Annotated[int, Field(ge=1)] = 10
    files: Annotated[int, Field(ge=1)] = 9


class Database(_Section):
    """The ledger's SQLAlchemy URL; a file in the home if empty."""

    url: str = ""


class CoordinatorSettings(_Section):
    """All of coordinator.toml."""

    federation: Federation
    ports: Ports = Ports()
    listen: Listen = Listen()
    database: Database = Database()
    log: Log = Log()


@dataclass(frozen=True)
class CoordinatorHome:
    """A coordinator's home and its settings."""

    path: Path
    settings: CoordinatorSettings

    @classmethod
    def init(
        cls, path: Path, settings: CoordinatorSettings, passphrase: str | None, now: datetime | None = None
    ) -> "CoordinatorHome":
        """Make a home, with the federation's authority, the server's certificate and the key that signs requests.

        Args:
            path: a folder that is empty or not there.
            settings: what coordinator.toml will say.
            passphrase: encrypts the authority's key; without one only the file's permissions protect it.

        Raises:
            ConfigError: something is in the folder, or the passphrase is too short.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"{path} is not empty; choose a new folder, a federation is made once.")
        now = now or datetime.now(UTC)
        with durable.directory(path) as aside:
            aside.chmod(0o700)
            made = cls(aside, settings)
            Authority.create(made.authority_key, made.authority, settings.federation.name, passphrase, now)
            made.rotate(passphrase, now)
            Identity.at(made.signing_key)
            for folder in (made.runs, made.logs):
                folder.mkdir(mode=0o700, exist_ok=True)
                folder.chmod(0o700)
            pki.write_private(aside / SETTINGS, _written(settings).encode())
        return cls(path, settings)

    @classmethod
    def open(cls, path: Path) -> "CoordinatorHome":
        """Read a home.

        Raises:
            ConfigError: it is none, others may read it, or a key or value is wrong; all of them are named.
        """
        file = path / SETTINGS
        if not file.exists():
            raise ConfigError(f"{file} is missing; make a federation first: fedcomet coordinator init {path}.")
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(f"{path}: others than its owner may look into it; run chmod 700 on it.")
        try:
            settings = CoordinatorSettings.model_validate(tomllib.loads(file.read_bytes().decode()))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
            raise ConfigError(f"{file}: can't be read ({problem}).") from None
        except ValidationError as problem:
            raise ConfigError(f"{file}: {explain(problem, CoordinatorSettings)}") from None
        return cls(path, settings)

    def open_authority(self, passphrase: str | None) -> Authority:
        """Read the authority; see `Authority.open` for what may be wrong."""
        return Authority.open(self.authority_key, self.authority, passphrase)

    def rotate(self, passphrase: str | None, now: datetime | None = None) -> None:
        """Give the server a new key and certificate; a running server takes them up by itself."""
        authority = self.open_authority(passphrase)
        key = pki.make_key(pki.next_key(self.server_key))
        federation = self.settings.federation
        names = [federation.address, *federation.also, "localhost", "127.0.0.1"]
        chain = authority.issue_server(key.public_key(), names, now or datetime.now(UTC))
        pki.write_private(self.server_certificate, chain)
        self.server_pair()

    def server_pair(self) -> tuple[bytes, bytes]:
        """Give the server's private key, and its certificate with the authority's behind it; see `pki.pair`."""
        return pki.pair(self.server_key, self.server_certificate)

    def warnings(self, now: datetime) -> list[str]:
        """Say which of its own certificates are due, and what to do about them."""
        server = pki.validity(pki.read_certificate(self.server_certificate), now)
        authority = pki.validity(pki.read_certificate(self.authority), now)
        anew = "found the federation anew before, as all its certificates end with it"
        told = [server.warning("the server", "run fedcomet coordinator rotate")]
        if authority.days_left < _LAST_YEAR:
            told.append(authority.warning("the authority", anew))
        return [each for each in told if each is not None]

    def rotate_if_due(self, passphrase: str | None, now: datetime) -> bool:
        """Rotate the server's certificate when a third of its time is left; tell whether it was."""
        if not pki.validity(pki.read_certificate(self.server_certificate), now).due:
            return False
        self.rotate(passphrase, now)
        return True

    def keep_certificate(self, passphrase: str | None, now: datetime) -> list[str]:
        """Rotate the server's certificate if it is due; gives what people must see to: `warnings`, and what failed."""
        told: list[str] = []
        try:
            if self.rotate_if_due(passphrase, now):
                _log.info("the server's certificate was due and has been renewed")
        except (FedcometError, OSError) as problem:
            told.append(f"The server's certificate can't be renewed, which is tried again every hour: {problem}")
        try:
            return [*told, *self.warnings(now)]
        except FedcometError as problem:
            return [*told, str(problem)]

    @property
    def signing_key(self) -> Path:
        """The Ed25519 key that signs requests of runs; see `server.app.coordinator_key`."""
        return self.runs / "coordinator.key"

    @property
    def ledger_url(self) -> str:
        """The ledger's SQLAlchemy URL."""
        return self.settings.database.url or f"sqlite:///{(self.path / 'ledger.sqlite').absolute()}"

    @property
    def authority_key(self) -> Path:
        """The authority's private key."""
        return self.path / "ca.key"

    @property
    def authority(self) -> Path:
        """The authority's certificate."""
        return self.path / "ca.crt"

    @property
    def server_key(self) -> Path:
        """The server's private key."""
        return self.path / "server.key"

    @property
    def server_certificate(self) -> Path:
        """The server's certificate, and the authority's behind it."""
        return self.path / "server.crt"

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return self.path / "runs"

    @property
    def backups(self) -> Path:
        """The folder of the copies that are made of the ledger before it is migrated."""
        return self.path / "backups"

    @property
    def logs(self) -> Path:
        """The folder of what daemons tell."""
        return self.path / "logs"


def read_passphrase(file: Path | None) -> str | None:
    """Give the passphrase of the authority's key: of a file, or else of the environment; None if there is none.

    Raises:
        ConfigError: the file can't be read, is empty, or others may read it.
    """
    if file is None:
        return os.environ.get(PASSPHRASE) or None
    try:
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise ConfigError(f"{file}: others than its owner may read this passphrase; run chmod 600 on it.")
        passphrase = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{file}: the passphrase can't be read ({cause}).") from None
    if not passphrase:
        raise ConfigError(f"{file} is empty; write the passphrase into it.")
    return passphrase


def _written(settings: CoordinatorSettings) -> str:
    """The text of coordinator.toml, for people to go on with."""
    federation, ports = settings.federation, settings.ports
    return f"""\
[federation]
name = {dumps(federation.name)}
address = {dumps(federation.address)}  # the host name or IP address that sites dial
also = {dumps(federation.also)}  # other names of this machine; then run fedcomet coordinator rotate

[ports]
fleet = {ports.fleet}    # rounds, HTTPS: Flower's Fleet calls only
control = {ports.control}  # control, gRPC under mutual TLS
enrol = {ports.enrol}    # joining, gRPC under TLS
ui = {ports.ui}       # the dashboard
health = {ports.health}   # health and metrics, on loopback
runtime = {ports.runtime}  # the coordinator's own processes, on loopback

[listen]
host = {dumps(settings.listen.host)}

[database]
url = {dumps(settings.database.url)}  # the ledger's SQLAlchemy URL; a file in this folder if empty
"""
