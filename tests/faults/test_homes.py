"""A site whose certificate has expired, and one whose home was put back from an old copy: by the daemon's own words."""

import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from client.budget import FILE, Budget, Limit
from client.home import SiteHome
from federation import pki
from federation.pki import Role
from server.enrolment import invite
from server.journal import Status
from server.plan import PrivacyPlan
from tests.field import Field, federation, node, until

pytestmark = pytest.mark.slow

_LIMIT = Limit(8.0, 1e-5)


def stop(field: Field, name: str) -> None:
    service = field.sites[name].service
    assert service is not None
    service.stop()


def says(field: Field, name: str, *words: str) -> dict[str, Any]:
    """Wait until a site is not well and says why; gives its health."""

    def found() -> dict[str, Any] | None:
        health = field.sites[name].health()
        there = not health["healthy"] and all(word in health.get("reason", "") for word in words)
        return health if there else None

    health: dict[str, Any] = until(found, lambda: str(field.sites[name].health()), 120)
    return health


def expired(field: Field, home: SiteHome) -> bytes:
    """A certificate of the site's that the authority gave for a day, two days ago."""
    key = pki.read_key(home.key)
    current = pki.read_member(home.certificate.read_bytes())
    secret = bytes.fromhex(current.fingerprint)
    request, proof = pki.ask(key, home.identity, current.name, current.role, secret)
    wish = pki.read_request(request, proof, secret)
    return field.home.open_authority(None).issue(wish, datetime.now(UTC) - timedelta(days=2), 1.0)


def test_a_new_key_of_a_site_that_runs_is_taken_up_without_an_alarm(tmp_path: Path) -> None:
    with federation(tmp_path) as field:
        site, before = field.sites["icu"], node(field.place, "icu")
        for words in ((), ("--new-key",)):
            field.cli("site", "renew", *words, "--home", str(site.home.path))
        until(lambda: node(field.place, "icu") not in (None, before), "the node is started again", 120)
        until(lambda: site.health()["healthy"], lambda: str(site.health()), 120)
        field.all_online()
        field.begin("first", rounds=2, min_sites=2, evaluate_every=0)
        field.finished("first")
        time.sleep(65)  # by then its health was told with the new certificate
        assert site.health()["control"] == "fine"
        told = [line["message"] for line in site.log() if line["level"] in ("warning", "error")]
        assert not [line for line in told if "does not know this site" in line or "was replaced" in line]


def test_an_expired_certificate_is_said_and_a_new_invitation_mends_it(tmp_path: Path) -> None:
    with federation(tmp_path) as field:
        site = field.sites["icu"]
        stop(field, "icu")
        pki.write_private(site.home.certificate, expired(field, site.home))
        field.run_site("icu")
        says(field, "icu", "The certificate of icu expired on", "new invitation", "fedcomet site join")
        assert any("The certificate of icu expired on" in line["message"] for line in site.log())
        journal = field.begin("first", rounds=2, min_sites=1, expect_sites=1, evaluate_every=0)
        field.finished("first")
        assert {entry.site for entry in journal.replies(2)} == {"ward"}

        stop(field, "icu")
        print_ = pki.fingerprint(pki.read_certificate(field.home.authority))
        token = invite(field.ledger, print_, "icu", Role.SITE, 1.0, "test")
        address = f"127.0.0.1:{field.home.settings.ports.enrol}"
        field.cli("site", "join", address, token, "--home", str(site.home.path), "--yes")
        field.run_site("icu")
        until(lambda: site.health()["healthy"], lambda: str(site.health()), 120)
        field.all_online()
        journal = field.begin("second", rounds=2, min_sites=2, evaluate_every=0)
        field.finished("second")
        assert {entry.site for entry in journal.replies(2)} == {"icu", "ward"}


def test_an_old_copy_of_a_home_is_said_and_its_budget_does_not_roll_back(tmp_path: Path) -> None:
    with federation(tmp_path, run=False) as field:
        for name, site in field.sites.items():
            limit = f"[privacy]\nepsilon_total = {_LIMIT.epsilon}\ndelta_total = {_LIMIT.delta}\n"
            site.home.policy.write_text(site.home.policy.read_text().replace("[privacy]\n", limit))
            field.run_site(name)
        field.all_online()
        site = field.sites["icu"]
        privacy = PrivacyPlan(sampling_rate=0.25, noise_multiplier=4.0, delta=1e-5)
        field.begin("first", rounds=2, min_sites=2, privacy=privacy)
        field.finished("first")
        stop(field, "icu")
        copy = tmp_path / "copy"
        shutil.copytree(site.home.path, copy, symlinks=True)
        held = spent(site.home)
        assert held > 0
        field.run_site("icu")
        field.all_online()
        field.begin("second", rounds=2, min_sites=2, privacy=privacy)
        field.finished("second")
        heard = until(lambda: told(field, "icu", held), "the coordinator hears of the budget", 120)
        stop(field, "icu")
        assert spent(site.home) > held

        shutil.rmtree(site.home.path)
        os.rename(copy, site.home.path)
        assert spent(site.home) == held
        field.run_site("icu")
        says(field, "icu", "icu answers nothing: its state was restored from a copy", "fedcomet site restored")
        field.all_online()  # its node is there to say so to whoever asks
        journal = field.begin("third", rounds=1, min_sites=1, privacy=privacy)
        field.finished("third")
        (refusal,) = [entry for entry in journal.sites() if entry.site == "icu"]
        assert refusal.status == Status.REFUSED
        assert "answers nothing" in refusal.reason
        assert told(field, "icu", held) == heard, "nobody is told less than before"
        assert spent(site.home) == held, "nothing private is begun"

        shown = field.cli("site", "restored", "--home", str(site.home.path), "--yes")
        assert "Epsilon 8 is charged. The site takes part again." in shown
        until(lambda: site.health()["healthy"], lambda: str(site.health()), 120)
        assert spent(site.home) >= 8.0
        journal = field.begin("fourth", rounds=1, min_sites=1, privacy=privacy)
        field.finished("fourth")
        (refusal,) = [entry for entry in journal.sites() if entry.site == "icu"]
        assert refusal.status == Status.REFUSED
        assert "privacy.epsilon_total" in refusal.reason


def spent(home: SiteHome) -> float:
    with Budget.open(home.state / FILE, _LIMIT) as budget:
        return budget.spent()


def told(field: Field, name: str, more_than: float) -> float | None:
    """The epsilon that the coordinator heard of last, if it is above one."""
    entries = field.ledger.budgets(name)
    return entries[-1].epsilon if entries and entries[-1].epsilon > more_than else None
