"""What a run's manifest promises a patient, as the mechanisms that will really run: both sides check the same figure.

Private training ("dp-sgd") takes a number of steps that follows from the manifest alone, the same at every site:
patients are drawn with one probability, whatever their number. So what a site will have spent is known before the run
begins. How many patients train at a site counts as known: it is what the site's updates are weighed by.

Noise on the update ("local") is one release a round: the site's whole update, cut to the norm `clip`. Two such updates
are at most twice that apart, whatever of the records differs, so the same figure holds for one patient more or less
and for a site that exchanges all of its records.

Losses of tuning patients are told only where the manifest asks for them, as noised sums whose cost is added to that of
the training. A patient either trains or tunes, so what one of them pays is less: the sum is claimed.

Noise that is shared out ("distributed") is one release a round, too: the sum that secure aggregation opens. Each site
adds discrete Gaussian integers to its update in integers. At least `min_sites` sites are in every sum, of which
`min_sites` - `honest_sites` may tell the coordinator what they have added, so the noise of `honest_sites` sites covers
what any one of them has. How far apart two updates of a site are, in integers: with g the step of `FixedPoint`, a site
cuts its update x of P values to |x| <= (clip - g sqrt(P)/2) (1 - 2^-20), and tells q = rint(x/g) (all weights are
equal, and no value is beyond `masking.clip`). Rounding moves each value by 1/2 at most, q as a whole by sqrt(P)/2, and
the float arithmetic before it by less than 2^-20 of |x|/g. So |q| <= clip/g exactly, and |q - q'| <= 2 clip/g for any
two sets of records. That the sum is told modulo a word's size is post-processing.
"""

import math

from federation.accountant import DiscreteGaussian, Gaussian, Mechanism, Mechanisms, epsilon
from federation.manifest import LocalWork, Manifest, Privacy, PrivateEvaluation, TaskEvaluation
from federation.messages import ProtocolError
from federation.summed import aggregation_of, numbers_of
from tokenizer.errors import ConfigError

_MOST_ROUNDING = 0.01
"""The largest part of the clip that rounding to integers may take."""
_FLOAT_SHARE = 2.0**-20
"""What float32 and float64 may lengthen a cut update by, with room: its own rounding to float32 is 2^-24."""


def steps_of_round(local: LocalWork, sampling_rate: float) -> int:
    """Give the private steps of every round; a pass over the patients draws each of them once, on average."""
    return local.steps if local.steps is not None else max(1, round((local.epochs or 1.0) / sampling_rate))


def releases_of_round(privacy: Privacy, local: LocalWork) -> int:
    """Give how many sums are noised in every round: private steps, or one update."""
    return steps_of_round(local, privacy.sampling_rate) if privacy.mechanism == "dp-sgd" else 1


def expected_patients(privacy: Privacy, patients: int, steps: int) -> int:
    """Give how many of a site's patients so many steps draw on average: the weight of its update; at least 1.

    Where noise is shared out all weights are 1: nothing else may tell of the records.
    """
    return 1 if privacy.mechanism == "distributed" else max(1, round(privacy.sampling_rate * patients * steps))


def of_steps(privacy: Privacy, releases: int) -> Mechanisms:
    """Give what so many private steps, or noised updates, are to the accountant, whatever the model and the sites.

    Of shared noise it is the law at the finest step, by which the noise is planned; `of_releases` has the real step.
    """
    if privacy.honest_sites is not None:
        return Mechanisms((_shares(privacy, 2.0**-40 * privacy.clip, 1, releases),))
    # Noise is stated in clips; one patient moves a sum of shares by one clip at most, and an update by two.
    furthest = 2.0 if privacy.mechanism == "local" else 1.0
    return Mechanisms((Gaussian(privacy.noise_multiplier / furthest, privacy.sampling_rate, releases),))


