"""Founding a federation, inviting, joining and revoking, as people type it."""

import subprocess
import sys
from pathlib import Path

from client.home import SiteHome
from server.home import CoordinatorHome
from tests import typed
from tests.joined import listening
from tests.superlink import REPOSITORY


def fedcomet(*arguments: object, status: int = 0, **environment: str) -> str:
    done = typed.fedcomet(*arguments, **{"COLUMNS": "400", **environment})
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if not status else done.stderr


def free_ports(home: Path) -> None:
    place = home / "coordinator.toml"
    text = place.read_text().replace("control = 8444", "control = 0").replace("enrol = 8445", "enrol = 0")
    place.write_text(text.replace("0.0.0.0", "127.0.0.1"))


def test_people_found_a_federation_invite_a_site_and_compare_fingerprints(tmp_path: Path) -> None:
    home, site = tmp_path / "home", tmp_path / "site"
    told = fedcomet("coordinator", "init", home, "--name", "Heart study", "--address", "127.0.0.1")
    free_ports(home)
    where = {"FEDCOMET_HOME": str(home)}
    token = fedcomet("coordinator", "invite", "icu", **where)
    assert token.count("\n") == 1
    with listening(tmp_path, CoordinatorHome.open(home)) as coordinator:
        seen = fedcomet("site", "join", coordinator.enrol_address, token, "--home", site, "--yes")
        shown = fedcomet("coordinator", "fingerprints", **where)
        authority = told.rpartition("fingerprint: ")[2].strip()
        assert authority in seen
        assert authority in shown
        own = next(line for line in shown.splitlines() if line.startswith("icu"))
        assert own.split("  ")[1] in seen
        fedcomet("site", "message", "the scanner is down", "--home", site)
        assert "icu: the scanner is down" in fedcomet("coordinator", "message", **where)
        assert "holds until" in fedcomet("site", "renew", "--home", site)
        fedcomet("coordinator", "rotate", **where)
        fedcomet("coordinator", "revoke", "icu", "--reason", "a test", **where)
        assert "icu was revoked" in fedcomet("site", "renew", "--home", site, status=1)
    assert SiteHome.open(site).name == "icu"


def test_a_passphrase_protects_the_authority_and_its_file_must_be_its_owners(tmp_path: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "passphrase"
    file.write_text("correct horse battery\n")
    arguments = ("coordinator", "init", home, "--name", "x", "--address", "localhost", "--passphrase-file", file)
    assert "chmod 600" in fedcomet(*arguments, status=1)
    file.chmod(0o600)
    assert "encrypted" in fedcomet(*arguments)
    where = {"FEDCOMET_HOME": str(home)}
    assert "FEDCOMET_CA_PASSPHRASE" in fedcomet("coordinator", "rotate", status=1, **where)
    fedcomet("coordinator", "rotate", FEDCOMET_CA_PASSPHRASE="correct horse battery", **where)
    assert "not empty" in fedcomet(*arguments, status=1)


def test_who_hands_in_the_token_by_a_file_is_still_asked_at_the_terminal(tmp_path: Path) -> None:
    home, site, file = tmp_path / "home", tmp_path / "site", tmp_path / "token"
    fedcomet("coordinator", "init", home, "--name", "Heart study", "--address", "127.0.0.1")
    free_ports(home)
    file.write_text(fedcomet("coordinator", "invite", "icu", "--home", home))
    in_a_terminal = (sys.executable, "-c", "import pty, sys; sys.exit(pty.spawn(['sh', '-c', *sys.argv[1:]]) >> 8)")
    with listening(tmp_path, CoordinatorHome.open(home)) as coordinator:
        program = f"'{sys.executable}' '{REPOSITORY}/fedcomet.py'"
        join = f"{program} site join {coordinator.enrol_address} - --home '{site}' < '{file}'"
        asked = "Does the coordinator read you the same federation's fingerprint?"
        for words, alone, status, told in (
            (("sh", "-c", join), True, 1, "--yes"),
            ((*in_a_terminal, join), False, 0, " has joined"),
        ):
            done = subprocess.run(
                words,
                input="y\n",
                capture_output=True,
                text=True,
                start_new_session=alone,
                check=False,
            )
            assert (done.returncode, told in done.stdout + done.stderr) == (status, True), done
            assert (asked in done.stdout) == (not alone)
