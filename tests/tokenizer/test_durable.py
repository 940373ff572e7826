"""Files that are whole or not there, whoever else writes, and whatever was killed while it wrote."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tokenizer import durable


def killed(path: Path) -> None:
    """Let a process be killed while it writes a file."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom tokenizer import durable\n"
        "with durable.file(Path(sys.argv[1])) as aside:\n"
        "    aside.write_text('half')\n    print(flush=True)\n    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            durable.write_bytes(path, b"whole")
            assert list(path.parent.glob(f"{path.name}.{process.pid}.*.partial"))  # while it lives it is left alone
        finally:
            process.kill()


def test_what_killed_writers_left_is_swept_by_the_next_process_that_writes_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, other = tmp_path / "head.json", tmp_path / "head.json.old"
    killed(head)
    assert len(list(tmp_path.iterdir())) == 2
    killed(other)
    assert len(list(tmp_path.iterdir())) == 3, "the second process has swept what the first one left"
    (tmp_path / f"head.json.{os.getpid()}.1.partial").write_text("of a process that had this number")
    (tmp_path / "records.partial").write_text("nobody's of ours")
    left = {"head.json", "head.json.old", "records.partial"}
    durable.write_bytes(head, b"new")
    assert len({path.name for path in tmp_path.iterdir()} - left) == 2, "this one has looked before"
    monkeypatch.setattr(durable, "_SWEPT", set())  # as another process
    durable.write_bytes(head, b"newer")
    assert {path.name for path in tmp_path.iterdir()} == left


def test_threads_that_write_the_same_file_at_once_do_not_meet(tmp_path: Path) -> None:
    path, both, problems = tmp_path / "plan.json", threading.Barrier(2, timeout=20), list[BaseException]()

    def write() -> None:
        try:
            with durable.file(path) as aside:
                aside.write_bytes(b"the plan")
                both.wait()
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]
    assert path.read_bytes() == b"the plan"
