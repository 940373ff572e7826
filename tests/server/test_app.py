import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from safetensors import SafetensorError

from client.files import SiteFiles
from federation import flower
from federation.manifest import LocalWork, OuterOptions, software_version
from federation.messages import PrepareReply, Refusal, SurveyReply, TrainReply
from model import checkpoint
from model.settings import preset_of
from server import app as server_app
from server.app import Outcome, OutOfRoom, coordinate
from server.backup import save
from server.journal import Journal, ReplyEntry, Status
from server.ledger import Ledger
from server.plan import FederationPlan
from server.post import TooFewSites
from server.restore import restore
from server.rounds import Event, RoundFailed
from server.tables import RunState
from tests import tiny
from tests.tiny import FunctionGrid, Node
from tokenizer.codebook import Codebook, Survey, TokenizerOptions
from tokenizer.errors import ConfigError, DataError


class Coordinator:
    """A coordinator on a grid of functions, with a clock that only moves when it has nothing to do."""

    def __init__(self, run_dir: Path, nodes: Mapping[int, Node]) -> None:
        self.run_dir, self.grid = run_dir, FunctionGrid(nodes)
        self.events: list[Event] = []
        self._now = time.time()

    def pause(self, seconds: float) -> None:
        self._now += seconds

    def lead(self, plan: FederationPlan) -> Outcome:
        clock: Callable[[], float] = lambda: self._now  # noqa: E731
        return coordinate(self.grid, self.run_dir, plan, listen=self.events.append, clock=clock, pause=self.pause)

    def replies(self, number: int) -> list[ReplyEntry]:
        with Journal(self.run_dir / "ledger.sqlite") as journal:
            return journal.replies(number)


def hospitals(root: Path, count: int = 3) -> dict[int, Node]:
    return dict(enumerate(map(tiny.honest, tiny.sites(root, count)), 1))


def altered(node: Node, kind: str, change: Callable[[Any, Message], Message | None]) -> Node:
    """A site that is honest but for its answers to one kind of request."""

    def answer(message: Message) -> Message | None:
        reply = node(message)
        if message.metadata.message_type != kind or reply is None:
            return reply
        return change(flower.read(reply), message)

    return answer


def with_update(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[TrainReply, Message], Message]:
    return lambda reply, to: flower.reply(dataclasses.replace(reply, update=change(reply.update)), to)


def nan_at_three(update: np.ndarray) -> np.ndarray:
    update = update.copy()
    update[3] = np.nan
    return update


def garbage(_: Any, to: Message) -> Message:
    return Message(RecordDict({"header": ConfigRecord({"json": "{"}), "payloads": ArrayRecord()}), reply_to=to)


def test_a_run_ends_with_a_checkpoint_of_its_codebook(ram_path: Path) -> None:
    coordinator = Coordinator(ram_path / "run", hospitals(ram_path))
    outcome = coordinator.lead(tiny.plan())
    codebook = Codebook.load(outcome.codebook)
    decoder, extra, _ = checkpoint.load(outcome.checkpoint, codebook.hash)
    assert decoder.config.vocab == len(codebook)
    with Journal(ram_path / "run" / "ledger.sqlite") as journal:
        replies = [reply for number in (1, 2) for reply in journal.replies(number)]
    assert extra == {
        "codebook_hash": codebook.hash,
        "manifest_hash": outcome.manifest.hash,
        "preset": preset_of(outcome.manifest.model),
        "round": 2,
        "rounds": 2,
        "tokens": sum(reply.tokens for reply in replies),
        "steps": sum(reply.steps for reply in replies),
        "sites": 3,
        "privacy": None,
        "software": software_version(),
        "torch": torch.__version__,
    }
    assert outcome.best_checkpoint.exists()
    losses = [event.values["loss"] for event in coordinator.events if event.kind == "round.evaluated"]
    assert losses == sorted(losses, reverse=True)
    assert not list((ram_path / "run").glob("**/*.partial"))
    assert not list((ram_path / "run/rounds").iterdir())


def test_a_finished_run_is_not_led_again(ram_path: Path) -> None:
    coordinator = Coordinator(ram_path / "run", hospitals(ram_path))
    outcome = coordinator.lead(tiny.plan())
    again = Coordinator(ram_path / "run", {})
    assert again.lead(tiny.plan()) == outcome
    assert again.grid.asked == []


