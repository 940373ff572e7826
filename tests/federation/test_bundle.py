"""Claims about what Flower ships to sites: named files, signed by a trusted coordinator, equal to what is installed."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation import bundle
from federation.identity import Identity

HERE = Path(bundle.__file__).parent / "flower_app"


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.at(tmp_path_factory.mktemp("key") / "key")


@pytest.fixture(scope="module")
def content() -> bytes:
    return bundle.build()


def names(content: bytes) -> set[str]:
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        return set(opened.namelist())


def rewritten(content: bytes, **files: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, files.pop(name, old.read(name)))
        for name, data in files.items():
            new.writestr(name, data)
    return made.getvalue()


def test_a_bundle_holds_the_named_files_whatever_lies_beside_them(tmp_path: Path, content: bytes) -> None:
    shutil.copytree(HERE, tmp_path / "app")
    for stray in ("patients.json", "rows.jsonl", "notes.md", "more.py", "table.toml", "x.yaml"):
        (tmp_path / "app" / stray).write_text('{"subject_id": 1}')
    (tmp_path / "app" / "records").mkdir()
    (tmp_path / "app" / "records" / "a.json").write_text("[]")
    made = bundle.build(tmp_path / "app")
    assert names(made) == {*bundle.FILES, ".info/CONTENT"}
    assert made == content
    assert made == bundle.build()


def test_a_bundle_that_lacks_a_file_is_not_built(tmp_path: Path) -> None:
    shutil.copytree(HERE, tmp_path / "app")
    (tmp_path / "app" / "fedcomet_site.py").unlink()
    with pytest.raises(ValueError, match=r"lacks fedcomet_site\.py"):
        bundle.build(tmp_path / "app")


def test_a_signed_bundle_is_taken_and_flower_itself_agrees(content: bytes, identity: Identity) -> None:
    from flwr.supercore.fab import Fab
    from flwr.supernode.start_client_internal import _verify_fab

    signed = bundle.sign(content, identity)
    assert bundle.objection(content, signed, [identity.public]) is None
    fab = Fab(bundle.digest(content), content, signed)
    assert _verify_fab(fab, bundle.trusted_entities([identity.public]))


def test_a_bundle_without_a_trusted_signature_is_refused(tmp_path: Path, content: bytes, identity: Identity) -> None:
    other = Identity.at(tmp_path / "other")
    signed = bundle.sign(content, identity)
    moved = {key.replace(identity.public[8:], other.public[8:]): told for key, told in signed.items()}
    late = json.loads(next(told for key, told in signed.items() if key.startswith("fpk_")))
    late["signed_at"] += 1
    changed = {**signed, f"fpk_{identity.public[8:]}": json.dumps(late)}
    for given_, keys in (
        ({}, [identity.public]),
        (signed, []),
        (signed, [other.public]),
        (moved, [other.public]),
        (changed, [identity.public]),
    ):
        told = bundle.objection(content, given_, keys)
        assert told is not None
        assert "has signed it" in told


@given(where=st.integers(min_value=0), bit=st.integers(0, 7))
def test_one_changed_bit_is_refused(content: bytes, identity: Identity, where: int, bit: int) -> None:
    altered = bytearray(content)
    altered[where % len(altered)] ^= 1 << bit
    signed = bundle.sign(content, identity, 1_700_000_000)
    assert bundle.objection(bytes(altered), signed, [identity.public]) is not None


def test_code_that_is_not_installed_here_is_refused_though_a_trusted_key_signed_it(
    content: bytes, identity: Identity
) -> None:
    for odd, named in (
        (rewritten(content, **{"fedcomet_site.py": b"import os\n"}), "fedcomet_site.py"),
        (rewritten(content, **{"patients.json": b"[]"}), "patients.json"),
        (rewritten(content, **{"pyproject.toml": b"[project]\n"}), "pyproject.toml"),
        (rewritten(content, **{"sitecustomize.py": b""}), "sitecustomize.py"),
    ):
        told = bundle.objection(odd, bundle.sign(odd, identity), [identity.public])
        assert told is not None
        assert named in told


@given(data=st.binary(max_size=300), told=st.dictionaries(st.text(max_size=8), st.text(max_size=40), max_size=3))
def test_whatever_arrives_is_read_with_care(identity: Identity, data: bytes, told: dict[str, str]) -> None:
    odd = {**told, f"fpk_{identity.public[8:]}": "[" * 50}
    assert bundle.objection(data, odd, [identity.public]) is not None
    assert bundle.objection(data, bundle.sign(data, identity, 7), [identity.public]) is not None


def test_a_raw_signature_never_stands_for_a_statement(identity: Identity) -> None:
    with pytest.raises(ValueError, match="statement"):
        identity.sign_raw(b"fedcomet request v1\n")
