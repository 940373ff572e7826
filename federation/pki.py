"""The federation's certificates: who is who on its connections (X.509, RFC 5280; ECDSA on P-384).

A federation has one authority, whose key lies at the coordinator (`server.authority`). It issues certificates of two
kinds, neither of which can stand in for the other: the server's (TLS server) and members' (TLS client). A member's
binds one identity together:

    CN = its name, OU = its role, O = the federation
    subject public key = its P-384 key: TLS client, and Flower's node key
    SAN = urn:fedcomet:ed25519:<hex>: the Ed25519 key (`federation.identity`) that signs approvals and masked sums

A request for one is signed with both keys, the second time over the request and what it answers (an invitation, or the
certificate that it renews), so it proves both and fits nowhere else. What a request asks beyond that is not copied.
"""

import hashlib
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from federation.identity import Identity, is_public_key, verify
from federation.messages import is_site_name
from tokenizer import durable
from tokenizer.errors import ConfigError, FedcometError

MOST_REQUEST_BYTES = 4096
"""A request for a certificate has about 600."""

_SCHEME, _URN = "ed25519:", "urn:fedcomet:ed25519:"
_PROOF = "certificate request"
_PEM, _DER = serialization.Encoding.PEM, serialization.Encoding.DER


class Role(StrEnum):
    """What a member may do; `server.control` says which calls that is."""

    SITE = "site"
    COORDINATOR = "coordinator"
    VIEWER = "viewer"


class CertificateError(FedcometError):
    """A certificate, or a request for one, that is damaged, of somebody else, or not as it must be."""


@dataclass(frozen=True)
class Member:
    """What a member's certificate says.

    Attributes:
        name, role, federation: whose it is.
        ed25519: the public key of its signatures, as `federation.identity` writes it.
        node_key: the public key of its connections, see `node_key`.
        serial, fingerprint: of the certificate; hexadecimal digits, the latter its sha256.
        since, until: when it holds.
    """

    name: str
    role: Role
    federation: str
    ed25519: str
    node_key: str
    serial: str
    fingerprint: str
    since: datetime
    until: datetime


@dataclass(frozen=True)
class Wish:
    """A request for a member's certificate that proved both of its keys."""

    name: str
    role: Role
    ed25519: str
    key: ec.EllipticCurvePublicKey

    @property
    def node_key(self) -> str:
        """The public key of its connections, as in `Member`."""
        return node_key(self.key)


def make_key(path: Path, passphrase: str | None = None) -> ec.EllipticCurvePrivateKey:
    """Make a P-384 key in a file that only its owner can read, replacing what is there."""
    key = ec.generate_private_key(ec.SECP384R1())
    shut: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        shut = serialization.BestAvailableEncryption(passphrase.encode())
    write_private(path, key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, shut))
    return key


def read_key(path: Path, passphrase: str | None = None) -> ec.EllipticCurvePrivateKey:
    """Read a P-384 key.

    Raises:
        ConfigError: others may read it, it is none, or the passphrase is missing or wrong.
    """
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(f"{path}: others than its owner may use this private key; run chmod 600 on it.")
        data = path.read_bytes()
    except OSError as cause:
        raise ConfigError(f"{path}: the private key can't be read ({cause.strerror}).") from None
    shut = b"ENCRYPTED" in data
    if shut and passphrase is None:
        raise ConfigError(f"{path} is encrypted; set FEDCOMET_CA_PASSPHRASE or name --passphrase-file.")
    try:
        key = serialization.load_pem_private_key(data, (passphrase or "").encode() if shut else None)
    except (ValueError, TypeError):
        told = "the passphrase is wrong, or the file damaged" if shut else "is no private key; restore it from a copy"
        raise ConfigError(f"{path}: {told}.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{path} holds a key of another kind; a P-384 key is needed.")
    return key


def write_private(path: Path, data: bytes) -> None:
    """Write a file durably that nobody but its owner can read, at no moment."""
    with durable.file(path) as aside:
        aside.unlink(missing_ok=True)
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)