def test_the_order_of_the_nodes_makes_no_difference(ram_path: Path) -> None:
    files = tiny.sites(ram_path)
    results = []
    for run, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        fresh = [SiteFiles(f.name, f.data, ram_path / run / f.name) for f in files]
        nodes = {place: tiny.honest(fresh[n]) for place, n in enumerate(order, 1)}
        outcome = Coordinator(ram_path / run, nodes).lead(tiny.plan(outer=OuterOptions.nesterov()))
        results.append((outcome.ledger_fingerprint, outcome.checkpoint.read_bytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        (with_update(nan_at_three), Status.MALFORMED, "1 values that are not finite"),
        (with_update(lambda update: update[:-1]), Status.MALFORMED, "shape"),
        (
            lambda reply, to: flower.reply(dataclasses.replace(reply, manifest_hash="0" * 64), to),
            Status.MALFORMED,
            "run",
        ),
        (lambda reply, to: flower.reply(Refusal(reply.site, "not today"), to), Status.REFUSED, "not today"),
        (lambda reply, to: flower.reply(SurveyReply(reply.site, b""), to), Status.MALFORMED, "in the place of"),
        (garbage, Status.MALFORMED, "not JSON"),
        (lambda reply, to: to, Status.MALFORMED, "came in the place of an answer"),
        (lambda reply, to: Message(Error(1, "out of memory"), reply_to=to), Status.FAILED, "out of memory"),
        (lambda reply, to: None, Status.LATE, "deadline"),
    ],
    ids=["nan", "length", "manifest", "refusal", "kind", "garbage", "echo", "crash", "silence"],
)
def test_one_bad_site_is_named_and_the_others_go_on(
    ram_path: Path, change: Callable[[Any, Message], Message | None], status: Status, told: str
) -> None:
    nodes = hospitals(ram_path)
    nodes[2] = altered(nodes[2], "train", change)
    coordinator = Coordinator(ram_path / "run", nodes)
    outcome = coordinator.lead(tiny.plan())
    assert outcome.checkpoint.exists()
    for number in (1, 2):
        replies = {entry.site: entry for entry in coordinator.replies(number)}
        assert [replies[s].status for s in ("site-0", "site-2")] == [Status.ACCEPTED] * 2
        assert replies["site-1"].status is status
        assert told in replies["site-1"].reason
    assert {e.site for e in coordinator.events if e.kind == f"update.{status}"} == {"site-1"}


def test_when_all_sites_refuse_the_run_says_why_and_can_go_on_later(ram_path: Path) -> None:
    nodes = hospitals(ram_path)

    def refuse(reply: Any, to: Message) -> Message:
        return flower.reply(Refusal(reply.site, "the data office has closed"), to)

    closed = {number: altered(node, "train", refuse) for number, node in nodes.items()}
    with pytest.raises(
        RoundFailed, match=r"Round 1 has 0 usable updates.*site-0, site-1, site-2: refused, the data office has closed"
    ):
        Coordinator(ram_path / "run", closed).lead(tiny.plan())
    outcome = Coordinator(ram_path / "run", nodes).lead(tiny.plan())
    undisturbed = Coordinator(ram_path / "other", nodes).lead(tiny.plan())
    assert outcome.ledger_fingerprint == undisturbed.ledger_fingerprint


@pytest.mark.parametrize("kind", ["query.survey", "query.prepare"])
def test_when_nobody_takes_part_the_run_says_why(ram_path: Path, kind: str) -> None:
    def refuse(reply: Any, to: Message) -> Message:
        return flower.reply(Refusal(reply.site, "no approval"), to)

    nodes = {number: altered(node, kind, refuse) for number, node in hospitals(ram_path).items()}
    with pytest.raises(TooFewSites, match=r"0 sites .* are needed .site-0, site-1, site-2: no approval"):
        Coordinator(ram_path / "run", nodes).lead(tiny.plan())


def test_an_empty_site_and_a_corrupt_one_are_named_and_the_others_go_on(ram_path: Path) -> None:
    files = tiny.sites(ram_path, 4)
    files[1] = tiny.site(ram_path, "site-1", 1, patients=0)
    shard = files[2].data / "data/train/0.parquet"
    shard.write_bytes(shard.read_bytes()[:-200])
    coordinator = Coordinator(ram_path / "run", dict(enumerate(map(tiny.honest, files), 1)))
    coordinator.lead(tiny.plan())
    refusals = {event.site: event.text for event in coordinator.events if event.kind == "survey.refused"}
    assert refusals["site-1"] == "site-1 has no patients."
    assert "site-2 can't use its records" in refusals["site-2"]
    assert "train/0.parquet" in (files[2].state / "site.log").read_text()
    assert [entry.site for entry in coordinator.replies(2)] == ["site-0", "site-3"]
    with Journal(ram_path / "run/ledger.sqlite") as journal:
        assert [(entry.site, entry.status) for entry in journal.sites()] == [
            ("site-0", Status.ACCEPTED),
            ("site-1", Status.REFUSED),
            ("site-2", Status.REFUSED),
            ("site-3", Status.ACCEPTED),
        ]


