import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer.hospital import frame, stays
from tokenizer.errors import DataError
from tokenizer.events import MedsDataset, write_meds
from tokenizer.pieces import cut


@given(
    blocks=st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 5)), max_size=12),
    events=st.integers(1, 6),
    chunk=st.integers(1, 7),
)
def test_pieces_cover_every_row_once_and_part_no_subject(blocks, events, chunk):
    ids = np.repeat([subject for subject, _ in blocks], [rows for _, rows in blocks]).astype(np.int64)
    found = cut("s", (ids[at : at + chunk] for at in range(0, len(ids), chunk)), events)
    assert sum(piece.rows for piece in found.pieces) == len(ids)
    assert [piece.start for piece in found.pieces] == [
        0,
        *np.cumsum([piece.rows for piece in found.pieces])[:-1],
    ][: len(found.pieces)]
    parts = [set(ids[piece.start : piece.start + piece.rows].tolist()) for piece in found.pieces]
    assert sum(map(len, parts)) == len(set().union(*parts)), "a subject is in one piece"
    assert found.subjects.tolist() == sorted(set(ids.tolist()))
    joined = [subject for place, subject in enumerate(ids) if place == 0 or ids[place - 1] != subject]
    assert found.scattered == (len(joined) > len(set(joined)))
    if found.scattered:
        assert len(found.pieces) == 1
    else:
        assert all(piece.rows >= events for piece in found.pieces[:-1])
        longest = max((rows for _, rows in blocks), default=0) * 12
        assert all(piece.rows < events + longest for piece in found.pieces)


def test_the_chunks_in_which_a_file_is_looked_at_make_no_difference():
    ids = np.repeat(np.arange(50), 7)
    cuts = [cut("s", iter(np.array_split(ids, parts)), 20) for parts in (1, 2, 9, 350)]
    assert len(cuts[0].pieces) == 17
    assert all(other.pieces == cuts[0].pieces for other in cuts)


def test_pieces_are_read_as_the_whole_shard_is(tmp_path):
    write_meds(tmp_path / "site", [("0", stays(range(30))), ("1", stays(range(30, 35)))], name="x")
    whole, small = MedsDataset.open(tmp_path / "site"), MedsDataset.open(tmp_path / "site", piece_events=100)
    assert [piece.rows for piece in whole.pieces] == [len(whole.read(shard)) for shard in whole.shards]
    assert len(small.pieces) > 5
    assert small.events == whole.events
    assert small.subjects == whole.subjects == 35
    assert pl.concat(map(small.read, small.pieces)).equals(pl.concat(map(whole.read, whole.shards)))


def test_odd_rows_of_all_pieces_are_counted_once(tmp_path):
    odd = [(subject, hour, "A", float("nan")) for subject in range(9) for hour in (2, 1)]
    file = tmp_path / "data" / "0.parquet"
    file.parent.mkdir()
    frame(odd).write_parquet(file)
    dataset = MedsDataset.open(tmp_path, piece_events=4)
    for _ in range(2):
        for piece in dataset.pieces:
            dataset.read(piece)
        assert dataset.notes[1:] == [
            "data/0.parquet: 18 values were NaN or infinite, and read as missing.",
            "data/0.parquet: 9 rows were not sorted by subject and time, and sorted here.",
        ]
    dataset.read("data/0.parquet")
    assert len(dataset.notes) == 3


def test_a_bad_row_is_named_by_its_place_in_the_file_not_in_the_piece(tmp_path):
    file = tmp_path / "data" / "0.parquet"
    file.parent.mkdir()
    codes = [None if row == 17 else "A" for row in range(20)]
    frame([(row // 2, row, code, None) for row, code in enumerate(codes)]).write_parquet(file)
    dataset = MedsDataset.open(tmp_path, piece_events=4)
    with pytest.raises(DataError, match=r"row 17 \(from 0\) has no code"):
        dataset.read(dataset.pieces[-1])


def test_scattered_subjects_are_said(tmp_path):
    file = tmp_path / "data" / "0.parquet"
    file.parent.mkdir()
    frame([(1, 0, "A", None), (2, 0, "A", None), (1, 1, "A", None)]).write_parquet(file)
    dataset = MedsDataset.open(tmp_path, piece_events=1)
    assert dataset.scattered == ("data/0.parquet",)
    assert len(dataset.pieces) == 1
