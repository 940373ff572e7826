import dataclasses
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from federation import flower
from federation.identity import Identity, is_public_key, signed_by, verify
from federation.messages import EvaluateRequest, PrepareRequest, Request, SurveyRequest, TrainRequest
from tokenizer.codebook import TokenizerOptions
from tokenizer.errors import ConfigError
from tokenizer.split import SplitRule

WEIGHTS = np.arange(5, dtype=np.float32)
REQUESTS: list[Request] = [
    SurveyRequest(SplitRule("k"), TokenizerOptions(), 5),
    PrepareRequest(b"manifest", b"codebook", 5.5),
    TrainRequest("0" * 64, 1, WEIGHTS, 7.0),
    EvaluateRequest("0" * 64, 1, "tuning", WEIGHTS, 7.0),
]


def test_a_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "identity" / "site.key"
    first = Identity.at(path)
    assert Identity.at(path).public == first.public
    assert is_public_key(first.public)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["site.key"]


def test_processes_that_come_first_together_end_up_with_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: Identity.at(tmp_path / "key").public, range(8)))
    assert len(set(keys)) == 1


def test_the_text_of_an_identity_does_not_hold_the_key(tmp_path: Path) -> None:
    identity = Identity.at(tmp_path / "key")
    pem = (tmp_path / "key").read_text()
    assert pem.splitlines()[1] not in f"{identity!r}{identity}"


def test_a_key_that_others_can_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    Identity.at(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        Identity.at(path)
    path.write_bytes(b"nonsense")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="not a private key"):
        Identity.at(path)
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path.write_bytes(X25519PrivateKey.generate().private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    with pytest.raises(ConfigError, match="another kind"):
        Identity.at(path)


def test_a_signature_holds_for_its_purpose_its_data_and_its_key(tmp_path: Path) -> None:
    one, other = Identity.at(tmp_path / "one"), Identity.at(tmp_path / "other")
    signature = one.sign("approval", b"data")
    assert verify(one.public, "approval", b"data", signature)
    assert not verify(other.public, "approval", b"data", signature)
    assert not verify(one.public, "outbound", b"data", signature)
    assert not verify(one.public, "approval", b"date", signature)
    for nonsense in ("", "zz", signature[:-2], "0" * 128):
        assert not verify(one.public, "approval", b"data", nonsense)
    for nonsense in ("", one.public[8:], "ed25519:xyz", "ed25519:" + "f" * 64):
        assert not verify(nonsense, "approval", b"data", signature)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.kind)
def test_a_request_is_signed_as_a_whole_and_the_signature_survives_flower(tmp_path: Path, request_: Request) -> None:
    identity = Identity.at(tmp_path / "key")
    signed = flower.from_record(flower.to_record(identity.sign_request(request_)))
    assert isinstance(signed, Request)
    assert signed_by(signed) == identity.public
    assert signed_by(request_) is None
    for field in dataclasses.fields(signed):
        value = getattr(signed, field.name)
        if isinstance(value, np.ndarray):
            changed = np.nextafter(value, np.float32(9))
        elif isinstance(value, (int, float)):
            changed = value + 1
        elif isinstance(value, (str, bytes)):
            changed = value[:-1] if value else type(value)(b"x") if isinstance(value, bytes) else "x"
        else:
            changed = dataclasses.replace(
                value, **({"key": "l"} if isinstance(value, SplitRule) else {"value_bins": 9})
            )
        assert signed_by(dataclasses.replace(signed, **{field.name: changed})) is None, field.name


def test_a_signature_can_not_be_taken_over_to_another_kind_of_request(tmp_path: Path) -> None:
    signed = Identity.at(tmp_path / "key").sign_request(REQUESTS[2])
    other = EvaluateRequest("0" * 64, 1, "tuning", WEIGHTS, 7.0, signed.coordinator, signed.signature)
    assert signed_by(other) is None


def test_a_key_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.chmod(tmp_path / "folder", 0o700)
    with pytest.raises(ConfigError, match="folder"):
        Identity.at(tmp_path / "folder")
