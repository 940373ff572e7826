"""An active server is played against a site: each attack is refused, by its own error, before anything leaves."""

import copy
import dataclasses
import logging
import pickle
import re
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from client.held import Held
from client.masked import MaskedSite
from federation.identity import Identity
from federation.masking import (
    AlteredShare,
    ConsentRequest,
    ForgedSignature,
    KeysRequest,
    Masked,
    OpenRequest,
    OutOfTurn,
    Replayed,
    SecondUnmasking,
    SplitRoster,
    TooFewSites,
    WeakKeys,
    keyring_of,
    transcript_of,
)
from federation.messages import ProtocolError
from server.unmask import Stage, Unmasking
from tests.sums import FAR, IDENTITIES, NAMES, Federation, agreement, changed, foreign_consent, resigned
from tokenizer.errors import ConfigError, DataError


def fresh_key() -> str:
    return X25519PrivateKey.generate().public_key().public_bytes_raw().hex()


# Keys


@pytest.mark.parametrize("field", ["channel", "mask"])
def test_a_key_that_the_server_swapped_is_refused(field: str) -> None:
    played = Federation(agreement())
    request = changed(played.requests(Stage.SHARES)["ash"], "keys", 2, **{field: fresh_key()})
    with pytest.raises(ForgedSignature, match="cedar's keys is not signed by its enrolled identity"):
        played.answer("ash", request)


def test_keys_signed_by_an_identity_of_the_server_s_own_are_refused() -> None:
    played = Federation(agreement())
    request = played.requests(Stage.SHARES)["ash"]
    bare = dataclasses.replace(request.keys[1], mask=fresh_key())
    forged = resigned("hazel", bare)  # enrolled elsewhere, but not birch
    with pytest.raises(ForgedSignature, match="birch"):
        played.answer("ash", changed(request, "keys", 1, signature=forged.signature, mask=bare.mask))


def test_a_site_that_nobody_enrolled_is_refused() -> None:
    played = Federation(agreement())
    request = played.requests(Stage.SHARES)["ash"]
    ghost = resigned("hazel", request.keys[1], site="hazel")
    with pytest.raises(ForgedSignature, match="hazel is not in the roster"):
        played.answer("ash", dataclasses.replace(request, keys=(*request.keys, ghost)))


def test_a_key_shown_for_two_sites_is_refused() -> None:
    played = Federation(agreement())
    request = played.requests(Stage.SHARES)["ash"]
    copied = resigned("birch", request.keys[1], mask=request.keys[0].mask)
    with pytest.raises(ForgedSignature, match="same key"):
        played.answer("ash", dataclasses.replace(request, keys=(request.keys[0], copied, *request.keys[2:])))


def test_a_key_that_agrees_with_anybody_is_refused() -> None:
    """A colluding site signs a point of low order, with which every X25519 secret is zero."""
    played = Federation(agreement())
    request = played.requests(Stage.SHARES)["ash"]
    weak = resigned("birch", request.keys[1], channel="00" * 32)
    with pytest.raises(WeakKeys, match="birch"):
        played.answer("ash", dataclasses.replace(request, keys=(request.keys[0], weak, *request.keys[2:])))
    with pytest.raises(WeakKeys, match="birch"):
        Unmasking(played.agreement).receive("birch", weak)


def test_a_list_without_the_site_s_own_keys_is_refused() -> None:
    played = Federation(agreement())
    request = played.requests(Stage.SHARES)["ash"]
    with pytest.raises(SplitRoster, match="does not hold the keys that ash has sent"):
        played.answer("ash", dataclasses.replace(request, keys=request.keys[1:]))


def test_keys_out_of_order_or_twice_are_refused() -> None:
    played = Federation(agreement())
    request = played.requests(Stage.SHARES)["ash"]
    for keys in (request.keys[::-1], (request.keys[0], *request.keys)):
        with pytest.raises(ProtocolError, match="order of distinct"):
            played.answer("ash", dataclasses.replace(request, keys=keys))


# The roster


def test_a_site_s_minimum_is_of_summed_sites_not_of_those_that_sign() -> None:
    agreed = agreement(5, 3)
    played = Federation(agreed)
    played.sites["ash"] = MaskedSite(agreed, "ash", IDENTITIES["ash"], minimum=5)
    played.play(dropped={Stage.CONSENT: ["elm"], Stage.OPENING: ["fir"]})
    played.check(played.server.open_())


