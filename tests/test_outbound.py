"""Claims about what leaves a site, checked against docs/privacy.md."""

import dataclasses
import re
from pathlib import Path

from federation import messages

LISTED = Path(__file__).parents[1] / "docs" / "privacy.md"


def fields_of_all_answers() -> set[str]:
    return {
        f"{answer.__name__}.{field.name}" for answer in messages.Reply.__args__ for field in dataclasses.fields(answer)
    }


def test_the_list_of_what_leaves_a_site_names_every_field_of_every_answer_and_nothing_else() -> None:
    listed = re.findall(r"^\| `(\w+\.\w+)` \|", LISTED.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == fields_of_all_answers()