def node_key(key: ec.EllipticCurvePublicKey) -> str:
    """Give a public key as the ledger knows nodes by: SubjectPublicKeyInfo (DER), hexadecimal digits."""
    return key.public_bytes(_DER, serialization.PublicFormat.SubjectPublicKeyInfo).hex()


def pair(key: Path, certificate: Path) -> tuple[bytes, bytes]:
    """Give a private key and its certificate (with what stands behind it), PEM, which fit together.

    Who replaces both writes `next_key(key)` first, then the certificate; the next key takes its place here, also after
    a crash in between.

    Raises:
        ConfigError, CertificateError: they can't be read, or don't fit.
    """
    signed, following = read_certificate(certificate), next_key(key)
    if following.exists() and read_key(following).public_key() == signed.public_key():
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(following, key)
        durable.sync_directory(key.parent)
    if read_key(key).public_key() != signed.public_key():
        raise CertificateError(f"{certificate} does not belong to {key}; restore both from one backup, or renew them.")
    return key.read_bytes(), certificate.read_bytes()


def next_key(key: Path) -> Path:
    """Tell where the key lies that shall take a key's place."""
    return key.with_name(f"{key.name}.next")


def ask(
    key: ec.EllipticCurvePrivateKey, identity: Identity, name: str, role: Role, answers: bytes
) -> tuple[bytes, str]:
    """Ask for a member's certificate.

    Args:
        key, identity: of its connections and of its signatures.
        answers: what the request belongs to: the sha256 of an invitation, or of the certificate that it renews.

    Returns:
        The request (PKCS #10, DER), and the proof that `read_request` wants to see beside it.
    """
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject(name, role)))
    names = x509.SubjectAlternativeName([urn(identity.public)])
    request = builder.add_extension(names, critical=False).sign(key, hashes.SHA384()).public_bytes(_DER)
    return request, identity.sign(_PROOF, request + answers)


def read_request(request: bytes, proof: str, answers: bytes) -> Wish:
    """Read a request for a member's certificate, and see that it was signed with both keys.

    Raises:
        CertificateError: it is none, or a signature doesn't fit.
    """
    if len(request) > MOST_REQUEST_BYTES:
        raise CertificateError(f"The certificate request has {len(request):,} bytes; it must be one of fedcomet's.")
    try:
        read = x509.load_der_x509_csr(request)
        key, signed = read.public_key(), read.is_signature_valid
    except (ValueError, TypeError, InvalidSignature):
        raise CertificateError("The certificate request is damaged; run the command again.") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise CertificateError("The certificate request is for a key of another kind; a P-384 key is needed.")
    name, role, ed25519 = _read_names(read)
    if not signed or not verify(ed25519, _PROOF, request + answers, proof):
        raise CertificateError(
            "The certificate request is not signed with both keys that it names, for this invitation or certificate."
        )
    return Wish(name, role, ed25519, key)


def read_member(pem: bytes) -> Member:
    """Read a member's certificate; who issued it is for TLS or `issued_by` to check.

    Raises:
        CertificateError: it is none.
    """
    certificate = load(pem, "a certificate")
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CertificateError("The certificate is for a key of another kind; a P-384 key is needed.")
    name, role, ed25519 = _read_names(certificate)
    return Member(
        name=name,
        role=role,
        federation=only(certificate.subject, NameOID.ORGANIZATION_NAME),
        ed25519=ed25519,
        node_key=node_key(key),
        serial=f"{certificate.serial_number:x}",
        fingerprint=fingerprint(certificate),
        since=certificate.not_valid_before_utc,
        until=certificate.not_valid_after_utc,
    )


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Tell whether an authority's key signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def load(data: bytes, what: str) -> x509.Certificate:
    """Read the first certificate of PEM text; `what` names it in messages."""
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError:
        raise CertificateError(f"{what} is not a certificate; restore it from a copy, or join again.") from None


