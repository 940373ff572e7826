"""The federation's certificate authority, which lies at the coordinator; `federation.pki` describes what it issues.

A certificate holds from ten minutes before it was made, as clocks differ.
"""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from federation import pki
from federation.pki import CertificateError, Wish
from tokenizer import durable
from tokenizer.errors import ConfigError

AUTHORITY_DAYS, SERVER_DAYS, MEMBER_DAYS = 3650, 365, 90

_SKEW = timedelta(minutes=10)
_PEM = serialization.Encoding.PEM
_SHORTEST_PASSPHRASE = 12


class Authority:
    """The federation's certificate authority: its key, and the certificate that members trust."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key, self.certificate = key, certificate

    @classmethod
    def create(
        cls, key: Path, certificate: Path, federation: str, passphrase: str | None, now: datetime
    ) -> "Authority":
        """Make an authority and write its two files; its key is encrypted if there is a passphrase.

        Raises:
            ConfigError: one of the files is there, or the passphrase is too short.
        """
        if certificate.exists():
            raise ConfigError(f"{certificate} is there already; a federation keeps its authority.")
        if passphrase is not None and len(passphrase) < _SHORTEST_PASSPHRASE:
            raise ConfigError(f"The passphrase is too short; take {_SHORTEST_PASSPHRASE} characters or more.")
        private = pki.make_key(key, passphrase)
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
                x509.NameAttribute(NameOID.COMMON_NAME, f"{federation} authority"[:64]),
            ]
        )
        builder = _builder(name, name, private.public_key(), now, now + timedelta(days=AUTHORITY_DAYS))
        usage = _usage(key_cert_sign=True, crl_sign=True)
        signed = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(private, hashes.SHA384())
        )
        durable.write_bytes(certificate, signed.public_bytes(_PEM))
        return cls(private, signed)

    @classmethod
    def open(cls, key: Path, certificate: Path, passphrase: str | None) -> "Authority":
        """Read an authority's files.

        Raises:
            ConfigError: the key can't be read or used.
            CertificateError: the certificate is not this key's.
        """
        private = pki.read_key(key, passphrase)
        signed = pki.read_certificate(certificate)
        if signed.public_key() != private.public_key():
            raise CertificateError(f"{certificate} does not belong to {key}; restore both from one backup.")
        return cls(private, signed)

    @property
    def pem(self) -> bytes:
        """The certificate that members trust."""
        return self.certificate.public_bytes(_PEM)

    def issue(self, wish: Wish, now: datetime, days: float = MEMBER_DAYS) -> bytes:
        """Give a member's certificate, PEM; it says what the wish says and nothing else."""
        subject = x509.Name([self._organization, *pki.subject(wish.name, wish.role)])
        until = self._until(now, days)
        builder = _builder(subject, self.certificate.subject, wish.key, now, until).add_extension(
            x509.SubjectAlternativeName([pki.urn(wish.ed25519)]), critical=False
        )
        return self._signed(builder, ExtendedKeyUsageOID.CLIENT_AUTH).public_bytes(_PEM)

    def issue_server(
        self, key: ec.EllipticCurvePublicKey, addresses: list[str], now: datetime, days: float = SERVER_DAYS
    ) -> bytes:
        """Give the server's certificate for these host names and IP addresses, with the authority's behind it; PEM."""
        name = x509.NameAttribute(NameOID.COMMON_NAME, "fedcomet coordinator")
        until = self._until(now, days)
        builder = _builder(x509.Name([self._organization, name]), self.certificate.subject, key, now, until)
        names = x509.SubjectAlternativeName([_address(each) for each in dict.fromkeys(addresses)])
        signed = self._signed(builder.add_extension(names, critical=False), ExtendedKeyUsageOID.SERVER_AUTH)
        return signed.public_bytes(_PEM) + self.pem

    def _until(self, now: datetime, days: float) -> datetime:
        """When a certificate ends: with the authority's at the latest, or it would not hold as long as it says."""
        return min(now + timedelta(days=days), self.certificate.not_valid_after_utc)

    @property
    def _organization(self) -> x509.NameAttribute:
        return x509.NameAttribute(
            NameOID.ORGANIZATION_NAME, pki.only(self.certificate.subject, NameOID.ORGANIZATION_NAME)
        )

    def _signed(self, builder: x509.CertificateBuilder, purpose: x509.ObjectIdentifier) -> x509.Certificate:
        return (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
            .sign(self._key, hashes.SHA384())
        )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.astimezone(UTC) - _SKEW)
        .not_valid_after(until.astimezone(UTC))
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _address(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(text))
    except ValueError:
        return x509.DNSName(text)