def test_a_survey_that_breaks_its_floor_is_left_out(ram_path: Path) -> None:
    def leak(reply: SurveyReply, to: Message) -> Message:
        content = json.loads(reply.survey)
        content["codes"]["RARE//DISEASE"] = 1
        return flower.reply(dataclasses.replace(reply, survey=json.dumps(content).encode()), to)

    nodes = hospitals(ram_path)
    nodes[2] = altered(nodes[2], "query.survey", leak)
    coordinator = Coordinator(ram_path / "run", nodes)
    outcome = coordinator.lead(tiny.plan())
    assert [event.site for event in coordinator.events if event.kind == "survey.refused"] == ["site-1"]
    assert b"RARE" not in outcome.codebook.read_bytes()


@pytest.mark.parametrize(
    "survey",
    [
        b"[" * 100_000,
        Survey(TokenizerOptions(min_patients=5), 9, {"\ud800": 9}),
        Survey(TokenizerOptions(min_patients=5), 9, {"A": 9}, values={"A": {5: 10**400}}),
        Survey(TokenizerOptions(min_patients=5), 9, gaps={"1-5min": {40_000: 9}}),
    ],
    ids=["deep", "surrogate", "huge", "far"],
)
def test_a_survey_that_breaks_the_codebook_is_left_out(ram_path: Path, survey: bytes | Survey) -> None:
    def poison(reply: SurveyReply, to: Message) -> Message:
        data = survey if isinstance(survey, bytes) else json.dumps({"format": "fedcomet-survey/1", **vars_of(survey)})
        return flower.reply(dataclasses.replace(reply, survey=data if isinstance(data, bytes) else data.encode()), to)

    nodes = hospitals(ram_path)
    nodes[2] = altered(nodes[2], "query.survey", poison)
    coordinator = Coordinator(ram_path / "run", nodes)
    coordinator.lead(tiny.plan(rounds=1))
    assert coordinator.events[-1].kind == "run.finished"


def vars_of(survey: Survey) -> dict[str, Any]:
    return dataclasses.asdict(survey)


def test_a_survey_under_other_options_is_left_out(ram_path: Path) -> None:
    def other(reply: SurveyReply, to: Message) -> Message:
        return flower.reply(dataclasses.replace(reply, survey=Survey(TokenizerOptions(min_patients=1)).to_bytes()), to)

    nodes = hospitals(ram_path)
    nodes[1] = altered(nodes[1], "query.survey", other)
    coordinator = Coordinator(ram_path / "run", nodes)
    coordinator.lead(tiny.plan())
    assert [e.text for e in coordinator.events if e.kind == "survey.refused"] == [
        "its survey was taken with other options"
    ]


def test_two_sites_of_one_name_are_refused(ram_path: Path) -> None:
    files = tiny.site(ram_path, "icu", 1)
    twin = SiteFiles("icu", files.data, ram_path / "other-state")
    coordinator = Coordinator(ram_path / "run", {1: tiny.honest(files), 2: tiny.honest(twin)})
    with pytest.raises(ConfigError, match="call themselves icu"):
        coordinator.lead(tiny.plan())


def test_a_site_that_takes_anothers_name_in_a_round_is_malformed(ram_path: Path) -> None:
    nodes = hospitals(ram_path)
    nodes[2] = altered(nodes[2], "train", lambda reply, to: flower.reply(dataclasses.replace(reply, site="site-0"), to))
    coordinator = Coordinator(ram_path / "run", nodes)
    coordinator.lead(tiny.plan())
    assert [entry.status for entry in coordinator.replies(1)] == [Status.ACCEPTED, Status.MALFORMED, Status.ACCEPTED]


