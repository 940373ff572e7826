"""The coordinator's dashboard as browsers meet it: every page for every role, forms, hostile names, downloads."""

import csv
import hashlib
import html
import io
import re
import tempfile
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from federation import website
from federation.pki import Role
from server import tables
from server.dashboard import Dashboard
from server.ledger import Ledger
from server.ledger_entries import BudgetEntry, MetricEntry, RefusalEntry
from server.passwords import Passwords
from server.run_entries import Checkpoint, Phase, SiteEntry, Status
from server.tables import RunState
from tests.watched import ANNA, VERA, Browser, Watched, coordinator_home, hidden, manifest, play

HOSTILE = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>{{7*7}}"
RUN = HOSTILE.replace("/", "")
PAGES = ("/", "/runs", "/runs/stroke-2026", "/events", "/events?run=stroke-2026&what=round.", "/events.csv?site=ghent")
LEADERS_PAGES = (
    "/runs/stroke-2026/stop",
    "/runs/stroke-2026/checkpoints/6.safetensors",
    "/runs/stroke-2026/checkpoints/6.zip",
)


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        home = coordinator_home(Path(folder) / "home")
        with Ledger.open(home.ledger_url) as ledger:
            made = Watched(home, ledger)
            made.fill()
            yield made


@pytest.fixture(scope="module")
def app(watched: Watched) -> Any:
    return Dashboard(watched.home, watched.ledger, ("10.1.2.3",)).app()


@pytest.fixture(scope="module")
def anna(app: Any) -> Browser:
    browser = Browser(app)
    assert browser.sign_in(*ANNA).status_code == 303
    return browser


@pytest.fixture(scope="module")
def vera(app: Any) -> Browser:
    browser = Browser(app)
    assert browser.sign_in(*VERA).status_code == 303
    return browser


@pytest.mark.parametrize("path", PAGES)
def test_everybody_who_signed_in_reads_and_nobody_else(app: Any, anna: Browser, vera: Browser, path: str) -> None:
    assert anna.get(path).status_code == vera.get(path).status_code == 200
    answer = Browser(app).get(path)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/sign-in?next=%2F")


@pytest.mark.parametrize("path", LEADERS_PAGES)
def test_only_coordinators_wish_and_take_models_away(app: Any, anna: Browser, vera: Browser, path: str) -> None:
    assert anna.get(path).status_code == 200
    refused = vera.get(path)
    assert refused.status_code == 403
    assert "This takes a coordinator; vera is a viewer." in refused.text
    assert Browser(app).get(path).status_code == 303


def test_a_viewer_is_offered_nothing_that_is_refused(anna: Browser, vera: Browser) -> None:
    for word in ("/stop", "/pause", ".safetensors", ".zip"):
        assert word in anna.get("/runs/stroke-2026").text
        assert word not in vera.get("/runs/stroke-2026").text


def test_every_answer_bears_what_browsers_must_know(app: Any, anna: Browser) -> None:
    strange = Browser(app, base="https://evil.example")
    answers = [anna.get(path) for path in (*PAGES, *LEADERS_PAGES, "/nothing", "/static/page.css", "/static/x")]
    for answer in (*answers, Browser(app).get("/"), strange.get("/sign-in")):
        for name, value in website.HEADERS.items():
            assert answer.headers[name] == value
    assert "unsafe" not in website.HEADERS["Content-Security-Policy"]


def test_pages_have_no_inline_styles_or_scripts_and_load_nothing_from_elsewhere(anna: Browser) -> None:
    for path in ("/", "/runs", "/runs/stroke-2026", "/events", "/runs/stroke-2026/stop"):
        page = Shape(anna.get(path).text)
        assert not page.inline, path
        assert all(each.startswith("/") and not each.startswith("//") for each in page.loaded), path


def test_pages_can_be_read_aloud(anna: Browser) -> None:
    for path in ("/", "/runs", "/runs/stroke-2026", "/events", "/runs/stroke-2026/stop"):
        page = Shape(anna.get(path).text)
        assert page.counts["main"] == page.counts["h1"] == page.counts["title"] == 1
        assert page.counts["nav"] == 1
        assert page.counts["caption"] == page.counts["table"]
        assert page.headers_without_scope == 0
        assert page.unlabelled == 0, path
        assert (
            page.levels == sorted(page.levels)
            or max(b - a for a, b in zip(page.levels, page.levels[1:], strict=False)) <= 1
        )
        assert len(page.ids) == len(set(page.ids))
    assert 'id="said" role="status"' in anna.get("/runs/stroke-2026").text


