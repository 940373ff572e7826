import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from federation.manifest import LocalWork, Manifest, OuterOptions
from federation.messages import (
    DeliveryError,
    EvaluateReply,
    EvaluateRequest,
    ProtocolError,
    Refusal,
    TrainReply,
    printable,
)
from federation.update import Layout, to_vector
from model.decoder import Decoder
from server.journal import Journal, Phase, Status
from server.rounds import TUNING, Answer, Event, RoundFailed, Rounds
from server.spool import Spool
from tests import tiny
from tokenizer.codebook import Codebook, Survey, TokenizerOptions
from tokenizer.errors import DataError

SITES = ("icu-a", "icu-b", "icu-c")
MODEL = tiny.MODEL
SIZE = Layout.of_config(MODEL).size


def agreement(**changes: Any) -> Manifest:
    codebook = Codebook.build(Survey(TokenizerOptions()))
    plan = tiny.plan(tokenizer=TokenizerOptions(), outer=OuterOptions.nesterov(), min_sites=2, rounds=2)
    manifest = dataclasses.replace(plan.manifest(codebook), model=MODEL, layout_hash=Layout.of_config(MODEL).hash)
    return dataclasses.replace(manifest, **changes)


MANIFEST = agreement()


class Run:
    """A run directory with everything that is open on it; `reopen` is what a new process does after a crash."""

    def __init__(self, path: Path, manifest: Manifest = MANIFEST) -> None:
        self.path, self.manifest = path, manifest
        self.events: list[Event] = []
        self.open()

    def open(self, journal: type[Journal] = Journal, spool: type[Spool] = Spool) -> None:
        self.journal = journal(self.path / "ledger.sqlite")
        self.journal.begin(self.manifest)
        self.rounds = Rounds(self.manifest, SIZE, self.journal, spool(self.path, self.manifest), self.events.append)

    def reopen(self) -> None:
        self.journal.close()
        self.open()

    def result(self) -> tuple[str, bytes]:
        path = Spool(self.path, self.manifest).checkpoint_path(self.manifest.rounds)
        return self.journal.fingerprint(), path.read_bytes()


@pytest.fixture
def run(ram_path: Path) -> Iterator[Run]:
    run = Run(ram_path / "run")
    yield run
    run.journal.close()


def reply(run: Run, site: str, **changes: Any) -> TrainReply:
    """What a good site answers: a function of site and round only."""
    number = run.rounds.number
    request = run.rounds.request(deadline_s=1e12)
    rng = np.random.default_rng([SITES.index(site), number])
    update = rng.normal(0, 0.01, SIZE).astype(np.float32)
    steps = run.manifest.local.steps or 1
    good = TrainReply(site, run.manifest.hash, number, request.digest, update, 100 * (1 + len(site)), steps, 3.5, 1.0)
    return dataclasses.replace(good, **changes)


def score(request: EvaluateRequest, site: str) -> EvaluateReply:
    head = (site, request.manifest_hash, request.round, request.split)
    return EvaluateReply(*head, request.digest, 10.0 * (1 + SITES.index(site)) / request.round, 10)


def finish_round(
    run: Run, order: Sequence[str] = SITES, pause: Callable[[], None] = lambda: None, late: Sequence[str] = ()
) -> None:
    """Lead a round; answers of the round before come from `late` once more."""
    run.rounds.open()
    pause()
    for site in order:
        if run.rounds.collecting and site in late:
            run.rounds.receive(site, reply(run, site, round=run.rounds.number - 1))
        if run.rounds.collecting and site in run.rounds.missing(SITES):
            run.rounds.receive(site, reply(run, site))
            pause()
    run.rounds.aggregate()
    pause()
    request = run.rounds.evaluation(TUNING, 1e12)
    run.rounds.score(request, {site: score(request, site) for site in order} if request else {})
    pause()
    run.rounds.commit()


def finish(run: Run) -> tuple[str, bytes]:
    while not run.rounds.finished:
        finish_round(run)
    return run.result()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    run = Run(tmp_path_factory.mktemp("expected") / "run")
    result = finish(run)
    run.journal.close()
    return result


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    orders=st.lists(st.permutations(SITES), min_size=2, max_size=2),
    crashes=st.sets(st.integers(0, 11)),
    late=st.sets(st.sampled_from(SITES)),
)
def test_neither_order_nor_crashes_nor_late_answers_change_the_result(
    ram_path: Path, expected: tuple[str, bytes], orders: list[list[str]], crashes: set[int], late: set[str]
) -> None:
    shutil.rmtree(ram_path / "run", ignore_errors=True)
    run = Run(ram_path / "run")
    moments = iter(range(100))

    def pause() -> None:
        if next(moments) in crashes:
            run.reopen()
            run.rounds.open()

    for order in orders:
        finish_round(run, order, pause, sorted(late))
    result = run.result()
    run.journal.close()
    assert result == expected


