"""What a run's manifest promises a patient, as the mechanisms that will really run: both sides check the same figure.

Private training ("dp-sgd") takes a number of steps that follows from the manifest alone, the same at every site:
patients are drawn with one probability, whatever their number. So what a site will have spent is known before the run
begins. How many patients train at a site counts as known: it is what the site's updates are weighed by.

Noise on the update ("local") is one release a round: the site's whole update, cut to the norm `clip`. Two such updates
are at most twice that apart, whatever of the records differs, so the same figure holds for one patient more or less
and for a site that exchanges all of its records.

Losses of tuning patients are told only where the manifest asks for them, as noised sums whose cost is added to that of
the training. A patient either trains or tunes, so what one of them pays is less: the sum is claimed.
"""

from federation.accountant import Approximate, Gaussian, Mechanisms, epsilon
from federation.manifest import LocalWork, Manifest, Privacy, PrivateEvaluation
from federation.messages import ProtocolError


def steps_of_round(local: LocalWork, sampling_rate: float) -> int:
    """Give the private steps of every round; a pass over the patients draws each of them once, on average."""
    return local.steps if local.steps is not None else max(1, round((local.epochs or 1.0) / sampling_rate))


def releases_of_round(privacy: Privacy, local: LocalWork) -> int:
    """Give how many sums are noised in every round: private steps, or one update."""
    return steps_of_round(local, privacy.sampling_rate) if privacy.mechanism == "dp-sgd" else 1


def expected_patients(privacy: Privacy, patients: int, steps: int) -> int:
    """Give how many of a site's patients so many steps draw on average: the weight of its update; at least 1."""
    return max(1, round(privacy.sampling_rate * patients * steps))


def of_steps(privacy: Privacy, steps: int) -> Mechanisms:
    """Give what so many private steps, or updates, are to the accountant."""
    # Noise is stated in clips; one patient moves a sum of shares by one clip at most, and an update by two.
    furthest = 2.0 if privacy.mechanism == "local" else 1.0
    return Mechanisms((Gaussian(privacy.noise_multiplier / furthest, privacy.sampling_rate, steps),))


def of_run(manifest: Manifest) -> Mechanisms:
    """Give all that a run releases of a site under differential privacy: its steps, or what its manifest says.

    Raises:
        ProtocolError: the run has no differential privacy.
    """
    return up_to(manifest, manifest.rounds)


def up_to(manifest: Manifest, number: int) -> Mechanisms:
    """Give what a run has released of a site when a round of it is over.

    Raises:
        ProtocolError: the run has no differential privacy.
    """
    privacy = privacy_of(manifest)
    if privacy.mechanism == "distributed":
        return Mechanisms((Approximate(privacy.epsilon, privacy.delta),))
    training = of_steps(privacy, releases_of_round(privacy, manifest.local) * number)
    told = sum(evaluated(manifest, each) for each in range(1, number + 1))
    return Mechanisms((*training.all, *(of_evaluations(privacy, told).all if told else ())))


def evaluated(manifest: Manifest, number: int) -> bool:
    """Tell whether a private run's tuning losses are told, with noise, after a round."""
    return is_due(privacy_of(manifest).evaluation, number, manifest.rounds)


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


def check(manifest: Manifest) -> None:
    """See that a run keeps the differential privacy that its manifest states; one that states none says nothing.

    Raises:
        ProtocolError: it costs more, or has what private steps can't have.
    """
    if (privacy := manifest.privacy) is None:
        return
    if privacy.mechanism == "local" and privacy.sampling_rate != 1:
        raise ProtocolError("Noise on the update knows no sampling of patients: privacy.sampling_rate must be 1.")
    if privacy.mechanism == "dp-sgd" and (manifest.train.clip or manifest.model.dropout):
        raise ProtocolError(
            "A private run has train.clip = 0, as each patient's share is clipped by itself, and no dropout."
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
