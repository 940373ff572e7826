import itertools
import secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation import shamir
from federation.messages import ProtocolError


@settings(deadline=None, max_examples=50)
@given(
    st.binary(min_size=32, max_size=32),
    st.lists(st.integers(1, 2**16), min_size=1, max_size=12, unique=True),
    st.data(),
)
def test_any_threshold_of_shares_gives_the_secret_back(secret: bytes, points: list[int], data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, len(points)))
    shares = shamir.split(secret, points, threshold)
    chosen = data.draw(st.permutations(points))[:threshold]
    assert shamir.combine({point: shares[point] for point in chosen}) == secret
    assert all(len(share) == shamir.SHARE_BYTES for share in shares.values())


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_least_and_the_greatest_secret_come_back(secret: bytes) -> None:
    shares = shamir.split(secret, range(1, 6), 3)
    for chosen in itertools.combinations(shares, 3):
        assert shamir.combine({point: shares[point] for point in chosen}) == secret


def test_one_share_too_few_fits_every_secret() -> None:
    """With t - 1 shares, each other secret has exactly one share that would make it the shared one."""
    secret, other = secrets.token_bytes(32), secrets.token_bytes(32)
    shares = shamir.split(secret, [1, 2, 3], 3)
    # The polynomial through (0, other), (1, s1), (2, s2), told at 3 by Lagrange in the integers modulo the prime.
    known = {0: int.from_bytes(other), 1: int.from_bytes(shares[1]), 2: int.from_bytes(shares[2])}
    at_three = (known[0] * 1 - known[1] * 3 + known[2] * 3) % shamir.PRIME
    forged = {1: shares[1], 2: shares[2], 3: at_three.to_bytes(shamir.SHARE_BYTES)}
    assert shamir.combine(forged) == other


def test_shares_of_one_secret_differ_each_time() -> None:
    secret = bytes(32)
    assert shamir.split(secret, [1, 2], 2) != shamir.split(secret, [1, 2], 2)


def test_the_field_is_prime_and_holds_every_secret() -> None:
    import sympy

    assert shamir.PRIME > 2**256
    assert sympy.isprime(shamir.PRIME)
    assert sympy.nextprime(2**256) == shamir.PRIME


@pytest.mark.parametrize("bad", [b"", bytes(32), b"\xff" * 33])
def test_what_is_no_share_is_refused(bad: bytes) -> None:
    with pytest.raises(ProtocolError, match="no number of the field"):
        shamir.combine({1: bad, 2: bytes(33)})


@pytest.mark.parametrize(
    ("secret", "points", "threshold"),
    [(bytes(31), [1, 2], 2), (bytes(32), [0, 1], 2), (bytes(32), [1, 1], 2), (bytes(32), [1], 2), (bytes(32), [1], 0)],
)
def test_what_would_lay_the_secret_open_is_refused(secret: bytes, points: list[int], threshold: int) -> None:
    with pytest.raises(ValueError, match=r"secret has|distinct"):
        shamir.split(secret, points, threshold)
