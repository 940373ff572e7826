import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from federation import pki
from federation.identity import Identity
from federation.invitation import Invitation
from federation.messages import is_site_name
from federation.pki import CertificateError, Role
from server.authority import Authority
from tokenizer.errors import ConfigError

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
ANSWERS = b"sha256 of an invitation"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca.key", tmp_path / "ca.crt", "test federation", None, NOW)


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Identity.at(tmp_path / "identity.key")


def test_a_members_certificate_binds_name_role_and_both_keys(
    tmp_path: Path, authority: Authority, identity: Identity
) -> None:
    key = pki.make_key(tmp_path / "tls.key")
    wish = pki.read_request(*pki.ask(key, identity, "icu", Role.VIEWER, ANSWERS), ANSWERS)
    pem = authority.issue(wish, NOW)
    member = pki.read_member(pem)
    assert (member.name, member.role, member.federation) == ("icu", Role.VIEWER, "test federation")
    assert member.ed25519 == identity.public
    assert member.node_key == pki.node_key(key.public_key()) == wish.node_key
    certificate = pki.load(pem, "it")
    assert pki.issued_by(certificate, authority.certificate)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


def test_no_certificate_outlives_its_authoritys(tmp_path: Path, authority: Authority, identity: Identity) -> None:
    key, end = pki.make_key(tmp_path / "tls.key"), authority.certificate.not_valid_after_utc
    wish = pki.read_request(*pki.ask(key, identity, "icu", Role.SITE, ANSWERS), ANSWERS)
    for pem in (
        authority.issue(wish, end - timedelta(days=5)),
        authority.issue_server(key.public_key(), ["localhost"], end - timedelta(days=5)),
    ):
        assert pki.load(pem, "it").not_valid_after_utc == end
    assert pki.load(authority.issue(wish, NOW, 7.0), "it").not_valid_after_utc == NOW + timedelta(days=7)


def test_a_certificate_says_only_what_was_proved_whatever_else_a_request_asks_for(
    tmp_path: Path, authority: Authority, identity: Identity
) -> None:
    key = pki.make_key(tmp_path / "tls.key")
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(pki.subject("icu", Role.SITE)))
    builder = builder.add_extension(x509.SubjectAlternativeName([pki.urn(identity.public)]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=True)
    request = builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.DER)
    wish = pki.read_request(request, identity.sign(pki._PROOF, request + ANSWERS), ANSWERS)
    extensions = pki.load(authority.issue(wish, NOW), "it").extensions
    assert extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_a_request_must_be_signed_with_both_keys_and_for_what_it_answers(tmp_path: Path, identity: Identity) -> None:
    key, other = pki.make_key(tmp_path / "tls.key"), Identity.at(tmp_path / "other.key")
    request, proof = pki.ask(key, identity, "icu", Role.SITE, ANSWERS)
    with pytest.raises(CertificateError, match="both keys"):
        pki.read_request(request, proof, b"sha256 of another invitation")
    with pytest.raises(CertificateError, match="both keys"):
        pki.read_request(request, other.sign(pki._PROOF, request + ANSWERS), ANSWERS)
    with pytest.raises(CertificateError, match="both keys"):
        pki.read_request(request, identity.sign("approval", request + ANSWERS), ANSWERS)
    bent = request[:-1] + bytes([request[-1] ^ 1])
    with pytest.raises(CertificateError, match=r"both keys|damaged"):
        pki.read_request(bent, identity.sign(pki._PROOF, bent + ANSWERS), ANSWERS)


def wrong_requests(identity: Identity) -> dict[str, bytes]:
    """Requests that are signed well, and wrong otherwise."""
    p384, urn = ec.generate_private_key(ec.SECP384R1()), pki.urn(identity.public)

    def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, name: str, role: str, *names: x509.GeneralName):
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
                x509.NameAttribute(NameOID.COMMON_NAME, name),
            ]
        )
        builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.DER)

    return {
        "another curve": request(ec.generate_private_key(ec.SECP256R1()), "icu", "site", urn),
        "RSA": request(rsa.generate_private_key(65537, 2048), "icu", "site", urn),
        "no Ed25519 key": request(p384, "icu", "site"),
        "a host name besides": request(p384, "icu", "site", urn, x509.DNSName("coordinator.example")),
        "another URI": request(p384, "icu", "site", x509.UniformResourceIdentifier("urn:fedcomet:ed25519:00")),
        "no role": request(p384, "icu", "root", urn),
        "a path for a name": request(p384, "../icu", "site", urn),
        "nonsense": b"nonsense",
        "too long": bytes(pki.MOST_REQUEST_BYTES + 1),
    }


def test_requests_that_are_not_as_they_must_be_are_refused(identity: Identity) -> None:
    for what, request in wrong_requests(identity).items():
        with pytest.raises(CertificateError) as refused:
            pki.read_request(request, identity.sign(pki._PROOF, request + ANSWERS), ANSWERS)
        assert str(refused.value), what