def test_a_roster_below_the_threshold_is_refused() -> None:
    played = Federation(agreement(5, 4))
    request = played.requests(Stage.SHARES)["ash"]
    with pytest.raises(TooFewSites, match=r"3 \(ash, birch, cedar\); ash needs 4"):
        played.answer("ash", dataclasses.replace(request, keys=request.keys[:3]))


def test_a_site_s_own_minimum_counts_where_it_is_higher() -> None:
    agreed = agreement(5, 3)
    with pytest.raises(TooFewSites, match="needs 6: the threshold is 3, its own minimum 6"):
        MaskedSite(agreed, "ash", IDENTITIES["ash"], minimum=6)
    played = Federation(agreed)
    played.sites["ash"] = MaskedSite(agreed, "ash", IDENTITIES["ash"], minimum=5)
    played.play(Stage.CONSENT, {Stage.MASKED: ["elm"]})
    with pytest.raises(TooFewSites, match="sites that are summed are 4"):
        played.ask("ash")


def test_a_site_takes_no_part_under_a_key_that_is_not_its_own() -> None:
    with pytest.raises(ConfigError, match="does not list ash with the key"):
        MaskedSite(agreement(), "ash", Identity(Ed25519PrivateKey.generate()))


def test_two_lists_of_keys_for_one_site_are_refused() -> None:
    played = Federation(agreement())
    request = played.requests(Stage.SHARES)["ash"]
    played.answer("ash", request)
    with pytest.raises(SplitRoster, match="another list of keys"):
        played.answer("ash", dataclasses.replace(request, keys=request.keys[:4]))


def split_federation() -> tuple[Federation, Any]:
    """The server shows ash, birch and cedar four keys each: without elm to ash, with elm to the others."""
    played = Federation(agreement(5, 3))
    whole = played.requests(Stage.SHARES)
    shares = {name: played.answer(name, whole[name]) for name in ("birch", "cedar", "elm", "fir")}
    fewer = dataclasses.replace(whole["ash"], keys=tuple(k for k in whole["ash"].keys if k.site != "elm"))
    shares["ash"] = played.answer("ash", fewer)
    played.server._replies[Stage.SHARES].update(shares)
    played.server.stage = Stage.MASKED
    return played, shares


def test_shares_from_sites_that_were_shown_other_keys_are_refused() -> None:
    played, shares = split_federation()
    request = played.server.request("ash", FAR)
    of_ash = dataclasses.replace(request, keyring=shares["ash"].keyring)
    of_ash = dataclasses.replace(of_ash, shares=tuple(s for s in of_ash.shares if s.site != "elm"))
    with pytest.raises(SplitRoster, match="ash and birch were shown different lists of keys"):
        played.answer("ash", of_ash)
    renamed = tuple(dataclasses.replace(share, keyring=of_ash.keyring) for share in of_ash.shares)
    lied = dataclasses.replace(of_ash, shares=renamed)
    with pytest.raises(ForgedSignature, match="birch's shares"):
        played.answer("ash", lied)


def test_a_server_does_not_take_shares_for_other_keys_than_it_sent() -> None:
    played, shares = split_federation()
    played.server.stage = Stage.SHARES
    played.server._replies[Stage.SHARES].clear()
    played.server._keyring = shares["birch"].keyring
    with pytest.raises(SplitRoster, match="ash answers for other keys"):
        played.server.receive("ash", shares["ash"])


def test_sites_that_are_brought_different_shares_do_not_open_a_sum() -> None:
    """The server tells birch that elm has dropped out, and the others that it has not."""
    played = Federation(agreement(5, 3))
    requests = played.requests(Stage.MASKED)
    for name, request in requests.items():
        fewer = dataclasses.replace(request, shares=tuple(s for s in request.shares if s.site != "elm"))
        played.answer(name, fewer if name == "birch" else request)
    everybody, without = ("ash", "birch", "cedar", "elm", "fir"), ("ash", "birch", "cedar", "fir")
    summed = without
    asked = ConsentRequest(played.agreement.place, played.agreement.digest, everybody, summed, FAR)
    with pytest.raises(SplitRoster, match="brought the shares of other sites"):
        played.answer("birch", asked)
    told = dataclasses.replace(asked, shared=without)
    consents = [played.answer(n, told if n == "birch" else asked) for n in summed]
    with pytest.raises(SplitRoster, match="birch was shown other keys or other sites than ash"):
        played.answer("ash", OpenRequest(played.agreement.place, played.agreement.digest, summed, tuple(consents), FAR))


