"""Claims about masked sums: they are the plain sums, whoever drops out when, and a masked vector tells nothing."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from federation import flower
from federation.fixed_point import CHUNK, FixedPoint, Total
from federation.masking import KINDS, Agreement, Keys, Masked, MaskingOptions, TooFewSites
from federation.messages import ProtocolError, Wire, from_wire, to_wire
from server.unmask import Stage
from tests.sums import FAR, Federation, agreement
from tokenizer.errors import ConfigError

STAGES = [stage for stage in Stage if stage is not Stage.DONE]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_masked_mean_is_the_plain_mean_whoever_drops_out_when(data: st.DataObject) -> None:
    count = data.draw(st.integers(3, 7), "sites")
    threshold = data.draw(st.integers(count // 2 + 1, count), "threshold")
    size = data.draw(st.sampled_from([1, 2, 3, 17, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5]), "size")
    bits, clip = data.draw(st.sampled_from([20, 30]), "bits"), data.draw(st.sampled_from([1e-4, 1.0, 300.0]), "clip")
    agreed = agreement(count, threshold, size, precision_bits=bits, clip=clip)
    names = list(agreed.roster)
    leaving = data.draw(st.permutations(names))[: data.draw(st.integers(0, count - threshold), "dropouts")]
    dropped: dict[Stage, list[str]] = {}
    for name in leaving:
        dropped.setdefault(data.draw(st.sampled_from(STAGES)), []).append(name)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    spread = data.draw(st.sampled_from([0.0, 0.1, 2.0, 1e30]), "spread")  # 2: many are clipped; 1e30: all
    updates = {name: (rng.normal(0, spread, size) * clip).astype(np.float32) for name in names}
    played = Federation(agreed, updates, weight=data.draw(st.sampled_from([1, 900]), "weight"))
    played.play(dropped=dropped)
    opening = played.server.open_()
    early = {n for stage in STAGES[:3] for n in dropped.get(stage, ())}
    assert set(opening.sites) == set(names) - early
    played.check(opening)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [20, 40])
def test_the_extremes_of_all_sites_together_do_not_wrap(sign: int, bits: int) -> None:
    agreed = agreement(7, 4, 10, precision_bits=bits)
    played = Federation(agreed, {name: np.full(10, sign * 1.0, np.float32) for name in agreed.roster})
    played.weights = dict.fromkeys(agreed.roster, agreed.options.max_weight)
    played.play()
    opening = played.server.open_()
    played.check(opening)
    np.testing.assert_allclose(opening.mean, sign, rtol=1e-7)


@pytest.mark.parametrize("stage", STAGES)
def test_too_few_sites_are_told_with_the_stage_and_who_is_missing(stage: Stage) -> None:
    played = Federation(agreement(5, 4))
    with pytest.raises(TooFewSites, match=rf"3 sites gave {stage.value}, 4 must. Missing: birch, elm\."):
        played.play(dropped={stage: ["birch", "elm"]})
    alone = Federation(agreement(5, 4))
    with pytest.raises(TooFewSites, match=rf"1 site gave {stage.value}, 4 must"):
        alone.play(dropped={stage: ["birch", "cedar", "elm", "fir"]})


def test_a_failed_stage_takes_the_answers_that_come_after_all() -> None:
    played = Federation(agreement(5, 4))
    with pytest.raises(TooFewSites, match="they keep their answer"):
        played.play(dropped={Stage.OPENING: ["birch", "elm"]})
    assert played.server.missing == ("birch", "elm")
    played.play()
    played.check(played.server.open_())


def test_the_sum_of_a_dropped_site_is_not_opened_when_its_update_comes_late() -> None:
    played = Federation(agreement(5, 3))
    late = played.requests(Stage.MASKED)["birch"]
    played.play(Stage.CONSENT, {Stage.MASKED: ["birch"]})
    played.server.receive("birch", played.answer("birch", late))
    played.play()
    opening = played.server.open_()
    assert "birch" not in opening.sites
    played.check(opening)


def test_masked_vectors_are_uniform() -> None:
    """Chi-square over each byte of a word of the masked zero vector; the false-alarm rate of the whole is 1e-6."""
    size = 1 << 18
    agreed = agreement(3, 2, size)
    played = Federation(agreed, {name: np.zeros(size, np.float32) for name in agreed.roster})
    request = played.requests(Stage.MASKED)["ash"]
    plain = np.empty(size, agreed.numbers.dtype)
    for part in range(0, size, CHUNK):
        agreed.numbers.encode(played.updates["ash"][part : part + CHUNK], 100, plain[part : part + CHUNK])
    masked = played.answer("ash", request).words
    assert all(chance > 1e-6 / 4 for chance in byte_chances(masked))
    assert all(chance < 1e-6 / 4 for chance in byte_chances(plain))


def byte_chances(words: np.ndarray) -> list[float]:
    columns = words.view(np.uint8).reshape(words.size, -1).T
    expected = words.size / 256
    return [float(chi2.sf(np.sum((np.bincount(c, minlength=256) - expected) ** 2 / expected), 255)) for c in columns]


def test_the_same_update_is_masked_differently_each_time() -> None:
    one, two = (Federation(agreement()).requests(Stage.MASKED) for _ in range(2))
    assert one["ash"].keyring != two["ash"].keyring
    first, second = (Federation(agreement()) for _ in range(2))
    words = [p.answer("ash", p.requests(Stage.MASKED)["ash"]).words for p in (first, second)]
    assert np.mean(words[0] == words[1]) < 0.01


def test_masking_needs_no_more_bytes_than_float32() -> None:
    agreed = agreement(7, 4, 100_000)
    played = Federation(agreed)
    request = played.requests(Stage.MASKED)["ash"]
    wire = to_wire(played.answer("ash", request))
    sent = len(wire.header) + sum(len(bytes(p)) for p in wire.payloads.values())
    assert sent <= 1.01 * played.updates["ash"].nbytes


def test_every_message_survives_the_wire() -> None:
    played = Federation(agreement())
    while played.server.stage is not Stage.DONE:
        for name in played.server.asked:
            request = played.server.request(name, FAR)
            assert carried(request) == request
            reply = played.answer(name, carried(request))
            again = carried(reply)
            if isinstance(reply, Masked):
                np.testing.assert_array_equal(again.words, reply.words)
                assert dataclasses.replace(again, words=reply.words).totals == reply.totals
            else:
                assert again == reply
            played.server.receive(name, again)
        played.server.advance()
    played.check(played.server.open_())


def carried(message: object) -> object:
    return flower.from_record(flower.to_record(message), KINDS)


@pytest.mark.parametrize("words", [np.zeros(3, np.float32), b"123", np.zeros(3, np.int32)])
def test_masked_words_of_another_type_are_refused(words: object) -> None:
    wire = to_wire(Masked("ash", "", "", (), np.zeros(3, np.uint32)))
    with pytest.raises(ProtocolError, match="wrong type"):
        from_wire(Wire(wire.header, {"words": words}), KINDS)


def test_messages_of_masking_are_not_part_of_the_plain_vocabulary() -> None:
    with pytest.raises(ProtocolError, match="no message of kind"):
        from_wire(to_wire(Keys("ash", "", "", "", "")))


def test_anything_that_is_agreed_is_in_the_digest() -> None:
    agreed = agreement()
    place = {"manifest_hash": "cd" * 32, "round": 2, "attempt": 2, "purpose": "evaluate tuning"}
    others: list[Agreement] = [agreement(**{field: value}) for field, value in place.items()]
    others += [agreement(size=999), agreement(work="ef" * 32)]
    others += [agreement(6, 4), agreement(clip=2.0), agreement(totals=()), agreement(max_weight=999)]
    assert len({a.digest for a in (agreed, *others)}) == 11


@pytest.mark.parametrize(("sites", "threshold"), [(4, 2), (5, 6), (7, 3)])
def test_a_threshold_that_two_halves_could_reach_is_refused(sites: int, threshold: int) -> None:
    with pytest.raises(ConfigError, match="must be from"):
        agreement(sites, threshold)


def test_a_roster_of_two_is_refused() -> None:
    with pytest.raises(TooFewSites, match="2 sites"):
        agreement(2, 2)


def test_a_roster_with_one_key_for_two_sites_is_refused() -> None:
    agreed = agreement()
    with pytest.raises(ConfigError, match="same identity key"):
        dataclasses.replace(agreed, roster={**agreed.roster, "ash": agreed.roster["birch"]})


@pytest.mark.parametrize("key", ["", "ab" * 32, "ed25519:" + "AB" * 32, "ed25519:" + "ab" * 31])
def test_a_roster_with_what_is_no_key_is_refused(key: str) -> None:
    agreed = agreement()
    with pytest.raises(ConfigError, match="key of birch"):
        dataclasses.replace(agreed, roster={**agreed.roster, "birch": key})


def test_options_name_what_is_wrong() -> None:
    for changes, match in (
        ({"clip": 0.0}, "clip"),
        ({"clip": float("inf")}, "clip"),
        ({"max_weight": 0}, "max_weight"),
        ({"precision_bits": 45}, "precision_bits"),
        ({"totals": (Total("weight", 1),)}, "distinct names"),
    ):
        with pytest.raises(ConfigError, match=match):
            MaskingOptions(**{"threshold": 2, "clip": 1.0, "max_weight": 1, **changes})


def test_the_stated_error_is_not_idle() -> None:
    """A bound that is far above what happens would tell nothing: half of it is reached."""
    fixed = FixedPoint(3, 1.0, 1, 20, ())
    values = (np.arange(1, 1001, dtype=np.float64) * fixed.step * 0.993).astype(np.float32)
    words, mean = np.empty(1000, fixed.dtype), np.empty(1000, np.float32)
    fixed.encode(values, 1, words)
    fixed.decode(words, 1, mean)
    assert np.max(np.abs(mean - values)) > 0.5 * fixed.mean_error(1, 1)


def test_the_thresholds_that_the_docs_recommend_are_what_the_docs_say() -> None:
    text = (Path(__file__).parents[2] / "docs" / "secure-aggregation.md").read_text(encoding="utf-8")
    rows = [tuple(map(int, row)) for row in re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)]
    assert len(rows) == 9
    for sites, threshold, leaving, colluding in rows:
        assert sites / 2 < threshold <= sites
        assert leaving == sites - threshold
        assert colluding == min(2 * threshold - sites - 1, threshold - 2)
