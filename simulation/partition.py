"""One MEDS dataset becomes several, as if its patients had gone to several hospitals.

Every patient goes to exactly one site, with all events and all columns. How patients are grouped is a
`simulation.config.Partition`:

- `code`: by what follows the prefix in a patient's first matching code (`ICUTYPE//3`); of several prefixes the first
  that occurs in the dataset counts. Patients without one form the site `other`, and so do groups below `min_patients`.
- `column`: the same by the first value of an extra column of the files.
- `iid`: equal shares at random.
- `dirichlet`: the groups of `code`, each dealt out over the sites in shares drawn from Dirichlet(alpha): the smaller
  alpha, the more sites differ.
- `chapters`: the same with ICD-10-CM chapters as groups, by the chapter of most of a patient's codes (as Elemento,
  medRxiv 2026, splits MIMIC-IV into five sites).
- `quantity`: shares of all patients drawn from Dirichlet(alpha).
- `time`: equal shares in the order of patients' first events: sites that began later.
- `system`: by the prefix that most of a patient's codes are under: ICD-9 against ICD-10.

Two passes, shard by shard: memory is bounded by a shard and one row per patient. Random choices follow from the seed
and the subject ids alone, not from how the dataset is sharded.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from pydantic import ValidationError

from simulation.chapters import chapter
from simulation.config import Partition
from tokenizer import durable
from tokenizer.codebook import BIRTH
from tokenizer.errors import ConfigError, DataError
from tokenizer.events import MedsDataset, write_meds

OTHER = "other"
_ACCOUNT = "partition.json"
_NAMED = ("code", "column", "system")


@dataclass(frozen=True)
class Site:
    """One part: `path` is its MEDS dataset."""

    name: str
    path: Path
    patients: int
    events: int


@dataclass(frozen=True)
class Parts:
    """What became of a dataset.

    Attributes:
        sites: by name.
        grouped_by: what was used: a prefix, a column, `first event`; empty for `iid` and `quantity`.
        without: patients who have no such code or value.
        several: patients who have more than one; their first, or that of most codes, counts.
        put_together: the groups below `min_patients` that became `other`, with their patients.
    """

    sites: tuple[Site, ...]
    grouped_by: str
    without: int
    several: int
    put_together: dict[str, int]


def partition(
    dataset: MedsDataset,
    rule: Partition,
    out: Path,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Parts:
    """Split a MEDS dataset into one for each site, `out/<site>`.

    What was split before, from the same records by the same rule and seed, is found again and left as it is. The
    account `out/partition.json` is written last; without it nothing counts as done.

    Args:
        dataset: where the patients come from.
        rule: how its patients are grouped.
        out: the folder of the sites; whatever else lies in it stays.
        seed: of all that is dealt out at random.
        progress: called with sites written and to write.

    Returns:
        The sites and how patients came to them.

    Raises:
        DataError: the dataset has no patients, or none has a code under any prefix or a value in the
            column, or all fall in one group.
    """
    if not dataset.subjects:
        raise DataError(f"{dataset.path}: no patients to split into sites; give a dataset with events")
    made_from = {"rule": rule.model_dump(mode="json"), "seed": seed, "source": dataset.fingerprint()}
    if (known := _known(out, made_from)) is not None:
        return known
    found = _groups(dataset, rule)
    table, put_together = _sites(found, rule, seed)
    names = sorted(table["site"].unique()) if rule.by in _NAMED else _numbered(rule.sites or 0)
    if len(names) < 2:
        raise DataError(
            f"{dataset.path}: all {dataset.subjects} patients fall in the one site {names[0]!r}; "
            "choose another prefix or column, or lower min_patients"
        )
    (out / _ACCOUNT).unlink(missing_ok=True)
    sites: list[Site] = []
    try:
        for name in names:
            members = table.filter(pl.col("site") == name).select("subject_id")
            tally = _Tally()
            sites.append(Site(name, out / name, members.height, 0))
            write_meds(out / name, _share(dataset, members, tally), name=f"{dataset.name}, site {name}")
            sites[-1] = replace(sites[-1], events=tally.events)
            if progress is not None:
                progress(len(sites), len(names))
    except BaseException:
        _remove(out, sites)
        raise
    parts = Parts(tuple(sites), found.key, found.without, found.several, put_together)
    account = made_from | asdict(parts) | {"sites": [asdict(site) | {"path": site.name} for site in sites]}
    durable.write_bytes(out / _ACCOUNT, json.dumps(account, indent=1, sort_keys=True).encode() + b"\n")
    return parts


def rule_of(**settings: object) -> Partition:
    """Make a rule of settings that a person typed.

    Raises:
        ConfigError: one is unknown or missing; says which.
    """
    try:
        return Partition.model_validate(settings)
    except ValidationError as error:
        said = "; ".join(
            ": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors()
        )
        raise ConfigError(f"the sites' rule: {said}") from None


def told(parts: Parts, by: str) -> tuple[str, ...]:
    """Say how patients came to their sites by a `Partition.by`, for people."""
    dealt = {
        "iid": "Sites are equal random shares.",
        "quantity": "Sites are random shares of drawn sizes.",
        "time": "Sites are equal shares in the order of patients' first events.",
        "dirichlet": f"Sites have drawn shares of each group by {parts.grouped_by}.",
        "chapters": "Sites have drawn shares of each group by ICD-10-CM chapter.",
    }
    notes = [dealt.get(by, f"Sites are the groups by {parts.grouped_by}.")]
    if parts.without and by in dealt:
        notes.append(
            f"{parts.without} patients have no {parts.grouped_by}; they are dealt out as a group of their own."
        )
        return tuple(notes)
    if parts.without:
        notes.append(f"{parts.without} patients have no {parts.grouped_by}; they form the site {OTHER}.")
    if parts.several:
        which = "that of most codes" if by in ("chapters", "system") else "their first"
        notes.append(f"{parts.several} patients have several groups by {parts.grouped_by}; {which} counts.")
    if parts.put_together:
        groups = ", ".join(f"{name} ({count})" for name, count in sorted(parts.put_together.items()))
        notes.append(f"Groups too small for a site of their own are together in {OTHER}: {groups}.")
    return tuple(notes)


def _known(out: Path, made_from: dict[str, object]) -> Parts | None:
    """Find what an earlier call has made of the same."""
    if not (out / _ACCOUNT).exists():
        return None
    account = json.loads((out / _ACCOUNT).read_bytes())
    if {key: account.pop(key, None) for key in made_from} != made_from:
        return None
    sites = tuple(Site(**site | {"path": out / site["path"]}) for site in account.pop("sites"))
    return Parts(sites, **account)


def _remove(out: Path, sites: list[Site]) -> None:
    for site in sites:
        shutil.rmtree(site.path, ignore_errors=True)
    with contextlib.suppress(OSError):  # other things lie in the folder: it stays
        out.rmdir()


@dataclass
class _Tally:
    events: int = 0


@dataclass(frozen=True)
class _Found:
    """One row per patient: subject_id, group (null: none); and what grouped them."""

    table: pl.DataFrame
    key: str
    without: int
    several: int


def _groups(dataset: MedsDataset, rule: Partition) -> _Found:
    match rule.by:
        case "column":
            return _by_column(dataset, rule.column or "")
        case "iid" | "quantity":
            ids = [_extra(dataset, shard, "subject_id") for shard in dataset.shards]
            table = pl.concat(ids).unique().with_columns(group=pl.lit(None, pl.String))
            return _Found(table, "", 0, 0)
        case "time":
            return _by_time(dataset)
        case "chapters" | "system":
            return _by_most(dataset, rule)
        case _:
            return _by_code(dataset, rule.prefixes)


def _by_time(dataset: MedsDataset) -> _Found:
    """Rank patients by the day of their first event; days of four digits sort as text."""
    parts = []
    for shard in dataset.shards:
        events = dataset.read(shard).filter(pl.col("code") != BIRTH)
        parts.append(events.group_by("subject_id").agg(group=pl.col("time").min().dt.strftime("%Y-%m-%d")))
    table = pl.concat(parts).group_by("subject_id").agg(pl.col("group").min())
    return _Found(table, "first event", table["group"].null_count(), 0)


def _by_most(dataset: MedsDataset, rule: Partition) -> _Found:
    """Group patients by the chapter, or by the prefix, that most of their codes are under; of equals the first."""
    wanted = [prefix.removesuffix("//") for prefix in rule.prefixes]
    code, everyone, counts = pl.col("code"), [], []
    for shard in dataset.shards:
        events = dataset.read(shard).select("subject_id", "code")
        everyone.append(events.select("subject_id").unique())
        for prefix in wanted:
            below = code.str.strip_prefix(f"{prefix}//")
            group = chapter(below) if rule.by == "chapters" else pl.lit(prefix)
            matching = events.filter(code.str.starts_with(f"{prefix}//")).select("subject_id", group=group)
            counts.append(matching.drop_nulls().group_by("subject_id", "group").len())
    ranked = pl.concat(counts).group_by("subject_id", "group").agg(pl.col("len").sum())
    if not ranked.height:
        kind = "ICD-10-CM code" if rule.by == "chapters" else "code"
        raise DataError(
            f"{dataset.path}: no patient has a {kind} under {', '.join(rule.prefixes)}; "
            "name a prefix that the dataset has, or split it by iid"
        )
    ranked = ranked.sort("subject_id", "len", "group", descending=[False, True, False])
    table = _first_of_each(ranked, pl.col("group"))
    return _found(pl.concat(everyone).unique(), table, "chapter" if rule.by == "chapters" else "system")


def _by_code(dataset: MedsDataset, prefixes: tuple[str, ...]) -> _Found:
    wanted = [prefix.removesuffix("//") for prefix in prefixes]
    tables: list[list[pl.DataFrame]] = [[] for _ in wanted]
    everyone = []
    for shard in dataset.shards:
        events = dataset.read(shard).select("subject_id", "code")
        everyone.append(events.select("subject_id").unique())
        for number, prefix in enumerate(wanted):
            code = pl.col("code")
            matching = events.filter((code == prefix) | code.str.starts_with(f"{prefix}//"))
            tables[number].append(_first_of_each(matching, code.str.strip_prefix(prefix).str.strip_prefix("//")))
    for prefix, parts in zip(wanted, tables, strict=True):
        table = pl.concat(parts)
        if table.height:
            return _found(pl.concat(everyone), table, prefix)
    raise DataError(
        f"{dataset.path}: no patient has a code under {', '.join(prefixes)}; "
        "name a prefix that the dataset has, or split it by iid"
    )


def _by_column(dataset: MedsDataset, column: str) -> _Found:
    rows = [_extra(dataset, shard, "subject_id", column) for shard in dataset.shards]
    table = pl.concat([_first_of_each(part.drop_nulls(), pl.col(column).cast(pl.String)) for part in rows])
    if not table.height:
        raise DataError(f"{dataset.path}: column {column} is empty; split the dataset by another column or by iid")
    return _found(pl.concat([part.select("subject_id").unique() for part in rows]), table, column)


def _first_of_each(rows: pl.DataFrame, value: pl.Expr) -> pl.DataFrame:
    """Each patient's first value in the order of rows, and whether there are others."""
    return rows.group_by("subject_id", maintain_order=True).agg(
        group=value.first(), several=value.n_unique().cast(pl.Int64) > 1
    )


