import numpy as np
import pytest

from model.decoder import Decoder, preset
from model.estimate import count, estimate
from model.rollout import Prompt, Reason
from model.tasks import Cohort, Task
from tokenizer.codebook import INTERVALS, Codebook, Token, TokenizerOptions
from tokenizer.errors import ConfigError

TASK = Task("die", "?", trigger=("IN",), outcome=("MEDS_DEATH",), competing=("OUT",), horizon_days=90)


def _count(reason: list[list[int]], event: list[list[int]]):
    return count(np.array(reason, np.int8), np.array(event, np.int32), np.ones_like(reason, np.int32))


def test_risk_is_the_share_of_resolved_trajectories_with_the_outcome():
    event, horizon, end, cap = Reason
    found = _count([[event, event, horizon, end], [event, cap, cap, cap]], [[0, 1, -1, -1], [0, -1, -1, -1]])
    assert found.risk.tolist() == [1 / 3, 1.0]
    assert found.resolved.tolist() == [0.75, 0.25]
    assert found.reasons == {"event": 3, "horizon": 1, "end of timeline": 1, "token cap": 3}
    assert (found.trajectories, found.tokens_sampled) == (4, 8)


def test_a_patient_without_resolved_trajectory_gets_the_cohorts_share():
    event, horizon, end, _ = Reason
    found = _count([[event, horizon], [horizon, horizon], [end, end]], [[0, -1], [-1, -1], [-1, -1]])
    assert found.risk.tolist() == [0.5, 0.0, 0.25]
    assert _count([[end, end]], [[-1, -1]]).risk.tolist() == [0.5]


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


def test_an_empty_cohort_gives_no_estimates(codebook: Codebook):
    decoder = Decoder.create(preset("0.3m", len(codebook), context=32), seed=0)
    found = estimate(decoder, codebook, _cohort(codebook, 0), TASK, trajectories=4, seed=0, max_tokens=8)
    assert found.risk.shape == (0,)


def test_nonsense_settings_are_named(codebook: Codebook):
    decoder = Decoder.create(preset("0.3m", len(codebook), context=32), seed=0)
    with pytest.raises(ConfigError, match="trajectories is 0"):
        estimate(decoder, codebook, _cohort(codebook, 1), TASK, trajectories=0, seed=0, max_tokens=8)
