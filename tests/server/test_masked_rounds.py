"""Claims about rounds whose updates are only ever seen as a sum."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from client.archive import Archive
from client.budget import FILE, Budget, State
from client.files import SiteFiles
from client.outbound import lines, read_entry, read_head
from federation import flower, protection
from federation.accountant import epsilon
from federation.manifest import LocalWork, Manifest, OuterOptions, PrivateEvaluation
from federation.masking import Masked
from federation.messages import EvaluateReply, Kept, TrainReply, TrainRequest
from federation.update import to_vector
from model import checkpoint
from model.decoder import Decoder
from server.app import Outcome, coordinate, give_up_sum
from server.backup import save
from server.journal import GIVEN_UP, Journal, Status, SumEntry
from server.ledger import Ledger
from server.plan import PrivacyPlan
from server.restore import restore
from server.rounds import Event, RoundFailed, Rounds, SumWaits
from server.run_view import RunView, look
from tests import tiny
from tests.masked import Federation, dumped, needles, wire_bytes
from tokenizer.errors import ConfigError, DataError


def weights(outcome: Outcome) -> np.ndarray:
    decoder, _, _ = checkpoint.load(outcome.checkpoint, outcome.manifest.codebook_hash)
    return to_vector(decoder)


def plainly(played: Federation, **changes: object) -> tuple[Outcome, Path]:
    """The same work without masks, by the same sites with fresh memories."""
    fresh = [SiteFiles(f.name, f.data, played.root / "plain" / f.name) for f in played.files]
    grid = tiny.FunctionGrid(dict(enumerate(map(tiny.honest, fresh), 1)))
    plan = dataclasses.replace(played.plan, secure_aggregation=None, **changes)  # type: ignore[arg-type]
    return coordinate(grid, played.root / "plain-run", plan), played.root / "plain-run"


@pytest.mark.parametrize("weighing", ["tokens", "uniform"])
def test_a_masked_run_is_the_plain_run_within_the_stated_error(ram_path: Path, weighing: str) -> None:
    played = Federation(ram_path, outer=OuterOptions(weights=weighing), rounds=1)  # type: ignore[arg-type]
    masked = played.lead()
    plain, folder = plainly(played)
    with Journal(ram_path / "run/ledger.sqlite") as journal, Journal(folder / "ledger.sqlite") as clear:
        (entry,), (losses,) = journal.sums("train"), journal.sums("evaluate tuning")
        replies = clear.replies(1)
        scores = clear.scores()
        assert journal.work(1) == clear.work(1)
        assert journal.losses("tuning")[1] == pytest.approx(clear.losses("tuning")[1], abs=1e-4)
    assert entry.sites == "site-0,site-1,site-2,site-3"
    assert entry.clipped == 0
    assert 0 < entry.error < 1e-7
    rounding = np.abs(weights(plain)) * 2.0**-22
    assert np.all(np.abs(weights(masked) - weights(plain)) <= entry.error + rounding)
    assert (entry.tokens, entry.steps) == (sum(r.tokens for r in replies), sum(r.steps for r in replies))
    assert entry.nll == pytest.approx(sum(r.loss * r.tokens for r in replies), rel=1e-6)
    assert losses.tokens == sum(s.tokens for s in scores)


def entry_of(root: Path, purpose: str = "train", number: int = 1) -> SumEntry:
    with Journal(root / "run/ledger.sqlite") as journal:
        entry = journal.sum(number, purpose)
    assert entry is not None
    return entry


def page_of(root: Path) -> RunView:
    with Ledger.open(root / "run/ledger.sqlite") as ledger:
        return look(ledger, ledger.runs()[0].name)


class Killed(BaseException):
    """The end of the coordinator's process."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Four sites that have kept their updates of the only round, and a coordinator that was killed before the sum."""
    played = Federation(tmp_path_factory.mktemp("trained"), rounds=1, deadline_s=500.0)
    with pytest.raises(Killed):
        played.lead(killing("query.mask_keys"))
    return played


