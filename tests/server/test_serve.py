"""`fedcomet coordinator serve` as a real process: what it keeps in order by itself, and how it ends."""

import re
import signal
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from federation import pki
from server import tables
from server.authority import Authority
from server.ledger import Ledger
from tests.field import FEDCOMET, Field, federation, found_federation, until
from tests.superlink import Service, free_ports, machine

pytestmark = pytest.mark.slow


def metrics(field: Field) -> dict[str, float]:
    """What the coordinator's daemon measures."""
    with urllib.request.urlopen(f"http://127.0.0.1:{field.home.settings.ports.health}/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_the_servers_certificate_is_renewed_and_what_people_must_see_to_is_told(tmp_path: Path) -> None:
    home, now = found_federation(tmp_path), datetime.now(UTC)
    for path in (home.authority_key, home.authority):
        path.unlink()
    Authority.create(home.authority_key, home.authority, "daemons", None, now - timedelta(days=3400))
    home.rotate(None, now - timedelta(days=300))
    with machine(tmp_path) as place, Ledger.open(home.ledger_url) as ledger:
        field = Field(tmp_path, home, place, ledger)
        serving = field.serve()
        until(lambda: metrics(field).get("fedcomet_coordinator_warnings"), field.told, 60)
        told = field.health()
        serving.terminate()
        assert serving.wait() == 0
    end = pki.read_certificate(home.authority).not_valid_after_utc  # no certificate outlives it
    assert pki.read_certificate(home.server_certificate).not_valid_after_utc == end > now + timedelta(days=249)
    (warning,) = told["warnings"]
    assert re.match(r"The certificate of the authority expires in 2\d\d days, .*; found the federation anew", warning)
    logged = [line["message"] for line in field.log()]
    assert logged.count(warning) == 1
    assert logged.count("the server's certificate was due and has been renewed") == 1


def test_a_site_that_was_put_out_comes_back_by_itself(tmp_path: Path) -> None:
    """As when the coordinator's clock jumps past the end of its certificate, and back."""

    def expire(ledger: Ledger, at: float) -> None:
        def work(session: Session) -> None:
            session.get_one(tables.Site, "icu").expires_at = at

        ledger.transactions.write(work)

    with federation(tmp_path, ("icu", "ward"), run=False) as field:
        field.run_site("icu")
        field.all_online(1)
        before = field.ledger.members.get("icu").expires_at or 0.0
        expire(field.ledger, 1.0)
        until(lambda: field.health()["sites"] == 1, field.told, 60)
        until(lambda: not field.sites["icu"].health()["healthy"], field.told, 120)
        expire(field.ledger, before)
        until(lambda: field.health()["online"] == 1, field.told, 300)
        until(lambda: field.sites["icu"].health()["healthy"], field.told, 120)
        assert field.health()["warnings"] == []
        field.join("lab")
        until(lambda: field.health()["sites"] == 3, field.told, 60)


def test_a_site_is_measured_as_long_as_it_is_enrolled(tmp_path: Path) -> None:
    def online(field: Field) -> dict[str, float]:
        found = [(name.split('"'), value) for name, value in metrics(field).items() if "_site_online{" in name]
        return {name: value for (_, name, _), value in found}

    with federation(tmp_path, ("icu", "ward"), run=False) as field:
        until(lambda: online(field) == {"icu": 0.0, "ward": 0.0}, field.told, 60)
        field.ledger.members.revoke("icu")
        until(lambda: online(field) == {"ward": 0.0}, field.told, 60)


def stop(service: Service, how: signal.Signals) -> None:
    """Send a signal, and see that the process takes it for the wish to end."""
    service.signal(how)
    assert service.wait(60) == 0, "".join(service.lines)
    assert "stopping; this coordinator had not begun to lead" in "".join(service.lines)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_coordinator_that_waits_for_the_lease_ends_when_it_is_told_to(tmp_path: Path, how: signal.Signals) -> None:
    home = found_federation(tmp_path)
    with machine(tmp_path) as place, Ledger.open(home.ledger_url) as ledger:
        with ledger.lead():
            standby = place.start(*FEDCOMET, "coordinator", "serve", str(home.path), "--wait")
            standby.wait_for("waiting for the coordinator on ")
            stop(standby, how)
        assert [each.what for each in ledger.events(what="lease.")] == ["lease.taken", "lease.given_back"]


def test_a_coordinator_whose_database_is_away_ends_when_it_is_told_to(tmp_path: Path) -> None:
    (nobody,) = free_ports(1)
    home = found_federation(tmp_path, database=f"postgresql+psycopg://fedcomet@127.0.0.1:{nobody}/ledger")
    with machine(tmp_path) as place:
        serving = place.start(*FEDCOMET, "coordinator", "serve", str(home.path))
        serving.wait_for("trying again")
        stop(serving, signal.SIGTERM)
