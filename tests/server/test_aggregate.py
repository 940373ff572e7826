import tracemalloc
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from federation.coding import Packed, pack
from federation.manifest import OuterOptions
from server import aggregate
from server.aggregate import GlobalState, TooFewUpdates, combine, outer_step

RULES = [
    OuterOptions(),
    OuterOptions(clip_norm=0.5, max_share=0.4),
    OuterOptions(rule="median"),
    OuterOptions(rule="trimmed_mean", byzantine=1),
    OuterOptions(rule="krum", byzantine=1),
]
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
    mean = combine(updates, shares, OuterOptions())[slice(0, updates[0].size)]
    np.testing.assert_allclose(mean, plain, rtol=1e-6, atol=1e-9)


@given(rounds(), st.floats(0.01, 2), st.integers(1, 7))
def test_chunks_make_no_difference(sent: tuple[list[np.ndarray], list[float]], lr: float, chunk: int) -> None:
    updates, shares = sent
    state = GlobalState(np.linspace(-1, 1, updates[0].size, dtype=np.float32))
    options = OuterOptions.nesterov(lr)
    whole = outer_step(state, combine(updates, shares, options), options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregate, "_CHUNK", chunk)
        parts = outer_step(state, combine(updates, shares, options), options)
    assert whole.momentum is not None
    assert parts.momentum is not None
    np.testing.assert_array_equal(whole.weights, parts.weights)
    np.testing.assert_array_equal(whole.momentum, parts.momentum)


def test_fedavg_with_rate_one_is_the_mean_of_the_local_weights() -> None:
    start = np.array([1, 2, 3], np.float32)
    local = [np.array([2, 2, 2], np.float32), np.array([0, 4, 8], np.float32)]
    update = combine([w - start for w in local], [1.0, 3.0], OuterOptions())
    state = outer_step(GlobalState(start), update, OuterOptions())
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
        state = outer_step(state, combine([update], [1.0], OuterOptions()), OuterOptions.nesterov())
        np.testing.assert_allclose(state.weights, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "yogi"])
def test_fedadam_and_fedyogi_are_those_of_their_paper(name: Literal["adam", "yogi"]) -> None:
    # Reddi et al., arXiv 2003.00295, algorithm 2, value by value in plain floats.
    rng = np.random.default_rng(0)
    start = rng.normal(size=20).astype(np.float32)
    options = OuterOptions.adaptive(name, lr=0.05)
    state, x = GlobalState(start), start.astype(np.float64)
    m, v, b1, b2, tau = np.zeros(20), np.full(20, 1e-6), 0.9, 0.99, 1e-3
    for _ in range(6):
        delta = rng.normal(size=20).astype(np.float32) * np.float32(0.01)
        for i in range(20):
            d = float(delta[i])
            m[i] = b1 * m[i] + (1 - b1) * d
            if name == "adam":
                v[i] = b2 * v[i] + (1 - b2) * d * d
            else:
                v[i] = v[i] - (1 - b2) * d * d * np.sign(v[i] - d * d)
            x[i] += 0.05 * m[i] / (np.sqrt(v[i]) + tau)
        state = outer_step(state, combine([delta], [1.0], OuterOptions()), options)
        np.testing.assert_allclose(state.weights, x, rtol=1e-5, atol=1e-6)


def test_a_state_is_not_changed() -> None:
    state = GlobalState(np.ones(4, np.float32), np.ones(4, np.float32))
    outer_step(state, combine([np.ones(4, np.float32)], [1.0], OuterOptions()), OuterOptions.nesterov())
    np.testing.assert_array_equal(state.weights, np.ones(4))
    np.testing.assert_array_equal(state.momentum, np.ones(4))


def seven(scale: float = 0.1) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(1 + scale * rng.normal(size=70)).astype(np.float32) for _ in range(7)]


@pytest.mark.parametrize("options", RULES)
def test_packed_updates_and_small_chunks_give_what_whole_ones_give(options: OuterOptions) -> None:
    updates, weights = seven(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 70.0]
    whole = outer_step(GlobalState(np.zeros(70, np.float32)), combine(updates, weights, options), options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregate, "_CHUNK", 32)
        packed = [Packed(pack(update, "float32"), "float32") for update in updates]
        parts = outer_step(GlobalState(np.zeros(70, np.float32)), combine(packed, weights, options), options)
    np.testing.assert_allclose(whole.weights, parts.weights, rtol=1e-6)


