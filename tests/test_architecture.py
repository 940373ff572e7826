"""docs/architecture.md names every module with its one reason to exist, in the words of its docstring."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DOCUMENT = REPOSITORY / "docs" / "architecture.md"
ROOMS = ("tokenizer", "model", "federation", "client", "server", "simulation")
_BEGIN, _END = "## Modules\n", "## Contracts\n"


def modules(room: str) -> dict[str, str]:
    """The modules of a folder, also in folders below, each with the first line of its docstring."""
    found = {}
    for path in sorted((REPOSITORY / room).rglob("*.py")):
        if path.name != "__init__.py" and not path.name.endswith("_pb2.py"):  # made from control.proto
            reason = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert reason, path
            found[str(path.relative_to(REPOSITORY / room).with_suffix(""))] = reason.partition("\n")[0]
    return found


def section() -> str:
    """What stands between two headings: a table for each folder."""
    tables = []
    for room in ROOMS:
        rows = [f"| `{name}` | {reason.replace('|', chr(92) + '|')} |\n" for name, reason in modules(room).items()]
        tables.append(f"### `{room}/`\n\n| module | one reason to exist |\n|---|---|\n{''.join(rows)}")
    return f"{_BEGIN}\n" + "\n".join(tables) + "\n"


def test_every_module_is_named_with_its_reason() -> None:
    """`python -m tests.test_architecture` writes the tables anew."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text[text.index(_BEGIN) : text.index(_END)] == section()


def test_what_is_named_elsewhere_in_the_document_exists() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for name in re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w/]*\.py)`", text):
        assert (REPOSITORY / name).exists(), name


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(_BEGIN)
    DOCUMENT.write_text(before + section() + _END + rest.partition(_END)[2], encoding="utf-8")
