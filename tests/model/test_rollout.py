"""Rollouts: against exact path probabilities, against a loop without any cache, and each way to end."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from model.clock import Clock, Waits
from model.decoder import Decoder
from model.rollout import Prompt, Reason, Rollouts, Stop, rollout
from model.sampling import uniforms
from model.settings import DecoderConfig
from tokenizer.codebook import Codebook, Token, TokenizerOptions
from tokenizer.errors import ConfigError, DataError

# A language of ten tokens: specials, one static, two ages, two intervals, an event and an outcome.
PAD, EOT, UNK, SEX, AGE_40, AGE_45, HOUR, DAY, LAB, DEATH = range(10)
VOCAB = 10
STATIC = np.arange(VOCAB) == SEX
AGE = np.isin(np.arange(VOCAB), (AGE_40, AGE_45))
CLOCK = Clock(
    waits=Waits.of(np.array([HOUR, DAY]), np.array([[1], [24]]), VOCAB),
    eot=EOT,
    never=np.isin(np.arange(VOCAB), (PAD, UNK)),
    is_static=STATIC,
    is_age=AGE,
)
# The same, but what takes time takes one of four times.
WIDE = replace(CLOCK, waits=Waits.of(np.array([DAY, HOUR]), np.array([[20, 24, 28, 40], [0, 1, 2, 5]]), VOCAB))
DIES = np.arange(VOCAB) == DEATH
NOTHING = np.zeros(VOCAB, dtype=bool)


def markov_decoder(chances: np.ndarray) -> Decoder:
    """A decoder whose next-token probabilities are exactly the rows of `chances`, whatever came before."""
    config = DecoderConfig(VOCAB, 1, VOCAB, 1, 1, 4, context=64, tied=False)
    decoder = Decoder.create(config, 0)
    with torch.no_grad():
        decoder.embed_tokens.weight.copy_(torch.eye(VOCAB))
        decoder.layers[0].self_attn.o_proj.weight.zero_()
        decoder.layers[0].mlp.down_proj.weight.zero_()
        # The final norm turns a one-hot row into sqrt(V) times itself.
        decoder.head_weight.copy_(torch.from_numpy(np.log(chances).T / VOCAB**0.5))
    return decoder


def wordy_decoder(seed: int = 3) -> Decoder:
    """A decoder with opinions: attention, positions and every layer matter."""
    decoder = Decoder.create(DecoderConfig(VOCAB, 2, 32, 4, 2, 48, context=40), seed)
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.dim() == 2:
                weight.mul_(8.0)
        decoder.embed_tokens.weight[[EOT, DEATH]] *= 0.1  # rare, so that trajectories become long
    return decoder


def some_prompts(*lengths: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    bodies = [rng.choice([AGE_40, HOUR, DAY, LAB], length - 1) for length in lengths]
    return [Prompt(np.concatenate([[SEX], body]).astype(np.int64)) for body in bodies]


def same(a: Rollouts, b: Rollouts) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def random_chances(seed: int) -> np.ndarray:
    """Transition probabilities; padding and unknown have some too, which must go to the others."""
    return np.random.default_rng(seed).dirichlet(np.full(VOCAB, 0.8), VOCAB) + 1e-3


def path_chances(chances: np.ndarray, start: int, longest: int) -> dict[tuple[int, ...], float]:
    """Probability of every path from `start` to death, the end, or the cap."""
    live = np.where(CLOCK.never, 0.0, chances)
    live /= live.sum(1, keepdims=True)
    paths: dict[tuple[int, ...], float] = {}
    for length in range(1, longest + 1):
        for path in itertools.product(np.flatnonzero(~CLOCK.never).tolist(), repeat=length):
            ends = [token in (DEATH, EOT) for token in path]
            if not any(ends[:-1]) and (ends[-1] or length == longest):
                steps = zip((start, *path[:-1]), path, strict=True)
                paths[path] = float(np.prod([live[a, b] for a, b in steps]))
    return paths


def misfit(temperature: float) -> tuple[float, float]:
    """Chi-square of sampled paths against their exact probabilities, and its 99.9 % point."""
    chances = random_chances(1)
    paths = path_chances(chances, LAB, 3)
    assert sum(paths.values()) == pytest.approx(1.0)
    prompts = [Prompt(np.array([SEX, LAB]))] * 4
    stop = Stop([DIES], horizon_us=None, max_tokens=3)
    result = rollout(
        markov_decoder(chances), CLOCK, prompts, trajectories=2000, stop=stop, seed=2, temperature=temperature,
        batch_rows=500, keep_tokens=True,
    )  # fmt: skip
    seen = Counter(tuple(result.trajectory(p, r).tolist()) for p in range(4) for r in range(2000))
    assert set(seen) <= set(paths)
    likely = [path for path, chance in paths.items() if chance * 8000 >= 5]
    expected = np.array([paths[path] * 8000 for path in likely])
    counted = np.array([seen[path] for path in likely])
    expected, counted = np.append(expected, 8000 - expected.sum()), np.append(counted, 8000 - counted.sum())
    return float(((counted - expected) ** 2 / expected).sum()), float(chi2.ppf(0.999, len(likely)))


def test_sampled_paths_have_their_exact_probabilities() -> None:
    distance, limit = misfit(temperature=1.0)
    assert distance < limit


def test_a_wrong_temperature_would_be_noticed() -> None:
    distance, limit = misfit(temperature=1.1)
    assert distance > limit


def times_of(clock: Clock, token: int) -> list[int]:
    """The equally likely times that pass with a token."""
    place = int(clock.waits.place[token])
    return [0] if place < 0 else clock.waits.times_us[place].tolist()


def death_within(chances: np.ndarray, horizon: int, longest: int, clock: Clock) -> float:
    """Exact chance that a trajectory from LAB ends with death by the horizon."""
    live = np.where(clock.never, 0.0, chances)
    live /= live.sum(1, keepdims=True)
    state = {(LAB, 0): 1.0}
    death = 0.0
    for _ in range(longest):
        following: dict[tuple[int, int], float] = {}
        for (token, now), chance in state.items():
            for successor in np.flatnonzero(live[token]).tolist():
                times = times_of(clock, successor)
                for later in (now + time for time in times):
                    joint = chance * live[token, successor] / len(times)
                    if successor == DEATH:
                        death += joint
                    elif successor != EOT and later <= horizon:
                        following[successor, later] = following.get((successor, later), 0.0) + joint
        state = following
    return death


@pytest.mark.parametrize("clock", [CLOCK, WIDE], ids=["narrow", "wide"])
def test_the_share_of_deaths_within_the_horizon_is_the_exact_one(clock: Clock) -> None:
    chances, horizon = random_chances(4), 30
    death = death_within(chances, horizon, 60, clock)
    stop = Stop([DIES], horizon_us=horizon, max_tokens=60)
    result = rollout(
        markov_decoder(chances), clock, [Prompt(np.array([LAB]))], trajectories=6000, stop=stop, seed=1, batch_rows=2000
    )
    share = (result.reason == Reason.EVENT).mean()
    assert abs(share - death) < 4 * (death * (1 - death) / 6000) ** 0.5
    assert (result.elapsed_us[result.reason == Reason.EVENT] <= horizon).all()
    assert (result.elapsed_us[result.reason == Reason.HORIZON] > horizon).all()


@pytest.mark.parametrize("clock", [CLOCK, WIDE], ids=["narrow", "wide"])
def test_summed_chances_are_unbiased_and_vary_less_than_counts(clock: Clock) -> None:
    """Against the exact chance of death, and every way to end adds up to one.

    Each at four standard errors: a right estimator fails one of the two with a chance of at most 1.3e-4 by the normal
    approximation. The seed is fixed, so the test does or doesn't for good.
    """
    chances, horizon = random_chances(4), 30
    death = death_within(chances, horizon, 60, clock)
    stop = Stop([DIES, np.arange(VOCAB) == EOT], horizon_us=horizon, max_tokens=200)
    result = rollout(
        markov_decoder(chances), clock, [Prompt(np.array([LAB]))], trajectories=3000, stop=stop, seed=1, batch_rows=3000
    )
    told = result.chances[0]
    error = told.std(0) / 3000**0.5
    assert abs(told[:, 0].mean() - death) < 4 * error[0]
    assert abs(told.sum(1).mean() - 1) < 4 * told.sum(1).std() / 3000**0.5
    counted = (result.reason[0] == Reason.EVENT) & (result.event[0] == 0)
    assert told[:, 0].var() < 0.8 * counted.var()
    # What it would be if an outcome's chance were added at only every second step, which the test must notice.
    assert abs(0.5 * told[:, 0].mean() - death) > 4 * error[0]


def without_cache(decoder: Decoder, prompt: Prompt, key: int, trajectory: int, stop: Stop, seed: int) -> list[int]:
    """The definition: a forward pass over the whole window for every token."""
    context, drawn, now = decoder.config.context, [], -prompt.elapsed_us
    window = prompt.tokens
    for step in range(stop.max_tokens):
        if len(window) > context:
            window = CLOCK.crop(window, int(context * 0.75))
        with torch.no_grad():
            logits = decoder.logits(decoder(torch.from_numpy(window), torch.tensor([len(window)]))[-1:])[0]
        logits[torch.from_numpy(CLOCK.never)] = -torch.inf
        cumulated = logits.softmax(0).double().cumsum(0).numpy()
        uniform = uniforms(seed, np.array([key]), np.array([trajectory]), np.array([step]))[0, 0]
        token = int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))
        window, now = np.append(window, token), now + times_of(CLOCK, token)[0]
        drawn.append(token)
        late = stop.horizon_us is not None and now > stop.horizon_us
        if late or token == EOT or any(mask[token] for mask in stop.outcomes):
            break
    return drawn


@pytest.mark.parametrize("batch_rows", [3, 16, 256])
def test_cache_crops_and_merged_lanes_equal_a_loop_without_any_of_them(batch_rows: int) -> None:
    """Prompts shorter than, as long as, and longer than the context of 40; trajectories that overflow it twice."""
    decoder, prompts = wordy_decoder(), some_prompts(2, 9, 17, 40, 39, 90, 3)
    stop = Stop([DIES], horizon_us=1000, max_tokens=60)
    result = rollout(
        decoder, CLOCK, prompts, trajectories=5, stop=stop, seed=7, batch_rows=batch_rows, keep_tokens=True
    )
    assert result.tokens_sampled.max() > 41
    for p, prompt in enumerate(prompts):
        for r in range(5):
            assert result.trajectory(p, r).tolist() == without_cache(decoder, prompt, p, r, stop, 7)


def test_no_trajectory_depends_on_what_else_is_sampled() -> None:
    decoder, prompts = wordy_decoder(), some_prompts(5, 12, 30, 7)
    prompts = [Prompt(prompt.tokens, key=100 + place) for place, prompt in enumerate(prompts)]
    stop = Stop([DIES], horizon_us=500, max_tokens=50)

    def run(some: list[Prompt], trajectories: int = 6, seed: int = 1) -> Rollouts:
        return rollout(decoder, CLOCK, some, trajectories=trajectories, stop=stop, seed=seed, keep_tokens=True)

    together = run(prompts)
    assert same(together, run(prompts))
    assert not same(together, run(prompts, seed=2))
    backwards, fewer = run(prompts[::-1]), run(prompts, trajectories=2)
    for p in range(4):
        alone = run([prompts[p]])
        for r in range(6):
            kept = together.trajectory(p, r).tolist()
            assert kept == alone.trajectory(0, r).tolist() == backwards.trajectory(3 - p, r).tolist()
        assert fewer.trajectory(p, 1).tolist() == together.trajectory(p, 1).tolist()


def ends(
    chances_after: dict[int, dict[int, float]],
    prompt: list[int],
    stop: Stop,
    elapsed_us: int = 0,
    clock: Clock = CLOCK,
    trajectories: int = 200,
) -> Rollouts:
    chances = np.full((VOCAB, VOCAB), 1e-30)
    for token, following in chances_after.items():
        for successor, chance in following.items():
            chances[token, successor] = chance
    prompts = [Prompt(np.array(prompt), elapsed_us)]
    decoder = markov_decoder(chances)
    return rollout(decoder, clock, prompts, trajectories=trajectories, stop=stop, seed=0, keep_tokens=True)


def test_an_outcome_ends_a_trajectory_and_the_first_mask_counts() -> None:
    both = Stop([NOTHING, DIES, DIES | (np.arange(VOCAB) == LAB)], None, 9)
    result = ends({SEX: {DAY: 1}, DAY: {DEATH: 0.5, LAB: 0.5}}, [SEX], both)
    assert (result.reason == Reason.EVENT).all()
    assert set(result.event.ravel()) == {1, 2}
    assert (result.elapsed_us == 24).all()
    assert (result.tokens_sampled == 2).all()


def test_a_horizon_that_passed_hides_what_comes_after() -> None:
    result = ends({SEX: {DAY: 1}, DAY: {DEATH: 1}}, [SEX], Stop([DIES], 23, 9))
    assert (result.reason == Reason.HORIZON).all()
    assert (result.event == -1).all()
    assert (result.elapsed_us == 24).all()
    assert (ends({SEX: {DAY: 1}, DAY: {DEATH: 1}}, [SEX], Stop([DIES], 24, 9)).reason == Reason.EVENT).all()


def test_the_end_of_the_timeline_and_the_cap_end_a_trajectory() -> None:
    result = ends({SEX: {EOT: 0.5, LAB: 0.5}, LAB: {LAB: 1}}, [SEX], Stop([DIES], 10, 4))
    assert set(result.reason.ravel()) == {Reason.END, Reason.CAP}
    assert (result.tokens_sampled[result.reason == Reason.END] == 1).all()
    assert (result.tokens_sampled[result.reason == Reason.CAP] == 4).all()
    assert (result.event == -1).all()


def test_the_clock_starts_at_the_prediction_and_known_silence_stays_silent() -> None:
    """Five hours after the last event, neither an event without a gap nor a gap of one hour is possible any more."""
    model = {LAB: {DEATH: 0.5, HOUR: 0.3, DAY: 0.15, EOT: 0.05}, DAY: {DEATH: 1}, HOUR: {DEATH: 1}}
    result = ends(model, [SEX, LAB], Stop([DIES], 20, 9), elapsed_us=5)
    dead = result.reason == Reason.EVENT
    assert (result.elapsed_us[dead] == 24 - 5).all()
    assert {tuple(result.trajectory(0, r)) for r in range(200)} == {(DAY, DEATH), (EOT,)}
    assert 0.6 < dead.mean() < 0.9  # 0.15 / 0.20
    assert (ends(model, [SEX, LAB], Stop([DIES], 18, 9), elapsed_us=5).reason[dead] == Reason.HORIZON).all()


def test_silence_leaves_each_interval_the_share_of_its_times_that_reach_the_prediction() -> None:
    """One of four times of HOUR and all of DAY are three hours or more; of DAY's, two reach past hour 23."""
    model = {LAB: {DEATH: 0.5, HOUR: 0.4, DAY: 0.1}, DAY: {DEATH: 1}, HOUR: {DEATH: 1}}
    result = ends(model, [LAB], Stop([DIES], 23, 9), elapsed_us=3, clock=WIDE, trajectories=4000)
    assert set(result.elapsed_us[result.reason == Reason.EVENT].tolist()) == {5 - 3, 20 - 3, 24 - 3}
    assert set(result.elapsed_us[result.reason == Reason.HORIZON].tolist()) == {28 - 3, 40 - 3}
    hour, late = 0.4 / 4 / (0.4 / 4 + 0.1), 0.1 / 2 / (0.4 / 4 + 0.1)
    for share, chance in (((result.elapsed_us == 2).mean(), hour), ((result.reason == Reason.HORIZON).mean(), late)):
        assert abs(share - chance) < 4 * (chance * (1 - chance) / 4000) ** 0.5
    # The first step alone tells the horizon's chance, and exactly.
    np.testing.assert_allclose(result.chances[0, :, 1], late, rtol=1e-5)
    for place in range(20):
        assert result.passed(0, place).sum() - 3 == result.elapsed_us[0, place]