def test_the_run_page_shows_what_the_ledger_holds(anna: Browser) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", " ", anna.get("/runs/stroke-2026").text))
    for told in ("round 7 of 8, collecting answers; 2 of 3 sites have answered", "waited for", "3.900", "5 older ones",
                 "No update", "Refusals and failures",
                 "refused: the update is not finite: 12 values are NaN or infinite", "2.5 min"):  # fmt: skip
        assert told in text
    assert anna.get("/runs/stroke-2026").text.count("<polyline") == 5


def test_the_run_page_shows_the_coordinators_own_questions(anna: Browser, watched: Watched) -> None:
    for number, value in ((1, 0.61), (2, 0.7342)):
        for name in ("central.auroc", "central.icu.auroc", "central.loss"):
            watched.ledger.note_metric(watched.run, MetricEntry(number, name, value))
    page = anna.get(f"/runs/{watched.run}").text
    for phrase in ("AUROC, mean of the tasks", "icu.auroc", "on the coordinator&#39;s cohort", "0.7342"):
        assert html.unescape(phrase) in html.unescape(page)


def test_unknown_pages_and_runs_are_404(anna: Browser) -> None:
    for path in ("/nothing", "/runs/nothing", "/runs/nothing/stop", "/runs/stroke-2026/explode", "/static/../pki.py",
                 "/runs/stroke-2026/checkpoints/5.safetensors", "/runs/stroke-2026/checkpoints/99.zip"):  # fmt: skip
        assert anna.get(path).status_code == 404, path


# --- signing in ---


def test_cookies_are_for_this_host_only_and_out_of_scripts_reach(app: Any) -> None:
    browser = Browser(app)
    first = browser.get("/sign-in").headers["set-cookie"]
    answer = browser.sign_in(*ANNA)
    for cookie in (first, answer.headers["set-cookie"]):
        assert cookie.startswith("__Host-fedcomet=")
        for flag in ("HttpOnly", "Secure", "SameSite=strict", "Path=/"):
            assert flag in cookie
        assert "Domain" not in cookie
    assert browser.get("/sign-in?next=/runs").headers["location"] == "/runs", "who is in stays in"
    assert browser.get("/").status_code == 200
    assert first.split(";")[0] != answer.headers["set-cookie"].split(";")[0], "a mark from before is not kept"


def test_signing_out_ends_the_session_for_good(app: Any) -> None:
    browser = Browser(app)
    browser.sign_in(*VERA)
    copy = Browser(app, cookies=browser.cookies)
    assert browser.submit(browser.get("/"), "/sign-out").status_code == 303
    assert copy.get("/").status_code == browser.get("/").status_code == 303


def test_wrong_passwords_are_counted_by_address(app: Any, watched: Watched) -> None:
    browser = Browser(app, address="198.51.100.9")
    for _ in range(5):
        answer = browser.sign_in("anna", "wrong")
        assert answer.status_code == 403
        assert "Nothing tells which part" in answer.text
    assert browser.sign_in(*ANNA).status_code == 429
    assert Browser(app, address="198.51.100.10").sign_in(*ANNA).status_code == 303
    (event,) = watched.ledger.events(what="dashboard.throttled")
    assert event.text == "from 198.51.100.9"


def test_one_goes_on_where_one_was_and_nowhere_else(app: Any) -> None:
    for wanted, goes in (
        ("/runs/stroke-2026?x=1", "/runs/stroke-2026?x=1"),
        ("//evil.example/", "/"),
        ("https://evil.example/", "/"),
        ("/\\evil.example", "/"),
        ("/a\r\nSet-Cookie: x=y", "/"),
        ("", "/"),
    ):
        browser = Browser(app)
        page = browser.get("/sign-in")
        answer = browser.submit(page, "/sign-in", name=VERA[0], secret=VERA[1], next=wanted)
        assert answer.headers["location"] == goes


def test_a_new_password_ends_open_sessions(app: Any, watched: Watched) -> None:
    passwords = Passwords(watched.home.path)
    passwords.set("otto", "viewer", "a password of otto")
    browser = Browser(app)
    browser.sign_in("otto", "a password of otto")
    assert browser.get("/").status_code == 200
    passwords.set("otto", "viewer", "another one of otto")
    assert browser.get("/").status_code == 303


def test_other_host_names_are_refused(app: Any) -> None:
    for base in ("https://federation.example", "https://127.0.0.1:8446", "https://[::1]:8446", "https://10.1.2.3"):
        assert Browser(app, base=base).get("/sign-in").status_code == 200, base
    for base in ("https://evil.example", "https://localhost.evil.example", "https://127.0.0.2"):
        assert Browser(app, base=base).get("/sign-in").status_code == 421, base


