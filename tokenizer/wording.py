"""Counts as people write them."""


def several(count: int, one: str, more: str = "") -> str:
    """A count with what is counted; `more` is the plural where an s isn't all.

    >>> several(1, "row"), several(1200, "row"), several(2, "row was", "rows were")
    ('1 row', '1,200 rows', '2 rows were')
    """
    return f"{count:,} {one if count == 1 else more or f'{one}s'}"