# Shares


@pytest.mark.parametrize("where", [0, 15, -1])
def test_a_share_that_was_altered_is_refused(where: int) -> None:
    played = Federation(agreement())
    request = played.requests(Stage.MASKED)["ash"]
    sealed = bytearray.fromhex(request.shares[1].sealed)
    sealed[where] ^= 1
    with pytest.raises(AlteredShare, match="share of cedar for ash was changed"):
        played.answer("ash", changed(request, "shares", 1, sealed=sealed.hex()))


@pytest.mark.parametrize("sealed", ["", "00", "zz", "0" * 80])
def test_a_share_that_is_none_is_refused(sealed: str) -> None:
    played = Federation(agreement())
    request = played.requests(Stage.MASKED)["ash"]
    with pytest.raises(AlteredShare, match="cedar"):
        played.answer("ash", changed(request, "shares", 1, sealed=sealed))


def test_a_share_meant_for_another_site_is_refused() -> None:
    played = Federation(agreement())
    requests = played.requests(Stage.MASKED)
    of_cedar_for_birch = requests["birch"].shares[1]
    assert of_cedar_for_birch.site == "cedar"
    with pytest.raises(AlteredShare, match="cedar"):
        played.answer("ash", changed(requests["ash"], "shares", 1, sealed=of_cedar_for_birch.sealed))


def test_a_commitment_that_the_server_swapped_is_refused() -> None:
    played = Federation(agreement())
    request = played.requests(Stage.MASKED)["ash"]
    with pytest.raises(ForgedSignature, match="cedar's shares"):
        played.answer("ash", changed(request, "shares", 1, commitment="00" * 32))


def test_shares_of_too_few_sites_are_refused() -> None:
    played = Federation(agreement(5, 4))
    request = played.requests(Stage.MASKED)["ash"]
    with pytest.raises(TooFewSites, match="sites that shared their secrets are 3"):
        played.answer("ash", dataclasses.replace(request, shares=request.shares[:2]))


# Opening


def ready(sites: int = 5, threshold: int = 3) -> Federation:
    """All have masked; the server may now ask for consent to any set."""
    played = Federation(agreement(sites, threshold))
    played.play(Stage.CONSENT)
    return played


def test_a_second_set_is_not_signed() -> None:
    played = ready()
    honest = played.server.request("ash", FAR)
    played.answer("ash", honest)
    with pytest.raises(SecondUnmasking, match="another set of sites for round 1"):
        played.answer("ash", dataclasses.replace(honest, summed=honest.summed[:4]))
    assert played.answer("ash", honest) == played.answer("ash", honest)


def test_both_secrets_of_one_site_are_never_released() -> None:
    """First the self mask of fir, as a summed site; then its mask key, as one that has dropped out."""
    played = ready()
    played.play(Stage.OPENING)
    honest = played.server.request("ash", FAR)
    opened = played.answer("ash", honest)
    assert "fir" in opened.seeds
    assert opened.keys == {}
    without_fir = tuple(name for name in honest.summed if name != "fir")
    transcript = transcript_of(played.server._keyring, honest.summed, without_fir)
    colluding = tuple(foreign_consent(n, played.agreement.digest, transcript) for n in without_fir)
    with pytest.raises(SecondUnmasking, match="and no other"):
        played.answer("ash", OpenRequest(played.agreement.place, played.agreement.digest, without_fir, colluding, FAR))


def test_two_halves_of_the_sites_cannot_be_made_to_open_two_sums() -> None:
    played = ready(5, 3)
    honest = played.server.request("ash", FAR)
    first, second = honest.summed, honest.summed[:4]  # with fir, and without
    one = [played.answer(name, dataclasses.replace(honest, summed=first)) for name in ("ash", "birch", "fir")]
    two = [played.answer(name, dataclasses.replace(honest, summed=second)) for name in ("cedar", "elm")]
    played.answer("ash", OpenRequest(played.agreement.place, played.agreement.digest, first, tuple(one), FAR))
    with pytest.raises(TooFewSites, match="sites that signed are 2"):
        played.answer("cedar", OpenRequest(played.agreement.place, played.agreement.digest, second, tuple(two), FAR))
    with pytest.raises(SplitRoster, match="ash was shown other"):
        played.answer(
            "cedar", OpenRequest(played.agreement.place, played.agreement.digest, second, (one[0], *two), FAR)
        )


