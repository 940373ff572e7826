from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, t

from model.cohort import Cohort
from model.decoder import Decoder
from model.estimate import Estimates, estimate, summarize
from model.predictions import prediction_table
from model.rollout import Prompt, Reason, Rollouts, Stop, rollout
from model.settings import DecoderConfig, preset
from model.tasks import Task
from tests.model.test_rollout import CLOCK, DEATH, DIES, LAB, NOTHING, SEX, markov_decoder, random_chances, times_of
from tokenizer.codebook import INTERVALS, Codebook, Token, TokenizerOptions
from tokenizer.errors import ConfigError

TASK = Task("die", "?", trigger=("IN",), outcome=("MEDS_DEATH",), competing=("OUT",), horizon_days=90)


def _count(reason: list[list[int]], event: list[list[int]]) -> Estimates:
    ends = np.array(reason, np.int8)
    zeros = np.zeros((*ends.shape, 3))
    rolled = Rollouts(
        ends, np.array(event, np.int32), np.zeros_like(ends, np.int64), np.ones_like(ends, np.int32), zeros
    )
    return summarize(rolled, "count")


def test_risk_is_the_share_of_resolved_trajectories_with_the_outcome():
    event, horizon, end, cap = Reason
    found = _count([[event, event, horizon, end], [event, cap, cap, cap]], [[0, 1, -1, -1], [0, -1, -1, -1]])
    assert found.risk.tolist() == [1 / 3, 1.0]
    assert found.resolved.tolist() == [0.75, 0.25]
    assert found.reasons == {"event": 3, "horizon": 1, "end of timeline": 1, "token cap": 3}
    assert (found.trajectories.tolist(), found.tokens_sampled) == ([4, 4], 8)


def test_a_patient_without_resolved_trajectory_gets_the_cohorts_share():
    event, horizon, end, _ = Reason
    found = _count([[event, horizon], [horizon, horizon], [end, end]], [[0, -1], [-1, -1], [-1, -1]])
    assert found.risk.tolist() == [0.5, 0.0, 0.25]
    assert _count([[end, end]], [[-1, -1]]).risk.tolist() == [0.5]


def test_summed_chances_give_the_outcomes_share_of_what_is_answered():
    ends = np.full((3, 2), Reason.EVENT, np.int8)
    zeros = np.zeros((3, 2), np.int64)
    chances = np.zeros((3, 2, 3))
    chances[0] = [[0.1, 0.2, 0.1], [0.3, 0.6, 0.3]]
    chances[1, 0] = [0.0, 0.4, 0.0]
    found = summarize(Rollouts(ends, zeros, zeros, zeros, chances))
    # The third patient's trajectories tell nothing: the share of the cohort, 0.4 of 2.0.
    np.testing.assert_allclose(found.risk, [0.25, 0.0, 0.2])


def test_trajectories_drawn_off_the_models_probabilities_give_no_risks():
    zeros = np.zeros((1, 2), np.int64)
    for altered in ("temperature 0.5", "top_p 0.9"):
        with pytest.raises(ConfigError, match=f"drawn with {altered}.*biased"):
            summarize(Rollouts(zeros, zeros, zeros, zeros, np.zeros((1, 2, 3)), altered))


@pytest.fixture(scope="module")
def codebook() -> Codebook:
    tokens = [
        *(Token("special", text) for text in ("pad", "eot", "unk")),
        Token("static", "*"),
        *(Token("interval", text) for text in INTERVALS),
        *(Token("code", code) for code in ("IN", "MEDS_DEATH", "OUT")),
        Token("other", ""),
    ]
    return Codebook(TokenizerOptions(), tokens, dict(INTERVALS), {}, {})


def _cohort(codebook: Codebook, size: int) -> Cohort:
    tokens = np.array([codebook.id(Token("static", "*")), codebook.id(Token("code", "IN"))], np.int32)
    return Cohort(
        subject_ids=np.arange(size),
        prediction_us=np.zeros(size, np.int64),
        prompts=tuple(Prompt(tokens, key=key) for key in range(size)),
        labels=np.zeros(size, np.int8),
        patients=size,
        excluded={},
    )


def test_rollouts_of_an_untrained_decoder_give_risks_that_follow_the_seed(codebook: Codebook):
    decoder = Decoder.create(preset("0.3m", len(codebook), context=32), seed=0)
    cohort = _cohort(codebook, 12)
    settings = {"trajectories": 16, "max_tokens": 24}
    first = estimate(decoder, codebook, cohort, TASK, seed=1, **settings)
    again = estimate(decoder, codebook, cohort, TASK, seed=1, **settings)
    other = estimate(decoder, codebook, cohort, TASK, seed=2, **settings)
    assert ((first.risk >= 0) & (first.risk <= 1)).all()
    assert first.risk.tolist() == again.risk.tolist() != other.risk.tolist()
    assert sum(first.reasons.values()) == 12 * 16
    # Fresh weights give every token about the same chance, so death comes first about as often as discharge.
    assert 0.2 < first.risk.mean() < 0.7


