"""How a site joins a federation, and checks at its first contact that it is the right one.

The token names the sha256 of the federation's authority. A handshake that sends nothing fetches the certificates that
the server shows; only if the authority is among them does the connection go on, and then it trusts that one alone. Keys
are made here and stay here; what leaves is on the list of what leaves (`client.outbound`) before it does.

What a site allows is for its people to say; a strict policy that names this coordinator is there to begin with.

A join that was cut off is done again with the same command: the same keys get the same certificate.
"""

import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.approval import site_key
from client.home import AUTHORITY, CERTIFICATE, KEY, Coordinator, SiteHome, write_settings
from client.outbound import Leaving, Outbound
from client.policy import TEMPLATE
from federation import pki
from federation.calls import ENROL_PORT, ENROLMENT
from federation.channel import CallError, Channel
from federation.control_pb2 import EnrolReply, EnrolRequest
from federation.identity import Identity, is_public_key
from federation.invitation import Invitation
from federation.messages import ProtocolError
from tokenizer import durable
from tokenizer.errors import ConfigError, FedcometError

_STATE = "state"
_NOBODY = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED


class WrongAuthority(FedcometError):
    """What answers is not the federation that the token is for."""


@dataclass(frozen=True)
class Fingerprints:
    """What the two people who join compare: of the federation's authority, and of the site's own two keys."""

    authority: str
    site: str


def join(
    home: Path,
    address: str,
    token: str,
    agree: Callable[[Invitation, Fingerprints], bool] = lambda *_: True,
    now: datetime | None = None,
    data: Path | None = None,
    policy: Path | None = None,
) -> SiteHome:
    """Join a federation.

    Args:
        home: the site's home; a new folder, or that of a site of the same name, which keeps its state.
        address: the coordinator's host, with ":port" where it isn't the usual one.
        token: as `fedcomet coordinator invite` gave it.
        agree: is shown both fingerprints before anything is sent; False ends it.
        now: the time.
        data, policy: where records and policy are, if elsewhere than in the home; what site.toml says already, stays.

    Raises:
        ConfigError: the token or the address is none, the home is another site's, or there are no such records.
        WrongAuthority: another server answers.
        CallError: the coordinator can't be reached, or refuses.
        ProtocolError: its answer makes no sense.
    """
    if data is not None and not data.is_dir():
        raise ConfigError(f"There is no folder {data}; say where the records are, or leave it to site.toml.")
    invitation = Invitation.read(token)
    _refuse_others(home, invitation.name)
    host, port = _split(address)
    authority = fetch_authority(host, port, invitation.authority)
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    state = home / _STATE
    identity, key = Identity.at(site_key(state)), _key(pki.next_key(home / KEY))
    own = pki.identity_fingerprint(identity.public, pki.node_key(key.public_key()))
    if not agree(invitation, Fingerprints(invitation.authority, own)):
        raise ConfigError("Not joined: the fingerprints were not agreed to. Nothing was sent.")
    request, proof = pki.ask(key, identity, invitation.name, invitation.role, invitation.digest)
    message = EnrolRequest(secret=invitation.secret, request=request, proof=proof)
    _note(state, identity, message, now or datetime.now(UTC))
    with Channel(_joined(host, port), authority) as channel:
        reply = _asked(channel, message, port)
    _check(reply, invitation, authority, identity, key)
    durable.write_bytes(home / AUTHORITY, authority)
    pki.write_private(home / CERTIFICATE, reply.certificate.encode())
    pki.pair(home / KEY, home / CERTIFICATE)
    coordinator = Coordinator(
        address=host, fleet_port=reply.fleet_port, control_port=reply.control_port, key=reply.coordinator
    )
    if policy is None:
        _begin_policy(home / "policy.toml", reply.coordinator)
    write_settings(home, invitation.name, coordinator, data, policy)
    (home / "logs").mkdir(mode=0o700, exist_ok=True)
    return SiteHome.open(home)


def _asked(channel: Channel, message: EnrolRequest, port: int) -> EnrolReply:
    """Ask for a certificate; where another of the coordinator's ports may have been asked, say so."""
    try:
        reply: EnrolReply = channel.call(ENROLMENT["Enrol"], message)
    except CallError as problem:
        if port == ENROL_PORT or problem.code not in _NOBODY:
            raise
        told = f"{problem} Or {port} is not its port for enrolment, which is {ENROL_PORT} unless the coordinator says."
        raise CallError(problem.code, told) from None
    return reply