def test_signatures_that_the_server_made_up_open_nothing() -> None:
    played = ready()
    played.play(Stage.OPENING)
    request = played.server.request("ash", FAR)
    with pytest.raises(ForgedSignature, match="cedar's consent"):
        played.answer("ash", changed(request, "consents", 2, signature=request.consents[1].signature))


def test_a_stranger_s_signature_does_not_count() -> None:
    played = Federation(agreement(5, 3))
    played.play(Stage.OPENING, {Stage.MASKED: ["fir"]})
    request = played.server.request("ash", FAR)
    more = foreign_consent("fir", request.agreement, request.consents[0].transcript)
    with pytest.raises(SplitRoster, match="fir signed, but is not among the summed"):
        played.answer("ash", dataclasses.replace(request, consents=(*request.consents, more)))


def test_a_set_without_the_site_itself_or_with_a_site_unheard_of_is_not_signed() -> None:
    played = Federation(agreement(5, 3))
    played.play(Stage.CONSENT, {Stage.SHARES: ["fir"]})
    honest = played.server.request("ash", FAR)
    for summed in (("birch", "cedar", "elm"), ("ash", "birch", "fir")):
        with pytest.raises(SplitRoster, match="must be ash and others"):
            played.answer("ash", dataclasses.replace(honest, summed=summed))


# Replays and order

OTHER_WORK = {"work": "ef" * 32}  # a coordinator that sent other weights to one site


def recorded(agreed: Any) -> tuple[Federation, dict[Stage, Any], dict[Stage, Any]]:
    """What ash was asked, and has answered, in a whole sum."""
    played, asked, answered = Federation(agreed), {}, {}
    while played.server.stage is not Stage.DONE:
        for name in played.server.asked:
            request = played.server.request(name, FAR)
            reply = played.answer(name, request)
            if name == "ash":
                asked[played.server.stage], answered[played.server.stage] = request, reply
            played.server.receive(name, reply)
        played.server.advance()
    return played, asked, answered


@pytest.mark.parametrize(
    "other", [{"round": 2}, {"attempt": 2}, {"manifest_hash": "cd" * 32}, {"size": 999}, OTHER_WORK]
)
def test_messages_of_another_round_attempt_run_work_or_model_are_refused(other: dict[str, Any]) -> None:
    _, asked, answered = recorded(agreement())
    later = Federation(agreement(**other))
    while later.server.stage is not Stage.DONE:
        with pytest.raises(Replayed, match="ash is at"):
            later.answer("ash", asked[later.server.stage])
        with pytest.raises(Replayed, match="ash answers for sum"):
            later.server.receive("ash", answered[later.server.stage])
        for name in later.server.asked:
            later.server.receive(name, later.ask(name))
        later.server.advance()


@pytest.mark.parametrize(("stage", "field"), [(Stage.SHARES, "keys"), (Stage.OPENING, "consents")])
def test_what_was_signed_in_another_round_does_not_count_in_this(stage: Stage, field: str) -> None:
    _, asked, _ = recorded(agreement())
    later = Federation(agreement(round=2))
    request = later.requests(stage)["ash"]
    old = getattr(asked[stage], field)[1]
    items = getattr(request, field)
    with pytest.raises(Replayed, match="birch belongs to sum"):
        later.answer("ash", dataclasses.replace(request, **{field: (items[0], old, *items[2:])}))
    renamed = dataclasses.replace(old, agreement=later.agreement.digest)
    with pytest.raises(ForgedSignature, match="birch"):
        later.answer("ash", dataclasses.replace(request, **{field: (items[0], renamed, *items[2:])}))


def test_an_update_is_masked_once() -> None:
    played = Federation(agreement(5, 3))
    request = played.requests(Stage.MASKED)["ash"]
    first = played.answer("ash", request)
    again = played.answer("ash", request)
    assert np.array_equal(first.words, again.words)
    assert first.totals == again.totals
    with pytest.raises(OutOfTurn, match="never used twice"):
        played.answer("ash", dataclasses.replace(request, shares=request.shares[1:]))
    for change in ("update", "weight", "total"):
        other = Federation(played.agreement, {**played.updates})
        other.sites, other.weights, other.totals = played.sites, {**played.weights}, {**played.totals}
        if change == "update":
            other.updates["ash"] = np.nextafter(other.updates["ash"], np.float32(1))
        elif change == "weight":
            other.weights["ash"] += 1
        else:
            other.totals["ash"] = {**other.totals["ash"], "steps": 7.0}
        with pytest.raises(OutOfTurn, match="never used twice"):
            other.answer("ash", request)