def test_a_silence_longer_than_any_interval_is_told_by_the_longest_ones() -> None:
    model = {LAB: {DEATH: 0.9, HOUR: 0.05, DAY: 0.05}, DAY: {LAB: 0.9, HOUR: 0.09, DAY: 0.01}}
    result = ends(model, [LAB], Stop([DIES], None, 2), elapsed_us=30)
    assert {tuple(result.trajectory(0, r)) for r in range(200)} == {(DAY, DAY)}
    assert (result.elapsed_us == 18).all()


def test_a_crop_keeps_static_tokens_the_last_age_before_it_and_the_newest() -> None:
    body = [LAB, HOUR, AGE_45, LAB, DAY, LAB, DAY, LAB]
    window = np.array([SEX, AGE_40, *body])
    assert CLOCK.crop(window, 10) is window
    assert CLOCK.crop(window, 7).tolist() == [SEX, AGE_45, LAB, DAY, LAB, DAY, LAB]
    assert CLOCK.crop(window, 8).tolist() == [SEX, AGE_40, AGE_45, LAB, DAY, LAB, DAY, LAB]
    assert CLOCK.crop(np.array([SEX, *[LAB] * 9]), 4).tolist() == [SEX, LAB, LAB, LAB]
    assert CLOCK.crop(np.array([SEX] * 9 + [AGE_40, LAB]), 4).tolist() == [SEX, SEX, AGE_40, LAB]
    for length in range(1, 11):
        assert len(CLOCK.crop(window, length)) == length