class Crash(BaseException):
    """The end of the process."""


def crashing(countdown: list[int]) -> tuple[type[Journal], type[Spool]]:
    """Ledger and spool that crash right after their n-th write."""

    def wrap(kind: type, names: Sequence[str]) -> Any:
        def wrapped(name: str) -> Any:
            original = getattr(kind, name)

            def method(self: Any, *args: Any, **kwargs: Any) -> Any:
                result = original(self, *args, **kwargs)
                countdown[0] -= 1
                if countdown[0] == 0:
                    raise Crash
                return result

            return method

        return type(kind.__name__, (kind,), {name: wrapped(name) for name in names})

    journal = wrap(Journal, ["begin", "enter", "reopen", "note_reply", "note_scores"])
    return journal, wrap(Spool, ["keep_update", "save", "sweep"])


def test_a_crash_after_any_write_changes_nothing(ram_path: Path, expected: tuple[str, bytes]) -> None:
    for write in itertools.count(1):
        run = Run(ram_path / str(write))
        run.journal.close()
        try:
            run.open(*crashing([write]))
            finish(run)
        except Crash:
            run.reopen()
            result = finish(run)
            run.journal.close()
            assert result == expected, f"differs after a crash at write {write}"
            shutil.rmtree(run.path)
        else:
            run.journal.close()
            break
    assert write > 20


def test_the_mean_is_weighted_by_tokens(ram_path: Path) -> None:
    run = Run(ram_path / "run", agreement(outer=OuterOptions(), rounds=1))
    start = to_vector(Decoder.create(MODEL, run.manifest.seed))
    run.rounds.open()
    sent = {"icu-a": (1.0, 100), "icu-b": (4.0, 300)}
    for site, (value, tokens) in sent.items():
        run.rounds.receive(site, reply(run, site, update=np.full(SIZE, value, np.float32), tokens=tokens))
    run.rounds.aggregate()
    np.testing.assert_allclose(run.rounds.request(0.0).weights, start + 3.25, rtol=1e-6)
    run.journal.close()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"update": np.full(SIZE, np.nan, np.float32)}, "not finite"),
        ({"update": np.full(SIZE, np.inf, np.float32)}, "not finite"),
        ({"update": np.zeros(SIZE - 1, np.float32)}, "shape"),
        ({"update": np.zeros((1, SIZE), np.float32)}, "shape"),
        ({"update": np.full(SIZE, 1e3, np.float32)}, "norm"),
        ({"manifest_hash": "0" * 64}, "belongs to run"),
        ({"round": 7}, "round 7"),
        ({"request_digest": "0" * 64}, "other weights"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 10**9}, "tokens"),
        ({"steps": 10**6}, "steps"),
        ({"site": "icu-b"}, "came from icu-a"),
    ],
)
def test_a_bad_update_is_named_and_the_others_go_on(ram_path: Path, changes: dict[str, Any], told: str) -> None:
    run = Run(ram_path / "run", agreement(max_norm=10.0))
    run.rounds.open()
    assert run.rounds.receive("icu-a", dataclasses.replace(reply(run, "icu-a"), **changes)) is Status.MALFORMED
    assert run.rounds.receive("icu-b", reply(run, "icu-b")) is Status.ACCEPTED
    assert run.rounds.receive("icu-c", reply(run, "icu-c")) is Status.ACCEPTED
    run.rounds.aggregate()
    bad = run.journal.replies(1)[0]
    assert (bad.site, bad.status) == ("icu-a", Status.MALFORMED)
    assert told in bad.reason
    assert [e.site for e in run.events if e.kind == "update.malformed"] == ["icu-a"]
    run.journal.close()


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (Refusal("icu-a", "no consent today"), Status.REFUSED),
        (ProtocolError("gibberish"), Status.MALFORMED),
        (DeliveryError("worker gone"), Status.FAILED),
        (EvaluateReply("icu-a", "", 1, "tuning", "", 0.0, 0), Status.MALFORMED),
    ],
)
def test_what_is_no_update_is_noted_with_its_reason(run: Run, answer: Answer, status: Status) -> None:
    run.rounds.open()
    run.rounds.request(1e12)
    assert run.rounds.receive("icu-a", answer) is status
    assert run.journal.replies(1)[0].reason


def test_the_first_answer_of_a_site_counts(run: Run) -> None:
    run.rounds.open()
    good = reply(run, "icu-a")
    assert run.rounds.receive("icu-a", good) is Status.ACCEPTED
    other = dataclasses.replace(good, update=good.update * 2)
    assert run.rounds.receive("icu-a", other) is Status.ACCEPTED
    assert run.journal.replies(1)[0].norm == pytest.approx(np.linalg.norm(good.update.astype(float)))


