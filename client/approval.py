"""What a person at the site has agreed to: approved manifests, signed with the site's key, and those not agreed to.

    identity/site.key            the site's private key, made on first use; only its owner can read it
    approvals/<hash>.json        an approval; remove it to withdraw
    waiting/<hash>.json          a manifest that was sent and isn't approved, as it came
    waiting/<hash>.coordinator   the public key of whoever signed it; empty if nobody did
    refused/                     the same of manifests that the policy refused when they were last sent

An approval names a manifest by the sha256 of its bytes: one changed bit makes another one, which isn't approved.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from federation import canonical
from federation.identity import Identity, verify
from federation.manifest import Manifest
from federation.messages import ProtocolError
from tokenizer import durable
from tokenizer.errors import ConfigError, DataError

_PURPOSE = "approval"
_MOST_KEPT = 20


@dataclass(frozen=True)
class Approval:
    """A person's yes to one manifest, under the policy (its sha256) that was in force."""

    manifest_hash: str
    policy: str | None
    time: str
    signature: str = ""

    def to_bytes(self) -> bytes:
        """Give the canonical bytes; without a signature, they are what is signed."""
        return canonical.encode(self)


@dataclass(frozen=True)
class Asked:
    """A manifest that a person looks at, whose public key signed its request (empty: nobody); and since when."""

    manifest: Manifest
    coordinator: str = ""
    since: datetime | None = None


def site_key(state: Path) -> Path:
    """Tell where the key of the site with this state folder is."""
    return state / "identity" / "site.key"


class Approvals:
    """What has been approved at the site with this state folder, what waits, and what the policy refused."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._waiting, self._refused = state / "waiting", state / "refused"

    def approve(self, manifest: Manifest, policy: str | None, now: datetime | None = None) -> Approval:
        """Sign a manifest; it no longer waits, nor counts as refused."""
        identity = Identity.at(site_key(self._state))
        time = (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds")
        bare = Approval(manifest.hash, policy, time)
        approval = replace(bare, signature=identity.sign(_PURPOSE, bare.to_bytes()))
        durable.write_bytes(self._approval(manifest.hash), approval.to_bytes())
        self.drop(manifest.hash)
        return approval

    def approved(self, manifest_hash: str) -> bool:
        """Tell whether a manifest is approved.

        Raises:
            DataError: there is an approval, but it doesn't bear this site's signature.
        """
        path = self._approval(manifest_hash)
        if not path.exists():
            return False
        approval = canonical.decode(Approval, path.read_bytes(), str(path), DataError)
        public = Identity.at(site_key(self._state)).public
        bare = replace(approval, signature="").to_bytes()
        if approval.manifest_hash != manifest_hash or not verify(public, _PURPOSE, bare, approval.signature):
            raise DataError(f"{path} doesn't bear this site's signature; remove it and approve the manifest again.")
        return True

    def wait(self, manifest: Manifest, coordinator: str) -> None:
        """Keep a manifest for a person to look at; of many, only the latest are kept."""
        _keep(self._waiting, manifest, coordinator)
        _unlink(self._refused / f"{manifest.hash}.json")

    def refuse(self, manifest: Manifest, coordinator: str) -> None:
        """Keep a manifest that the policy refuses, for a person to see; of many, only the latest are kept."""
        _keep(self._refused, manifest, coordinator)
        _unlink(self._waiting / f"{manifest.hash}.json")

    def drop(self, manifest_hash: str) -> None:
        """Keep a manifest no longer: it may run."""
        for folder in (self._waiting, self._refused):
            _unlink(folder / f"{manifest_hash}.json")

    def waiting(self) -> list[str]:
        """Give the hashes of the manifests that wait, the latest first."""
        return [path.stem for path in _newest_first(self._waiting)]

    def refused(self) -> list[str]:
        """Give the hashes of the manifests that the policy refused, the latest first."""
        return [path.stem for path in _newest_first(self._refused)]

    def find(self, wanted: str) -> Asked:
        """Give the manifest in a file, or the one that waits or was refused and whose hash begins so.

        Raises:
            ConfigError: there is none, or there are several.
            ProtocolError: it is no manifest that this software knows.
        """
        if Path(wanted).is_file():
            return Asked(_read(Path(wanted)))
        kept = [*_newest_first(self._waiting), *_newest_first(self._refused)]
        fitting = [path for path in kept if wanted and path.name.startswith(wanted)]
        if len(fitting) != 1:
            told = ", ".join(path.stem[:16] for path in kept) or "none"
            raise ConfigError(
                f"{wanted!r} is neither a manifest's file nor the beginning of one that waits or was refused ({told})."
            )
        manifest, signer = _read(fitting[0]), fitting[0].with_suffix(".coordinator")
        try:
            since = datetime.fromtimestamp(fitting[0].stat().st_mtime, UTC)
        except FileNotFoundError:  # approved meanwhile
            since = None
        return Asked(manifest, signer.read_text() if signer.exists() else "", since)

    def _approval(self, manifest_hash: str) -> Path:
        return self._state / "approvals" / f"{manifest_hash}.json"


def _keep(folder: Path, manifest: Manifest, coordinator: str) -> None:
    path = folder / f"{manifest.hash}.json"
    if path.exists():
        return
    durable.write_bytes(path.with_suffix(".coordinator"), coordinator.encode())
    durable.write_bytes(path, manifest.to_bytes())
    for other in _newest_first(folder)[_MOST_KEPT:]:
        _unlink(other)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".coordinator").unlink(missing_ok=True)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"), key=lambda path: (-path.stat().st_mtime_ns, path.name))


def _read(path: Path) -> Manifest:
    try:
        return Manifest.from_bytes(path.read_bytes())
    except OSError as cause:
        raise ConfigError(f"{path} can't be read ({cause.strerror}).") from None
    except ProtocolError as problem:
        raise ConfigError(f"{path}: {problem}") from None