def test_a_clock_is_read_from_a_codebook() -> None:
    words = [("special", "pad"), ("special", "eot"), ("special", "unk"), ("static", "SEX//F"), ("age", "40-45")]
    tokens = [Token(*word) for word in [*words, ("interval", "1-2d"), ("code", "LAB//1")]]
    codebook = Codebook(TokenizerOptions(), tokens, {"1-2d": 5}, {}, {}, waits={"1-2d": [4, 6]}, intervals={"1-2d": 3})
    clock = Clock.of(codebook)
    assert clock.waits.draw(np.array([6, 5, 5]), np.array([0.9, 0.1, 0.9]), np.array([0, 0, 0])).tolist() == [0, 4, 6]
    assert np.flatnonzero(clock.never).tolist() == [codebook.pad, codebook.unk]
    assert (np.flatnonzero(clock.is_static).tolist(), np.flatnonzero(clock.is_age).tolist()) == ([3], [4])
    decoder = Decoder.create(DecoderConfig(7, 1, 8, 1, 1, 8, 16), 0)
    prompts = [Prompt(np.array([3, 4, 6], dtype=np.int32))]
    stop = Stop([codebook.matching(["LAB"])], 7, 20)
    given = rollout(decoder, codebook, prompts, trajectories=50, stop=stop, seed=0, grammar=False)
    assert same(given, rollout(decoder, clock, prompts, trajectories=50, stop=stop, seed=0))
    assert set(given.reason.ravel()) == {Reason.EVENT, Reason.HORIZON, Reason.END}


