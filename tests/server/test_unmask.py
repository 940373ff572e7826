"""Claims about the coordinator's side: what it takes, what it refuses, and that it survives a kill."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from federation.masking import (
    ForgedSignature,
    Keys,
    MaskingError,
    OutOfTurn,
    SplitRoster,
    WrongLength,
)
from server.unmask import Stage, Unmasking
from tests.sums import FAR, Federation, agreement, resigned


@pytest.mark.parametrize("bits", [20, 40])
@pytest.mark.parametrize("shape", ["short", "long", "wide", "square"])
def test_a_masked_vector_of_another_size_or_type_is_refused_and_left_out(shape: str, bits: int) -> None:
    agreed = agreement(precision_bits=bits)
    played = Federation(agreed)
    played.play(Stage.MASKED)
    reply = played.ask("ash")
    words = {
        "short": reply.words[:-1],
        "long": np.append(reply.words, reply.words[:1]),
        "wide": reply.words.astype("<u8" if bits == 20 else "<u4"),
        "square": reply.words.reshape(10, 100),
    }[shape]
    with pytest.raises(WrongLength, match="masked update of ash"):
        played.server.receive("ash", dataclasses.replace(reply, words=words))
    played.play(dropped={Stage.MASKED: ["ash"]})
    opening = played.server.open_()
    assert "ash" not in opening.sites
    played.check(opening)


@pytest.mark.parametrize("totals", [(1, 2, 3), (1, 2, 3, 2**64), (1, 2, 3, -1)])
def test_totals_of_another_number_or_size_are_refused(totals: tuple[int, ...]) -> None:
    played = Federation(agreement())
    played.play(Stage.MASKED)
    with pytest.raises(WrongLength, match="totals"):
        played.server.receive("ash", dataclasses.replace(played.ask("ash"), totals=totals))


def test_a_reply_that_comes_twice_counts_once() -> None:
    played = Federation(agreement())
    played.play(Stage.MASKED)
    replies = {name: played.ask(name) for name in played.server.asked}
    for name in (*replies, *replies):
        played.server.receive(name, replies[name])
    played.server.advance()
    played.play()
    played.check(played.server.open_())


def test_a_reply_in_the_name_of_another_site_is_refused() -> None:
    played = Federation(agreement())
    with pytest.raises(ForgedSignature, match="birch names ash"):
        played.server.receive("birch", played.ask("ash"))


def test_a_reply_of_a_later_stage_is_refused() -> None:
    played = Federation(agreement())
    played.play(Stage.OPENING)
    opened = played.ask("ash")
    with pytest.raises(OutOfTurn, match="opening shares while keys"):
        Unmasking(played.agreement).receive("ash", opened)


def test_keys_that_were_not_signed_by_their_site_are_refused_at_once() -> None:
    played = Federation(agreement())
    keys = played.ask("ash")
    forged = dataclasses.replace(resigned("birch", dataclasses.replace(keys)), site="ash")
    with pytest.raises(ForgedSignature, match="ash's keys"):
        played.server.receive("ash", forged)


def test_a_site_that_leaves_one_out_when_it_shares_is_refused() -> None:
    played = Federation(agreement())
    played.play(Stage.SHARES)
    shares = played.ask("ash")
    fewer = {name: sealed for name, sealed in shares.sealed.items() if name != "elm"}
    with pytest.raises(MaskingError, match="ash has not shared its secrets out over all"):
        played.server.receive("ash", dataclasses.replace(shares, sealed=fewer))


def test_a_signature_on_another_set_is_refused() -> None:
    played = Federation(agreement())
    played.play(Stage.CONSENT)
    consent = played.ask("ash")
    with pytest.raises(SplitRoster, match="ash signed other"):
        played.server.receive("ash", resigned("ash", consent, transcript="00" * 32))


@pytest.mark.parametrize("part", ["seeds", "keys"])
@pytest.mark.parametrize("share", ["00" * 33, "ff" * 33, "01" * 33, "zz", ""])
def test_a_wrong_share_opens_nothing_and_is_told(part: str, share: str) -> None:
    played = Federation(agreement(5, 4))
    played.play(Stage.OPENING, {Stage.MASKED: ["birch"]})
    for name in played.server.asked:
        opened = played.ask(name)
        if name == "cedar":
            given = getattr(opened, part)
            opened = dataclasses.replace(opened, **{part: {**given, min(given): share}})
        played.server.receive(name, opened)
    played.server.advance()
    with pytest.raises(MaskingError, match="or one of ash, cedar, elm, fir released a wrong share"):
        played.server.open_()


def test_a_wrong_share_does_no_harm_where_more_than_enough_came() -> None:
    played = Federation(agreement(5, 3))
    played.play(Stage.OPENING, {Stage.MASKED: ["birch"]})
    for name in played.server.asked:
        opened = played.ask(name)
        if name == "cedar":
            wrong = {part: dict.fromkeys(getattr(opened, part), "01" * 33) for part in ("seeds", "keys")}
            opened = dataclasses.replace(opened, **wrong)
        played.server.receive(name, opened)
    played.server.advance()
    played.check(played.server.open_())


def test_shares_of_other_sites_than_were_asked_for_are_refused() -> None:
    played = Federation(agreement())
    played.play(Stage.OPENING)
    opened = played.ask("ash")
    with pytest.raises(MaskingError, match="ash has not released"):
        played.server.receive("ash", dataclasses.replace(opened, seeds={}))


def test_a_sum_is_opened_once_and_only_when_all_stages_are_closed() -> None:
    played = Federation(agreement())
    played.play(Stage.OPENING)
    with pytest.raises(OutOfTurn, match="opening shares are asked for"):
        played.server.open_()
    played.play()
    played.server.open_()
    with pytest.raises(OutOfTurn, match="second time"):
        played.server.open_()
    with pytest.raises(OutOfTurn, match="nothing more to ask"):
        played.server.request("ash", FAR)
    with pytest.raises(OutOfTurn, match="no stage is left"):
        played.server.advance()


def test_a_killed_coordinator_goes_on_from_the_replies_that_it_kept() -> None:
    played = Federation(agreement())
    kept: list[Any] = []
    silent = {Stage.SHARES: ["fir"], Stage.MASKED: ["elm"]}
    while played.server.stage is not Stage.DONE:
        for name in played.server.asked:
            if name not in silent.get(played.server.stage, ()):
                again = Unmasking(played.agreement)
                for step in kept:
                    again.advance() if step is None else again.receive(step.site, step)
                assert (again.stage, again.asked) == (played.server.stage, played.server.asked)
                assert again.request(name, FAR) == played.server.request(name, FAR)
                played.server = again
                kept.append(played.ask(name))
                played.server.receive(name, kept[-1])
        played.server.advance()
        kept.append(None)
    played.check(played.server.open_())


def test_the_coordinator_keeps_no_masked_update() -> None:
    """What a memory dump would show: the running sum, and none of the vectors in it."""
    played = Federation(agreement())
    played.play(Stage.CONSENT)
    held = [reply.words for reply in played.server._replies[Stage.MASKED].values()]
    assert all(words.size == 0 for words in held)
    assert isinstance(played.server._replies[Stage.KEYS]["ash"], Keys)
