"""Bytes that are read a part at a time are the bytes that they are made of."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.parts import FileBytes, Joined, sha256
from tokenizer.errors import DataError


@given(st.lists(st.binary(max_size=9), max_size=5), st.integers(-3, 50), st.integers(-3, 50))
def test_joined_bytes_are_cut_as_one_piece_is(places: list[bytes], start: int, stop: int) -> None:
    whole, joined = b"".join(places), Joined(places)
    assert bytes(joined) == whole
    assert len(joined) == joined.size == len(whole)
    assert joined[start:stop].tobytes() == whole[start:stop]
    assert sha256(joined) == hashlib.sha256(whole).hexdigest()


def test_a_part_that_lies_in_one_place_is_not_copied() -> None:
    places = [bytearray(b"abc"), bytearray(b"defg")]
    part = Joined(places)[4:6]
    places[1][1:3] = b"XY"
    assert part.tobytes() == b"XY"


def test_a_file_is_read_from_its_offset_on_and_one_that_was_cut_short_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"head, then the rest")
    rest = FileBytes(path, 6)
    assert rest.size == 13
    assert rest[0:4].tobytes() == b"then"
    assert np.array_equal(rest[9:], np.frombuffer(b"rest", np.uint8))
    path.write_bytes(b"head, th")
    with pytest.raises(DataError, match="cut short"):
        rest[0:4]