def test_the_authoritys_key_is_only_its_owners_and_encrypted_where_there_is_a_passphrase(tmp_path: Path) -> None:
    place = tmp_path / "ca.key", tmp_path / "ca.crt"
    Authority.create(*place, "federation", "correct horse battery", NOW)
    assert stat.S_IMODE(place[0].stat().st_mode) == 0o600
    assert b"ENCRYPTED" in place[0].read_bytes()
    Authority.open(*place, "correct horse battery")
    with pytest.raises(ConfigError, match="FEDCOMET_CA_PASSPHRASE"):
        Authority.open(*place, None)
    with pytest.raises(ConfigError, match="passphrase is wrong"):
        Authority.open(*place, "incorrect horse battery")
    with pytest.raises(ConfigError, match="keeps its authority"):
        Authority.create(*place, "federation", None, NOW)
    place[0].chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        Authority.open(*place, "correct horse battery")
    with pytest.raises(ConfigError, match="too short"):
        Authority.create(tmp_path / "b.key", tmp_path / "b.crt", "federation", "short", NOW)


def test_an_authority_with_another_ones_certificate_is_refused(tmp_path: Path) -> None:
    Authority.create(tmp_path / "a.key", tmp_path / "a.crt", "one", None, NOW)
    Authority.create(tmp_path / "b.key", tmp_path / "b.crt", "other", None, NOW)
    with pytest.raises(CertificateError, match="does not belong"):
        Authority.open(tmp_path / "a.key", tmp_path / "b.crt", None)


def test_a_key_takes_its_place_with_its_certificate_at_whatever_moment_the_writer_was_killed(
    tmp_path: Path, authority: Authority
) -> None:
    key, certificate = tmp_path / "server.key", tmp_path / "server.crt"
    first = pki.make_key(key)
    pki.write_private(certificate, authority.issue_server(first.public_key(), ["localhost"], NOW))
    before = pki.pair(key, certificate)
    second = pki.make_key(pki.next_key(key))
    assert pki.pair(key, certificate) == before  # killed behind the key
    pki.write_private(certificate, authority.issue_server(second.public_key(), ["localhost"], NOW))
    pem, chain = pki.pair(key, certificate)  # killed behind the certificate
    assert serialization.load_pem_private_key(pem, None).public_key() == pki.load(chain, "it").public_key()
    assert not pki.next_key(key).exists()
    pki.make_key(key)
    with pytest.raises(CertificateError, match="does not belong"):
        pki.pair(key, certificate)


def test_a_certificate_is_due_in_the_last_third_of_its_time_and_says_what_to_do(
    tmp_path: Path, authority: Authority, identity: Identity
) -> None:
    key = pki.make_key(tmp_path / "tls.key")
    wish = pki.read_request(*pki.ask(key, identity, "icu", Role.SITE, ANSWERS), ANSWERS)
    certificate = pki.load(authority.issue(wish, NOW, days=90), "it")

    def told(days: float) -> str | None:
        return pki.validity(certificate, NOW + timedelta(days=days)).warning("icu", "renew it")

    assert told(59) is None
    assert told(61) == "The certificate of icu expires in 29 days, on 2027-02-24 12:00 UTC; renew it."
    assert "in 12 hours" in (told(89.5) or "")
    assert "expired on 2027-02-24 12:00 UTC; renew it" in (told(91) or "")


NAMES = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True).filter(is_site_name)


@given(NAMES, st.sampled_from(list(Role)), st.binary(min_size=32, max_size=32))
def test_a_token_comes_back_as_it_was(name: str, role: Role, authority: bytes) -> None:
    made = Invitation.new(name, role, authority.hex())
    assert Invitation.read(made.token) == made
    assert Invitation.read(f"  {made.token[:40]}\n{made.token[40:]} ") == made
    assert made.secret.hex() not in repr(made)


@given(st.data())
def test_a_token_that_was_not_copied_whole_is_refused_before_it_is_used(data: st.DataObject) -> None:
    token = Invitation.new("icu", Role.SITE, "00" * 32).token
    place = data.draw(st.integers(0, len(token) - 1))
    letter = data.draw(st.sampled_from("abcXYZ019-_"))
    changed = token[:place] + letter + token[place + 1 :]
    for wrong in (token[:place], token[:place] + token[place + 1 :], *([changed] if changed != token else [])):
        with pytest.raises(ConfigError, match="whole invitation token"):
            Invitation.read(wrong)


def test_two_tokens_have_nothing_in_common_but_what_they_say() -> None:
    one, other = (Invitation.new("icu", Role.SITE, "00" * 32) for _ in range(2))
    assert one.secret != other.secret
    assert one.digest != other.digest
    with pytest.raises(ConfigError, match="no name"):
        Invitation.new("two words", Role.SITE, "00" * 32)