def killing(kind: str) -> Callable[[Event], None]:
    """A listener that kills the coordinator when a kind of question goes out, or of event happens; once."""
    killed: list[bool] = []

    def listen(event: Event) -> None:
        if not killed and kind in (event.kind, event.text):
            killed.append(True)
            raise Killed

    return listen


LEAVES = {
    "query.mask_keys": ("site-0,site-1,site-3", "keys: no answer before the deadline"),
    "query.mask_shares": ("site-0,site-1,site-3", "shares: no answer before the deadline"),
    "query.masked": ("site-0,site-1,site-3", "masked updates: no answer before the deadline"),
    "query.mask_consent": ("site-0,site-1,site-2,site-3", "signatures: no answer before the deadline"),
    "query.mask_open": ("site-0,site-1,site-2,site-3", "opening shares: no answer before the deadline"),
}


@pytest.mark.parametrize("kind", LEAVES)
def test_a_site_that_leaves_at_any_stage_does_not_stop_a_round(ram_path: Path, trained: Federation, kind: str) -> None:
    played = trained.copy(ram_path)
    played.silence(3, kind)
    played.lead()
    summed, told = LEAVES[kind]
    entry = entry_of(ram_path)
    assert (entry.sites, entry.attempt, entry.stage) == (summed, 2, "done")
    assert ("site-2", told) in [(event.site, event.text) for event in played.events if event.kind == "sum.dropped"]
    assert entry.dropped == f"site-2 ({told})"
    assert entry_of(ram_path, "evaluate tuning").sites == "site-0,site-1,site-3"


def test_a_site_that_does_not_train_in_time_is_not_in_the_sum(ram_path: Path) -> None:
    played = Federation(ram_path, rounds=1, evaluate_every=0, deadline_s=500.0)
    played.silence(3, "train")
    played.lead()
    assert ("update.late", "site-2") in [(event.kind, event.site) for event in played.events]
    assert entry_of(ram_path).sites == "site-0,site-1,site-3"


@pytest.mark.parametrize("kind", ["query.mask_keys", "query.masked", "query.mask_open"])
def test_too_few_sites_fail_the_round_with_the_reason_and_it_goes_on_when_they_are_back(
    ram_path: Path, trained: Federation, kind: str
) -> None:
    played = trained.copy(ram_path)
    undisturbed = dict(played.grid.nodes)
    for number in (2, 4):
        played.silence(number, kind)
    with pytest.raises(
        RoundFailed, match=r"Missing: site-1, site-3.*site-1, site-3: no answer before the deadline.*same run"
    ):
        played.lead()
    entry = entry_of(ram_path)
    signed = kind == "query.mask_open"
    ended = "sum.waits" if signed else "sum.failed"
    assert "Missing: site-1, site-3" in entry.reason
    assert re.search(r"[^.] \(site-1, site-3: no answer before the deadline\)\.$", entry.reason)
    assert "Missing: site-1, site-3" in next(event.text for event in played.events if event.kind == ended)
    assert entry.attempt == (2 if signed else 4)
    assert bool(entry.collected_sha256) == signed
    page, doing = page_of(ram_path), f"summing under masks (attempt {entry.attempt}, {entry.stage})"
    assert f"round 1 of 1, {doing}; 4 of 4 sites have answered; missing in the sum: site-1, site-3." in page.said
    assert [site.no_update for site in page.sites] == [0, 1, 0, 1]
    assert {(each.site, each.what) for each in page.refusals} == {(f"site-{n}", "sum, train") for n in (1, 3)}
    assert "collecting answers and their masked sum" in {words for words, *_ in page.phases}
    played.grid.nodes = undisturbed
    played.lead()
    assert [site.no_update for site in page_of(ram_path).sites] == [0, 0, 0, 0]
    after = entry_of(ram_path)
    assert (after.sites, after.reason) == ("site-0,site-1,site-2,site-3", "")
    assert after.attempt == (2 if signed else 5)


