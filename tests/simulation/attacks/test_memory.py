"""What was planted is found by as many bits as it was learned, and what nobody had is not."""

import itertools

import numpy as np
import pytest
from scipy import stats

from simulation.attacks import memory
from simulation.attacks.canaries import alone, plant
from simulation.attacks.training import train
from tests.simulation.attacks import small

# Probability that a right estimator fails a test.
FALSE_ALARM = 1e-6


def test_a_model_that_knows_nothing_ranks_every_course_alike() -> None:
    """Ranks are uniform: exposure has the mean 1.44 and the distribution of log2(N) less the log of a uniform rank."""
    words, rng = small.words(), np.random.default_rng(0)
    model = small.recipe(1).initial()
    courses = [course for course, _ in memory.invent(words, 60, 12, rng)]
    bits = np.array([memory.exposure(model, words, course, 63, rng) for course in courses])
    ranks = 64 / 2**bits
    jittered = ranks - rng.random(len(ranks))
    assert stats.kstest(jittered / 64, "uniform").pvalue > FALSE_ALARM
    assert abs(bits.mean() - 1 / np.log(2)) < 5 * 1.5 / np.sqrt(len(bits))


def test_courses_that_were_learned_by_heart_are_exposed_and_come_out() -> None:
    words, rng = small.words(), np.random.default_rng(3)
    made = {times: memory.invent(words, 4, 12, rng) for times in (0, 25)}
    split = plant(small.patients(1, 20), [whole for _, whole in made[25] for _ in range(25)])
    model = train(small.recipe(120, decoder={"width": 64, "ff": 128}), split, words, small.KEY)
    courses = {times: [course for course, _ in some] for times, some in made.items()}
    nobody, many = memory.planted(model, words, courses, rivals=127, tries=5, seed=0)
    assert (nobody.patients, many.patients) == (0, 25)
    assert many.exposure.value == many.highest == 7
    assert many.extraction.greedy.value == 1
    assert many.extraction.sampled.value == 1
    assert nobody.extraction.greedy.value == 0
    assert nobody.exposure.value < 6  # type: ignore[operator]


def test_planted_timelines_hold_their_course_and_follow_the_grammar() -> None:
    words = small.words()
    for course, whole in memory.invent(words, 20, 10, np.random.default_rng(0)):
        assert (len(course.beginning), len(course.secret)) == (5, 5)
        np.testing.assert_array_equal(whole[:10], np.concatenate([course.beginning, course.secret]))
        assert words.grammar.accepts(whole)
        assert whole[-1] == words.eot


def test_a_finished_model_tells_what_one_member_alone_had() -> None:
    words, members, others = small.words(), small.patients(31, 20), small.patients(32, 20)
    model = train(
        small.recipe(300, batch_tokens=256, decoder={"layers": 2, "width": 64, "ff": 128}), members, words, small.KEY
    )
    found = memory.rare(model, words, members, others, length=4, most=20, tries=3, seed=0)
    assert found.members.courses > 10
    assert found.others.courses > 10
    assert found.members.greedy.low > found.others.greedy.high  # type: ignore[operator]


def test_a_course_of_one_patient_alone_is_in_no_other() -> None:
    """Against a search through all runs of all timelines."""
    members, others = small.patients(31, 30), small.patients(32, 30)
    rng = np.random.default_rng(0)
    found = memory._unique(members, others, 4, rng)
    timelines = [split.timeline(n)[0].tolist() for split in (members, others) for n in range(len(split))]
    runs = [{tuple(t[a : a + 4]) for a in range(len(t) - 3)} for t in timelines]
    owners: list[list[int]] = [[], []]
    for kind, courses in enumerate(found):
        assert len(courses) > 10
        for course in courses:
            having = [n for n, some in enumerate(runs) if tuple(course.secret.tolist()) in some]
            assert len(having) == 1
            owners[kind] += having
            told = course.beginning.tolist() + course.secret.tolist()
            assert timelines[having[0]][: len(told)] == told
            assert len(course.beginning) >= 4
    assert len(set(owners[0])) == len(owners[0])
    assert max(owners[0]) < 30 <= min(owners[1])
    # Nobody who has such a course is passed over.
    counts: dict[tuple[int, ...], int] = {}
    for run in itertools.chain.from_iterable(runs):
        counts[run] = counts.get(run, 0) + 1
    able = [n for n, t in enumerate(timelines) if any(counts[tuple(t[a : a + 4])] == 1 for a in range(4, len(t) - 3))]
    assert sorted(owners[0] + owners[1]) == able


def test_nothing_to_ask_for_is_said_so() -> None:
    words, twins = small.words(), alone([small.patients(1, 20).timeline(0)[0]] * 2)
    found = memory.rare(small.recipe(1).initial(), words, twins, twins, length=4, most=5, tries=1, seed=0)
    assert found.members.courses == 0
    assert found.members.greedy.value is None


@pytest.mark.parametrize("beginning", [1, 80])
def test_a_long_beginning_is_cut_to_the_context(beginning: int) -> None:
    words = small.words()
    timeline = np.concatenate([small.patients(1, 20).timeline(n)[0][:-1] for n in range(12)]).astype(np.int64)
    nll = memory._nll(small.recipe(1).initial(), timeline[:beginning], [timeline[:6], timeline[1:7]])
    assert np.isfinite(nll).all()
    assert nll == pytest.approx(6 * np.log(len(words)), rel=0.1)