def _found(everyone: pl.DataFrame, table: pl.DataFrame, key: str) -> _Found:
    joined = everyone.join(table, on="subject_id", how="left")
    without = joined["group"].null_count()
    return _Found(joined.select("subject_id", "group"), key, without, int(table["several"].sum()))


def _extra(dataset: MedsDataset, shard: str, *columns: str) -> pl.DataFrame:
    file = dataset.path / shard
    known = pl.read_parquet_schema(file)
    for column in columns:
        if column not in known:
            raise DataError(f"{file}: no column {column}; it has {', '.join(known)}")
    return pl.read_parquet(file, columns=list(columns), hive_partitioning=False, glob=False)


def _sites(found: _Found, rule: Partition, seed: int) -> tuple[pl.DataFrame, dict[str, int]]:
    """Name each patient's site: columns subject_id, site; and the groups that were put together."""
    table = found.table.with_columns(order=_order(found.table["subject_id"], seed)).sort("order")
    if rule.by == "time":
        # In the order of first events; who began on the same day stands in the random order.
        table = table.sort("group", maintain_order=True, nulls_last=True).with_columns(group=pl.lit(None, pl.String))
        return _dealt(table, rule.sites or 0, None, seed), {}
    if rule.by not in _NAMED:
        return _dealt(table, rule.sites or 0, None if rule.by == "iid" else rule.alpha, seed), {}
    names = {group: _name(found.key, group) for group in table["group"].unique().sort()}
    if len(set(names.values())) < len(names):
        # Two values may look alike once they are file names.
        taken = sorted(names.values())
        names = {g: n if taken.count(n) == 1 else f"{n}-{_digest(str(g))}" for g, n in names.items()}
    sizes = dict(table["group"].value_counts().iter_rows())
    small = {g: size for g, size in sizes.items() if g is not None and size < rule.min_patients}
    site = [OTHER if group in small else names[group] for group in table["group"]]
    put_together = {names[group]: size for group, size in sorted(small.items())}
    return table.select("subject_id", site=pl.Series(site, dtype=pl.String)), put_together


