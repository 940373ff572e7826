"""What travels between the coordinator and its sites: rounded vectors, and weights that are sent once."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from client.archive import Archive
from client.files import SiteFiles
from federation import flower
from federation.coding import Coding, length, nearest
from federation.manifest import OuterOptions, Transport
from federation.messages import EvaluateRequest, Lacking, TrainReply, TrainRequest
from server.app import Outcome, coordinate
from server.journal import Journal, Status
from server.rounds import Event, RoundFailed
from tests import tiny
from tests.tiny import FunctionGrid, Node
from tokenizer.errors import DataError


class Wiretap:
    """A site, and what it is asked and answers."""

    def __init__(self, files: SiteFiles) -> None:
        self.asked: list[TrainRequest | EvaluateRequest] = []
        self.answered: list[object] = []
        self._node, self.forgets = tiny.honest(files), False
        self._state = files.state

    def __call__(self, message: Message) -> Message | None:
        request = flower.read(message)
        if self.forgets:
            for path in self._state.rglob("weights"):
                path.unlink()
        reply = self._node(message)
        if isinstance(request, TrainRequest | EvaluateRequest) and reply is not None:
            self.asked.append(request)
            self.answered.append(flower.read(reply))
        return reply


def lead(root: Path, nodes: list[Node], **changes: object) -> Outcome:
    return coordinate(FunctionGrid(dict(enumerate(nodes, 1))), root / "run", tiny.plan(rounds=3, **changes))


def losses(run: Path) -> list[float]:
    with Journal(run / "ledger.sqlite") as journal:
        return [loss for _, loss in sorted(journal.losses("tuning").items())]


@pytest.mark.parametrize("coding", ["bfloat16", "int8"])
def test_rounded_updates_are_smaller_and_train_as_well(ram_path: Path, coding: Coding) -> None:
    plain, rounded = ram_path / "plain", ram_path / "rounded"
    lead(plain, [tiny.honest(files) for files in tiny.sites(plain)])
    taps = [Wiretap(files) for files in tiny.sites(rounded)]
    outcome = lead(rounded, list(taps), transport=Transport(coding, "bfloat16"))
    assert losses(rounded / "run") == pytest.approx(losses(plain / "run"), abs=0.01)
    assert losses(plain / "run")[0] > losses(plain / "run")[-1] + 0.01
    size = outcome.manifest.model.parameters()
    with Journal(rounded / "run/ledger.sqlite") as journal:
        assert {entry.bytes for n in (1, 2, 3) for entry in journal.replies(n)} == {length(size, coding)}
    for request in taps[0].asked:
        assert request.coding == "bfloat16"
        assert np.array_equal(request.weights, nearest(request.weights, "bfloat16"))


def test_what_rounding_takes_away_comes_with_the_next_update(ram_path: Path) -> None:
    files = tiny.sites(ram_path)
    tap = Wiretap(files[0])
    outcome = lead(ram_path, [tap, *map(tiny.honest, files[1:])], transport=Transport("int8"))
    run = Archive(files[0].state).run(outcome.manifest.hash)
    # Asked for round 3 again without what is kept of it, the site does the same work with the same residual.
    kept, last = run.reply(3), run.residual_before(4)
    assert kept is not None
    assert last is not None
    assert 0 < np.abs(last).max() < np.abs(kept.update).max()
    (run.path / "rounds/0003.safetensors").unlink()
    (request,) = [request for request in tap.asked if isinstance(request, TrainRequest) and request.round == 3]
    sent = dataclasses.replace(request, weights=np.asarray(run.weights(request.known, request.coding)), known="")
    message = flower.request(flower.to_record(sent), sent.kind, 1, group="3", ttl_s=60.0)
    flower.number_(message, "again")
    again = flower.read(tap(message) or message)
    assert isinstance(again, TrainReply)
    assert np.array_equal(again.update, kept.update)
    assert np.array_equal(run.residual_before(4), last)
    path = run.path / "residuals" / "0003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"0003\.safetensors is damaged"):
        run.residual_before(4)


def test_weights_that_were_evaluated_are_not_sent_again(ram_path: Path) -> None:
    taps = [Wiretap(files) for files in tiny.sites(ram_path)]
    lead(ram_path, list(taps))
    for tap in taps:
        known = {(type(request), request.round): request.known != "" for request in tap.asked}
        assert [known[TrainRequest, n] for n in (1, 2, 3)] == [False, True, True]
        assert not any(known[EvaluateRequest, n] for n in (1, 2, 3))
        assert all(request.weights.size == 0 for request in tap.asked if request.known)


def test_a_site_that_lacks_the_weights_gets_them(ram_path: Path) -> None:
    files = tiny.sites(ram_path)
    taps = [Wiretap(one) for one in files]
    taps[1].forgets = True
    lead(ram_path, list(taps))
    assert sum(isinstance(answer, Lacking) for answer in taps[1].answered) == 2
    assert not any(isinstance(answer, Lacking) for tap in (taps[0], taps[2]) for answer in tap.answered)
    with Journal(ram_path / "run/ledger.sqlite") as journal:
        assert all(entry.status is Status.ACCEPTED for n in (1, 2, 3) for entry in journal.replies(n))


def test_a_site_that_always_lacks_weights_costs_only_itself(ram_path: Path) -> None:
    files = tiny.sites(ram_path)

    def lacking(message: Message) -> Message | None:
        request = flower.read(message)
        if isinstance(request, TrainRequest):
            return flower.reply(Lacking(files[0].name, request.manifest_hash, request.digest), message)
        return honest(message)

    honest = tiny.honest(files[0])
    lead(ram_path, [lacking, *map(tiny.honest, files[1:])])
    with Journal(ram_path / "run/ledger.sqlite") as journal:
        entries = {entry.site: entry for entry in journal.replies(2)}
    assert [entries[one.name].status for one in files] == [Status.MALFORMED, Status.ACCEPTED, Status.ACCEPTED]
    assert "lacking came in the place" in entries[files[0].name].reason


def test_an_update_in_another_coding_is_refused(ram_path: Path) -> None:
    files = tiny.sites(ram_path)
    honest = tiny.honest(files[0])

    def other(message: Message) -> Message | None:
        reply = honest(message)
        found = None if reply is None else flower.read(reply)
        if isinstance(found, TrainReply):
            return flower.reply(dataclasses.replace(found, coding="float32"), message)
        return reply

    lead(ram_path, [other, *map(tiny.honest, files[1:])], transport=Transport("bfloat16"))
    with Journal(ram_path / "run/ledger.sqlite") as journal:
        entry = next(entry for entry in journal.replies(1) if entry.site == files[0].name)
    assert (entry.status, entry.reason) == (
        Status.MALFORMED,
        "the update travels as float32, agreed is bfloat16",
    )


def test_only_the_drawn_sites_are_asked(ram_path: Path) -> None:
    taps = [Wiretap(files) for files in tiny.sites(ram_path, 5)]
    lead(ram_path, list(taps), sites_per_round=2)
    asked = [{n for n in (1, 2, 3) if any(request.round == n for request in tap.asked)} for tap in taps]
    assert [sum(n in rounds for rounds in asked) for n in (1, 2, 3)] == [2, 2, 2]
    assert len({tuple(n in rounds for rounds in asked) for n in (1, 2, 3)}) > 1


def test_krum_leaves_a_hostile_site_out_and_says_so(ram_path: Path) -> None:
    files = tiny.sites(ram_path, 5)
    honest = tiny.honest(files[0])

    def hostile(message: Message) -> Message | None:
        reply = honest(message)
        found = None if reply is None else flower.read(reply)
        if isinstance(found, TrainReply):
            return flower.reply(dataclasses.replace(found, update=-50 * found.update), message)
        return reply

    events: list[Event] = []
    grid = FunctionGrid(dict(enumerate([hostile, *map(tiny.honest, files[1:])], 1)))
    plan = tiny.plan(outer=OuterOptions(rule="krum", byzantine=1))
    coordinate(grid, ram_path / "run", plan, listen=events.append)
    out = [(event.round, event.site) for event in events if event.kind == "update.outlier"]
    assert out == [(1, files[0].name), (2, files[0].name)]
    with Journal(ram_path / "run/ledger.sqlite") as journal:
        reasons = {entry.site: entry.reason for entry in journal.replies(1)}
    assert reasons.pop(files[0].name) == "left out by krum: it lies far from the others"
    assert set(reasons.values()) == {""}


def test_too_few_sites_for_the_rule_fail_the_round(ram_path: Path) -> None:
    files = tiny.sites(ram_path)
    with pytest.raises(RoundFailed, match="krum with byzantine = 1 needs at least 5 updates, there are 3"):
        lead(ram_path, list(map(tiny.honest, files)), outer=OuterOptions(rule="krum", byzantine=1))
