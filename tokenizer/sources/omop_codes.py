"""OMOP concepts become codes: `<vocabulary>//<code>`, by the concept tables where the source has them.

A row names its meaning up to three times: a standard concept, the concept of the source's own code, and that code's
text. `Codes.resolve` takes the first that can be told, in the order that the site chose, and counts what could not.
"""

from collections import Counter
from typing import Literal

import numpy as np
import polars as pl

from tokenizer.sources.intake import Intake
from tokenizer.wording import several

Choice = Literal["standard", "source"]

_MEANING = ["concept_id", "source_concept_id", "source_value"]

# Names are kept only where one is shown as such: departments, destinations, races, visit types.
_NAMED_DOMAINS = ("Visit", "Place of Service", "Provider", "Provider Specialty", "Race", "Ethnicity", "Gender")
_LOCAL = 2_000_000_000


class Concepts:
    """What the concept tables of a source say; filled piece by piece, then `close`d.

    Of every concept the code is held, in about 50 bytes; names and units only of the few where they are asked for.

    Attributes:
        known: whether there is a concept table at all.
    """

    def __init__(self) -> None:
        self.known = False
        self._pieces = [pl.DataFrame(schema={"id": pl.Int64, "code": pl.String, "standard": pl.Boolean})]
        self._texts = {what: [pl.DataFrame(schema={"id": pl.Int64, what: pl.String})] for what in ("unit", "name")}
        self._map_pieces = [pl.DataFrame(schema={"id": pl.Int64, "target": pl.Int64})]

    def add(self, frame: pl.DataFrame) -> None:
        """Take rows of `concept`: concept_id int64, and texts."""
        self.known = True
        vocabulary, code = clean(pl.col("vocabulary_id")), clean(pl.col("concept_code"))
        named = pl.col("domain_id").is_in(_NAMED_DOMAINS) | (pl.col("concept_id") >= _LOCAL)
        concepts = frame.filter(pl.col("concept_id") != 0).select(
            id="concept_id",
            code=vocabulary + "//" + _dotted(vocabulary, code),
            standard=pl.col("standard_concept") == "S",
            unit=pl.when(vocabulary == "UCUM").then("concept_code"),
            name=pl.when(named).then(clean(pl.col("concept_name")).str.to_uppercase()),
        )
        self._pieces.append(concepts.select("id", "code", "standard").drop_nulls("code"))
        for what, pieces in self._texts.items():
            pieces.append(concepts.select("id", what).drop_nulls())

    def add_maps(self, frame: pl.DataFrame) -> None:
        """Take rows of `concept_relationship`: which concept maps to which standard one."""
        valid = pl.col("invalid_reason").is_null() & (pl.col("concept_id_1") != pl.col("concept_id_2"))
        chosen = frame.filter((pl.col("relationship_id") == "Maps to") & valid)
        self._map_pieces.append(chosen.select(id="concept_id_1", target="concept_id_2").drop_nulls())

    def close(self) -> None:
        """Order what was taken, for look-ups."""
        concepts = pl.concat(self._pieces).sort("id", maintain_order=True)
        self._concepts = concepts.filter((pl.col("id") != pl.col("id").shift()).fill_null(value=True))
        self._ids = self._concepts["id"].to_numpy()
        self._named = {
            what: pl.concat(pieces).unique("id", keep="first", maintain_order=True)
            for what, pieces in self._texts.items()
        }
        maps = pl.concat(self._map_pieces).unique().sort("id", "target")
        self._maps = maps.filter(pl.Series(self._place(maps["target"].to_numpy())[1], dtype=pl.Boolean))
        self._map_ids = self._maps["id"].to_numpy()
        self._pieces, self._map_pieces, self._texts = [], [], {}

    def own(self, ids: pl.Series) -> pl.DataFrame:
        """Id and code of known concepts, as they are."""
        return self._look_up(ids).select("id", "code")

    def standard(self, ids: pl.Series) -> pl.DataFrame:
        """Id and code of known concepts, in standard ones where a map says how; one concept may become several."""
        concepts = self._look_up(ids)
        other = concepts.filter(~pl.col("standard").fill_null(value=False))["id"].to_numpy()
        start, end = np.searchsorted(self._map_ids, other), np.searchsorted(self._map_ids, other, side="right")
        rows = np.concatenate([np.arange(a, b) for a, b in zip(start, end, strict=True)] or [np.zeros(0, np.int64)])
        pairs = self._maps[rows.astype(np.int64)]
        targets = self._look_up(pairs["target"]).select(target="id", code="code")
        mapped = pairs.join(targets, on="target").select("id", "code").sort("id", "code")
        return pl.concat([concepts.join(mapped, on="id", how="anti").select("id", "code"), mapped])

    def text(self, ids: pl.Series, what: Literal["unit", "name"]) -> pl.Series:
        """Unit (as UCUM writes it) or name (upper case) of each concept; null where nothing is known."""
        table = self._named[what]
        return ids.alias("id").to_frame().join(table, on="id", how="left", maintain_order="left")[what]

    def _look_up(self, ids: pl.Series) -> pl.DataFrame:
        """Rows of the concept table: id, code, standard; none for unknown ids."""
        at, known = self._place(ids.drop_nulls().unique().sort().to_numpy())
        return self._concepts[at[known]]

    def _place(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where ids stand in the concept table, int64 [N], and whether they do, bool [N]."""
        at = np.searchsorted(self._ids, ids)
        known = at < len(self._ids)
        known[known] = self._ids[at[known]] == ids[known]
        return at, known


class Codes:
    """Gives rows their codes.

    Args:
        concepts: what the concept tables say.
        choice: "standard": the standard concept first; "source": the concept of the source's own code first.
    """

    def __init__(self, concepts: Concepts, choice: Choice) -> None:
        self._concepts = concepts
        self._choice = choice
        self._fallbacks: Counter[tuple[str, str]] = Counter()

    def resolve(self, frame: pl.DataFrame, table: str, kind: str) -> pl.DataFrame:
        """Add the column `code`; a row whose concept maps to several standard ones becomes several.

        Args:
            frame: with `concept_id` and `source_concept_id`, int64 (0 and null: none), and `source_value`, text.
            table: for notes.
            kind: first part of codes that only the source knows.
        """
        # A table has millions of rows and thousands of meanings; texts are put together once for each of these.
        meanings = frame.group_by(_MEANING).agg(_rows=pl.len())
        coded = self._coded(meanings, table, kind).select(*_MEANING, "code")
        return frame.join(coded, on=_MEANING, how="left", nulls_equal=True, maintain_order="left_right")

    def _coded(self, meanings: pl.DataFrame, table: str, kind: str) -> pl.DataFrame:
        first, second = ("concept_id", "source_concept_id")[:: 1 if self._choice == "standard" else -1]
        key = {name: pl.when(pl.col(name) != 0).then(pl.col(name)) for name in (first, second)}
        keyed = meanings.with_columns(key[first].alias("_first"), key[second].alias("_second"))
        found = {
            "_first": self._concepts.own(keyed["_first"])
            if self._choice == "source"
            else self._concepts.standard(keyed["_first"]),
            "_second": self._concepts.standard(keyed["_second"]),
        }
        value = pl.lit(f"{kind}//") + clean(pl.col("source_value"))
        numbers = [_numbered("_first"), _numbered("_second")]
        rest = [*numbers, value] if self._choice == "standard" else [value, *numbers]
        joined = keyed.with_columns(self._key(found)).join(
            pl.concat([table.with_columns(_by=pl.lit(by)) for by, table in found.items()]),
            left_on=["_id", "_by"],
            right_on=["id", "_by"],
            how="left",
            maintain_order="left_right",
        )
        fallback = joined.with_columns(_rest=pl.coalesce(*rest, pl.lit(f"{kind}//UNMAPPED")))
        self._count(fallback.filter(pl.col("code").is_null()), table, kind)
        return fallback.with_columns(code=pl.coalesce("code", "_rest"))

    def answers(self, ids: pl.Series) -> pl.Series:
        """Codes of concepts that are answers; null for 0 and null."""
        some = ids.set(ids == 0, None).alias("id")
        distinct = some.unique().drop_nulls()
        table = distinct.to_frame().join(self._concepts.own(distinct), on="id", how="left")
        coded = table.with_columns(pl.coalesce("code", pl.lit("OMOP//") + pl.col("id").cast(pl.String)).alias("code"))
        return some.to_frame().join(coded, on="id", how="left", maintain_order="left")["code"]

    def units(self, ids: pl.Series, texts: pl.Series) -> pl.Series:
        """Units as UCUM writes them where the concept says it, else as the source does."""
        some = ids.set(ids == 0, None)
        table = pl.DataFrame([self._concepts.text(some, "unit").alias("unit"), texts.alias("text")])
        return (
            table.with_columns(self.answers(some).alias("other"))
            .select(pl.coalesce("unit", "text", "other").alias("unit"))
            .to_series()
        )

    def names(self, ids: pl.Series) -> pl.Series:
        """Names of concepts, in upper case; null for 0, null and what the concept table lacks."""
        return self._concepts.text(ids, "name")

    def note(self, intake: Intake) -> None:
        """Say in the flow's notes what could not be told."""
        if not self._concepts.known:
            intake.note(
                "There is no concept table: codes are OMOP//<concept_id>, or the source's own where it has none."
            )
        for (table, what), count in sorted(self._fallbacks.items()):
            intake.note(f"{table}: {several(count, 'row')} {what}.")

    def _key(self, found: dict[str, pl.DataFrame]) -> list[pl.Expr]:
        has = {by: pl.col(by).is_in(table["id"].implode()).fill_null(value=False) for by, table in found.items()}
        second = pl.col("_second")
        if self._choice == "source":
            # The source's own text is nearer to what was asked for than the concept that somebody made of it.
            has["_second"] &= pl.col("source_value").is_null()
        else:
            # A standard concept speaks everywhere, even by its number alone; a site's own concept speaks only there.
            has["_second"] &= (second < _LOCAL) | ~(pl.col("_first") < _LOCAL).fill_null(value=False)
        return [
            pl.when(has["_first"]).then("_first").when(has["_second"]).then("_second").alias("_id"),
            pl.when(has["_first"]).then(pl.lit("_first")).otherwise(pl.lit("_second")).alias("_by"),
        ]

    def _count(self, rest: pl.DataFrame, table: str, kind: str) -> None:
        numbered = pl.col("_rest").str.starts_with("OMOP//")
        unmapped = pl.col("_rest") == f"{kind}//UNMAPPED"
        for what, which in (
            ("with a concept that the concept table lacks (OMOP//<concept_id>)", numbered),
            ("with neither a concept nor a code (UNMAPPED)", unmapped),
            ("without a concept that is known, only the source's code", ~numbered & ~unmapped),
        ):
            if count := int(rest.filter(which)["_rows"].sum()):
                self._fallbacks[table, what] += count


def clean(text: pl.Expr) -> pl.Expr:
    """A text that may be part of a code: `//` parts codes, so it can't stand inside of one; empty is null."""
    bare = text.str.replace_all(r"/{2,}", "/").str.strip_chars(" /")
    return pl.when(bare != "").then(bare)


def _numbered(column: str) -> pl.Expr:
    # A concept that a site made for itself says nothing elsewhere; its text says more.
    speaks = (pl.col(column) < _LOCAL) | pl.col("source_value").is_null()
    return pl.when(speaks).then(pl.lit("OMOP//") + pl.col(column).cast(pl.String))


def _dotted(vocabulary: pl.Expr, code: pl.Expr) -> pl.Expr:
    """ICD codes in upper case and with their dot, however the vocabulary was loaded."""
    upper = code.str.to_uppercase()
    procedure = vocabulary == "ICD9Proc"
    external = (vocabulary == "ICD9CM") & upper.str.starts_with("E")
    # ICD-9-CM's external causes have four characters before the dot, its procedures two, all others three.
    size = pl.when(procedure).then(2).when(external).then(4).otherwise(3)
    bare = vocabulary.is_in(["ICD10CM", "ICD9CM", "ICD9Proc"]) & ~upper.str.contains(r"[.-]")
    dotted = upper.str.slice(0, size) + "." + upper.str.slice(size)
    return (
        pl.when(bare & (upper.str.len_chars() > size))
        .then(dotted)
        .when(vocabulary.str.starts_with("ICD"))
        .then(upper)
        .otherwise(code)
    )