def test_progress_counts_up_to_all_and_no_prompt_is_no_problem() -> None:
    seen: list[tuple[int, int]] = []
    stop = Stop([DIES], 300, 30)
    rollout(
        wordy_decoder(), CLOCK, some_prompts(3, 9), trajectories=4, stop=stop, seed=0,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (8, 8)
    nobody = rollout(wordy_decoder(), CLOCK, [], trajectories=4, stop=stop, seed=0, keep_tokens=True)
    assert nobody.reason.shape == (0, 4)


def test_tokens_are_given_only_when_kept() -> None:
    result = rollout(wordy_decoder(), CLOCK, some_prompts(3), trajectories=1, stop=Stop([], None, 3), seed=0)
    with pytest.raises(ConfigError, match="keep_tokens"):
        result.trajectory(0, 0)


GOOD = {"trajectories": 1, "stop": Stop([DIES], 5, 5), "seed": 0}


@pytest.mark.parametrize(
    ("prompt", "change", "told"),
    [
        (Prompt(np.array([], dtype=np.int64)), {}, "prompt 0 is empty"),
        (Prompt(np.array([VOCAB])), {}, r"outside of 0\.\.9"),
        (Prompt(np.array([SEX]), elapsed_us=-1), {}, "after the prediction"),
        (Prompt(np.array([SEX])), {"temperature": 0.0}, "temperature is 0"),
        (Prompt(np.array([SEX])), {"top_p": 0.0}, "top_p is 0"),
        (Prompt(np.array([SEX])), {"top_p": 1.5}, "top_p is 1.5"),
        (Prompt(np.array([SEX])), {"trajectories": 0}, "at least 1"),
        (Prompt(np.array([SEX])), {"stop": Stop([np.zeros(3, dtype=bool)], 5, 5)}, "outcome 0 is not a mask"),
        (Prompt(np.array([SEX])), {"stop": Stop([DIES], -5, 5)}, "horizon is -5"),
    ],
)
def test_what_cannot_be_rolled_out_is_refused(prompt: Prompt, change: dict, told: str) -> None:
    with pytest.raises((ConfigError, DataError), match=told):
        rollout(wordy_decoder(), CLOCK, [prompt], **{**GOOD, **change})


def test_a_codebook_of_another_size_is_refused() -> None:
    other = Decoder.create(DecoderConfig(11, 1, 8, 1, 1, 8, 16), 0)
    with pytest.raises(ConfigError, match="the codebook has 10 tokens, the decoder 11"):
        rollout(other, CLOCK, some_prompts(3), **GOOD)


def test_a_diverged_decoder_is_told() -> None:
    decoder = wordy_decoder()
    with torch.no_grad():
        decoder.norm.weight.fill_(torch.nan)
    with pytest.raises(DataError, match="scores are not finite"):
        rollout(decoder, CLOCK, some_prompts(3), **GOOD)
