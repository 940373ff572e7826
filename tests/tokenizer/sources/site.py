"""Small folders of tables, and their events."""

import polars as pl

from tokenizer.sources.tables import import_tables


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def events_of(dataset):
    """All events, in the order of patients and the canonical one within."""
    files = sorted(dataset.glob("data/**/*.parquet"))
    return pl.concat([pl.read_parquet(file) for file in files]).sort("subject_id", maintain_order=True)


TABLE = """
[[table]]
name = "labs"
files = "labs.csv"
subject = "id"
time = "time"
[[table.event]]
code = "LAB//{test}"
value = "value"
"""


def run(tmp_path, files, mapping=TABLE, **options):
    """Import files given as texts or bytes; gives the flow and the events."""
    for name, content in files.items():
        write(tmp_path / "site" / name, content)
    path = write(tmp_path / "mapping.toml", mapping)
    flow = import_tables(tmp_path / "site", tmp_path / "out", path, name="site", **options)
    return flow, events_of(tmp_path / "out")


def set_aside(tmp_path):
    """Row, column, reason and content of the rows in quarantine."""
    from tokenizer.sources.quarantine import read_quarantine

    return [
        (int(row["row"]), row["column"], row["reason"], row["content"])
        for row in read_quarantine(tmp_path / "out/quarantine.csv")
    ]
