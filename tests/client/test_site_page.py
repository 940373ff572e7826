"""A site's own page: what it shows, to whom, and that damage in one part hides nothing of the others."""

import html
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from client.approval import Approvals, site_key
from client.dashboard import dashboard
from client.home import SiteHome
from client.outbound import Leaving, Outbound
from client.site_view import Window, troubles
from federation.identity import Identity
from tests.watched import Browser, site_home

TOKEN = "the token that was printed"
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def home(ram_path: Path) -> SiteHome:
    return site_home(ram_path / "site")


def visitor(app: Any, token: str = TOKEN) -> Browser:
    browser = Browser(app, base="http://127.0.0.1:8453", address="127.0.0.1")
    browser.submit(browser.get("/sign-in"), "/sign-in", secret=token)
    return browser


def said(browser: Browser) -> str:
    answer = browser.get("/")
    assert answer.status_code == 200
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", answer.text)).split())


def test_whoever_has_the_token_sees_what_left_what_it_cost_and_what_waits(home: SiteHome) -> None:
    text = said(visitor(dashboard(home, TOKEN)))
    for told in (
        "7 messages have left; the list of them is whole; 1 run waits for approval.",
        "What will run: stroke-2026",
        "the run has no differential privacy",
        "of 4 that the policy allows",
        "the coordinator can't be reached; trying again",
        "1 ×: too few patients",
        "Named",
    ):
        assert told in text
    assert "connected" not in text, "what is no trouble stays in the log"
    numbers = [int(n) for n in re.findall(r'<th scope="row">(\d+)</th>', visitor(dashboard(home, TOKEN)).get("/").text)]
    assert numbers == list(range(7, 0, -1)), "newest first"


def test_without_the_token_nothing_is_seen(home: SiteHome) -> None:
    app = dashboard(home, TOKEN)
    for token in ("", "another", TOKEN + "x"):
        browser = visitor(app, token)
        assert browser.get("/").status_code == 303
        assert browser.get("/live").status_code == 303
    elsewhere = Browser(app, base="http://site.example")
    assert elsewhere.get("/sign-in").status_code == 421, "a name that was made to point here is refused"


def test_the_page_changes_nothing(home: SiteHome) -> None:
    browser = visitor(dashboard(home, TOKEN))
    before = {path: path.read_bytes() for path in home.path.rglob("*") if path.is_file()}
    said(browser)
    assert browser.post("/", {}).status_code == 405
    assert {path: path.read_bytes() for path in home.path.rglob("*") if path.is_file()} == before


def test_a_refused_run_and_updates_without_privacy_are_told(home: SiteHome) -> None:
    browser = visitor(dashboard(home, TOKEN))
    assert "Refused by the policy" not in said(browser)
    approvals = Approvals(home.state)
    (digest,) = approvals.waiting()
    approvals.refuse(approvals.find(digest).manifest, "")
    listed = Outbound(home.state / "outbound", Identity.at(site_key(home.state)))
    listed.note(Leaving("train.reply", 10, "1" * 64, "train", run=digest, policy="1" * 64), datetime.now(UTC))
    text = said(browser)
    for told in (
        "0 runs wait for approval",
        f"Refused by the policy stroke-2026 {digest[:16]}",
        "privacy.training : the run has no differential privacy",
        "Updates of 1 run left without differential privacy : no epsilon is claimed",
    ):
        assert told in text, told


def test_a_changed_entry_breaks_the_list_and_is_named(home: SiteHome) -> None:
    browser = visitor(dashboard(home, TOKEN))
    assert "the list of them is whole" in said(browser)
    path = next((home.state / "outbound").glob("0*.jsonl"))
    path.write_bytes(path.read_bytes().replace(b'"bytes":4300512', b'"bytes":4300511', 1))
    text = said(browser)
    assert "the list of them is BROKEN" in text
    assert "entry 2" in text
    assert "Nothing may leave before that is understood" in text


def test_damage_in_one_part_hides_no_other(home: SiteHome) -> None:
    browser = visitor(dashboard(home, TOKEN))
    home.policy.write_text("version = 2")
    (home.state / "outbound" / "head.json").write_text("{}")
    (home.state / "budget.sqlite").write_bytes(b"no database")
    waiting = next((home.state / "waiting").glob("*.json"))
    waiting.write_text('{"name": "<script>alert(1)</script>"}')
    answer = browser.get("/")
    assert answer.status_code == 200
    assert HOSTILE not in answer.text
    text = said(browser)
    for told in ("policy.toml", "head.json", "the coordinator can't be reached; trying again", waiting.stem[:16]):
        assert told in text


def test_a_new_site_has_a_page_too(ram_path: Path) -> None:
    home = site_home(ram_path / "site", private=False)
    for name in ("state", "logs"):
        for path in sorted((home.path / name).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    text = said(visitor(dashboard(home, TOKEN)))
    assert "Nothing has left this site yet" in text
    assert "There is no privacy budget" in text


def test_hostile_texts_of_a_coordinator_are_shown_as_they_are(home: SiteHome) -> None:
    lines = [{"time": HOSTILE, "level": "error", "program": HOSTILE, "message": HOSTILE}]
    (home.path / "logs" / "site.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    home.policy.write_text(f"# {HOSTILE}\nversion = 1\n")
    answer = visitor(dashboard(home, TOKEN)).get("/")
    assert answer.text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3
    assert HOSTILE not in answer.text


def test_the_stamp_changes_with_what_is_shown_and_not_else(home: SiteHome) -> None:
    window = Window(home)
    before = window.stamp()
    assert window.stamp() == before
    digest = Approvals(home.state).waiting()[0]
    Approvals(home.state).approve(Approvals(home.state).find(digest).manifest, None)
    assert window.stamp() != before
    assert window.look().waiting == ()


def test_what_takes_long_is_done_again_only_when_something_changed(home: SiteHome) -> None:
    window = Window(home)
    first, second = window.look(), window.look()
    assert first.outbound is second.outbound
    assert first.budget is second.budget
    path = next((home.state / "outbound").glob("0*.jsonl"))
    os.utime(path, ns=(1, 1))
    assert window.look().outbound is not first.outbound


def test_only_the_latest_troubles_of_a_long_log_are_read(tmp_path: Path) -> None:
    lines = [json.dumps({"level": "warning", "message": f"{n} {'x' * 200}"}) for n in range(5000)]
    (tmp_path / "site.jsonl").write_text("\n".join([*lines, "no json", "[1]", '{"level": "info"}']) + "\n")
    found = troubles(tmp_path)
    assert [each.message.split()[0] for each in found] == [str(n) for n in range(4999, 4979, -1)]
    assert troubles(tmp_path / "nowhere") == []