# --- forms ---


def test_a_wish_needs_a_form_of_this_page(app: Any, anna: Browser, vera: Browser, watched: Watched) -> None:
    path = "/runs/stroke-2026/pause"
    form = hidden(anna.get(path))
    others = hidden(vera.get("/"))
    refused = [
        anna.post(path, {}),
        anna.post(path, {"form_token": "0" * 64}),
        anna.post(path, others),
        anna.post(path, form, origin="https://evil.example"),
        anna.post(path, form, sec_fetch_site="same-site"),
        vera.post(path, others),
        Browser(app).post(path, form),
    ]
    assert [answer.status_code for answer in refused] == [403] * 7
    assert watched.ledger.run("stroke-2026").state == RunState.RUNNING


def test_forms_that_are_too_long_or_damaged_are_refused(anna: Browser) -> None:
    form = hidden(anna.get("/runs/stroke-2026/pause"))
    assert anna.post("/runs/stroke-2026/pause", {**form, "x": "y" * 100_000}).status_code == 413
    assert anna.post("/runs/stroke-2026/pause", {**form, **{f"x{n}": "" for n in range(50)}}).status_code == 400


def test_a_coordinator_pauses_resumes_and_stops_as_the_ledger_then_says(anna: Browser, watched: Watched) -> None:
    play(watched.ledger, watched.home, "other", rounds=2)
    for wish, state in (("pause", RunState.PAUSING), ("resume", RunState.RUNNING), ("stop", RunState.STOPPING)):
        page = anna.get(f"/runs/other/{wish}")
        assert "other?" in page.text
        answer = anna.submit(page, f"/runs/other/{wish}")
        assert (answer.status_code, answer.headers["location"]) == (303, "/runs/other")
        assert watched.ledger.run("other").state == state
    assert watched.ledger.events(run="other", what="run.stopping")[-1].who == "dashboard:anna"
    late = anna.submit(anna.get("/runs/other/pause"), "/runs/other/pause")
    assert late.status_code == 409
    assert "only a run that is running can pause" in late.text


def test_a_wish_is_never_a_link(anna: Browser, watched: Watched) -> None:
    before = watched.ledger.run("stroke-2026").state
    for wish in ("pause", "resume", "stop"):
        assert anna.get(f"/runs/stroke-2026/{wish}?form_token=x").status_code == 200
    assert watched.ledger.run("stroke-2026").state == before


# --- what the ledger holds may be hostile ---


def test_hostile_names_and_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    home = coordinator_home(tmp_path / "home", name="F<script>")
    with Ledger.open(home.ledger_url) as ledger:
        ledger.members.invite(HOSTILE, Role.SITE, "00" * 32, 60)
        ledger.members.seen(HOSTILE, HOSTILE, "online")
        ledger.propose(RUN, b"plan")
        journal = ledger.journal(RUN)
        journal.start(RUN, b"plan")
        journal.begin(manifest())
        journal.note_site(SiteEntry(HOSTILE, Status.REFUSED, HOSTILE))
        journal.enter(1, Phase.ANNOUNCED)
        journal.enter(1, Phase.AGGREGATED, Checkpoint(HOSTILE, HOSTILE, 1))
        ledger.note_refusal(RUN, RefusalEntry(1, HOSTILE, HOSTILE, HOSTILE, 0.0))
        ledger.report_budget(BudgetEntry(HOSTILE, 1.0, 1e-6, 2.0, 1e-6))
        ledger.approve(manifest().hash, HOSTILE, "00")
        ledger.note(HOSTILE, HOSTILE, run=RUN, site=HOSTILE, told="=cmd|' /C calc'!A0")
        ledger.abandon(RUN, HOSTILE)
        browser = Browser(Dashboard(home, ledger).app())
        browser.sign_in(*ANNA)
        run = re.search(r'href="(/runs/[^"]+)"', browser.get("/runs").text)
        assert run is not None
        for path in ("/", "/runs", run.group(1), f"{run.group(1)}/resume", "/events", f"/events?run={HOSTILE}"):
            answer = browser.get(path)
            assert answer.status_code == 200, path
            assert "<script>alert" not in answer.text
            assert "<img" not in answer.text
            assert "49" not in re.findall(r"\{?\{?7\*7\}?\}?|>49<", answer.text)
            assert not Shape(answer.text).inline
        cells = [row[-1] for row in csv.reader(io.StringIO(browser.get("/events.csv").text))]
        assert "'=cmd|' /C calc'!A0" in cells


