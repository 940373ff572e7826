"""Terms that hold local steps back: their gradients are exact, and corrected local steps are those of pooled data."""

import numpy as np
import torch

from client.drift import Drift, next_drift
from model.decoder import Decoder
from model.pull import Pull
from model.settings import DecoderConfig

CONFIG = DecoderConfig(vocab=8, layers=1, width=16, heads=2, kv_heads=2, ff=32, context=64)


def flat(decoder: Decoder) -> torch.Tensor:
    return torch.cat([weight.reshape(-1) for weight in decoder.parameters()])


def test_the_proximal_gradient_is_that_of_its_loss() -> None:
    decoder = Decoder.create(CONFIG, 0)
    anchor = flat(Decoder.create(CONFIG, 1)).detach()
    (0.5 * 0.3 * (flat(decoder) - anchor).square().sum()).backward()
    expected = [weight.grad for weight in decoder.parameters()]
    decoder.zero_grad(set_to_none=True)
    Pull(decoder, anchor.numpy(), proximal=0.3).add_(decoder)
    for weight, wanted in zip(decoder.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, wanted)


def test_drift_is_taken_from_gradients_in_the_order_of_the_flat_vector() -> None:
    decoder = Decoder.create(CONFIG, 0)
    drift = np.arange(flat(decoder).numel(), dtype=np.float32)
    Pull(decoder, drift, drift=drift).add_(decoder)
    grads = torch.cat([weight.grad.reshape(-1) for weight in decoder.parameters() if weight.grad is not None])
    np.testing.assert_array_equal(grads.numpy(), -drift)


def quadratics(alike: bool, rounds: int, correct: bool) -> tuple[np.ndarray, np.ndarray]:
    """Two sites, each with a loss 0.5 (w - b)' A (w - b); gives the global weights and the minimum of the mean loss."""
    rng = np.random.default_rng(3)
    curvature = np.stack([np.diag(rng.uniform(0.2, 2.0, 5)) for _ in range(2)])
    centre = rng.normal(size=(2, 5))
    if alike:
        curvature, centre = np.stack([curvature[0]] * 2), np.stack([centre[0]] * 2)
    best = np.linalg.solve(curvature.sum(0), np.einsum("sij,sj->i", curvature, centre))
    weights, kept, rate, steps = np.zeros(5, np.float32), [None, None], 0.1, 10
    for number in range(1, rounds + 1):
        ends = []
        for site in range(2):
            drift = next_drift(kept[site], number, weights, rate * steps)
            w = weights.astype(np.float64)
            for _ in range(steps):
                w = w - rate * (curvature[site] @ (w - centre[site]) - (drift if correct else 0))
            ends.append(w.astype(np.float32))
            kept[site] = Drift(number, drift, ends[-1])  # type: ignore[call-overload]
        weights = np.mean(ends, axis=0, dtype=np.float32)
    return weights, best


def test_corrected_steps_reach_the_minimum_of_unlike_sites_and_plain_averaging_does_not() -> None:
    found, best = quadratics(alike=False, rounds=300, correct=True)
    np.testing.assert_allclose(found, best, atol=2e-5)
    plain, best = quadratics(alike=False, rounds=300, correct=False)
    assert np.abs(plain - best).max() > 1e-2


def test_on_like_sites_corrected_steps_are_plain_sgd() -> None:
    corrected, _ = quadratics(alike=True, rounds=5, correct=True)
    plain, _ = quadratics(alike=True, rounds=5, correct=False)
    np.testing.assert_allclose(corrected, plain, atol=1e-6)


def test_it_is_scaffold_with_control_variates() -> None:
    # The literal algorithm 1 of arXiv 1910.06378, option II, on three sites in one dimension.
    slopes, centres, rate, steps = np.array([0.5, 1.0, 2.0]), np.array([1.0, -2.0, 4.0]), 0.05, 8
    x, c, control = 0.0, 0.0, np.zeros(3)
    weights, kept = np.zeros(1, np.float32), [None] * 3
    for number in range(1, 8):
        y = np.full(3, x)
        ours = []
        for site in range(3):
            for _ in range(steps):
                y[site] -= rate * (slopes[site] * (y[site] - centres[site]) - control[site] + c)
            drift = next_drift(kept[site], number, weights, rate * steps)
            w = float(weights[0])
            for _ in range(steps):
                w -= rate * (slopes[site] * (w - centres[site]) - float(drift[0]))
            ours.append(np.array([w], np.float32))
            kept[site] = Drift(number, drift, ours[-1])  # type: ignore[call-overload]
        fresh = control - c + (x - y) / (steps * rate)
        c += float((fresh - control).mean())
        x, control = float(y.mean()), fresh
        weights = np.mean(ours, axis=0, dtype=np.float32)
        assert abs(float(weights[0]) - x) < 1e-5