@given(st.lists(st.floats(0.01, 1e9), min_size=1, max_size=9), st.floats(0.05, 1))
def test_no_site_counts_for_more_than_its_share(weights: list[float], most: float) -> None:
    shares = combine([np.ones(1, np.float32)] * len(weights), weights, OuterOptions(max_share=most)).shares
    assert sum(shares) == pytest.approx(1)
    assert max(shares) <= max(most, 1 / len(weights)) * (1 + 1e-9)
    order = np.argsort(weights, kind="stable")
    assert (np.diff(np.array(shares)[order]) >= -1e-12).all()
    if max(weights) / sum(weights) <= most:
        assert shares == pytest.approx([weight / sum(weights) for weight in weights])


@pytest.mark.parametrize("options", RULES[2:])
@pytest.mark.parametrize("attack", [1e6, -30.0, 0.0])
def test_one_hostile_site_does_not_move_the_robust_rules_far(options: OuterOptions, attack: float) -> None:
    updates = seven()
    good = np.stack(updates[1:])
    updates[0] = np.full(70, attack, np.float32)
    found = combine(updates, [1e9, *[1.0] * 6], options)
    moved = found[slice(0, 70)]
    assert (np.abs(moved - good.mean(axis=0)) <= 2 * (good.max(axis=0) - good.min(axis=0))).all()
    if options.rule == "krum":
        assert [share == 0 for share in found.shares] == [True] + [False] * 6


def test_the_rules_are_those_of_their_papers() -> None:
    updates = seven(1.0)
    rows = np.stack(updates).astype(np.float64)
    part = slice(0, 70)
    np.testing.assert_allclose(combine(updates, [1.0] * 7, RULES[2])[part], np.median(rows, axis=0))
    np.testing.assert_allclose(combine(updates, [1.0] * 7, RULES[3])[part], np.sort(rows, axis=0)[1:-1].mean(axis=0))
    scores = [sorted(((rows - row) ** 2).sum(axis=1))[1 : 7 - 1 - 2 + 1] for row in rows]  # without itself
    taken = np.argsort([sum(score) for score in scores])[:6]
    np.testing.assert_allclose(combine(updates, [1.0] * 7, RULES[4])[part], rows[np.sort(taken)].mean(axis=0))
    cut = rows * np.minimum(1, 0.5 / np.linalg.norm(rows, axis=1))[:, None]
    np.testing.assert_allclose(combine(updates, [1.0] * 7, OuterOptions(clip_norm=0.5))[part], cut.mean(axis=0))


@pytest.mark.parametrize(("rule", "least"), [("trimmed_mean", 5), ("krum", 7)])
def test_too_few_updates_for_the_rule_are_told(rule: str, least: int) -> None:
    options = OuterOptions(rule=rule, byzantine=2)  # type: ignore[arg-type]
    combine(seven()[:least], [1.0] * least, options)
    with pytest.raises(TooFewUpdates, match=f"at least {least} updates, there are {least - 1}"):
        combine(seven()[: least - 1], [1.0] * (least - 1), options)


def test_memory_is_one_model_and_one_buffer_whatever_the_number_of_sites() -> None:
    size = 1 << 20
    packed = Packed(pack(np.ones(size, np.float32), "bfloat16"), "bfloat16")
    state = GlobalState(np.zeros(size, np.float32))

    def peak(sites: int) -> int:
        tracemalloc.start()
        try:
            outer_step(state, combine([packed] * sites, [1.0] * sites, OuterOptions(clip_norm=1.0)), OuterOptions())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(2), peak(64)
    assert many < few + 100_000
    # The new weights, and a few chunks of a quarter of a million values in float64; a second model would not fit.
    assert many < 4 * size + 5 * (8 << 18)


def test_the_measure_of_memory_sees_vectors_that_are_held() -> None:
    packed = Packed(pack(np.ones(1 << 20, np.float32), "bfloat16"), "bfloat16")
    tracemalloc.start()
    try:
        held = [packed[0 : 1 << 20] for _ in range(8)]
        assert tracemalloc.get_traced_memory()[1] > 8 * held[0].nbytes
    finally:
        tracemalloc.stop()
