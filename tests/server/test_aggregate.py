import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from federation.manifest import OuterOptions
from server import aggregate
from server.aggregate import GlobalState, outer_step, weighted_mean

values = st.floats(-1e3, 1e3, width=32)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[np.ndarray], list[float]]:
    sites, size = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    updates = [draw(hnp.arrays(np.float32, size, elements=values)) for _ in range(sites)]
    return updates, [float(draw(st.integers(1, 10**9))) for _ in range(sites)]


@settings(deadline=None)
@given(rounds())
def test_the_mean_is_the_plain_weighted_mean(sent: tuple[list[np.ndarray], list[float]]) -> None:
    updates, shares = sent
    plain = np.average(np.stack(updates).astype(np.float64), axis=0, weights=shares)
    np.testing.assert_allclose(weighted_mean(updates, shares), plain, rtol=1e-6, atol=1e-9)


@given(rounds(), st.floats(0.01, 2), st.integers(1, 7))
def test_chunks_make_no_difference(sent: tuple[list[np.ndarray], list[float]], lr: float, chunk: int) -> None:
    updates, shares = sent
    state = GlobalState(np.linspace(-1, 1, updates[0].size, dtype=np.float32))
    options = OuterOptions.nesterov(lr)
    whole = outer_step(state, updates, shares, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregate, "_CHUNK", chunk)
        parts = outer_step(state, updates, shares, options)
    assert whole.momentum is not None
    assert parts.momentum is not None
    np.testing.assert_array_equal(whole.weights, parts.weights)
    np.testing.assert_array_equal(whole.momentum, parts.momentum)


def test_fedavg_with_rate_one_is_the_mean_of_the_local_weights() -> None:
    start = np.array([1, 2, 3], np.float32)
    local = [np.array([2, 2, 2], np.float32), np.array([0, 4, 8], np.float32)]
    state = outer_step(GlobalState(start), [w - start for w in local], [1.0, 3.0], OuterOptions())
    np.testing.assert_allclose(state.weights, [0.5, 3.5, 6.5])
    assert state.momentum is None


def test_nesterov_is_that_of_torch() -> None:
    rng = np.random.default_rng(0)
    start = rng.normal(size=50).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    state = GlobalState(start)
    for _ in range(5):
        update = rng.normal(size=50).astype(np.float32)
        parameter.grad = -torch.tensor(update, dtype=torch.float64)
        sgd.step()
        state = outer_step(state, [update], [1.0], OuterOptions.nesterov())
        np.testing.assert_allclose(state.weights, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_state_is_not_changed() -> None:
    state = GlobalState(np.ones(4, np.float32), np.ones(4, np.float32))
    outer_step(state, [np.ones(4, np.float32)], [1.0], OuterOptions.nesterov())
    np.testing.assert_array_equal(state.weights, np.ones(4))
    np.testing.assert_array_equal(state.momentum, np.ones(4))