def left_after_signing(
    ram_path: Path, trained: Federation, **changes: object
) -> tuple[Federation, dict[int, tiny.Node]]:
    """A run whose only round is signed, and that two of its four sites then leave."""
    played = trained.copy(ram_path)
    if changes:
        (ram_path / "run/plan.json").unlink()
        played.plan = dataclasses.replace(played.plan, **changes)  # type: ignore[arg-type]
    undisturbed = dict(played.grid.nodes)
    for number in (2, 4):
        played.silence(number, "query.mask_open")
    return played, undisturbed


def test_a_signed_sum_that_too_many_sites_left_ends_the_run_with_a_status_of_its_own(
    ram_path: Path, trained: Federation
) -> None:
    played, undisturbed = left_after_signing(ram_path, trained)
    with pytest.raises(SumWaits, match=r"Round 1 waits for sites that have signed.*site-1, site-3.*give-up") as waits:
        played.lead()
    assert waits.value.exit_code == 4
    assert "sum.waits" in {event.kind for event in played.events}
    assert "Missing: site-1, site-3" in entry_of(ram_path).reason
    number, reason = give_up_sum(ram_path / "run", really=False)
    assert (number, reason) == (1, entry_of(ram_path).reason)
    played.grid.nodes = undisturbed
    played.lead()
    assert entry_of(ram_path).sites == "site-0,site-1,site-2,site-3"
    with pytest.raises(ConfigError, match="waits for no sum"):
        give_up_sum(ram_path / "run", really=True)


def test_sites_that_come_back_within_the_wait_are_not_too_late(ram_path: Path, trained: Federation) -> None:
    played, undisturbed = left_after_signing(ram_path, trained, signed_wait_s=10_000.0)

    def come_back(event: Event) -> None:
        # Asked again, the sites that are left sign again; those that have gone are silent.
        if len([each for each in played.events if each.text == "query.mask_consent"]) == 5:
            played.grid.nodes = undisturbed

    played.lead(come_back)
    assert entry_of(ram_path).sites == "site-0,site-1,site-2,site-3"
    assert "sum.waits" not in {event.kind for event in played.events}