def fetch_authority(host: str, port: int, fingerprint: str, timeout_s: float = 20.0) -> bytes:
    """Give the certificate with a fingerprint, PEM, if a server shows it; nothing is sent but a TLS greeting.

    Raises:
        ConfigError: nothing answers.
        WrongAuthority: the server doesn't show it.
    """
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the fingerprint decides
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as shown,
        ):
            chain = _chain(shown)
    except OSError as cause:
        told = f"no answer within {timeout_s:g} s" if isinstance(cause, TimeoutError) else cause.strerror or cause
        raise ConfigError(
            f"The coordinator at {_joined(host, port)} can't be reached ({told}); check the "
            "address, the network and the firewall."
        ) from None
    for der in chain:
        if sha256(der).hexdigest() == fingerprint:
            return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)
    raise WrongAuthority(
        f"What answers at {_joined(host, port)} is not the federation that this token is for: it shows another "
        "authority. The address may be wrong, or somebody sits in between; nothing was sent. Ask the coordinator to "
        "read its fingerprint to you."
    )


def _chain(shown: ssl.SSLSocket) -> list[bytes]:
    """The certificates that a server showed, DER; unchecked."""
    if hasattr(shown, "get_unverified_chain"):  # from Python 3.13 on
        given: list[bytes] = shown.get_unverified_chain()
        return given
    inner: Any = shown._sslobj  # type: ignore[attr-defined]
    return [each.public_bytes(ssl._ssl.ENCODING_DER) for each in inner.get_unverified_chain() or ()]  # type: ignore[attr-defined]


def _refuse_others(home: Path, name: str) -> None:
    if (home / "site.toml").exists() and (there := SiteHome.open(home).name) != name:
        raise ConfigError(f"{home} is the home of {there}, the token is for {name}; choose another folder with --home.")


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key that waits for a certificate: of a join that was cut off, or a new one."""
    return pki.read_key(path) if path.exists() else pki.make_key(path)


def _note(state: Path, identity: Identity, message: EnrolRequest, now: datetime) -> None:
    """Write down what leaves; of the token only its hash, which the list may show to others."""
    data = message.SerializeToString(deterministic=True)
    content = {
        "secret": {"bytes": len(message.secret), "sha256": sha256(message.secret).hexdigest()},
        "request": {"bytes": len(message.request), "sha256": sha256(message.request).hexdigest()},
        "proof": message.proof,
        "ed25519": identity.public,
    }
    leaving = Leaving("EnrolRequest", len(data), sha256(data).hexdigest(), "control", content=content)
    Outbound(state / "outbound", identity).note(leaving, now)


def _check(
    reply: EnrolReply, invitation: Invitation, authority: bytes, identity: Identity, key: ec.EllipticCurvePrivateKey
) -> None:
    """See that the answer is what was asked for.

    Raises:
        ProtocolError: it isn't.
    """
    certificate = pki.load(reply.certificate.encode(), "the coordinator's answer")
    member = pki.read_member(reply.certificate.encode())
    told = (member.name, member.role, member.ed25519)
    if (
        told != (invitation.name, invitation.role, identity.public)
        or certificate.public_key() != key.public_key()
        or not pki.issued_by(certificate, pki.load(authority, "the authority"))
        or not is_public_key(reply.coordinator)
        or not (0 < reply.fleet_port < 65536 and 0 < reply.control_port < 65536)
    ):
        raise ProtocolError("The coordinator's answer is not the certificate that was asked for; tell it so.")


def _begin_policy(path: Path, coordinator: str) -> None:
    """Write a strict policy that answers this coordinator, where there is none."""
    if path.exists():
        return
    example = f'# "ed25519:{"0" * 64}"'
    pki.write_private(path, TEMPLATE.read_text(encoding="utf-8").replace(example, f'"{coordinator}"').encode())


def _split(address: str) -> tuple[str, int]:
    """Host and port of "host", "host:port", "[ipv6]:port"."""
    host, separator, port = address.rpartition(":")
    if not separator or address.endswith("]") or (":" in host and not host.startswith("[")):
        host, port = address, str(ENROL_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(f"{address!r} is no address; write host or host:port, as the coordinator told.")
    return host, int(port)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