def test_steps_out_of_turn_are_refused() -> None:
    played = Federation(agreement())
    digest = played.agreement.digest
    consent = ConsentRequest(played.agreement.place, digest, NAMES[:5], NAMES[:5], FAR)
    with pytest.raises(OutOfTurn, match="not masked"):
        played.answer("ash", consent)
    with pytest.raises(OutOfTurn, match="signed no set"):
        played.answer("ash", OpenRequest(played.agreement.place, digest, NAMES[:5], (), FAR))
    masked = Federation(agreement()).requests(Stage.MASKED)["ash"]
    with pytest.raises(OutOfTurn, match="not shared"):
        played.answer("ash", dataclasses.replace(masked, agreement=digest))


# Its own update


@pytest.mark.parametrize(
    ("update", "weight", "totals", "match"),
    [
        (np.zeros(999, np.float32), 1, {"steps": 1, "loss": 0}, r"float32 \[1000\] was agreed"),
        (np.zeros(1000), 1, {"steps": 1, "loss": 0}, "float64"),
        (np.zeros(2000, np.float32)[::2], 1, {"steps": 1, "loss": 0}, "contiguous"),
        (np.full(1000, np.nan, np.float32), 1, {"steps": 1, "loss": 0}, "not finite"),
        (np.zeros(1000, np.float32), 0, {"steps": 1, "loss": 0}, "weight is 0"),
        (np.zeros(1000, np.float32), 1001, {"steps": 1, "loss": 0}, "'weight' is not within"),
        (np.zeros(1000, np.float32), 1, {"steps": 51, "loss": 0}, "'steps' is not within"),
        (np.zeros(1000, np.float32), 1, {"steps": 1}, "agreed are"),
    ],
)
def test_what_was_not_agreed_is_refused_and_can_be_done_right_after(
    update: np.ndarray, weight: int, totals: dict[str, float], match: str
) -> None:
    played = Federation(agreement())
    request = played.requests(Stage.MASKED)["ash"]
    with pytest.raises(DataError, match=match):
        played.sites["ash"].mask_(request, update, weight, totals)
    played.play()
    played.check(played.server.open_())


def test_masking_writes_over_the_update_and_takes_no_second_one() -> None:
    played = Federation(agreement())
    request = played.requests(Stage.MASKED)["ash"]
    update = played.updates["ash"].copy()
    masked = played.sites["ash"].mask_(request, update, 1, played.totals["ash"])
    assert np.shares_memory(masked.words, update)


# Crashes


def revived(played: Federation, name: str) -> None:
    kept = played.sites[name].to_secret_bytes()
    played.sites[name] = MaskedSite(played.agreement, name, IDENTITIES[name], before=kept)


def test_a_site_that_crashes_between_any_two_steps_goes_on() -> None:
    played = Federation(agreement())
    while played.server.stage is not Stage.DONE:
        for name in played.server.asked:
            revived(played, name)
            reply = played.ask(name)
            revived(played, name)
            again = played.ask(name)
            if isinstance(reply, Masked):
                assert again.totals == reply.totals
                assert np.array_equal(again.words, reply.words)
            else:
                assert again == reply
            played.server.receive(name, reply)
        played.server.advance()
    played.check(played.server.open_())


def test_a_crash_does_not_make_a_site_sign_or_mask_twice() -> None:
    played = ready()
    honest = played.server.request("ash", FAR)
    played.answer("ash", honest)
    revived(played, "ash")
    with pytest.raises(SecondUnmasking):
        played.answer("ash", dataclasses.replace(honest, summed=honest.summed[:4]))
    masked = Federation(agreement())
    request = masked.requests(Stage.MASKED)["ash"]
    masked.answer("ash", request)
    revived(masked, "ash")
    masked.updates["ash"] = masked.updates["ash"] + 1
    with pytest.raises(OutOfTurn, match="never used twice"):
        masked.answer("ash", request)


def after(played: Federation, **changes: Any) -> MaskedSite:
    kept = played.sites["ash"].to_secret_bytes()
    return MaskedSite(agreement(**changes), "ash", IDENTITIES["ash"], before=kept)