def test_a_site_that_agreed_to_another_manifest_takes_no_part(ram_path: Path) -> None:
    def other(reply: PrepareReply, to: Message) -> Message:
        return flower.reply(dataclasses.replace(reply, manifest_hash="0" * 64), to)

    nodes = hospitals(ram_path)
    nodes[3] = altered(nodes[3], "query.prepare", other)
    coordinator = Coordinator(ram_path / "run", nodes)
    coordinator.lead(tiny.plan())
    assert [entry.site for entry in coordinator.replies(1)] == ["site-0", "site-1"]


def test_a_site_that_comes_later_joins_at_the_next_round(ram_path: Path) -> None:
    nodes = hospitals(ram_path)
    late = nodes.pop(3)
    coordinator = Coordinator(ram_path / "run", nodes)

    def watch(event: Event) -> None:
        if (event.kind, event.round) == ("round.committed", 1):
            coordinator.grid.nodes[3] = late

    coordinate(coordinator.grid, ram_path / "run", tiny.plan(), listen=watch)
    assert [len(coordinator.replies(number)) for number in (1, 2)] == [2, 3]


def breaking(node: Node, kind: str, times: int) -> Node:
    """A site whose process breaks down at a kind of request, so many times."""
    left = [None] * times

    def answer(message: Message) -> Message | None:
        if message.metadata.message_type == kind and left:
            left.pop()
            return Message(Error(1, "out of memory"), reply_to=message)
        return node(message)

    return answer


@pytest.mark.parametrize("kind", ["query.survey", "query.prepare"])
def test_a_site_whose_process_breaks_down_once_is_asked_again_and_loses_nothing(ram_path: Path, kind: str) -> None:
    nodes = hospitals(ram_path)
    nodes[2] = breaking(nodes[2], kind, 1)
    coordinator = Coordinator(ram_path / "run", nodes)
    coordinator.lead(tiny.plan(rounds=1))
    assert [entry.status for entry in coordinator.replies(1)] == [Status.ACCEPTED] * 3
    assert "site-1" in {event.site for event in coordinator.events if event.kind == "survey.received"}
    assert not [event for event in coordinator.events if event.kind.endswith(".refused")]


def test_a_site_whose_process_breaks_down_twice_takes_part_from_the_next_round_on(ram_path: Path) -> None:
    nodes = hospitals(ram_path)
    nodes[2] = breaking(nodes[2], "query.prepare", 2)
    coordinator = Coordinator(ram_path / "run", nodes)
    coordinator.lead(tiny.plan())
    assert [len(coordinator.replies(number)) for number in (1, 2)] == [2, 3]
    with Journal(coordinator.run_dir / "ledger.sqlite") as journal:
        assert {entry.site for entry in journal.sites()} == {"site-0", "site-1", "site-2"}


def test_why_too_few_take_part_is_told_of_those_too_whose_process_broke_down(ram_path: Path) -> None:
    nodes = {number: breaking(node, "query.prepare", 2) for number, node in hospitals(ram_path).items()}
    with pytest.raises(TooFewSites, match=r"node-1, node-2, node-3: .*out of memory"):
        Coordinator(ram_path / "run", nodes).lead(tiny.plan())


def test_a_site_that_refuses_a_run_is_asked_again_ever_more_rarely_until_it_takes_part(ram_path: Path) -> None:
    refusing, asked = [True], []
    nodes = hospitals(ram_path)

    def refuse(reply: Any, to: Message) -> Message:
        asked.append(max(event.round for event in coordinator.events))
        return flower.reply(Refusal(reply.site, "nobody has approved it") if refusing else reply, to)

    nodes[2] = altered(nodes[2], "query.prepare", refuse)
    coordinator = Coordinator(ram_path / "run", nodes)

    def watch(event: Event) -> None:
        coordinator.events.append(event)
        if (event.kind, event.round) == ("round.committed", 5):
            refusing.clear()

    coordinate(coordinator.grid, ram_path / "run", tiny.plan(rounds=9, evaluate_every=0), listen=watch)
    assert asked == [1, 2, 4, 8]
    assert [len(coordinator.replies(number)) for number in range(1, 10)] == [2] * 7 + [3] * 2
    with Journal(coordinator.run_dir / "ledger.sqlite") as journal:
        assert {entry.site: entry.status for entry in journal.sites()}["site-1"] is Status.ACCEPTED


def test_a_plan_that_no_codebook_would_fit_is_refused_before_a_site_is_asked(ram_path: Path) -> None:
    coordinator = Coordinator(ram_path / "run", hospitals(ram_path))
    with pytest.raises(ConfigError, match="batch_tokens"):
        coordinator.lead(tiny.plan(local=LocalWork(steps=1, batch_tokens=8)))
    assert not coordinator.grid.asked


