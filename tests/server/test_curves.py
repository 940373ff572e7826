import math
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from server.curves import Curve, draw, ticks

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


@given(NUMBERS, NUMBERS, st.integers(2, 8))
def test_ticks_are_few_even_and_surround_the_values(one: float, other: float, most: int) -> None:
    low, high = min(one, other), max(one, other)
    found = ticks(low, high, most)
    assert 1 <= len(found) <= most + 2
    tolerance = 1e-6 * max(1.0, abs(low), abs(high))
    assert found[0] <= low + tolerance
    assert found[-1] >= high - tolerance


@given(st.dictionaries(st.integers(0, 500), st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=12))
def test_whatever_was_measured_makes_a_picture_without_styles(values: dict[int, float]) -> None:
    drawn = draw([Curve("<b>&", values), Curve("all", {1: 2.0}, main=True)], 'A "title".', "nats")
    root = ElementTree.fromstring(drawn)
    assert root.get("aria-label", "").startswith('A "title".')
    assert "style" not in drawn
    points = [part for each in root.iter("polyline") for part in each.get("points", "").split()]
    assert len(points) == 1 + sum(math.isfinite(value) for value in values.values())
    for point in points:
        x, y = map(float, point.split(","))
        assert 0 <= x <= 420
        assert 0 <= y <= 250


def test_nothing_measured_is_no_picture() -> None:
    assert draw([Curve("a", {}), Curve("b", {1: math.nan})], "", "") == ""


def test_many_sites_are_a_crowd_and_few_can_be_told_apart() -> None:
    def drawn(count: int) -> str:
        return draw([Curve(f"s{n}", {1: n, 2: n}) for n in range(count)], "", "")

    assert all(f"kind-{n}" in drawn(6) for n in range(1, 7))
    assert "kind-" not in drawn(7)
    assert drawn(7).count("crowd") == 14
