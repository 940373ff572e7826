"""Files that are whole or not there, whoever else writes, and whatever was killed while it wrote."""

import os
import subprocess
import sys
import threading
from pathlib import Path

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


def test_what_a_killed_writer_left_is_swept_by_the_next_one_or_with_the_folder(tmp_path: Path) -> None:
    head, other = tmp_path / "head.json", tmp_path / "head.json.old"
    killed(head)
    killed(other)
    (tmp_path / f"head.json.{os.getpid()}.1.partial").write_text("of a process that had this number")
    (tmp_path / "records.partial").write_text("nobody's of ours")
    durable.write_bytes(head, b"new")
    assert [path.name for path in tmp_path.glob("head.json.[0-9]*")] == []
    assert len(list(tmp_path.glob("head.json.old.*.partial"))) == 1
    durable.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"head.json", "head.json.old", "records.partial"}


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
