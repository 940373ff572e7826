"""What privacy costs is measured on records that are nobody's, and is next to nothing without noise and clipping."""

from pathlib import Path

from simulation.private_cost import Trial, measure
from tokenizer.progress import Step


def test_noise_costs_loss_and_no_noise_does_not(tmp_path: Path) -> None:
    seen: list[Step] = []
    trial = Trial(patients=150, sampling_rate=0.1, noise_multiplier=1e-9, steps=12, clip=1.0, context=64)
    quiet = measure(trial, tmp_path, watch=seen.append)
    loud = measure(Trial(**{**vars(trial), "noise_multiplier": 20.0}), tmp_path)
    assert (len(seen), seen[-1].done, seen[-1].total) == (24, 24, 24)
    assert (loud.plain, loud.untrained, loud.tokens) == (quiet.plain, quiet.untrained, quiet.tokens)
    assert 100 < quiet.patients < 200
    assert quiet.plain < quiet.untrained
    assert abs(quiet.nats) < 0.3 * (quiet.untrained - quiet.plain)
    assert loud.nats > quiet.nats + 0.2


def test_the_same_trial_gives_the_same_figures(tmp_path: Path) -> None:
    trial = Trial(patients=150, sampling_rate=0.05, noise_multiplier=1.0, steps=2, context=64)
    assert measure(trial, tmp_path / "one") == measure(trial, tmp_path / "other")
