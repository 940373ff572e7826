"""What a run with shared noise promises follows from its manifest; its integers keep the norm that was counted with."""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from federation import protection
from federation.accountant import DiscreteGaussian, epsilon
from federation.identity import Identity
from federation.manifest import Manifest, OuterOptions, Privacy, SecureAggregation
from federation.masking import MaskingOptions, Place, Purpose
from federation.messages import ProtocolError, TrainReply
from federation.summed import agreement_of, numbers_of, update_of
from federation.vectors import cut_, norm
from server.plan import PrivacyPlan
from tests import tiny
from tokenizer.codebook import Codebook, Survey, TokenizerOptions
from tokenizer.errors import ConfigError

CODEBOOK = Codebook.build(Survey(TokenizerOptions()))
ROSTER = {f"s{n:02}": Identity(Ed25519PrivateKey.generate()).public for n in range(50)}
SHARED = PrivacyPlan(noise_multiplier=6.0, delta=1e-5, mechanism="distributed", honest_sites=7)


def manifest_of(
    sites: int = 10, threshold: int = 7, min_sites: int = 10, masking: dict[str, Any] | None = None, **changes: Any
) -> Manifest:
    options = MaskingOptions(threshold, **{"clip": 1.0, "max_weight": 1, **(masking or {})})
    chosen = SecureAggregation(min_sites, options, dict(list(ROSTER.items())[:sites]))
    plan = {"privacy": SHARED, "outer": OuterOptions(weights="uniform"), "secure_aggregation": chosen, **changes}
    return tiny.plan(tokenizer=TokenizerOptions(), **plan).manifest(CODEBOOK)


MANIFEST = manifest_of()


def test_the_noise_of_the_honest_sites_is_what_is_accounted() -> None:
    privacy, fixed = protection.privacy_of(MANIFEST), numbers_of(MANIFEST)
    (found,) = protection.of_releases(MANIFEST, 3).all
    assert isinstance(found, DiscreteGaussian)
    assert (found.shares, found.dimensions, found.steps) == (7, MANIFEST.model.parameters(), 3)
    assert found.variance == fixed.noise_variance
    assert found.l2 == pytest.approx(2 * privacy.clip / fixed.step, rel=1e-12)
    # Seven shares together have the deviation of six clips, a third of which is the distance of two updates.
    assert math.sqrt(7 * found.variance) / found.l2 == pytest.approx(3.0, rel=1e-12)
    assert privacy.epsilon == pytest.approx(epsilon(protection.of_run(MANIFEST).all, 1e-5), abs=1e-4)


def test_a_plan_finds_the_noise_whatever_the_model_and_the_number_of_honest_sites() -> None:
    wanted = dataclasses.replace(SHARED, noise_multiplier=None, epsilon=8.0)
    few = protection.privacy_of(manifest_of(privacy=wanted))
    many = protection.privacy_of(manifest_of(50, 34, 50, privacy=dataclasses.replace(wanted, honest_sites=33)))
    assert few.noise_multiplier == many.noise_multiplier
    assert 7.9 < epsilon(protection.of_run(manifest_of(privacy=wanted)).all, 1e-5) <= 8.0
    assert many.share == pytest.approx(many.noise_multiplier / math.sqrt(33))


def vectors(size: int, step: float) -> st.SearchStrategy[np.ndarray]:
    """Updates of all kinds: wild ones, and those that rounding lengthens most, half a step above an integer."""
    seeds = st.integers(0, 2**32)
    wild = seeds.map(lambda s: np.random.default_rng(s).standard_cauchy(size).astype(np.float32))
    half = st.integers(0, 10**6).map(lambda k: np.full(size, (k + 0.5000001) * step, np.float32))
    one = seeds.map(lambda s: (np.arange(size) == s % size).astype(np.float32) * 3)
    return st.one_of(wild, half, one)


@pytest.mark.parametrize(("bits", "size"), [(20, 1000), (34, 1000), (20, 70_000)])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_in_integers_every_update_has_the_agreed_norm_exactly(bits: int, size: int, data: st.DataObject) -> None:
    """The norm is added up in whole numbers of any size, so nothing is lost."""
    manifest = manifest_of(masking={"precision_bits": bits})
    fixed = numbers_of(manifest)
    limit = (1 - fixed.step * math.sqrt(size) / 2) * (1 - 2.0**-20)
    update = data.draw(vectors(size, fixed.step))
    cut_(update, limit)
    words = np.empty(size, fixed.dtype)
    for start in range(0, size, 1 << 16):
        part = slice(start, start + (1 << 16))
        assert fixed.encode(update[part], 1, words[part]) == 0, "no value is ever beyond the clip"
    told = words.view(f"<i{fixed.dtype.itemsize}").tolist()
    assert sum(q * q for q in told) <= (1 / Fraction(fixed.step)) ** 2


def test_without_the_room_for_rounding_the_norm_would_be_exceeded() -> None:
    """The negative control of the test above."""
    fixed = numbers_of(MANIFEST)
    update = np.full(200_000, 0.6 * fixed.step, np.float32)
    length = norm(update)
    words = np.empty(update.size, fixed.dtype)
    fixed.encode(update[: 1 << 16], 1, words[: 1 << 16])
    told = words[: 1 << 16].view("<i4").astype(float)
    assert np.linalg.norm(told) * fixed.step > 1.6 * length * math.sqrt((1 << 16) / update.size)


def test_the_cut_is_what_the_rounding_needs() -> None:
    lost = 1.0 - protection.clip_before_rounding(MANIFEST)
    rounding = numbers_of(MANIFEST).step * math.sqrt(MANIFEST.model.parameters()) / 2
    assert lost == pytest.approx(rounding + 2.0**-20, rel=1e-3)