def test_a_newcomer_does_not_take_the_place_of_a_site_that_signed(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A draw that the newcomer wins, and site-0 loses to it.
    monkeypatch.setattr(Rounds, "drawn", lambda _, sites: dict(sorted(sites.items(), reverse=True)[:3]))
    played = Federation(ram_path, rounds=1, evaluate_every=0, deadline_s=500.0, sites_per_round=3)
    everybody = dict(played.grid.nodes)
    del played.grid.nodes[4]
    for number in (2, 3):
        played.silence(number, "query.mask_open")
    with pytest.raises(SumWaits):
        played.lead()
    played.grid.nodes = everybody
    played.lead()
    assert entry_of(ram_path).sites == "site-0,site-1,site-2"


@pytest.mark.parametrize("dies", ["round.aggregated", "round.committed", ""])
def test_a_round_that_is_given_up_ends_with_the_weights_before_it_and_the_run_goes_on(
    ram_path: Path, dies: str
) -> None:
    played = Federation(ram_path, rounds=2, deadline_s=500.0, evaluate_every=2)
    undisturbed = dict(played.grid.nodes)
    for number in (2, 4):
        played.silence(number, "query.mask_open")
    with pytest.raises(SumWaits):
        played.lead()
    give_up_sum(ram_path / "run", really=True)
    assert entry_of(ram_path).stage == GIVEN_UP
    asked = len(played.grid.asked)
    if dies:
        with pytest.raises(Killed):
            played.lead(killing(dies))
        assert len(played.grid.asked) == asked
    played.grid.nodes = {**undisturbed}
    outcome = played.lead()
    with Journal(ram_path / "run/ledger.sqlite") as journal:
        assert journal.committed() == 2
        given_up, summed = journal.sums("train")
        assert journal.work(2).steps == summed.steps
    assert (given_up.stage, given_up.sites) == (GIVEN_UP, "")
    assert summed.sites == "site-0,site-1,site-2,site-3"
    first = checkpoint.load(ram_path / "run/checkpoints/0001.safetensors").decoder
    assert np.array_equal(to_vector(first), to_vector(Decoder.create(outcome.manifest.model, outcome.manifest.seed)))
    assert not np.array_equal(weights(outcome), to_vector(first))
    # What the first round's sum was is not opened by anybody: its messages are answered no more.
    kinds = [kind for _, kind in played.grid.asked[asked:]]
    assert kinds.count("query.mask_open") == 8  # of the second round, and of its evaluation


def test_only_a_sum_that_was_signed_can_be_given_up(ram_path: Path, trained: Federation) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        give_up_sum(ram_path, really=True)
    played = trained.copy(ram_path)
    with pytest.raises(ConfigError, match="waits for no sum that was signed"):
        give_up_sum(played.root / "run", really=True)


def test_fewer_sites_than_the_minimum_are_not_summed_though_the_threshold_is_reached(ram_path: Path) -> None:
    played = Federation(ram_path, rounds=1, evaluate_every=0, deadline_s=500.0, min_sites=4)
    played.silence(3, "query.masked")
    with pytest.raises(RoundFailed, match=r"3 sites gave keys, 4 must. Missing: site-2"):
        played.lead()


def test_an_evaluation_that_can_not_be_summed_costs_its_figure_and_not_the_round(
    ram_path: Path, trained: Federation
) -> None:
    played = trained.copy(ram_path)
    for number in (1, 2):
        played.meddle(number, "evaluate", lambda *_: None)
    played.lead()
    assert "Missing: site-0, site-1" in entry_of(ram_path, "evaluate tuning").reason
    (told,) = [event for event in played.events if event.kind == "round.evaluated"]
    assert np.isnan(told.values["loss"])
    assert "round.committed" in {event.kind for event in played.events}


SIGNED = ["query.mask_consent", "query.mask_open", "round.aggregated", "evaluate"]


@pytest.fixture(scope="module")
def expected(trained: Federation, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    played = trained.copy(tmp_path_factory.mktemp("undisturbed"))
    return weights(played.lead())


@pytest.mark.parametrize("kind", ["query.mask_keys", "query.mask_shares", "query.masked", *SIGNED])
def test_a_coordinator_that_is_killed_at_any_stage_ends_with_the_same_weights(
    ram_path: Path, trained: Federation, expected: np.ndarray, kind: str
) -> None:
    """It is killed twice: when a question goes out, and when two of four sites have answered it."""
    played = trained.copy(ram_path)
    with pytest.raises(Killed):
        played.lead(killing(kind))
    dead: list[bool] = []

    def die(honest: tiny.Node, message: Message) -> Message | None:
        if not dead:
            dead.append(True)
            raise Killed
        return honest(message)

    if kind.startswith("query."):
        played.meddle(3, kind, die)
        with pytest.raises(Killed):
            played.lead()
    assert np.array_equal(weights(played.lead()), expected)
    # Before signatures each start is a new attempt; from then on the same one goes on.
    assert entry_of(ram_path).attempt == (2 if kind in SIGNED else 4)


def test_a_masked_sum_that_changed_on_the_disk_is_not_opened(ram_path: Path, trained: Federation) -> None:
    played = trained.copy(ram_path)
    with pytest.raises(Killed):
        played.lead(killing("query.mask_open"))
    path = ram_path / "run/rounds/0001/train.sum"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match="masked sum has changed"):
        played.lead()


def test_a_site_whose_process_dies_while_it_answers_is_asked_again_and_gives_the_same(
    ram_path: Path, trained: Federation, expected: np.ndarray
) -> None:
    """Its reply is lost after all that must not be forgotten was kept, at every stage."""
    played = trained.copy(ram_path)
    dead: set[str] = set()

    def die(honest: tiny.Node, message: Message) -> Message | None:
        answer, kind = honest(message), message.metadata.message_type
        if kind in dead:
            return answer
        dead.add(kind)
        return flower.failure("the process is gone", message)

    for kind in ("query.mask_keys", "query.mask_shares", "query.masked", "query.mask_consent", "query.mask_open"):
        played.meddle(3, kind, die)
    assert np.array_equal(weights(played.lead()), expected)
    entry = entry_of(ram_path)
    assert (entry.sites, entry.dropped) == ("site-0,site-1,site-2,site-3", "")
    assert len(dead) == 5


def test_an_update_in_clear_is_not_taken_in_a_masked_run(ram_path: Path) -> None:
    played = Federation(ram_path, rounds=1, evaluate_every=0)

    def in_clear(honest: tiny.Node, message: Message) -> Message:
        request = flower.read(message)
        assert isinstance(request, TrainRequest)
        update = np.ones_like(request.weights)
        head = ("site-2", request.manifest_hash, request.round, request.digest)
        return flower.reply(TrainReply(*head, update, 10, 2, 1.0, 1.0), message)

    played.meddle(3, "train", in_clear)
    played.lead()
    with Journal(ram_path / "run/ledger.sqlite") as journal:
        (bad,) = [entry for entry in journal.replies(1) if entry.status is not Status.ACCEPTED]
    assert (bad.site, bad.reason) == ("site-2", "a train.reply came in the place of a kept")
    assert not list((ram_path / "run").rglob("*.update"))


def test_a_coordinator_that_sends_one_site_other_weights_gets_no_sum_with_it(ram_path: Path) -> None:
    """The model inconsistency attack: the others would have nothing to add. Here the site just isn't in the sum."""
    played = Federation(ram_path, rounds=1, evaluate_every=0)

    def other_weights(honest: tiny.Node, message: Message) -> Message | None:
        request = flower.read(message)
        assert isinstance(request, TrainRequest)
        asked = dataclasses.replace(request, weights=request.weights * 0.5)
        changed = flower.request(flower.to_record(asked), "train", 3, group="1", ttl_s=60.0)
        flower.number_(changed, "x")
        answer = honest(changed)
        assert answer is not None
        kept = flower.read(answer)
        assert isinstance(kept, Kept)
        return flower.reply(dataclasses.replace(kept, request_digest=request.digest), message)

    played.meddle(3, "train", other_weights)
    played.lead()
    entry = entry_of(ram_path)
    assert entry.sites == "site-0,site-1,site-3"
    assert "site-2 (keys: The request is for sum" in entry.dropped


@pytest.mark.parametrize("masked", [True, False])
def test_what_the_coordinator_keeps_and_hears_holds_nothing_of_a_single_site(ram_path: Path, masked: bool) -> None:
    """Its whole folder and all messages that it got; of a plain run the same search finds everything."""
    played = Federation(ram_path, rounds=1, local=LocalWork(steps=40, batch_tokens=512), threshold=3)
    codebook = Federation(ram_path / "elsewhere").lead().codebook.read_bytes()
    chosen = played.plan.secure_aggregation
    assert chosen is not None
    wide = dataclasses.replace(chosen, masking=dataclasses.replace(chosen.masking, max_weight=40 * 512))
    played.plan = dataclasses.replace(played.plan, codebook=codebook, secure_aggregation=wide if masked else None)
    heard = []
    for number in list(played.grid.nodes):
        honest = played.grid.nodes[number]

        def listening(message: Message, honest: tiny.Node = honest) -> Message | None:
            answer = honest(message)
            if answer is not None:
                heard.append(wire_bytes(answer))
            return answer

        played.grid.nodes[number] = listening
    outcome = played.lead()
    told = b"".join(heard) + dumped(ram_path / "run") + repr(played.events).encode()
    for files in played.files:
        run = Archive(files.state).run(outcome.manifest.hash)
        reply = run.reply(1)
        assert reply is not None
        for what, needle in needles(reply).items():
            assert (re.search(needle, told) is None) == masked, (files.name, what)
    entry = entry_of(ram_path) if masked else None
    assert entry is None or re.search(rb"(?<![0-9a-f])%d(?![0-9a-f])" % entry.tokens, told)


def test_a_private_run_can_be_masked_too_and_what_was_charged_is_what_is_masked(ram_path: Path) -> None:
    privacy = PrivacyPlan(sampling_rate=0.5, noise_multiplier=1.0)
    played = Federation(ram_path, count=3, rounds=1, privacy=privacy)
    played.lead()
    entry = entry_of(ram_path)
    assert (entry.sites, entry.nll) == ("site-0,site-1,site-2", 0.0)
    assert "evaluate" not in {kind for _, kind in played.grid.asked}
    for files in played.files:
        with Budget.open(files.state / FILE) as budget:
            (charge,) = budget.charges()
        assert charge.state == State.RELEASED
        folder = files.state / "outbound"
        left = [read_entry(line, place).message for place, line in lines(folder, read_head(folder))]
        costs = {message.kind: message.epsilon for message in left if message.epsilon is not None}
        assert set(costs) == {Masked.kind}
        assert {message.round for message in left if message.kind.startswith("query.mask")} == {1}
    told = [event.values for event in played.events if event.kind == "round.aggregated"]
    assert told == [{"sites": 3, "patients": entry.tokens}]


def test_noised_losses_of_a_masked_private_run_are_summed_and_charged(ram_path: Path) -> None:
    told = PrivateEvaluation(every=2, bound=4.0, noise_multiplier=0.01)
    privacy = PrivacyPlan(sampling_rate=0.5, noise_multiplier=1.0, evaluation=told)
    played = Federation(ram_path, count=3, rounds=3, privacy=privacy)
    kept: list[EvaluateReply] = []

    def collect(event: Event) -> None:
        if event.kind == "round.evaluated":
            for files in played.files:
                run = Archive(files.state).run(event_manifest(played))
                score = run.score(event.round, "tuning")
                kept.extend([] if score is None or score.round != event.round else [score])

    outcome = played.lead(collect)
    with Journal(ram_path / "run/ledger.sqlite") as journal:
        losses, sums = journal.losses("tuning"), journal.sums("evaluate tuning")
    assert [entry.round for entry in sums] == [2, 3]
    assert len(kept) == 6
    for entry in sums:
        parts = [score for score in kept if score.round == entry.round]
        assert entry.tokens == sum(score.tokens for score in parts)
        assert entry.nll == pytest.approx(sum(score.nll for score in parts), abs=1e-2)
    assert int(outcome.best_checkpoint.stem) == min(losses, key=lambda number: losses[number])
    for files in played.files:
        with Budget.open(files.state / FILE) as budget:
            charges = budget.charges()
            assert budget.spent(1e-6) == epsilon(protection.of_run(outcome.manifest).all, 1e-6)
        assert {charge.state for charge in charges} == {State.RELEASED}
        assert sorted((c.release.purpose, c.release.round) for c in charges) == [
            *(("evaluation", number) for number in (2, 3)),
            *(("training", number) for number in (1, 2, 3)),
        ]
        folder = files.state / "outbound"
        left = [read_entry(line, place).message for place, line in lines(folder, read_head(folder))]
        assert [message.kind for message in left if message.epsilon is not None] == [Masked.kind] * 5
    (row,) = {event.values.keys() >= {"patients", "loss"} for event in played.events if event.kind == "round.evaluated"}
    assert row


def event_manifest(played: Federation) -> str:
    return Manifest.from_bytes((played.root / "run" / "manifest.json").read_bytes()).hash


def test_a_ledger_from_before_a_signed_sum_says_that_its_run_can_not_go_on(ram_path: Path) -> None:
    played, ledger = Federation(ram_path, rounds=3), ram_path / "run/ledger.sqlite"

    def watch(event: Event) -> None:
        if event.kind == "round.announced":
            with Ledger.open(ledger) as opened:
                save(opened.transactions, ram_path / f"{event.round - 1}.backup")
            if event.round == 3:
                raise Killed

    with pytest.raises(Killed):
        played.lead(watch)
    for number in (1, 2):
        with Ledger.open(ledger) as opened:
            restore(ram_path / f"{number}.backup", opened.transactions, replace=True)
        if number == 1:
            told = (
                r"0002\.safetensors is there, .* last round of the run is 1: .*sign one sum a round, so round 2 can't"
            )
            with pytest.raises(DataError, match=told + r" be done again.* has round 2 as committed"):
                played.lead()
    assert played.lead().checkpoint.name == "0003.safetensors"