def of_releases(manifest: Manifest, releases: int) -> Mechanisms:
    """Give what so many private steps, or noised updates, of a run are to the accountant.

    Raises:
        ProtocolError: the run has no differential privacy, or shared noise without secure aggregation or too little.
    """
    privacy = privacy_of(manifest)
    if privacy.mechanism != "distributed":
        return of_steps(privacy, releases)
    try:
        step = numbers_of(manifest).step
        return Mechanisms((_shares(privacy, step, manifest.model.parameters(), releases),))
    except ConfigError as problem:
        raise ProtocolError(f"privacy: shared noise doesn't fit: {problem}") from None


def of_run(manifest: Manifest) -> Mechanisms:
    """Give all that a run releases of a site under differential privacy.

    Raises:
        ProtocolError: as `of_releases`.
    """
    return up_to(manifest, manifest.rounds)


def up_to(manifest: Manifest, number: int) -> Mechanisms:
    """Give what a run has released of a site when a round of it is over.

    Raises:
        ProtocolError: as `of_releases`.
    """
    privacy = privacy_of(manifest)
    training = of_releases(manifest, releases_of_round(privacy, manifest.local) * number)
    told = sum(evaluated(manifest, each) for each in range(1, number + 1))
    losses = of_evaluations(privacy, told).all if told else ()
    return Mechanisms((*training.all, *losses, *of_tallies(manifest.tasks, number, manifest.rounds)))


def evaluated(manifest: Manifest, number: int) -> bool:
    """Tell whether a private run's tuning losses are told, with noise, after a round."""
    return is_due(privacy_of(manifest).evaluation, number, manifest.rounds)


def of_tallies(tasks: TaskEvaluation | None, number: int, rounds: int) -> tuple[Mechanism, ...]:
    """Give what noised answers to questions cost until a round of so many is over; none where nothing is told so."""
    times = 0 if tasks is None else sum(tasks.due(each, rounds) for each in range(1, number + 1))
    return () if tasks is None or not tasks.form.noise or not times else (of_one_tally(tasks, times),)


def of_one_tally(tasks: TaskEvaluation, times: int = 1) -> Mechanism:
    """Give what one evaluation of all questions is to the accountant (`federation.tallies` has the sensitivity)."""
    form = tasks.form
    return DiscreteGaussian(form.variance, float(form.most_per_patient), steps=len(tasks.tasks) * times)


def is_due(evaluation: PrivateEvaluation | None, number: int, rounds: int) -> bool:
    """Tell whether a round of so many is evaluated: every so often, and the last."""
    return evaluation is not None and (number % evaluation.every == 0 or number == rounds)


def of_evaluations(privacy: Privacy, times: int) -> Mechanisms:
    """Give what so many evaluations are to the accountant; one patient changes the sum by the bound at most.

    Raises:
        ProtocolError: the run tells no losses.
    """
    if privacy.evaluation is None:
        raise ProtocolError("The run tells no losses: its manifest has no privacy.evaluation.")
    return Mechanisms((Gaussian(privacy.evaluation.noise_multiplier, 1.0, times),))


def clip_before_rounding(manifest: Manifest) -> float:
    """Give the norm to which an update is cut, such that in integers it has the agreed norm at most (see above)."""
    lost = numbers_of(manifest).step * math.sqrt(manifest.model.parameters()) / 2
    return (privacy_of(manifest).clip - lost) * (1 - _FLOAT_SHARE)


def colluding_sites(manifest: Manifest) -> int | None:
    """Give how many sites may work with the coordinator against shared noise; None where each site has its own."""
    privacy, sums = manifest.privacy, manifest.secure_aggregation
    if privacy is None or sums is None or privacy.honest_sites is None:
        return None
    return sums.min_sites - privacy.honest_sites