def test_an_attempt_that_failed_before_consent_may_be_tried_again_with_new_keys() -> None:
    played = ready()
    new = agreement(attempt=2)
    again = after(played, attempt=2).keys(KeysRequest(new.place, new.digest, FAR))
    assert again.mask != played.server._of(type(again))[0].mask


def test_a_round_whose_set_was_signed_gets_no_second_attempt() -> None:
    played = ready()
    played.ask("ash")
    with pytest.raises(SecondUnmasking, match="signed for round 1 already"):
        after(played, attempt=2)
    assert after(played, round=2)
    assert after(played, manifest_hash="cd" * 32)


@pytest.mark.parametrize("changes", [{"clip": 2.0}, {"round": 0, "attempt": 9}])
def test_a_sum_is_never_begun_again(changes: dict[str, Any]) -> None:
    with pytest.raises(OutOfTurn, match="never begun again"):
        after(ready(), **changes)


# Secrets


def secrets_of(site: MaskedSite) -> set[str]:
    held: Held = site._held
    assert held.secrets is not None
    own = {held.secrets.channel, held.secrets.mask, held.secrets.seed}
    return own | {share for pair in held.shares.values() for share in pair}


def test_secrets_are_shown_nowhere(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG)
    played = ready()
    site = played.sites["ash"]
    hidden = secrets_of(site)
    assert len(hidden) == 3 + 2 * 5
    for shown in (site, site._held, site._held.secrets, site._masks()):
        assert not any(secret in text for secret in hidden for text in (repr(shown), str(shown), f"{shown}"))
        assert not re.search(r"[0-9a-f]{32}|b'", repr(shown))
    for thing in (site, site._held, site._held.secrets, *site._masks()):
        for give_away in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="pickled"):
                give_away(thing)
    played.play()
    out = capsys.readouterr()
    assert not any(secret in caplog.text + out.out + out.err for secret in hidden)


def test_messages_before_opening_hold_no_secret_and_opening_releases_one_share_for_each_site() -> None:
    played = Federation(agreement())
    told = ""
    while played.server.stage is not Stage.OPENING:
        for name in played.server.asked:
            request = played.server.request(name, FAR)
            reply = played.answer(name, request)
            told += repr(request) + repr(reply)
            played.server.receive(name, reply)
        played.server.advance()
    hidden = set().union(*(secrets_of(site) for site in played.sites.values()))
    assert not any(secret in told for secret in hidden)


def test_secrets_are_forgotten_once_the_sum_is_open() -> None:
    played = ready()
    hidden = secrets_of(played.sites["ash"])
    played.play()
    released = set(played.sites["ash"]._held.opened.seeds.values())
    kept = played.sites["ash"].to_secret_bytes().decode()
    assert not any(secret in kept for secret in hidden - released)
    with pytest.raises(OutOfTurn, match="forgotten"):
        played.sites["ash"]._masks()


def test_the_keyring_names_the_keys_whatever_their_order() -> None:
    request = Federation(agreement()).requests(Stage.SHARES)["ash"]
    assert keyring_of(agreement(), request.keys) == keyring_of(agreement(), request.keys[::-1])


def test_no_update_is_masked_without_the_noise_that_was_agreed_or_with_noise_that_was_not() -> None:
    for noise, key, told in (
        (0.5, b"", "agreed for this sum, but no key"),
        (0.0, b"k" * 32, "not agreed for this sum"),
    ):
        played = Federation(agreement(noise=noise))
        request = played.requests(Stage.MASKED)["ash"]
        update, part = played.updates["ash"].copy(), (played.weights["ash"], played.totals["ash"])
        with pytest.raises(DataError, match=told):
            played.sites["ash"].mask_(request, update, *part, key)
        assert np.array_equal(update, played.updates["ash"]), "nothing has changed"


def test_other_noise_under_the_same_masks_is_refused() -> None:
    played = Federation(agreement(noise=0.5))
    request = played.requests(Stage.MASKED)["ash"]
    part = played.weights["ash"], played.totals["ash"]
    one = played.sites["ash"].mask_(request, played.updates["ash"].copy(), *part, b"k" * 32)
    same = played.sites["ash"].mask_(request, played.updates["ash"].copy(), *part, b"k" * 32)
    assert np.array_equal(one.words, same.words)
    with pytest.raises(OutOfTurn, match="never used twice"):
        played.sites["ash"].mask_(request, played.updates["ash"].copy(), *part, b"l" * 32)
