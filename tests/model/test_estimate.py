import numpy as np
import pytest

from model.cohort import Cohort
from model.decoder import Decoder, preset
from model.estimate import Estimates, estimate, summarize
from model.rollout import Prompt, Reason, Rollouts
from model.tasks import Task
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