def _dealt(table: pl.DataFrame, sites: int, alpha: float | None, seed: int) -> pl.DataFrame:
    """Deal the patients of each group out over numbered sites, in shares that are equal or drawn."""
    rng = np.random.default_rng(seed)
    names = np.array(_numbered(sites))
    parts = []
    for group in table["group"].unique().sort():
        members = table.filter(pl.col("group").eq_missing(group))
        shares = np.full(sites, 1 / sites) if alpha is None else rng.dirichlet(np.full(sites, alpha))
        ends = np.round(np.cumsum(shares) * members.height).astype(np.int64)
        ends[-1] = members.height
        site = np.repeat(names, np.diff(ends, prepend=0))
        parts.append(members.select("subject_id", site=pl.Series(site, dtype=pl.String)))
    return pl.concat(parts)


def _share(dataset: MedsDataset, members: pl.DataFrame, tally: _Tally) -> Iterator[tuple[str, pl.DataFrame]]:
    for shard in dataset.shards:
        events = pl.read_parquet(dataset.path / shard, hive_partitioning=False, glob=False)
        mine = events.join(members, on="subject_id", how="semi", maintain_order="left")
        if mine.height:
            tally.events += mine.height
            yield re.sub(r"^data/|\.parquet$", "", shard), mine


def _numbered(sites: int) -> list[str]:
    width = len(str(sites))
    return [f"site-{number:0{width}d}" for number in range(1, sites + 1)]


def _order(ids: pl.Series, seed: int) -> pl.Series:
    """A random order of patients that follows from the seed and each id alone."""
    key = seed.to_bytes(16, "little", signed=True)
    digests = (hashlib.blake2b(str(one).encode(), key=key, digest_size=8).digest() for one in ids)
    return pl.Series([int.from_bytes(digest, "little") for digest in digests], dtype=pl.UInt64)


def _name(key: str, group: str | None) -> str:
    """A folder name; values of several words speak for themselves, others carry the prefix or column."""
    if group is None:
        return OTHER
    value = _slug(group)
    return value if "-" in value else _slug(f"{key}-{group}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-.")[:80] or _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