def test_too_few_updates_fail_the_round_which_can_be_taken_up_again(run: Run, expected: tuple[str, bytes]) -> None:
    run.rounds.open()
    run.rounds.receive("icu-a", reply(run, "icu-a"))
    run.rounds.receive("icu-b", Refusal("icu-b", "the store is being moved"))
    run.rounds.late("icu-c")
    with pytest.raises(RoundFailed, match=r"icu-b: refused, the store is being moved; icu-c: late"):
        run.rounds.aggregate()
    run.reopen()
    run.rounds.open()
    assert run.rounds.missing(SITES) == ["icu-b", "icu-c"]
    assert finish(run) == expected


def test_the_reason_of_a_failed_round_names_every_site_in_what_is_kept_of_it(run: Run) -> None:
    run.rounds.open()
    run.rounds.request(1e12)
    for site in SITES:
        run.rounds.receive(site, Refusal(site, f"{site} has not approved {'5a' * 32}; {'look at it, ' * 25}then start"))
    with pytest.raises(RoundFailed) as failed:
        run.rounds.aggregate()
    told = str(failed.value)
    assert printable(told) == told
    assert f"({', '.join(SITES)}: refused, the site has not approved 5a5a5a5a; look at it," in told
    assert told.endswith(" …). Once the sites can answer, start the same run again: it continues with this round.")


def test_an_update_file_that_changed_is_not_used(run: Run) -> None:
    run.rounds.open()
    for site in SITES:
        run.rounds.receive(site, reply(run, site))
    path = run.path / "rounds/0001/icu-b.update"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(DataError, match="icu-b"):
        run.rounds.aggregate()


def test_a_checkpoint_that_changed_is_not_continued_from(run: Run) -> None:
    finish_round(run)
    path = run.path / "checkpoints/0001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match="has changed"):
        run.reopen()


def test_only_the_last_the_one_before_and_the_best_checkpoint_are_kept(ram_path: Path) -> None:
    run = Run(ram_path / "run", agreement(rounds=5))
    losses = {1: 5.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0}
    while not run.rounds.finished:
        number = run.rounds.number
        run.rounds.open()
        for site in SITES:
            run.rounds.receive(site, reply(run, site))
        run.rounds.aggregate()
        request = run.rounds.evaluation(TUNING, 1e12)
        assert request is not None
        answers = {s: dataclasses.replace(score(request, s), nll=10 * losses[number]) for s in SITES}
        run.rounds.score(request, {**answers, "icu-c": None})
        run.rounds.commit()
    assert run.rounds.best() == 2
    assert sorted(p.stem for p in (run.path / "checkpoints").iterdir()) == ["0002", "0004", "0005"]
    assert [e.status for e in run.journal.scores() if e.site == "icu-c"] == [Status.LATE] * 5
    assert not list((run.path / "rounds").iterdir())
    run.journal.close()


def test_an_aggregated_round_takes_no_more_updates(run: Run) -> None:
    run.rounds.open()
    for site in SITES:
        run.rounds.receive(site, reply(run, site))
    run.rounds.aggregate()
    run.reopen()
    run.rounds.open()
    assert run.rounds.phase is Phase.AGGREGATED
    assert not run.rounds.collecting


@pytest.mark.parametrize("size", [2**62, 2**64, 10**30])
def test_numbers_that_no_ledger_holds_are_malformed(ram_path: Path, size: int) -> None:
    run = Run(ram_path / "run", agreement(local=LocalWork(epochs=1, batch_tokens=8192)))
    run.rounds.open()
    assert run.rounds.receive("icu-a", reply(run, "icu-a", steps=size, tokens=size)) is Status.MALFORMED
    for site in SITES[1:]:
        run.rounds.receive(site, reply(run, site))
    run.rounds.aggregate()
    request = run.rounds.evaluation(TUNING, 1e12)
    assert request is not None
    huge = dataclasses.replace(score(request, "icu-b"), tokens=size)
    run.rounds.score(request, {"icu-b": huge, "icu-c": score(request, "icu-c")})
    assert [entry.status for entry in run.journal.scores()] == [Status.MALFORMED, Status.ACCEPTED]
    run.journal.close()


def test_local_epochs_bound_the_tokens_too(ram_path: Path) -> None:
    run = Run(ram_path / "run", agreement(local=LocalWork(epochs=1, batch_tokens=64)))
    run.rounds.open()
    assert run.rounds.receive("icu-a", reply(run, "icu-a", steps=3, tokens=193)) is Status.MALFORMED
    assert run.rounds.receive("icu-b", reply(run, "icu-b", steps=3, tokens=192)) is Status.ACCEPTED
    run.journal.close()