def test_both_estimators_agree_and_summed_chances_are_closer(codebook: Codebook):
    """Against 4,000 trajectories: eight of them are nearer by summed chances than by counting."""
    decoder = Decoder.create(preset("0.3m", len(codebook), context=32), seed=0)
    truth = {
        how: estimate(
            decoder, codebook, _cohort(codebook, 1), TASK, trajectories=4000, seed=9, max_tokens=24, estimator=how
        )
        for how in ("chances", "count")
    }
    risk = truth["chances"].risk[0]
    assert abs(truth["count"].risk[0] - risk) < 4 * (risk * (1 - risk) / 4000 / truth["count"].resolved[0]) ** 0.5
    errors = {
        how: estimate(
            decoder, codebook, _cohort(codebook, 40), TASK, trajectories=8, seed=1, max_tokens=24, estimator=how
        ).risk
        - risk
        for how in ("chances", "count")
    }
    assert np.abs(errors["chances"]).mean() < 0.7 * np.abs(errors["count"]).mean()


def test_an_empty_cohort_gives_no_estimates(codebook: Codebook):
    decoder = Decoder.create(preset("0.3m", len(codebook), context=32), seed=0)
    found = estimate(decoder, codebook, _cohort(codebook, 0), TASK, trajectories=4, seed=0, max_tokens=8)
    assert found.risk.shape == (0,)


def test_nonsense_settings_are_named(codebook: Codebook):
    decoder = Decoder.create(preset("0.3m", len(codebook), context=32), seed=0)
    with pytest.raises(ConfigError, match="trajectories is 0"):
        estimate(decoder, codebook, _cohort(codebook, 1), TASK, trajectories=0, seed=0, max_tokens=8)


# A language of ten tokens whose futures can be enumerated: tests/model/test_rollout.py has it.
GRID = (0, 1, 2, 24, 30)


def _exact_incidence(chances: np.ndarray, longest: int, horizon: int) -> tuple[np.ndarray, float]:
    """By enumeration: chance that death comes by each time of the grid, and that a future resolves."""
    live = np.where(CLOCK.never, 0.0, chances)
    live /= live.sum(1, keepdims=True)
    by, told = np.zeros(len(GRID)), 0.0
    waiting = [(LAB, 0, 0, 1.0)]
    while waiting:
        last, now, length, chance = waiting.pop()
        for token in np.flatnonzero(live[last]).tolist():
            then, weight = now + times_of(CLOCK, token)[0], chance * live[last, token]
            if then > horizon:
                told += weight
            elif token == DEATH:
                told += weight
                by += weight * (then <= np.array(GRID))
            elif token != CLOCK.eot and length + 1 < longest:
                waiting.append((token, then, length + 1, weight))
    return by, told


def test_curves_are_the_exact_cumulative_incidence_and_batches_add_up() -> None:
    """Bound of 4.5 standard errors at five times: a false alarm in 30,000 runs."""
    chances = random_chances(5)
    decoder, prompts = markov_decoder(chances), [Prompt(np.array([SEX, LAB]))]
    stop = Stop([DIES, NOTHING], 30, 4, GRID)

    def run(trajectories: int, first: int = 0) -> Rollouts:
        return rollout(decoder, CLOCK, prompts, trajectories=trajectories, stop=stop, seed=3, first=first)

    whole = run(4000)
    by, told = _exact_incidence(chances, 4, 30)
    assert whole.curve is not None
    summed = np.cumsum(whole.curve[0, :, 0], axis=1)
    error = summed.std(axis=0, ddof=1) / 4000**0.5
    assert (np.abs(summed.mean(axis=0) - by) <= 4.5 * error + 1e-6).all()
    assert whole.chances[0].sum(axis=1).mean() == pytest.approx(told, abs=0.03)
    np.testing.assert_allclose(summed[:, -1], whole.chances[0, :, 0], atol=1e-12)
    parts = [run(6), run(10, first=6)]
    np.testing.assert_allclose(np.concatenate([p.chances for p in parts], axis=1), run(16).chances, atol=1e-6)


def test_standard_errors_tell_how_far_estimates_lie_from_one_another(codebook: Codebook) -> None:
    """200 equal prompts: the spread of the estimates is the mean standard error within 20 % (4 deviations of it)."""
    decoder = Decoder.create(preset("0.3m", len(codebook), context=32), seed=0)
    for how in ("chances", "count"):
        found = estimate(
            decoder, codebook, _cohort(codebook, 200), TASK, trajectories=24, seed=5, max_tokens=12, estimator=how
        )
        assert found.risk.std(ddof=1) == pytest.approx(np.sqrt((found.se**2).mean()), rel=0.2)