@pytest.mark.parametrize(
    "path", ["../../ca.key", "/etc/passwd", "checkpoints/../../../ca.key", "checkpoints", "", "link"]
)
def test_what_a_checkpoint_names_must_lie_in_the_run_s_own_folder(anna: Browser, watched: Watched, path: str) -> None:
    link = watched.home.runs / watched.run / "link"
    if not link.is_symlink():
        link.symlink_to(watched.home.path / "ca.key")
    row = tables.Checkpoint
    with watched.ledger.transactions.engine.begin() as connection:
        connection.execute(update(row).where(row.round == 1).values(path=path))
    for form in ("safetensors", "zip"):
        answer = anna.get(f"/runs/{watched.run}/checkpoints/1.{form}")
        assert answer.status_code == 404
        assert "PRIVATE KEY" not in answer.text


def test_runs_whose_names_are_paths_have_nothing_to_take_away(anna: Browser, watched: Watched) -> None:
    watched.ledger.propose("..", b"")
    for path in ("/runs/%2e%2e/checkpoints/1.zip", "/runs/..%2f..%2fca.key", "/runs/%2e%2e%2fca.key/checkpoints/1.zip"):
        assert anna.get(path).status_code == 404, path


# --- what is taken away ---


def test_a_checkpoint_comes_byte_for_byte_and_is_noted(anna: Browser, watched: Watched) -> None:
    answer = anna.get("/runs/stroke-2026/checkpoints/6.safetensors")
    data = (watched.home.runs / "stroke-2026" / "checkpoints" / "0006.safetensors").read_bytes()
    assert answer.content == data
    assert "attachment" in answer.headers["content-disposition"]
    event = watched.ledger.events(what="checkpoint.downloaded")[-1]
    assert (event.who, event.run, event.round, event.text) == (
        "dashboard:anna", "stroke-2026", 6, hashlib.sha256(data).hexdigest()
    )  # fmt: skip


def test_an_export_is_a_whole_folder_and_leaves_nothing_behind(anna: Browser, watched: Watched) -> None:
    answer = anna.get("/runs/stroke-2026/checkpoints/6.zip")
    assert int(answer.headers["content-length"]) == len(answer.content)
    names = zipfile.ZipFile(io.BytesIO(answer.content)).namelist()
    for name in ("config.json", "model.safetensors", "codebook.json", "README.md"):
        assert f"0006/{name}" in names
    assert not list(watched.home.path.glob("export-*"))


def test_the_audit_trail_goes_back_page_by_page_and_as_csv(anna: Browser, watched: Watched) -> None:
    for number in range(230):
        watched.ledger.note("coordinator", "test.many", told=str(number))
    path, seen = "/events?what=test.many", []
    for _ in range(3):
        page = anna.get(path).text
        seen += [int(text) for text in re.findall(r'<td class="text">(\d+)</td>', page)]
        older = re.search(r'href="(/events\?[^"]*before=[^"]*)"', page)
        path = html.unescape(older.group(1)) if older else ""
    assert (seen, path) == (list(range(229, -1, -1)), "")
    rows = list(csv.DictReader(io.StringIO(anna.get("/events.csv?what=test.many").text)))
    assert [int(row["text"]) for row in rows] == list(range(230))
    for before in ("x", "-1", "9" * 30, "1; DROP TABLE event"):
        assert (
            anna.get(
                "/events",
            ).status_code
            == anna.get(f"/events?before={before}").status_code
            == 200
        )


class Shape(HTMLParser):
    """What a page is made of, as far as the tests ask."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: dict[str, int] = dict.fromkeys(("main", "h1", "title", "nav", "caption", "table"), 0)
        self.inline: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.labels: set[str] = set()
        self.fields: list[str] = []
        self.levels: list[int] = []
        self.headers_without_scope = self.nameless = 0
        self.feed(text)
        self.unlabelled = self.nameless + len(set(self.fields) - self.labels)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attributes}
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.inline += [name for name in told if name == "style" or name.startswith("on")]
        self.inline += [tag] if tag == "style" or (tag == "script" and "src" not in told) else []
        self.loaded += [told[name] for name in ("src", "href", "action") if name in told and told[name][:1] != "#"]
        self.ids += [told["id"]] if "id" in told else []
        self.labels |= {told["for"]} if tag == "label" else set()
        self.fields += [told.get("id", "?")] if tag == "input" and told.get("type") != "hidden" else []
        self.levels += [int(tag[1])] if re.fullmatch(r"h[1-6]", tag) else []
        self.headers_without_scope += tag == "th" and "scope" not in told
        self.nameless += told.get("role") in ("img", "region") and not told.get("aria-label")
