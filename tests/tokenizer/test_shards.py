"""Who works on the pieces makes no difference to what comes out."""

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.tokenizer import jobs
from tests.tokenizer.hospital import stays
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.errors import ConfigError, DataError
from tokenizer.events import MedsDataset, write_meds
from tokenizer.shards import SMALL_EVENTS, WORKER_BYTES, Crew, each
from tokenizer.split import SplitRule
from tokenizer.store import build_store
from tokenizer.survey import survey
from tokenizer.workers import WorkerDied

RULE = SplitRule("key")
ALONE, THREADS, TWO = Crew(1), Crew(), Crew(2)


@pytest.fixture
def site(tmp_path):
    shards = {"a": stays(range(60)), "b": stays(range(60, 100), 1, lab="LAB//RARE//x"), "c": stays(range(100, 101))}
    write_meds(tmp_path / "meds", shards.items(), name="site")
    return MedsDataset.open(tmp_path / "meds", piece_events=200)


def files(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def listed(function, work, crew):
    with closing(each(function, work, crew, events=10, what="the test")) as results:
        return list(results)


def test_stores_are_byte_identical_whoever_builds_them(site, tmp_path):
    assert len(site.pieces) > 8
    book = Codebook.build(survey(site, RULE, TokenizerOptions(min_patients=40)))
    alone = build_store(site, book, RULE, tmp_path / "alone", crew=ALONE)
    told: list[tuple[int, int]] = []
    together = build_store(
        site, book, RULE, tmp_path / "together", lambda done, total: told.append((done, total)), crew=TWO
    )
    threaded = build_store(site, book, RULE, tmp_path / "threaded", crew=THREADS)
    assert files(together.path) == files(threaded.path) == files(alone.path)
    assert told == [(done, len(site.pieces)) for done in range(1, len(site.pieces) + 1)]


def test_surveys_are_byte_identical_whoever_takes_them(site, tmp_path):
    options = TokenizerOptions(min_patients=7)
    whole = MedsDataset.open(site.path)
    assert len(whole.pieces) == 3
    taken = [survey(site, RULE, options, crew=crew).to_bytes() for crew in (ALONE, THREADS, TWO)]
    assert taken == [survey(whole, RULE, options, crew=ALONE).to_bytes()] * 3


def test_results_come_in_the_order_of_the_jobs():
    work = [(number,) for number in range(20)]
    for crew in (ALONE, THREADS, TWO):
        assert listed(jobs.double, work, crew) == [2 * number for number in range(20)]
        assert listed(jobs.double, [], crew) == []


def test_what_a_job_raises_comes_through_and_nothing_is_left(site, tmp_path):
    book = Codebook.build(survey(site, RULE, TokenizerOptions(min_patients=40)))
    damaged = site.path / site.shards[1]
    damaged.write_bytes(damaged.read_bytes()[:-50])
    for crew in (ALONE, THREADS, TWO):
        with pytest.raises(DataError, match=r"b\.parquet: not a readable parquet file"):
            build_store(site, book, RULE, tmp_path / "store", crew=crew)
    assert not list(tmp_path.glob("store*"))


def test_a_worker_that_dies_is_told_with_what_to_do():
    with pytest.raises(WorkerDied, match=r"the test ended with code -9.*If memory ran out, use fewer workers"):
        listed(jobs.end_this_process, [(), ()], TWO)


def test_little_work_starts_no_process_and_much_takes_the_cores_that_memory_allows():
    cores = len(os.sched_getaffinity(0))
    assert Crew().processes(100, SMALL_EVENTS - 1) == 1
    assert 1 <= Crew().processes(100, SMALL_EVENTS) <= cores
    assert Crew().processes(1, 10**9) == 1
    assert Crew(3).processes(100, 10) == 3
    assert Crew(3).processes(2, 10) == 2
    assert Crew(1).processes(100, 10**9) == 1
    assert WORKER_BYTES > 0


def test_a_worker_starts_no_workers():
    assert listed(jobs.processes_of_a_crew, [(10**9,), (10**9,)], TWO) == [1, 1]


def test_impossible_crews_are_refused():
    with pytest.raises(ConfigError, match="0 workers"):
        Crew(0)
    with pytest.raises(ConfigError, match="not both"):
        Crew(2, "auto")


def test_a_missing_ray_says_what_to_install():
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "from tokenizer.shards import Crew, each\n"
        "try:\n    next(each(print, [()], Crew(ray='auto'), events=1, what='x'))\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "ConfigError Ray is not installed here; `pip install 'fedcomet[ray]'` does that.\n"


RAY = """
import sys
from contextlib import closing
from pathlib import Path
from tests.tokenizer import jobs
from tokenizer.codebook import Codebook
from tokenizer.events import MedsDataset
from tokenizer.shards import Crew, each
from tokenizer.split import SplitRule
from tokenizer.store import build_store
root, crew = Path(sys.argv[1]), Crew(ray="local")
site = MedsDataset.open(root / "meds", piece_events=200)
build_store(site, Codebook.load(root / "codebook.json"), SplitRule("key"), root / "ray", crew=crew)
for wrong in ((jobs.fail, ("no such shard",), crew), (jobs.double, (1,), Crew(ray="auto"))):
    try:
        list(each(wrong[0], [wrong[1]], wrong[2], events=1, what="the test"))
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_a_store_that_a_ray_cluster_builds_is_the_same_to_the_byte(site, tmp_path):
    """In a process of its own: Ray ends the process that started it when the cluster is lost."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'fedcomet[ray]'")
    book = Codebook.build(survey(site, RULE, TokenizerOptions(min_patients=40)))
    book.save(tmp_path / "codebook.json")
    alone = build_store(site, book, RULE, tmp_path / "alone", crew=ALONE)
    done = subprocess.run(
        [sys.executable, "-c", RAY, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "ray") == files(alone.path)
    failed, missing = done.stdout.splitlines()
    assert failed == "ValueError no such shard"
    assert missing.startswith("ConfigError Ray at 'auto': ")
    assert missing.endswith("Start it, or check the address.")
