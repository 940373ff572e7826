"""What a coordinator's people type about the ledger."""

import json
import threading
from pathlib import Path

import pytest
from sqlalchemy import update
from typer.testing import CliRunner, Result

from server import run_commands, tables
from server.home import CoordinatorHome, CoordinatorSettings, Database, Federation
from server.ledger import Ledger
from server.ledger_commands import app
from server.ledger_entries import BudgetEntry
from server.overview import ONLINE_S
from server.tables import RunState
from tests.server.test_backup import filled
from tokenizer.errors import ConfigError, DataError, FedcometError


@pytest.fixture
def home(ram_path: Path) -> Path:
    settings = CoordinatorSettings(federation=Federation(name="hearts", address="localhost"))
    made = CoordinatorHome.init(ram_path / "home", settings, None)
    with Ledger.open(made.ledger_url) as ledger:
        filled(ledger)
    return made.path


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)], catch_exceptions=False)


def told(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_status_tells_what_needs_a_person(home: Path) -> None:
    with Ledger.open(home / "ledger.sqlite") as ledger:
        ledger.report_budget(BudgetEntry("north", 2.9, 1e-6, 3.0, 1e-6))
        ledger.journal("icu").end(RunState.FAILED, "nobody answered")
        with ledger.lead():
            found = json.loads(told("status", home, "--json"))
            assert found["leader"]["process"] > 0
    assert found["runs"] == {"failed": 1}
    assert found["members"] == {"enrolled": 1, "invited": 1}
    assert found["needs_attention"] == [
        "run icu failed: nobody answered",
        "north was never seen",
        "north has spent epsilon 2.9 of 3",
    ]
    text = told("status", home)
    assert "nobody" in text
    assert "run icu failed: nobody answered" in text


def test_a_run_that_was_approved_after_it_failed_can_be_resumed(home: Path) -> None:
    def hints() -> list[str]:
        return [each for each in json.loads(told("status", home, "--json"))["needs_attention"] if "resume" in each]

    with Ledger.open(home / "ledger.sqlite") as ledger:
        ledger.approve(ledger.run("icu").manifest_hash, "north", "ab")
        ledger.journal("icu").end(RunState.FAILED, "nobody has approved it")
        assert hints() == []
        ledger.approve(ledger.run("icu").manifest_hash, "south", "ab")
    assert hints() == [
        "run icu can go on, as south approved it since it failed: fedcomet coordinator resume icu",
    ]


def test_what_is_followed_is_told_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Ledger.open(home / "ledger.sqlite") as ledger:
        ledger.start("icu")

        def fail() -> None:
            ledger.journal("icu").start("icu")
            ledger.journal("icu").end(RunState.FAILED, "nobody answered")

        later = threading.Timer(1.0, fail)
        later.start()
        with pytest.raises(FedcometError, match=r"Run icu has failed\. Mend what it says"):
            run_commands.resume("icu", follow=True, home=home)
        later.join()
    out = capsys.readouterr().out
    assert out.count("nobody answered") == 1
    assert "run.failed nobody answered" in out


def test_a_site_that_is_away_is_named(home: Path) -> None:
    def away() -> list[str]:
        return [each for each in json.loads(told("status", home, "--json"))["needs_attention"] if "seen" in each]

    with Ledger.open(home / "ledger.sqlite") as ledger:
        ledger.members.seen("north", "0.1.0")
        assert away() == []
        assert [site["online"] for site in json.loads(told("sites", home, "--json"))] == [True, False]
        assert "yes" in told("sites", home)
        with ledger.transactions.engine.begin() as connection:
            long_ago = tables.Site.last_seen - ONLINE_S - 90
            connection.execute(update(tables.Site).values(last_seen=long_ago))
    assert away() == ["north was last seen 3.0 min ago"]
    assert "north was last seen 3.0 min ago" in told("status", home)
    assert not any(site["online"] for site in json.loads(told("sites", home, "--json")))
    assert "yes" not in told("sites", home)


def test_runs_and_sites_are_listed(home: Path) -> None:
    (run,) = json.loads(told("runs", home, "--json"))
    assert (run["name"], run["round"], run["rounds"], run["sites"], run["tuning_loss"]) == ("icu", 1, 2, 1, 2.0)
    assert "1/2" in told("runs", home)
    north, south = json.loads(told("sites", home, "--json"))
    assert (north["name"], north["status"], north["certificate"]) == ("north", "enrolled", "good")
    assert (south["name"], south["status"], south["certificate"]) == ("Ärzte-süd", "invited", "none")
    assert "0.3333" in told("sites", home)
    piped = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["sites", str(home)]).output
    assert "certificate until  epsilon  its limit" in piped
    assert len(piped.splitlines()) == 3, "a line for each member"


def test_logs_show_the_newest_last(home: Path) -> None:
    found = json.loads(told("logs", home, "--what", "round.", "--last", 2, "--json"))
    assert [(event["what"], event["run"], event["round"]) for event in found] == [
        ("round.evaluated", "icu", 1),
        ("round.committed", "icu", 1),
    ]
    assert "budget.reported" in told("logs", home, "--site", "north")
    assert json.loads(told("logs", home, "--run", "other", "--json")) == []


def test_the_home_can_come_from_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCOMET_HOME", str(home))
    assert json.loads(told("runs", "--json"))[0]["name"] == "icu"


def test_backup_and_restore(home: Path, ram_path: Path) -> None:
    file = ram_path / "ledger.backup"
    with Ledger.open(home / "ledger.sqlite") as ledger:
        ledger.start("icu")
        ledger.journal("icu").start("icu")
    made, under_way = told("backup", file, "--home", home).splitlines()
    assert under_way == f"Run icu is under way, round 1 is committed: copy {home}/runs/icu before it goes on."
    with pytest.raises(ConfigError, match="--yes replaces it"):
        told("backup", file, "--home", home)
    with pytest.raises(ConfigError, match="is not empty"):
        told("restore", file, "--home", home)
    restored = told("restore", file, "--home", home, "--yes")
    assert made.rsplit(maxsplit=1)[-1] == restored.rsplit(maxsplit=1)[-1]
    (home / "ledger.sqlite").unlink()
    for left in home.glob("ledger.sqlite-*"):
        left.unlink()
    with pytest.raises(DataError, match="There is no ledger"):
        told("runs", home)
    told("restore", file, "--home", home)
    assert json.loads(told("runs", home, "--json"))[0]["round"] == 1


def test_the_ledger_may_be_on_a_server(ram_path: Path, postgres_url: str) -> None:
    settings = CoordinatorSettings(
        federation=Federation(name="hearts", address="localhost"), database=Database(url=postgres_url)
    )
    home = CoordinatorHome.init(ram_path / "home", settings, None).path
    with Ledger.open(postgres_url) as ledger:
        filled(ledger)
    text = told("status", home)
    assert "s3cret" not in text
    assert "***" in text
    assert json.loads(told("runs", home, "--json"))[0]["round"] == 1
