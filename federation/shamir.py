"""Shamir's secret sharing: any `threshold` of a secret's shares give it back, fewer tell nothing about it.

A secret is 32 bytes, read as a number below 2²⁵⁶, in the prime field of 2²⁵⁶ + 297, the smallest prime that holds all
of them. Arithmetic is Python's own, exact and not constant in time: it runs at a site on numbers that nobody else feeds
to it, and at the coordinator on a secret that is being opened.

Source: A. Shamir, How to share a secret, Communications of the ACM 22 (1979).
"""

import secrets
from collections.abc import Collection, Mapping

from federation.messages import ProtocolError

PRIME = 2**256 + 297
"""The field's order."""

SHARE_BYTES = 33
"""A share is a number below `PRIME`, big-endian."""

_SECRET_BYTES = 32


def split(secret: bytes, points: Collection[int], threshold: int) -> dict[int, bytes]:
    """Share a secret of 32 bytes out over points.

    Args:
        secret: what to share.
        points: where the polynomial is told, distinct and at least 1; the secret itself stands at 0.
        threshold: how many shares give the secret back.

    Returns:
        A share of `SHARE_BYTES` bytes for each point.
    """
    if len(secret) != _SECRET_BYTES:
        raise ValueError(f"A secret has {_SECRET_BYTES} bytes, not {len(secret)}.")
    if not 1 <= threshold <= len(points) or len(set(points)) != len(points) or min(points) < 1:
        raise ValueError(f"{threshold} of {len(points)} shares: the points must be distinct, from 1, and enough.")
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {point: _value(coefficients, point).to_bytes(SHARE_BYTES) for point in points}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Give the secret back from exactly as many shares as its threshold says.

    Wrong shares, or too few, give wrong bytes: whoever combines checks the secret against something that was fixed
    before it was shared.

    Raises:
        ProtocolError: a share is no number of the field, or the result is no secret of 32 bytes.
    """
    points = {point: _number(share) for point, share in shares.items()}
    total = 0
    for point, value in points.items():
        above, below = 1, 1
        for other in points:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        total = (total + value * above * pow(below, -1, PRIME)) % PRIME
    if total >= 2 ** (8 * _SECRET_BYTES):
        raise ProtocolError("The shares don't give back a secret: at least one of them is wrong.")
    return total.to_bytes(_SECRET_BYTES)


def _value(coefficients: list[int], point: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


def _number(share: bytes) -> int:
    number = int.from_bytes(share)
    if len(share) != SHARE_BYTES or number >= PRIME:
        raise ProtocolError(f"A share of {len(share)} bytes is no number of the field.")
    return number