def check(manifest: Manifest) -> None:
    """See that a run keeps the differential privacy that its manifest states; one that states none says nothing.

    Raises:
        ProtocolError: it costs more, or has what its mechanism can't have.
    """
    if (privacy := manifest.privacy) is None:
        return
    if privacy.mechanism != "dp-sgd" and privacy.sampling_rate != 1:
        raise ProtocolError("Noise on the update knows no sampling of patients: privacy.sampling_rate must be 1.")
    if privacy.mechanism == "dp-sgd" and (manifest.train.clip or manifest.model.dropout):
        raise ProtocolError(
            "A private run has train.clip = 0, as each patient's share is clipped by itself, and no dropout."
        )
    if privacy.mechanism == "distributed":
        _check_shared(manifest, privacy)
    if manifest.tasks is not None and not manifest.tasks.form.noise:
        raise ProtocolError(
            "A private run tells answers to questions with noise only: set tasks.form.noise (and floor 1, bins 256 at "
            "most), or leave tasks out."
        )
    cost = epsilon(of_run(manifest).all, privacy.delta)
    if cost > privacy.epsilon:
        raise ProtocolError(
            f"The run says that it costs a patient epsilon {privacy.epsilon:g} at delta {privacy.delta:g} at most, but "
            f"noise {privacy.noise_multiplier:g} at sampling rate {privacy.sampling_rate:g} in {manifest.rounds} "
            f"rounds costs {cost:.4f}. Take more noise (fedcomet privacy plan), fewer rounds, or state what it costs."
        )


def privacy_of(manifest: Manifest) -> Privacy:
    """Give the differential privacy of a run that has one.

    Raises:
        ProtocolError: it has none.
    """
    if manifest.privacy is None:
        raise ProtocolError("The run has no differential privacy.")
    return manifest.privacy


def _shares(privacy: Privacy, step: float, parameters: int, releases: int) -> Mechanism:
    honest = privacy.honest_sites or 1
    return DiscreteGaussian((privacy.share / step) ** 2, 2 * privacy.clip / step, honest, parameters, releases)


def _check_shared(manifest: Manifest, privacy: Privacy) -> None:
    """See that a sum tells nothing but the noisy updates, and hides those of the honest sites."""
    what = 'mechanism "distributed"'
    if manifest.secure_aggregation is None:
        raise ProtocolError(
            f"privacy: {what} needs secure_aggregation: a site's share of the noise alone would protect too little. "
            'Without it, take "local" or "dp-sgd".'
        )
    sums = aggregation_of(manifest)
    most = _most_colluding(len(sums.roster), sums.masking.threshold)
    colluding = sums.min_sites - (privacy.honest_sites or 0)
    rules = {
        'outer.weights must be "uniform": how much records a site has would show in the sum': (
            manifest.outer.weights == "uniform"
        ),
        "max_norm must be left out: that a site refuses would tell of its update; clip bounds the norm": (
            manifest.max_norm is None
        ),
        f"secure_aggregation.masking.clip must be at least privacy.clip, {privacy.clip:g}": (
            sums.masking.clip >= privacy.clip
        ),
        f"honest_sites must be at most secure_aggregation.min_sites, {sums.min_sites}": colluding >= 0,
        f"honest_sites must be at least {sums.min_sites - most}: of {len(sums.roster)} sites with threshold "
        f"{sums.masking.threshold}, masks withstand {most} that work with the coordinator": colluding <= most,
    }
    if wrong := [rule for rule, holds in rules.items() if not holds]:
        raise ProtocolError(f"privacy: with {what}, {'; '.join(wrong)}.")
    of_run(manifest)
    lost = 1 - clip_before_rounding(manifest) / privacy.clip
    if lost > _MOST_ROUNDING:
        raise ProtocolError(
            f"privacy: with {what}, rounding to integers would take {lost:.1%} of the clip. Raise secure_aggregation."
            "masking.precision_bits, or lower its clip to privacy.clip."
        )


def _most_colluding(sites: int, threshold: int) -> int:
    """The most sites that, with an active coordinator, open no sum but one (docs/secure-aggregation.md)."""
    return max(0, min(2 * threshold - sites - 1, threshold - 2))