def test_too_few_nodes_are_waited_for_and_then_reported(ram_path: Path) -> None:
    coordinator = Coordinator(ram_path / "run", {})
    before = coordinator._now
    with pytest.raises(TooFewSites, match="0 sites are connected, at least 2"):
        coordinator.lead(tiny.plan(join_s=100.0))
    assert coordinator._now - before >= 100


def test_a_fixed_codebook_needs_no_survey(ram_path: Path) -> None:
    nodes = hospitals(ram_path)
    first = Coordinator(ram_path / "first", nodes).lead(tiny.plan())
    alone = Coordinator(ram_path / "alone", {1: nodes[1]})
    plan = tiny.plan(name="alone", codebook=first.codebook.read_bytes(), min_sites=1)
    outcome = alone.lead(plan)
    assert outcome.manifest.codebook_hash == first.manifest.codebook_hash
    assert {kind for _, kind in alone.grid.asked} == {"query.prepare", "train", "evaluate"}


def test_evaluations_can_be_rare_and_the_last_round_always_has_one(ram_path: Path) -> None:
    coordinator = Coordinator(ram_path / "run", hospitals(ram_path, 2))
    coordinator.lead(tiny.plan(rounds=3, evaluate_every=2))
    assert [event.round for event in coordinator.events if event.kind == "round.evaluated"] == [2, 3]
    never = Coordinator(ram_path / "never", hospitals(ram_path, 2))
    outcome = never.lead(tiny.plan(name="never", evaluate_every=0))
    assert "evaluate" not in {kind for _, kind in never.grid.asked}
    assert outcome.best_checkpoint == outcome.checkpoint


def test_a_directory_is_only_continued_with_its_own_settings(ram_path: Path) -> None:
    Coordinator(ram_path / "run", hospitals(ram_path)).lead(tiny.plan())
    changed = tiny.plan(rounds=3, local=LocalWork(epochs=1))
    with pytest.raises(ConfigError, match=r"other settings \(local, rounds\)"):
        Coordinator(ram_path / "run", {}).lead(changed)


def test_a_directory_is_used_by_one_process_at_a_time(ram_path: Path) -> None:
    coordinator = Coordinator(ram_path / "run", hospitals(ram_path))

    def watch(event: Event) -> None:
        with pytest.raises(ConfigError, match="in use by another process"):
            coordinator.lead(tiny.plan())

    coordinate(coordinator.grid, ram_path / "run", tiny.plan(rounds=1), listen=watch)


