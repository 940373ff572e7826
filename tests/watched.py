"""A federation and a site with something to see on every page, for tests of the dashboards."""

import asyncio
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import update

from client.approval import Approvals, site_key
from client.budget import Budget, Release
from client.home import Coordinator, SiteHome, write_settings
from client.outbound import Leaving, Outbound
from client.policy import TEMPLATE
from federation import pki
from federation.accountant import Gaussian, Mechanisms
from federation.identity import Identity
from federation.manifest import Manifest
from federation.pki import Role
from model import checkpoint
from model.decoder import Decoder
from server import ledger_entries, tables
from server.authority import Authority
from server.home import CoordinatorHome, CoordinatorSettings, Federation
from server.journal import Journal
from server.ledger import Ledger
from server.ledger_entries import BudgetEntry
from server.passwords import Passwords
from server.run_entries import Checkpoint, Phase, ReplyEntry, ScoreEntry, SiteEntry, Status
from tests import tiny
from tokenizer.codebook import Codebook, Survey, TokenizerOptions

ANNA, VERA = ("anna", "correct horse battery"), ("vera", "staple of the viewer")
"""A coordinator and a viewer: names and passwords."""

SITES = ("aachen", "bergen", "ghent")
ROUNDS = 8


def manifest(name: str = "tiny", rounds: int = ROUNDS) -> Manifest:
    options = TokenizerOptions()
    return tiny.plan(tokenizer=options, name=name, rounds=rounds).manifest(Codebook.build(Survey(options)))


def coordinator_home(path: Path, name: str = "Stroke outcomes") -> CoordinatorHome:
    settings = CoordinatorSettings(federation=Federation(name=name, address="federation.example"))
    home = CoordinatorHome.init(path, settings, None)
    for (who, password), role in ((ANNA, "coordinator"), (VERA, "viewer")):
        Passwords(path).set(who, role, password)  # type: ignore[arg-type]
    return home


def enrol(ledger: Ledger, home: CoordinatorHome, name: str, *, days: float = 90.0, since_days: float = 1.0) -> None:
    """Enrol a site whose certificate holds for `days` from `since_days` ago."""
    secret = hashlib.sha256(name.encode()).digest()
    pem = certificate(home.open_authority(None), name, home.path / "keys" / name, secret, days, since_days)
    member = pki.read_member(pem)
    ledger.members.invite(name, Role.SITE, secret.hex(), 3600)
    ledger.members.enrol(
        secret.hex(),
        ledger_entries.Identity(
            certificate=pem.decode(),
            serial=member.serial,
            fingerprint=member.fingerprint,
            ed25519=member.ed25519,
            node_key=member.node_key,
            expires_at=member.until.timestamp(),
        ),
    )


def certificate(authority: Authority, name: str, folder: Path, secret: bytes, days: float, since_days: float) -> bytes:
    key = pki.make_key(folder / "tls.key")
    request, proof = pki.ask(key, Identity.at(folder / "site.key"), name, Role.SITE, secret)
    now = datetime.now(UTC) - timedelta(days=since_days)
    return authority.issue(pki.read_request(request, proof, secret), now, days)


def play(ledger: Ledger, home: CoordinatorHome, name: str, rounds: int = 6) -> None:
    """Let a run go: some rounds done, one open in which one has answered, refused or is waited for."""
    ledger.propose(name, b"plan")
    ledger.start(name)
    journal = ledger.journal(name)
    agreed = manifest(name)
    journal.start(name, b"plan")
    journal.begin(agreed)
    for site in SITES:
        journal.note_site(SiteEntry(site, Status.ACCEPTED, counts="{}"))
        ledger.approve(agreed.hash, site, "00" * 64)
    save_checkpoint(home.runs / name / "checkpoints" / f"{rounds:04d}.safetensors")
    for number in range(1, rounds + 1):
        _round(journal, number, home.runs / name)
    journal.enter(rounds + 1, Phase.ANNOUNCED)
    journal.enter(rounds + 1, Phase.TRAINING)
    journal.enter(rounds + 1, Phase.COLLECTING)
    journal.note_reply(_reply(rounds + 1, SITES[0]))
    told = "the update is not finite: 12 values are NaN or infinite"
    journal.note_reply(ReplyEntry(rounds + 1, SITES[1], Status.REFUSED, told))
    _spread_out(ledger)


def save_checkpoint(path: Path) -> None:
    path.parent.mkdir(parents=True)
    codebook = Codebook.build(Survey(TokenizerOptions()))
    config = manifest().model
    checkpoint.save(path, Decoder.create(config, seed=0), extra={"codebook_hash": codebook.hash})
    codebook.save(path.parents[1] / "codebook.json")


def _round(journal: Journal, number: int, run: Path) -> None:
    journal.enter(number, Phase.ANNOUNCED)
    journal.enter(number, Phase.TRAINING)
    for place, site in enumerate(SITES):
        if (number, place) == (3, 2):
            journal.note_reply(ReplyEntry(number, site, Status.LATE, "no answer before the deadline"))
            continue
        if place == 1:
            journal.enter(number, Phase.COLLECTING)
        journal.note_reply(_reply(number, site))
    path = run / "checkpoints" / f"{number:04d}.safetensors"
    data = path.read_bytes() if path.exists() else b""
    made = Checkpoint(f"checkpoints/{path.name}", hashlib.sha256(data).hexdigest(), len(data) or 1_234_567)
    journal.enter(number, Phase.AGGREGATED, made, {"train.loss": 2.2 + 2.1 * math.exp(-number / 2.2)})
    losses = {site: 2.35 + 0.1 * place + 2.1 * math.exp(-number / 2.5) for place, site in enumerate(SITES)}
    scores = [
        ScoreEntry(number, site, "tuning", Status.ACCEPTED, "", 1000 * loss, 1000) for site, loss in losses.items()
    ]
    journal.note_scores(scores, number, {"tuning.loss": sum(losses.values()) / 3})
    journal.enter(number, Phase.COMMITTED)