def test_trajectories_are_drawn_until_the_wanted_error_or_the_most(codebook: Codebook) -> None:
    decoder = Decoder.create(preset("0.3m", len(codebook), context=32), seed=0)
    settings = {"trajectories": 8, "seed": 1, "max_tokens": 12}
    found = estimate(decoder, codebook, _cohort(codebook, 6), TASK, target_se=0.05, most=512, **settings)
    assert ((found.se <= 0.05) | (found.trajectories == 512)).all()
    assert len(set(found.trajectories.tolist())) > 1
    capped = estimate(decoder, codebook, _cohort(codebook, 3), TASK, target_se=1e-6, most=16, **settings)
    assert capped.trajectories.tolist() == [16] * 3
    fixed = estimate(decoder, codebook, _cohort(codebook, 3), TASK, trajectories=16, seed=1, max_tokens=12)
    np.testing.assert_allclose(capped.risk, fixed.risk, atol=1e-6)


@pytest.mark.parametrize("kind", ["count", "time", "set", "value"])
def test_other_kinds_tell_numbers_within_their_range(codebook: Codebook, kind: str) -> None:
    decoder = Decoder.create(preset("0.3m", len(codebook), context=32), seed=0)
    task = replace(TASK, kind=kind, outcome=("IN",), trigger=("OUT",), competing=("MEDS_DEATH",))
    cohort = _cohort(codebook, 5)
    found = estimate(decoder, codebook, cohort, task, trajectories=32, seed=1, max_tokens=24)
    table = prediction_table(task, replace(cohort, told={}), found)
    assert {len(column) for column in table.values()} == {5}
    assert set(table["task_hash"]) == {task.hash}
    if kind == "count":
        assert (found.mean > 0).all()
        assert (found.low <= found.median).all()
        assert (found.median <= found.high).all()
    if kind == "time":
        assert ((found.mean >= 0) & (found.high <= 90)).all()
        np.testing.assert_allclose(found.curve[:, -1], found.risk)
        assert (np.diff(found.curve, axis=1) >= 0).all()
    if kind == "set":
        np.testing.assert_allclose(found.codes[:, 0], found.risk)
    if kind == "value":
        assert np.isnan(found.mean).all()  # no code has values here
        assert (found.risk == 0).all()


def _covered(codebook: Codebook, kind: str, repeats: int, trajectories: int, many: int) -> int:
    """How many of so many equal prompts have the truth within t standard errors; the truth is of many trajectories."""
    decoder = Decoder.create(DecoderConfig(len(codebook), 1, 16, 2, 2, 32, 32), seed=0)
    task = TASK
    if kind in ("count", "time"):
        task = replace(TASK, kind=kind, outcome=("IN",), trigger=("OUT",), competing=("MEDS_DEATH",))
    how = "count" if kind == "counted risk" else "chances"
    settings = {"max_tokens": 16, "estimator": how}
    # Equal prompts with keys of their own are independent draws of one law.
    whole = estimate(decoder, codebook, _cohort(codebook, 50), task, trajectories=many // 50, seed=8, **settings)
    found = estimate(decoder, codebook, _cohort(codebook, repeats), task, trajectories=trajectories, seed=9, **settings)
    measured = kind in ("count", "time")
    told = found.mean if measured else found.risk
    number = found.risk * found.resolved * trajectories if kind == "time" else found.resolved * trajectories
    truth = float((whole.mean if measured else whole.risk).mean())
    reach = t.ppf(0.975, np.maximum(number - 1, 1)) * found.se
    assert np.isfinite(reach).all()
    return int((np.abs(told - truth) <= reach).sum())


KINDS = ("risk", "counted risk", "count", "time")


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_over_trajectories_cover_what_endless_ones_would_say(codebook: Codebook, kind: str) -> None:
    """Binomial: a right interval falls out of the band once in 10,000 tests; one of half the width does.

    Trajectories' chances are skewed here (some hold nearly all of it), so of 128 three in a hundred may be missing.
    """
    repeats = 120
    low, high = binom.ppf(5e-5, repeats, 0.92), binom.ppf(1 - 5e-5, repeats, 0.95)
    assert low <= _covered(codebook, kind, repeats, 128, 10_000) <= high
    assert binom.cdf(low, repeats, 2 * t.cdf(0.98, 127) - 1) > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_over_trajectories_cover_over_many_repeats(codebook: Codebook, kind: str) -> None:
    """A right interval falls out once in 10,000 tests; two in a hundred may be missing, as draws are skewed."""
    count = _covered(codebook, kind, 2000, 256, 200_000)
    low, high = binom.ppf(5e-5, 2000, 0.93), binom.ppf(1 - 5e-5, 2000, 0.95)
    print(f"{kind}: {count / 2000:.4f}")
    assert low <= count <= high