@pytest.mark.parametrize("count", [3, 10, 50])
def test_the_words_hold_twelve_deviations_of_all_noise_beside_the_updates(count: int) -> None:
    threshold = 2 * count // 3 + 1
    honest = {3: 2, 10: 7, 50: 33}[count]
    manifest = manifest_of(count, threshold, count, privacy=dataclasses.replace(SHARED, honest_sites=honest))
    fixed = numbers_of(manifest)
    room = 2 ** (8 * fixed.dtype.itemsize - 1) - 1 - count * fixed.levels
    assert fixed.dtype.itemsize == 4
    assert room >= 12 * math.sqrt(count * fixed.noise_variance) * (1 - 1e-6)
    assert fixed.step <= fixed.clip / 2**fixed.precision_bits


def test_beside_the_noisy_update_a_sum_tells_constants_only() -> None:
    size = MANIFEST.model.parameters()
    replies = [
        TrainReply("s00", MANIFEST.hash, 1, "ab" * 32, np.full(size, value, np.float32), tokens, steps, loss, seconds)
        for value, tokens, steps, loss, seconds in ((0.1, 1, 1, 0.0, 0.0), (0.2, 700, 31, 2.5, 9.0))
    ]
    parts = [update_of(MANIFEST, reply, b"k" * 32) for reply in replies]
    assert {(part.weight, *part.totals.items()) for part in parts} == {(1, ("tokens", 1), ("steps", 1), ("loss", 0.0))}
    assert protection.expected_patients(protection.privacy_of(MANIFEST), 1234, 1) == 1


def test_only_sums_of_updates_are_noisy() -> None:
    purposes: tuple[Purpose, ...] = ("train", "evaluate tuning")
    updates, losses = (agreement_of(MANIFEST, Place(MANIFEST.hash, 1, purpose, 1), "").options for purpose in purposes)
    assert updates.noise == protection.privacy_of(MANIFEST).share
    assert losses.noise == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"secure_aggregation": None}, "needs secure_aggregation"),
        ({"outer": OuterOptions()}, 'outer.weights must be "uniform"'),
        ({"max_norm": 5.0}, "max_norm must be left out"),
        ({"masking": {"clip": 0.5}}, "masking.clip must be at least privacy.clip, 1"),
        ({"min_sites": 7, "privacy": dataclasses.replace(SHARED, honest_sites=8)}, "at most secure_aggregation.min_si"),
        ({"privacy": dataclasses.replace(SHARED, honest_sites=6)}, "honest_sites must be at least 7: of 10 sites with"),
        ({"sites": 3, "threshold": 2, "min_sites": 3}, "at most secure_aggregation.min_sites, 3"),
        ({"masking": {"clip": 1e5}}, "rounding to integers would take"),
        ({"privacy": dataclasses.replace(SHARED, noise_multiplier=1e-9, epsilon=1.0)}, "shared noise doesn't fit"),
        ({"privacy": dataclasses.replace(SHARED, sampling_rate=0.5)}, "sampling_rate must be 1"),
        ({"privacy": dataclasses.replace(SHARED, epsilon=0.5)}, "costs"),
    ],
)
def test_what_shared_noise_cannot_go_with_is_refused_by_name(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        manifest_of(**changes)


def test_a_site_refuses_it_too_whoever_made_the_manifest() -> None:
    for changes, told in (
        ({"secure_aggregation": None}, "needs secure_aggregation"),
        ({"outer": OuterOptions()}, "outer.weights"),
        ({"max_norm": 1.0}, "max_norm"),
    ):
        with pytest.raises(ProtocolError, match=told):
            protection.check(dataclasses.replace(MANIFEST, **changes))
    protection.check(MANIFEST)


def test_who_is_relied_on_must_be_said_with_shared_noise_and_with_no_other() -> None:
    with pytest.raises(ConfigError, match="honest_sites must be given"):
        Privacy("distributed", 1, 1e-5, 1, 1)
    with pytest.raises(ConfigError, match="with no other"):
        Privacy("local", 1, 1e-5, 1, 1, honest_sites=3)
    with pytest.raises(ConfigError, match="at least 2"):
        Privacy("distributed", 1, 1e-5, 1, 1, honest_sites=1)
    with pytest.raises(ConfigError, match="totals and noise must be left out"):
        SecureAggregation(3, MaskingOptions(3, 1.0, 1, noise=1.0), dict(list(ROSTER.items())[:3]))


def test_how_many_may_collude_is_what_the_masks_withstand_at_most() -> None:
    assert protection.colluding_sites(MANIFEST) == 3
    assert protection.colluding_sites(dataclasses.replace(MANIFEST, privacy=None)) is None
    for sites, threshold, colluding in ((3, 3, 1), (4, 3, 1), (7, 5, 2), (10, 7, 3), (50, 34, 17)):
        fits = dataclasses.replace(SHARED, honest_sites=sites - colluding)
        assert protection.colluding_sites(manifest_of(sites, threshold, sites, privacy=fits)) == colluding


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_all_zeros_when_cut(wrong: float) -> None:
    update = np.ones(10, np.float32)
    update[3] = wrong
    cut_(update, 1.0)
    assert not update.any()


def test_a_short_update_is_not_changed_by_the_cut() -> None:
    update = np.full(4, 0.25, np.float32)
    cut_(update, 0.75)
    assert update.tolist() == [0.25] * 4
    cut_(update, 0.25)
    assert norm(update) == pytest.approx(0.25, rel=1e-7)
