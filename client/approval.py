"""What a person at the site has agreed to: approved manifests, signed with the site's key, and those that wait.

    identity/site.key            the site's private key, made on first use; only its owner can read it
    approvals/<hash>.json        an approval; remove it to withdraw
    waiting/<hash>.json          a manifest that was sent and isn't approved, as it came
    waiting/<hash>.coordinator   the public key of whoever signed it; empty if nobody did

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
_MOST_WAITING = 20


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
    """A manifest that a person looks at, and the public key of whoever signed its request (empty: nobody)."""

    manifest: Manifest
    coordinator: str = ""


def site_key(state: Path) -> Path:
    """Tell where the key of the site with this state folder is."""
    return state / "identity" / "site.key"


class Approvals:
    """What has been approved at the site with this state folder, and what waits."""

    def __init__(self, state: Path) -> None:
        self._state = state

    def approve(self, manifest: Manifest, policy: str | None, now: datetime | None = None) -> Approval:
        """Sign a manifest; it no longer waits."""
        identity = Identity.at(site_key(self._state))
        time = (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds")
        bare = Approval(manifest.hash, policy, time)
        approval = replace(bare, signature=identity.sign(_PURPOSE, bare.to_bytes()))
        durable.write_bytes(self._approval(manifest.hash), approval.to_bytes())
        for path in self._waiting.glob(f"{manifest.hash}.*"):
            path.unlink()
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
        if self._path(manifest.hash).exists():
            return
        durable.write_bytes(self._waiting / f"{manifest.hash}.coordinator", coordinator.encode())
        durable.write_bytes(self._path(manifest.hash), manifest.to_bytes())
        for path in self._newest_first()[_MOST_WAITING:]:
            path.unlink(missing_ok=True)
            path.with_suffix(".coordinator").unlink(missing_ok=True)

    def waiting(self) -> list[str]:
        """Give the hashes of the manifests that wait, the latest first."""
        return [path.stem for path in self._newest_first()]

    def find(self, wanted: str) -> Asked:
        """Give the manifest in a file, or the one that waits and whose hash begins so.

        Raises:
            ConfigError: there is none, or several wait.
            ProtocolError: it is no manifest that this software knows.
        """
        if Path(wanted).is_file():
            return Asked(_read(Path(wanted)))
        fitting = [name for name in self.waiting() if wanted and name.startswith(wanted)]
        if len(fitting) != 1:
            told = ", ".join(name[:16] for name in self.waiting()) or "none"
            raise ConfigError(f"{wanted!r} is neither a manifest's file nor the beginning of a waiting one ({told}).")
        signer = self._waiting / f"{fitting[0]}.coordinator"
        return Asked(_read(self._path(fitting[0])), signer.read_text() if signer.exists() else "")

    @property
    def _waiting(self) -> Path:
        return self._state / "waiting"

    def _path(self, manifest_hash: str) -> Path:
        return self._waiting / f"{manifest_hash}.json"

    def _approval(self, manifest_hash: str) -> Path:
        return self._state / "approvals" / f"{manifest_hash}.json"

    def _newest_first(self) -> list[Path]:
        return sorted(self._waiting.glob("*.json"), key=lambda path: (-path.stat().st_mtime_ns, path.name))


def _read(path: Path) -> Manifest:
    try:
        return Manifest.from_bytes(path.read_bytes())
    except OSError as cause:
        raise ConfigError(f"{path} can't be read ({cause.strerror}).") from None
    except ProtocolError as problem:
        raise ConfigError(f"{path}: {problem}") from None
