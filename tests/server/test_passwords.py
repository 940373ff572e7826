import stat
from pathlib import Path

import pytest

from federation.sessions import Person
from server.passwords import Passwords
from tokenizer.errors import ConfigError


def test_a_password_lets_its_owner_in_and_only_its_owner_reads_the_file(tmp_path: Path) -> None:
    passwords = Passwords(tmp_path)
    assert passwords.check("anna", "correct horse") is None
    passwords.set("anna", "coordinator", "correct horse")
    passwords.set("vera", "viewer", "correct horse")
    person = passwords.check("anna", "correct horse")
    assert person is not None
    assert (person.name, person.role) == ("anna", "coordinator")
    assert passwords.check("anna", "correct horsf") is None
    assert passwords.check("nobody", "correct horse") is None
    assert passwords.people() == {"anna": "coordinator", "vera": "viewer"}
    file = tmp_path / "passwords.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert b"correct horse" not in file.read_bytes()


def test_another_password_role_or_none_ends_what_was_open(tmp_path: Path) -> None:
    passwords = Passwords(tmp_path)
    passwords.set("anna", "coordinator", "correct horse")
    person = passwords.check("anna", "correct horse")
    assert person is not None
    assert passwords.holds(person)
    assert not passwords.holds(Person("anna", "viewer", person.stamp))
    passwords.set("anna", "coordinator", "correct horse")
    assert not passwords.holds(person), "the same words with a new salt"
    passwords.remove("anna")
    assert passwords.people() == {}
    with pytest.raises(ConfigError, match="Nobody signs in as 'anna'"):
        passwords.remove("anna")


@pytest.mark.parametrize(
    ("name", "password", "told"),
    [
        ("anna", "short", "12 to"),
        ("anna", "x" * 2000, "12 to"),
        ("a/b", "correct horse", "no name"),
        ("", "c" * 12, "no name"),
    ],
)
def test_bad_names_and_passwords_are_refused(tmp_path: Path, name: str, password: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Passwords(tmp_path).set(name, "viewer", password)
    assert not (tmp_path / "passwords.json").exists()


def test_a_damaged_file_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "passwords.json").write_text('{"people": {"anna": {"role": "king"}}}')
    with pytest.raises(ConfigError, match=r"passwords\.json"):
        Passwords(tmp_path).check("anna", "correct horse")
