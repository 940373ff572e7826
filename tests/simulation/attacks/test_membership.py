"""Members are told from others as well as scores allow, and the figures say how sure that is."""

import numpy as np
import pytest
from scipy import stats

from model import metrics
from simulation.attacks import membership
from simulation.attacks.canaries import alone
from simulation.attacks.membership import Effort, attack, auroc_interval, repeated, separate
from simulation.attacks.training import losses, train
from tests.simulation.attacks import small

# Probability that a right estimator fails a test.
FALSE_ALARM = 1e-6


def test_members_found_at_few_false_alarms() -> None:
    others = np.arange(1000.0)
    members = np.array([2000.0, 995.0, 990.5, 500.0, np.nan])
    found = separate("loss", members, others)
    assert (found.members, found.others) == (4, 1000)
    one, tenth = found.found
    # Ten of 1,000 others may be taken for members: those above 989.
    assert (one.asked, one.alarms, one.rate.value, one.note) == (0.01, 10, 0.75, "")
    assert (tenth.asked, tenth.alarms, tenth.rate.value, tenth.note) == (0.001, 1, 0.25, "")
    assert found.auroc.value == pytest.approx((1000 + 995.5 + 991 + 500.5) / 4000)


def test_rates_that_so_few_patients_cannot_show_are_said_so() -> None:
    found = separate("loss", np.arange(50.0), np.arange(50.0))
    assert all("too few" in each.note for each in found.found)
    assert all(each.alarms == 0 and each.rate.value == 0 for each in found.found)
    # None of 50: the true rate may be 5.8 %.
    assert found.found[0].highest == pytest.approx(1 - 0.05 ** (1 / 50))
    assert separate("loss", np.array([np.nan]), np.arange(5.0)).auroc.value is None


def test_ties_are_no_members_found() -> None:
    assert separate("loss", np.zeros(500), np.zeros(500)).found[0].rate.value == 0
    assert separate("loss", np.zeros(500), np.zeros(500)).auroc.value == 0.5


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("sizes", [(20, 20), (100, 40)])
def test_intervals_cover_the_true_auroc(shift: float, sizes: tuple[int, int]) -> None:
    """Normal scores: the true AUROC is Phi(shift / sqrt 2); 95 % intervals may cover 91 % where patients are few."""
    rng = np.random.default_rng(1)
    truth, runs, covered = stats.norm.cdf(shift / np.sqrt(2)), 300, 0
    for _ in range(runs):
        scores = np.concatenate([rng.normal(shift, 1, sizes[0]), rng.normal(0, 1, sizes[1])])
        low, high = auroc_interval(metrics.auroc(np.repeat([1, 0], sizes), scores), *sizes)
        covered += low <= truth <= high
    assert stats.binomtest(covered, runs, 0.91, alternative="less").pvalue > FALSE_ALARM


def test_intervals_at_the_ends() -> None:
    low, high = auroc_interval(1.0, 30, 30)
    assert high == 1.0
    assert 0.8 < low < 0.99
    assert auroc_interval(0.0, 30, 30) == pytest.approx((1 - high, 1 - low))
    low, high = auroc_interval(0.5, 30, 30)
    assert low == pytest.approx(1 - high)


def test_a_model_that_learned_its_patients_by_heart_gives_them_away() -> None:
    members, others, third = (small.patients(seed, 25) for seed in (21, 22, 23))
    words, recipe = small.words(), small.recipe(250, batch_tokens=256, decoder={"layers": 2, "width": 64, "ff": 128})
    model = train(recipe, members, words, small.KEY)
    reference = train(small.recipe(20), third, words, small.KEY)
    effort = Effort(trajectories=2)
    by_loss, by_rollouts = attack(model, reference, words, members, others, effort)
    assert by_loss.auroc.low > 0.8  # type: ignore[operator]
    assert by_rollouts.auroc.low > 0.5  # type: ignore[operator]
    # Negative control: a model that has seen none of them.
    for found in attack(reference, None, words, members, others, effort):
        assert found.auroc.low < 0.5 < found.auroc.high  # type: ignore[operator]


def test_losses_are_means_over_a_patients_targets() -> None:
    split, words = small.patients(5, 20), small.words()
    model = small.recipe(1).initial()
    together = losses(model, words, split)
    assert len(together) == 20
    one = losses(model, words, alone([split.timeline(7)[0]]))
    assert one[0] == pytest.approx(together[7], rel=1e-5)
    assert together.mean() == pytest.approx(np.log(len(words)), rel=0.05)
    assert np.isnan(losses(model, words, alone([np.array([words.eot]), split.timeline(0)[0]]))[0])


def test_timelines_without_a_future_have_no_score() -> None:
    words = small.words()
    split = alone([np.array([words.eot]), small.patients(5, 20).timeline(0)[0]])
    scores = repeated(small.recipe(1).initial(), words, split, trajectories=2)
    assert np.isnan(scores[0])
    assert 0 <= scores[1] <= 1
    assert membership.FALSE_ALARM_RATES == (0.01, 0.001)