def _reply(number: int, site: str) -> ReplyEntry:
    return ReplyEntry(number, site, Status.ACCEPTED, "", "ab" * 32, 50_000, 40, 2.5, 1.1, 4_300_000, 61.0)


def _spread_out(ledger: Ledger) -> None:
    """Rounds of a test are done in no time: write down times as a real run has them."""
    lengths = {"announced": 2.0, "training": 80.0, "collecting": 150.0, "aggregated": 45.0, "evaluated": 3.0}

    def work(session: Any) -> None:
        for phase, seconds in lengths.items():
            metric = tables.Metric
            session.execute(update(metric).where(metric.name == f"seconds.{phase}").values(value=seconds))
        for place, site in enumerate(SITES):
            reply = tables.Reply
            late = reply.received_at + place * 47
            session.execute(update(reply).where(reply.site == site).values(received_at=late))

    with ledger.transactions.engine.begin() as connection:
        work(connection)


@dataclass
class Watched:
    """A federation whose dashboard is looked at."""

    home: CoordinatorHome
    ledger: Ledger
    run: str = "stroke-2026"

    def fill(self) -> None:
        """Give it members, runs and budgets."""
        for site, since_days in zip(SITES, (1.0, 2.0, 75.0), strict=True):
            enrol(self.ledger, self.home, site, since_days=since_days)
        for site in SITES[:2]:
            self.ledger.members.seen(site, "0.1.0")
        self.ledger.members.invite("delft", Role.SITE, "ff" * 32, 3600)
        play(self.ledger, self.home, self.run)
        for site, spent in zip(SITES, (1.3, 3.9, 0.7), strict=True):
            limit = None if site == "ghent" else 4.0
            self.ledger.report_budget(BudgetEntry(site, spent, 1e-6, limit, 1e-6 if limit else None))
        self.ledger.propose("sepsis-pilot", b"plan")


def site_home(path: Path, *, private: bool = True) -> SiteHome:
    """A site that has sent some messages, spent some of its budget, and has a manifest waiting."""
    path.mkdir(parents=True, exist_ok=True)
    write_settings(path, "bergen", Coordinator(address="federation.example", fleet_port=1, control_port=2, key=_KEY))
    rules = TEMPLATE.read_text(encoding="utf-8")
    (path / "policy.toml").write_text(re.sub(r"(?m)^#? ?epsilon_total = .*$", "epsilon_total = 4.0", rules))
    home = SiteHome.open(path)
    identity = Identity.at(site_key(home.state))
    authority = Authority.create(path / "ca.key", path / "ca.crt", "Stroke outcomes", None, datetime.now(UTC))
    home.certificate.write_bytes(certificate(authority, home.name, path / "keys", b"0" * 32, 90.0, 1.0))
    outbound = Outbound(home.state / "outbound", identity)
    now = datetime.now(UTC)
    outbound.note(
        Leaving(
            "survey_reply",
            18_220,
            "a1" * 32,
            "survey",
            content={"reason": f"too few patients for {'5a' * 32}"},
            policy="c3" * 32,
        ),
        now,
    )
    for number in range(1, 7):
        about = {"run": "5a" * 32, "round": number, "epsilon": 0.4, "delta": 1e-6, "policy": "c3" * 32}
        outbound.note(Leaving("train_reply", 4_300_512, f"{number:064x}", "train", **about), now)  # type: ignore[arg-type]
    with Budget.open(home.state / "budget.sqlite") as budget:
        for number in range(1, 4 if private else 1):
            release = Release("5a" * 32, number, "training", Mechanisms((Gaussian(1.1, 0.01, 200),)), "q")
            budget.reserve(release)
            budget.charge(release, b"answer")
    Approvals(home.state).wait(manifest("stroke-2026"), _KEY)
    logs = path / "logs"
    logs.mkdir(exist_ok=True)
    said = ("info", "connected"), ("warning", "the coordinator can't be reached; trying again")
    about = {"time": now.isoformat(), "program": "supernode"}
    lines = [{**about, "level": level, "message": told} for level, told in said]
    (logs / "site.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


_KEY = "ed25519:" + "0f" * 32


@dataclass
class Browser:
    """A visitor of an ASGI application, with cookies as a browser keeps them, and no script."""

    app: Any
    base: str = "https://localhost"
    address: str = "192.0.2.7"
    cookies: httpx.Cookies = field(default_factory=httpx.Cookies)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self._ask("GET", path, None, headers)

    def post(self, path: str, form: Mapping[str, str], **headers: str) -> httpx.Response:
        return self._ask("POST", path, form, headers)

    def submit(self, page: httpx.Response, path: str, **fields: str) -> httpx.Response:
        """Send the form of a page that goes to `path`, with what it carries."""
        return self.post(path, {**hidden(page), **fields})

    def sign_in(self, name: str, secret: str) -> httpx.Response:
        return self.submit(self.get("/sign-in"), "/sign-in", name=name, secret=secret)

    def _ask(
        self, method: str, path: str, form: Mapping[str, str] | None, headers: Mapping[str, str]
    ) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, client=(self.address, 1))
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            async with httpx.AsyncClient(transport=transport, base_url=self.base, cookies=self.cookies) as client:
                answer = await client.request(method, path, data=form, headers=sent)
                self.cookies = client.cookies
                return answer

        return asyncio.run(ask())


def hidden(page: httpx.Response) -> dict[str, str]:
    """The hidden fields of a page's forms."""
    return dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', page.text))