def test_a_file_that_is_no_ledger_is_named(ram_path: Path) -> None:
    (ram_path / "run").mkdir()
    (ram_path / "run/ledger.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(DataError, match=r"ledger\.sqlite is not a ledger"):
        Coordinator(ram_path / "run", hospitals(ram_path)).lead(tiny.plan())


class Killed(BaseException):
    """The end of the coordinator's process."""


def put_back(coordinator: Coordinator, number: int) -> None:
    """Restore the ledger as it was when a round had been committed."""
    with Ledger.open(coordinator.run_dir / "ledger.sqlite") as ledger:
        restore(coordinator.run_dir.parent / f"{number}.backup", ledger.transactions, replace=True)


@pytest.fixture
def ahead(ram_path: Path) -> Coordinator:
    """A coordinator that was killed after four of five rounds, with a backup of its ledger after each."""
    coordinator = Coordinator(ram_path / "run", hospitals(ram_path, 2))

    def watch(event: Event) -> None:
        if event.kind == "round.announced":
            with Ledger.open(ram_path / "run/ledger.sqlite") as ledger:
                save(ledger.transactions, ram_path / f"{event.round - 1}.backup")
            if event.round == 5:
                raise Killed

    with pytest.raises(Killed):
        coordinate(coordinator.grid, coordinator.run_dir, tiny.plan(rounds=5, evaluate_every=0), listen=watch)
    return coordinator


@pytest.mark.parametrize("answered", [4, 5])
def test_a_ledger_that_is_one_round_behind_its_folder_goes_on_to_the_same_end(
    ahead: Coordinator, ram_path: Path, answered: int
) -> None:
    def watch(event: Event) -> None:
        if event.kind == "round.aggregated":
            raise Killed

    plan = tiny.plan(rounds=5, evaluate_every=0)
    expected = Coordinator(ram_path / "whole", hospitals(ram_path / "others", 2)).lead(plan)
    if answered == 5:
        with pytest.raises(Killed):
            coordinate(ahead.grid, ahead.run_dir, plan, listen=watch)
    put_back(ahead, 3)
    outcome = ahead.lead(plan)
    assert outcome.ledger_fingerprint == expected.ledger_fingerprint
    assert outcome.checkpoint.read_bytes() == expected.checkpoint.read_bytes()


@pytest.mark.parametrize("number", [1, 2])
def test_a_ledger_that_is_further_behind_its_folder_says_so_and_takes_nothing_away(
    ahead: Coordinator, number: int
) -> None:
    before = sorted(path.name for path in (ahead.run_dir / "checkpoints").iterdir())
    assert before == ["0003.safetensors", "0004.safetensors"]
    put_back(ahead, number)
    told = (
        rf"checkpoints/0004\.safetensors is there, but the ledger's last round of the run is {number}: the ledger is "
    )
    told += rf"an older copy\. .* so round {number + 1} can't be done again\. Restore a backup .* that has round 3 as"
    with pytest.raises(DataError, match=told):
        ahead.lead(tiny.plan(rounds=5, evaluate_every=0))
    assert sorted(path.name for path in (ahead.run_dir / "checkpoints").iterdir()) == before
    put_back(ahead, 3)
    assert ahead.lead(tiny.plan(rounds=5, evaluate_every=0)).checkpoint.name == "0005.safetensors"


def test_another_run_begins_with_the_checkpoint_of_one_that_can_not_go_on(ahead: Coordinator, ram_path: Path) -> None:
    second = Coordinator(ram_path / "second", ahead.grid.nodes)
    second.run_dir.mkdir()
    last = shutil.copy(ahead.run_dir / "checkpoints/0004.safetensors", second.run_dir / "initial.safetensors")
    codebook, told = (ahead.run_dir / "codebook.json").read_bytes(), json.loads(tiny.plan(rounds=1).to_bytes())
    told |= {"name": "second", "initial": hashlib.sha256(last.read_bytes()).hexdigest()}
    told |= {"codebook": hashlib.sha256(codebook).hexdigest()}
    outcome = second.lead(FederationPlan.from_bytes(json.dumps(told).encode(), codebook))
    assert outcome.checkpoint.name == "0001.safetensors"


def test_a_folder_that_is_older_than_its_ledger_is_told_as_such(ahead: Coordinator) -> None:
    (ahead.run_dir / "checkpoints/0004.safetensors").unlink()
    with pytest.raises(
        DataError, match=r"0004\.safetensors is missing.*older copy, up to round 3.*made after the ledger"
    ):
        ahead.lead(tiny.plan(rounds=5, evaluate_every=0))


def test_the_server_app_reads_its_plan_from_the_runs_folder(ram_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = FunctionGrid(hospitals(ram_path))
    monkeypatch.setenv("FEDCOMET_RUNS", str(ram_path / "runs"))
    run_dir = ram_path / "runs" / "first"
    run_dir.mkdir(parents=True)
    (run_dir / "plan.json").write_bytes(tiny.plan().to_bytes())
    server_app.app(grid, Context(0, 1, {}, RecordDict(), {"run": "first"}))
    assert (run_dir / "checkpoints/0002.safetensors").exists()


def test_the_server_app_says_that_its_disk_is_full_and_its_run_has_not_failed(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setenv("FEDCOMET_RUNS", str(ram_path / "runs"))
    run_dir = ram_path / "runs/first"
    run_dir.mkdir(parents=True)
    (run_dir / "plan.json").write_bytes(tiny.plan().to_bytes())
    nodes = hospitals(ram_path)
    context = Context(0, 1, {}, RecordDict(), {"run": "first"})
    with pytest.raises(OutOfRoom, match=r"^Out of room: .*No space left on device: '.*/checkpoints/0001\.safetensors'"):
        server_app.app(FunctionGrid(nodes), context)
    with Ledger.open(run_dir / "ledger.sqlite") as ledger:
        assert [run.state for run in ledger.runs()] == [RunState.RUNNING]


@pytest.mark.parametrize("run", ["../first", "", "unknown", 3])
def test_the_server_app_reads_no_other_folder(ram_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setenv("FEDCOMET_RUNS", str(ram_path))
    with pytest.raises(ConfigError):
        server_app.app(FunctionGrid({}), Context(0, 1, {}, RecordDict(), {"run": run}))
