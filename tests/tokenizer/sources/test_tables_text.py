"""Text becomes rows with the numbers that an editor shows, the fast way as the slow one."""

import csv
import gzip
import io
import tarfile
import zipfile
from contextlib import contextmanager

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer.sources.site import write
from tokenizer.errors import DataError
from tokenizer.sources import delimited
from tokenizer.sources.delimited import read_rows
from tokenizer.sources.folders import Found, find
from tokenizer.sources.mapping import Layout


@contextmanager
def blocks_of(count):
    """Blocks, and what counts as small, of so few bytes that a short text has many."""
    before = delimited.BLOCK, delimited._SMALL, delimited._LONGEST_FIELD
    delimited.BLOCK, delimited._SMALL, delimited._LONGEST_FIELD = count, 0, before[2]
    try:
        yield
    finally:
        delimited.BLOCK, delimited._SMALL, delimited._LONGEST_FIELD = before


def rows_of(content, names, **layout):
    """(row number, texts) of good rows and (row number, reason) of bad ones."""
    bad = []
    found = Found("a.csv", lambda: io.BytesIO(content))
    pieces = read_rows(
        [found],
        Layout(**layout),
        lambda file, header: {name: list(header).index(name) for name in names},
        lambda file, row, reason, content, advice: bad.append((row, reason)),
    )
    good = [
        (row["_row"], tuple(row[name] for name in names)) for frame in pieces for row in frame.iter_rows(named=True)
    ]
    return good, bad


CELLS = st.text(st.sampled_from('ab1 ,;"\n\r\tß€=\0'), max_size=5)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=12), st.integers(1, 60), st.sampled_from(["\n", "\r\n"]))
def test_what_a_csv_writer_wrote_is_read_back_whatever_the_blocks(rows, block, line_end):
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=line_end)
    writer.writerow("xyz")
    numbers = []
    for row in rows:
        numbers.append(out.getvalue().count("\n") + 1)
        # The module doesn't see that a lone carriage return has to be quoted before Python 3.13.
        writer.writerow(row) if not any("\r" in cell for cell in row) else out.write(
            ",".join('"' + cell.replace('"', '""') + '"' for cell in row) + line_end
        )
    with blocks_of(block):
        good, bad = rows_of(out.getvalue().encode(), "xyz")
    assert good == [(n, row) for n, row in zip(numbers, rows, strict=True) if "\0" not in "".join(row)]
    assert bad == [(n, "a NUL character") for n, row in zip(numbers, rows, strict=True) if "\0" in "".join(row)]


@settings(max_examples=300)
@given(st.text(st.sampled_from('ab,"\n\n\n'), max_size=40), st.integers(1, 30))
def test_any_text_gives_the_same_rows_block_by_block_as_row_by_row(text, block):
    content = b"x,y\n" + text.encode()
    fast, slow = delimited._fast, rows_of
    try:
        delimited._fast = lambda *_: None
        expected = slow(content, "xy")
    finally:
        delimited._fast = fast
    with blocks_of(block):
        assert rows_of(content, "xy") == expected
    assert rows_of(content, "xy") == expected


def test_a_row_has_the_number_of_the_line_on_which_it_begins():
    text = b'x,y\n\n1,a\n2,"b\nb"\n\n3,c\n'
    assert rows_of(text, "xy") == ([(3, ("1", "a")), (4, ("2", "b\nb")), (7, ("3", "c"))], [])


def test_bad_rows_are_told_by_line_and_the_others_read():
    text = b'x,y\n1,a\n2\n3,c,d\n"4"e,f\n5,\xff\n6,\0\n7,g\rh\n8," i"\n'
    good, bad = rows_of(text, "xy")
    assert good == [(2, ("1", "a")), (9, ("8", " i"))]
    assert bad == [
        (3, "too few columns"),
        (4, "too many columns"),
        (5, "text after a closing quote"),
        (6, "not utf-8 text"),
        (7, "a NUL character"),
        (8, "a carriage return inside of a row"),
    ]


def test_a_quote_that_is_never_closed_costs_one_row():
    lines = [f"{n},b" for n in range(2000)]
    lines[10] = '10,"b'
    good, bad = rows_of(b"x,y\n" + "\n".join(lines).encode(), "xy")
    assert bad == [(12, "a quote is opened and not closed")]
    assert [row for row, _ in good] == [n for n in range(2, 2002) if n != 12]


def test_a_quote_in_the_middle_of_a_text_is_a_letter():
    assert rows_of(b'x,y\n5" tube,2\n1,3"\n', "xy") == ([(2, ('5" tube', "2")), (3, ("1", '3"'))], [])


def test_quotes_mean_nothing_if_the_mapping_says_so():
    assert rows_of(b'x,y\n"a,b"\n', "xy", quote="") == ([(2, ('"a', 'b"'))], [])


@pytest.mark.parametrize(
    ("encoding", "layout"),
    [
        ("utf-8", {}),
        ("utf-8-sig", {}),
        ("cp1252", {"encoding": "cp1252"}),
        ("utf-16", {"encoding": "utf-16"}),
        ("utf-8", {"encoding": "utf-8-sig"}),
    ],
)
def test_encodings(encoding, layout):
    assert rows_of("x,y\nÜ,é\n".encode(encoding), "xy", **layout) == ([(2, ("Ü", "é"))], [])


