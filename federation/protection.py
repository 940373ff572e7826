"""What a run's manifest promises a patient, as the mechanisms that will really run: both sides check the same figure.

Private training ("dp-sgd") takes a number of steps that follows from the manifest alone, the same at every site:
patients are drawn with one probability, whatever their number. So what a site will have spent is known before the run
begins. How many patients train at a site counts as known: it is what the site's updates are weighed by.
"""

from federation.accountant import Approximate, Gaussian, Mechanisms, epsilon
from federation.manifest import LocalWork, Manifest, Privacy
from federation.messages import ProtocolError


def steps_of_round(local: LocalWork, sampling_rate: float) -> int:
    """Give the private steps of every round; a pass over the patients draws each of them once, on average."""
    return local.steps if local.steps is not None else max(1, round((local.epochs or 1.0) / sampling_rate))


def expected_patients(privacy: Privacy, patients: int, steps: int) -> int:
    """Give how many of a site's patients so many steps draw on average: the weight of its update; at least 1."""
    return max(1, round(privacy.sampling_rate * patients * steps))


def of_steps(privacy: Privacy, steps: int) -> Mechanisms:
    """Give what so many private steps are to the accountant."""
    return Mechanisms((Gaussian(privacy.noise_multiplier, privacy.sampling_rate, steps),))


def of_run(manifest: Manifest) -> Mechanisms:
    """Give all that a run releases of a site under differential privacy: its steps, or what its manifest says.

    Raises:
        ProtocolError: the run has no differential privacy.
    """
    privacy = privacy_of(manifest)
    if privacy.mechanism != "dp-sgd":
        return Mechanisms((Approximate(privacy.epsilon, privacy.delta),))
    return of_steps(privacy, steps_of_round(manifest.local, privacy.sampling_rate) * manifest.rounds)


def check(manifest: Manifest) -> None:
    """See that a run keeps the differential privacy that its manifest states; one that states none says nothing.

    Raises:
        ProtocolError: it costs more, or has what private steps can't have.
    """
    if (privacy := manifest.privacy) is None:
        return
    if manifest.train.clip or manifest.model.dropout:
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
