"""Fill a folder with all wheels that fedcomet needs, for machines without a network (docs/deploy.md).

Run it with the Python version and on the kind of machine (system, processor) that will install from the folder. What is
pinned in requirements.lock is fetched or built, fedcomet is built from this source, and two files are written beside:

    requirements.txt   every wheel's name, version and sha256, for `pip install --require-hashes`
    SHA256SUMS         of every file, requirements.txt included: carry its own sha256 by another way than the folder
"""

import hashlib
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).parents[1]
_WHEEL = re.compile(r"(?P<name>[^-]+)-(?P<version>[^-]+)(-\d[^-]*)?-[^-]+-[^-]+-[^-]+\.whl")


def fill(folder: Path, lock: Path, more: Sequence[str]) -> None:
    """Fetch and build the wheels; `more` goes to pip: requirements, `--extra-index-url` for another torch."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    wheel = (*pip, "wheel", "--quiet", "--wheel-dir", str(folder), *more)
    subprocess.run([*wheel, "--requirement", str(lock)], check=True)
    subprocess.run([*wheel, "--no-deps", str(SOURCE)], check=True)


def requirements(folder: Path) -> str:
    """Give the lines of requirements.txt for the wheels in a folder.

    Raises:
        SystemExit: a file is no wheel, or a project has two.
    """
    lines: dict[str, str] = {}
    for path in sorted(folder.glob("*.whl")):
        parts = _WHEEL.fullmatch(path.name)
        if parts is None:
            raise SystemExit(f"{path} is not named as wheels are; remove it.")
        name = parts["name"].replace("_", "-").lower()
        if name in lines:
            raise SystemExit(f"{folder} has two wheels of {name}; begin with an empty folder.")
        lines[name] = f"{name}=={parts['version']} --hash=sha256:{_sha256(path)}\n"
    return "".join(lines.values())


def sums(folder: Path) -> str:
    """Give the lines of SHA256SUMS, as `sha256sum --check` reads them."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != "SHA256SUMS"]
    return "".join(f"{_sha256(path)}  {path.name}\n" for path in paths)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str]) -> None:
    """Fill the folder that is named, and say what to carry over."""
    if not arguments:
        raise SystemExit("usage: python deploy/wheelhouse.py FOLDER [pip's options]")
    folder = Path(arguments[0])
    fill(folder, SOURCE / "requirements.lock", arguments[1:])
    (folder / "requirements.txt").write_text(requirements(folder), encoding="utf-8")
    (folder / "SHA256SUMS").write_text(sums(folder), encoding="utf-8")
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels; sha256 of SHA256SUMS: {_sha256(folder / 'SHA256SUMS')}")


if __name__ == "__main__":
    main(sys.argv[1:])