def read_certificate(path: Path) -> x509.Certificate:
    """Read the first certificate of a file.

    Raises:
        ConfigError: the file can't be read.
        CertificateError: it holds none.
    """
    try:
        return load(path.read_bytes(), str(path))
    except OSError as cause:
        raise ConfigError(f"{path}: the certificate can't be read ({cause.strerror}).") from None


def fingerprint(certificate: x509.Certificate) -> str:
    """The sha256 of a certificate, 64 hexadecimal digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def identity_fingerprint(ed25519: str, node: str) -> str:
    """Name both keys of a member, 64 hexadecimal digits: what two people compare when it joins."""
    return hashlib.sha256(f"{ed25519}\n{node}\n".encode()).hexdigest()


def spoken(digits: str) -> str:
    """Write a fingerprint in groups of four, to be read out and compared.

    Example:
        >>> spoken("00112233445566778899aabb")
        '0011 2233 4455 6677 8899 aabb'
    """
    return " ".join(digits[start : start + 4] for start in range(0, len(digits), 4))


@dataclass(frozen=True)
class Validity:
    """How long a certificate still holds.

    Attributes:
        until: its end.
        days_left: below 0 if it is over.
        due: whether it should be renewed: a third of its time, or less, is left.
    """

    until: datetime
    days_left: float
    due: bool

    def warning(self, whose: str, todo: str) -> str | None:
        """Say what to do about a certificate that is due or over; None if nothing is."""
        if not self.due:
            return None
        if self.days_left <= 0:
            return f"The certificate of {whose} expired on {self.until:%Y-%m-%d %H:%M} UTC; {todo}."
        left = f"{self.days_left:.0f} days" if self.days_left >= 2 else f"{self.days_left * 24:.0f} hours"
        return f"The certificate of {whose} expires in {left}, on {self.until:%Y-%m-%d %H:%M} UTC; {todo}."


def validity(certificate: x509.Certificate, now: datetime) -> Validity:
    """Tell how long a certificate still holds."""
    since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return Validity(until, (until - now) / timedelta(days=1), until - now <= (until - since) / 3)


def subject(name: str, role: Role) -> list[x509.NameAttribute]:
    """Give what a certificate's subject says of a member, but for its federation."""
    return [
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role.value),
        x509.NameAttribute(NameOID.COMMON_NAME, name),
    ]


def _read_names(read: x509.Certificate | x509.CertificateSigningRequest) -> tuple[str, Role, str]:
    """Name, role and Ed25519 key of a certificate or a request for one."""
    name, role = only(read.subject, NameOID.COMMON_NAME), only(read.subject, NameOID.ORGANIZATIONAL_UNIT_NAME)
    try:
        names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        raise CertificateError("The certificate names no Ed25519 key, or more than that; it is no member's.") from None
    text = uri.value if isinstance(uri, x509.UniformResourceIdentifier) else ""
    ed25519 = _SCHEME + text.removeprefix(_URN)
    if not text.startswith(_URN) or not is_public_key(ed25519):
        raise CertificateError("The certificate names no Ed25519 key; it is no member's.")
    if not is_site_name(name) or role not in set(Role):
        raise CertificateError(f"The certificate is for {name!r} as {role!r}, which names no member.")
    return name, Role(role), ed25519


def only(name: x509.Name, kind: x509.ObjectIdentifier) -> str:
    """Give the one value of a kind in a subject.

    Raises:
        CertificateError: there is none, or more.
    """
    values = [attribute.value for attribute in name.get_attributes_for_oid(kind)]
    if len(values) != 1 or not isinstance(values[0], str):
        raise CertificateError("The certificate's subject is not as a member's must be.")
    return values[0]


def urn(ed25519: str) -> x509.UniformResourceIdentifier:
    """Give the name under which a certificate has the key of signatures."""
    return x509.UniformResourceIdentifier(_URN + ed25519.removeprefix(_SCHEME))
