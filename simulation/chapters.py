"""The chapters of ICD-10-CM, from the ranges in its tabular list (CMS): `I00-I99` is `9`, the circulatory system."""

import polars as pl

_FIRSTS = (
    ("A00", "1 infections"),
    ("C00", "2 neoplasms"),
    ("D50", "3 blood"),
    ("E00", "4 endocrine"),
    ("F01", "5 mental"),
    ("G00", "6 nervous"),
    ("H00", "7 eye"),
    ("H60", "8 ear"),
    ("I00", "9 circulatory"),
    ("J00", "10 respiratory"),
    ("K00", "11 digestive"),
    ("L00", "12 skin"),
    ("M00", "13 musculoskeletal"),
    ("N00", "14 genitourinary"),
    ("O00", "15 pregnancy"),
    ("P00", "16 perinatal"),
    ("Q00", "17 congenital"),
    ("R00", "18 symptoms"),
    ("S00", "19 injury"),
    ("U00", "22 special purposes"),
    ("V00", "20 external causes"),
    ("Z00", "21 contacts"),
)
"""The first category of each chapter, in the order of categories; a chapter ends where the next begins."""


def chapter(code: pl.Expr) -> pl.Expr:
    """Give the chapter of ICD-10-CM codes (with or without dot), null where there is no category.

    >>> pl.DataFrame({"c": ["I50.9", "D49", "D509", "250.00"]}).select(chapter(pl.col("c")))["c"].to_list()
    ['9 circulatory', '2 neoplasms', '3 blood', None]
    """
    category = code.str.to_uppercase().str.slice(0, 3)
    found = pl.lit(None, pl.String)
    for first, name in _FIRSTS:
        found = pl.when(category >= first).then(pl.lit(name)).otherwise(found)
    return pl.when(category.str.contains(r"^[A-Z]\d[0-9A-Z]$")).then(found)
