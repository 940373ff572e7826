"""A site's home: the folder that `fedcomet site join` makes, and the settings in it that its people keep.

    site.toml        who and where; written when the site has joined
    state/           what it must not forget (`client.archive`), with the key of its signatures, which never leaves
    tls.key          the key of its connections and of its Flower node (P-384), which never leaves
    tls.crt          its certificate; renewed before it expires
    federation.crt   the authority that it trusts, as its token named it
    logs/            what its daemon tells

Everything is the owner's alone. Paths in site.toml are relative to the home.
"""

import fcntl
import tomllib
from dataclasses import dataclass, fields
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from client.approval import site_key
from client.files import SiteFiles
from federation import pki
from federation.identity import Identity, is_public_key
from federation.messages import is_site_name
from model.settings import Machine
from tokenizer.errors import ConfigError
from tokenizer.settings import AS_THEY_ARE, STANDARD, explain

_Port = Annotated[int, Field(ge=1, le=65535)]
_Number = Annotated[float, BeforeValidator(lambda given: float(given) if type(given) is int else given)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Work(_Section):
    """What the site works with; see `client.files.SiteFiles`."""

    name: str
    data: str = "data"
    state: str = "state"
    policy: str = "policy.toml"
    settings: str = AS_THEY_ARE
    budget: str = ""
    device: str = "cpu"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    micro_tokens: int = 0
    checkpointing: bool = False
    compile: bool = False
    processes: int = 1
    shard: bool = False
    snapshot_minutes: _Number = 10.0

    @field_validator("name")
    @classmethod
    def _name(cls, given: str) -> str:
        if not is_site_name(given):
            raise ValueError(f"{given!r} is no site's name")
        return given


class Coordinator(_Section):
    """Where the coordinator is (a host name or IP address, and ports), and the public key that signs its requests."""

    address: Annotated[str, Field(min_length=1)]
    fleet_port: _Port
    control_port: _Port
    key: str

    @field_validator("key")
    @classmethod
    def _public(cls, given: str) -> str:
        if not is_public_key(given):
            raise ValueError(f"{given!r} is not a public key; it has ed25519: and 64 hexadecimal digits")
        return given


class Daemon(_Section):
    """How `fedcomet site run` runs: its ports on loopback, how long it may take to stop, how much log is kept."""

    health_port: _Port = 8451
    runtime_port: _Port = 8452
    stop_seconds: Annotated[_Number, Field(ge=0, le=3600)] = 60.0
    log_megabytes: Annotated[int, Field(ge=1)] = 10
    log_files: Annotated[int, Field(ge=1)] = 9


class SiteSettings(_Section):
    """All of site.toml."""

    site: Work
    coordinator: Coordinator
    daemon: Daemon = Daemon()


@dataclass(frozen=True)
class SiteHome:
    """A site's home and its settings."""

    path: Path
    settings: SiteSettings

    @classmethod
    def open(cls, path: Path) -> "SiteHome":
        """Read a home.

        Raises:
            ConfigError: it is none, or a key or value in site.toml is wrong; all of them are named.
        """
        file = path / "site.toml"
        if not file.exists():
            raise ConfigError(f"{file} is missing; join a federation first: fedcomet site join ADDRESS TOKEN.")
        try:
            settings = SiteSettings.model_validate(tomllib.loads(file.read_bytes().decode()))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
            raise ConfigError(f"{file}: can't be read ({problem}).") from None
        except ValidationError as problem:
            raise ConfigError(f"{file}: {explain(problem, SiteSettings)}") from None
        return cls(path, settings)

    @property
    def name(self) -> str:
        """The site's name."""
        return self.settings.site.name

    @property
    def state(self) -> Path:
        """The folder of what it must not forget."""
        return self.path / self.settings.site.state

    def check_data(self) -> None:
        """See that the records are where site.toml says.

        Raises:
            ConfigError: there is no such folder.
        """
        if not (folder := self.files.data).is_dir():
            file = self.path / "site.toml"
            raise ConfigError(f"{file}: site.data: there is no folder {folder}; say where the records are.")

    @property
    def policy(self) -> Path:
        """Its policy; a site of a federation has one."""
        return self.path / self.settings.site.policy

    @property
    def has_daemon(self) -> bool:
        """Whether a daemon runs in it, well or not."""
        try:
            with open(self.path / LOCK, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @property
    def files(self) -> SiteFiles:
        """What `client.site` is told.

        Raises:
            ConfigError: how the machine trains makes no sense.
        """
        work = self.settings.site
        machine = Machine(**{field.name: getattr(work, field.name) for field in fields(Machine)})
        settings = work.settings if work.settings in (AS_THEY_ARE, STANDARD) else str(self.path / work.settings)
        where = (self.path / work.data).absolute(), self.state.absolute()
        return SiteFiles(
            work.name, *where, settings, machine, work.snapshot_minutes, self.policy.absolute(), work.budget
        )

    @property
    def identity(self) -> Identity:
        """The key of its signatures."""
        return Identity.at(site_key(self.state))

    @property
    def key(self) -> Path:
        """The private key of its connections."""
        return self.path / KEY

    @property
    def certificate(self) -> Path:
        """Its certificate."""
        return self.path / CERTIFICATE

    @property
    def authority(self) -> Path:
        """The certificate that it trusts."""
        return self.path / AUTHORITY


KEY, CERTIFICATE, AUTHORITY = "tls.key", "tls.crt", "federation.crt"
LOCK = "daemon.lock"
"""Held by the daemon that works in a home."""


def write_settings(
    path: Path, name: str, coordinator: Coordinator, data: Path | None = None, policy: Path | None = None
) -> None:
    """Write the site.toml of a site that has joined; of one that is there, only what is behind [coordinator]."""
    file = path / "site.toml"
    places = {
        "data": dumps("data" if data is None else str(data.absolute())),
        "policy": dumps("policy.toml" if policy is None else str(policy.absolute())),
    }
    new = _SITE.format(name=dumps(name), as_is=_AS_IS, **places)
    before = file.read_text(encoding="utf-8") if file.exists() else new
    where = _COORDINATOR.format(
        address=dumps(coordinator.address),
        fleet=coordinator.fleet_port,
        control=coordinator.control_port,
        key=dumps(coordinator.key),
    )
    pki.write_private(file, (before.partition("[coordinator]")[0].rstrip() + "\n\n" + where).encode())


_AS_IS = dumps(AS_THEY_ARE)
_SITE = """\
# Paths are relative to this folder.
[site]
name = {name}
data = {data}  # the records: a MEDS dataset's folder
state = "state"         # what the site must not forget; keep it, and never put back an old copy
policy = {policy}  # what the site allows; it must be there
settings = {as_is}       # what is done to the records first: a TOML file, "standard" or "none"
budget = ""             # the privacy budget's database; a file in state if empty
device = "cpu"          # where to train: cpu, cuda

# [daemon]              # others where two sites share a machine
# health_port = 8451
# runtime_port = 8452
"""
_COORDINATOR = """\
[coordinator]  # from here on, joining again writes it anew
address = {address}
fleet_port = {fleet}
control_port = {control}
key = {key}  # signs its requests
"""
