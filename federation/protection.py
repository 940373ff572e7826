"""What a run's manifest promises a patient, as the mechanisms that will really run: both sides check the same figure.

Private training ("dp-sgd") takes a number of steps that follows from the manifest alone, the same at every site:
patients are drawn with one probability, whatever their number. So what a site will have spent is known before the run
begins.
"""

from federation.accountant import Approximate, Gaussian, Mechanisms, epsilon
from federation.manifest import Manifest, Privacy
from federation.messages import ProtocolError


def steps_of_round(manifest: Manifest) -> int:
    """Give the private steps of every round; a pass over the patients is as many as draw each of them once on average.

    Raises:
        ProtocolError: the run has no differential privacy.
    """
    local = manifest.local
    if local.steps is not None:
        return local.steps
    return max(1, round((local.epochs or 1.0) / _privacy(manifest).sampling_rate))


def of_steps(privacy: Privacy, steps: int) -> Mechanisms:
    """Give what so many private steps are to the accountant."""
    return Mechanisms((Gaussian(privacy.noise_multiplier, privacy.sampling_rate, steps),))


def of_run(manifest: Manifest) -> Mechanisms:
    """Give all that a run releases of a site under differential privacy: what its manifest says, or its steps.

    Raises:
        ProtocolError: the run has no differential privacy.
    """
    privacy = _privacy(manifest)
    if privacy.mechanism != "dp-sgd":
        return Mechanisms((Approximate(privacy.epsilon, privacy.delta),))
    return of_steps(privacy, steps_of_round(manifest) * manifest.rounds)


def check(manifest: Manifest) -> None:
    """See that a run costs no more than its manifest says; a run without differential privacy says nothing.

    Raises:
        ProtocolError: it costs more.
    """
    if (privacy := manifest.privacy) is None:
        return
    cost = epsilon(of_run(manifest).all, privacy.delta)
    if cost > privacy.epsilon:
        raise ProtocolError(
            f"The run says that it costs a patient epsilon {privacy.epsilon:g} at delta {privacy.delta:g} at most, but "
            f"noise {privacy.noise_multiplier:g} at sampling rate {privacy.sampling_rate:g} in {manifest.rounds} "
            f"rounds costs {cost:.4f}. Take more noise (fedcomet privacy plan), fewer rounds, or state what it costs."
        )


def _privacy(manifest: Manifest) -> Privacy:
    if manifest.privacy is None:
        raise ProtocolError("The run has no differential privacy.")
    return manifest.privacy