def test_bytes_that_an_encoding_does_not_have_are_a_bad_row():
    assert rows_of(b"x,y\n\x81,a\nb,c\n", "xy", encoding="cp1252") == ([(3, ("b", "c"))], [(2, "not cp1252 text")])


def test_utf_16_is_recognised():
    with pytest.raises(DataError, match=r'a\.csv: is UTF-16 text.*encoding = "utf-16"'):
        rows_of("x,y\na,b\n".encode("utf-16"), "xy")


def test_line_ends_of_old_macs():
    assert rows_of(b"x,y\ra,b\rc,d", "xy") == ([(2, ("a", "b")), (3, ("c", "d"))], [])


def test_no_line_end_at_the_end_and_none_at_all():
    assert rows_of(b"x,y\na,b", "xy") == ([(2, ("a", "b"))], [])
    assert rows_of(b"x,y", "xy") == ([], [])


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_even_a_header_is_refused(content):
    with pytest.raises(DataError, match=r"a\.csv: the file is empty"):
        rows_of(content, "x")


def test_files_without_a_header():
    assert rows_of(b"a,b\n", "xy", header=False, columns=["x", "y"]) == ([(1, ("a", "b"))], [])


def test_one_column_and_a_header_with_quotes():
    assert rows_of(b'"x"\na\n\nb\n', "x") == ([(2, ("a",)), (4, ("b",))], [])


@given(st.lists(st.lists(st.sampled_from(["1,a", "2,b", "", "3", '4,"c"', "5,ä"]), max_size=4), max_size=6))
def test_small_files_put_together_keep_their_names_and_rows(files):
    contents = {f"{n}.csv": "x,y\n" + "".join(f"{line}\n" for line in lines) for n, lines in enumerate(files)}

    def read(names):
        bad, pieces = [], []
        founds = [Found(name, lambda name=name: io.BytesIO(contents[name].encode())) for name in names]
        for frame in read_rows(
            founds, Layout(), lambda *_: {"x": 0, "y": 1}, lambda file, row, *_: bad.append((file, row))
        ):
            pieces += frame.select("_file", "_row", "x", "y").rows()
        return pieces, bad

    together = read(contents)
    alone = [read([name]) for name in contents]
    assert together[0] == [row for rows, _ in alone for row in rows]
    assert together[1] == [row for _, bad in alone for row in bad]


def test_a_truncated_gzip_file_says_after_which_row(tmp_path):
    text = b"x,y\n" + b"".join(b"%d,%d\n" % (n, n * 7919 % 1000) for n in range(100_000))
    packed = gzip.compress(text)
    write(tmp_path / "a.csv.gz", packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"a\.csv\.gz: damaged or cut off somewhere after row [45]\d{4} .*export"):
        list(read_rows(find(tmp_path, ["*.gz"], "t"), Layout(), lambda *_: {"x": 0}, lambda *_: None))


def test_archives_are_folders(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name, text in (("one/x.csv", b"x\n1\n"), ("two/y.csv", b"x\n2\n")):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr("one/z.csv", "x\n3\n")
        zipped.writestr("one/deep/z.csv.gz", gzip.compress(b"x\n4\n"))

    def read(folder, pattern):
        pieces = read_rows(find(folder, [pattern], "t"), Layout(), lambda *_: {"x": 0}, lambda *_: None)
        return sorted(pl.concat(pieces).select("_file", "x").rows())

    assert read(tmp_path, "*.tar.gz/*/*.csv") == [("a.tar.gz/one/x.csv", "1"), ("a.tar.gz/two/y.csv", "2")]
    assert read(tmp_path / "a.tar.gz", "two/*") == [("two/y.csv", "2")]
    assert read(tmp_path, "a.zip/**/*.csv*") == [("a.zip/one/deep/z.csv.gz", "4"), ("a.zip/one/z.csv", "3")]
    content = (tmp_path / "a.tar.gz").read_bytes()
    write(tmp_path / "b.tar.gz", content[:-20])
    with pytest.raises(DataError, match=r"b\.tar\.gz: damaged or cut off"):
        read(tmp_path, "b.tar.gz/*/*.csv")
    with pytest.raises(DataError, match=r"There are one/x\.csv, two/y\.csv\. Did you mean"):
        read(tmp_path / "a.tar.gz", "two/x.csv")


def test_a_tar_that_ends_between_two_files_is_not_taken_for_a_whole_one(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("x.csv", "y.csv"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"x\n1\n"))
    write(tmp_path / "a.tar", out.getvalue()[:1024])
    with pytest.raises(DataError, match=r"a\.tar: damaged or cut off \(the end of the archive is missing"):
        list(find(tmp_path, ["a.tar/*.csv"], "t"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "z.csv").write_text("x\n1\n")
    assert [found.name for found in find(tmp_path, ["z.csv", "*.csv"], "t")] == ["z.csv"]
    (tmp_path / "z.csv.gz").write_bytes(gzip.compress(b"x\n1\n"))
    with pytest.raises(DataError, match=r"z\.csv is there twice, also as z\.csv\.gz\. Its rows would count twice"):
        list(find(tmp_path, ["z.csv*"], "t"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        for text in ("x\n1\n", "x\n2\n"):
            zipped.writestr("z.csv", text)
    with pytest.raises(DataError, match=r"a\.zip/z\.csv is there twice\. Its rows"):
        list(find(tmp_path, ["a.zip/*.csv"], "t"))
