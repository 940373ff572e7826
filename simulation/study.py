"""A study: make or split the records, train every arm, put the same questions to all of them.

Everything lies under one folder, and the same call on the same folder goes on where the last one stopped:
`study.json`, `records/<site>/`, `state/<site>/`, `pooled/`, `arms/<arm>/` (a run directory of `server.app` each),
`model/` (the federation's) and `answers/`.
"""

import fcntl
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from client.files import SiteFiles
from model.settings import Machine
from server.futures import Model
from simulation.arms import Arm, shards_of, train
from simulation.baselines import check_installed
from simulation.config import Study
from simulation.hospital import PROFILES, profile_of, write_hospital
from simulation.partition import partition, told
from simulation.pool import Pool
from simulation.questions import Answers, answer
from tokenizer import durable
from tokenizer.errors import ConfigError
from tokenizer.events import MedsDataset, write_meds
from tokenizer.progress import Step, Watch

PoolFor = Callable[[tuple[SiteFiles, ...]], Pool]


@dataclass(frozen=True)
class Result:
    """What a finished study knows; `simulation.findings` turns it into a report."""

    study: Study
    folder: Path
    sites: tuple[SiteFiles, ...]
    arms: tuple[Arm, ...]
    answers: tuple[Answers, ...]
    notes: tuple[str, ...] = ()


def run_study(
    study: Study,
    folder: Path,
    *,
    workers: int | None = None,
    watch: Watch = lambda step: None,
    pool: PoolFor | None = None,
    ask: bool = True,
) -> Result:
    """Run a study to its end; after a crash or a kill, the same call goes on where it stopped.

    Args:
        study: what to do.
        folder: where all of it lies.
        workers: processes that play sites and roll out; as many as there are cores when not given.
        watch: told how far the work is, from any thread.
        pool: gives the pool that plays these sites, and stays open; without, the study has one of its own.
        ask: whether the questions are put to the arms.

    Raises:
        ConfigError: the folder is in use, or belongs to another study; questions to a model without a head; or the arm
            "supervised" without scikit-learn.
        FedcometError: records can't be read, or the federation can't go on.
    """
    if ask and study.training.own_head:
        raise ConfigError("training.own_head: the federation's model has no head to answer with; compare losses only")
    if ask and "supervised" in study.arms:
        check_installed()
    with _claimed(folder, study):
        sites, notes = _sites(study, folder, watch)
        with Pool(workers) if pool is None else nullcontext(pool(sites)) as players:
            arms = train(study, sites, folder, players, watch)
            _release(arms, folder)
            answers = answer(study, sites, arms, folder, players, watch) if ask else ()
        return Result(study, folder, sites, arms, answers, notes)


def _release(arms: tuple[Arm, ...], folder: Path) -> None:
    """Lay the federation's model and its codebook where people look for them."""
    outcome = arms[0].outcome
    if outcome is not None and not (folder / "model").exists():
        Model(outcome.best_checkpoint, outcome.codebook).save(folder / "model")


@contextmanager
def _claimed(folder: Path, study: Study) -> Iterator[None]:
    """Hold the folder for this process and this study."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{folder}: another process is working here; wait for it, or take another --out"
            ) from None
        known = folder / "study.json"
        mine = study.model_dump(mode="json")
        if known.exists():
            other = json.loads(known.read_bytes())
            if changed := sorted(key for key in {*mine, *other} if mine.get(key) != other.get(key)):
                raise ConfigError(
                    f"{folder} holds a study with other settings ({', '.join(changed)}); take another --out, "
                    "or remove the folder to begin anew"
                )
        else:
            durable.write_bytes(known, json.dumps(mine, indent=1, sort_keys=True).encode())
        yield


def _sites(study: Study, folder: Path, watch: Watch) -> tuple[tuple[SiteFiles, ...], tuple[str, ...]]:
    """Give every site its records."""
    data, home = study.data, folder / "records"
    notes: tuple[str, ...] = ()
    if data.kind == "sites":
        records = dict(data.sites)
    elif data.kind == "synthetic":
        records = {}
        names = data.hospitals or tuple(PROFILES)
        profiles = [profile_of(name) for name in names]
        for done, (name, profile) in enumerate(zip(names, profiles, strict=True), 1):
            records[name] = home / name / "records"
            if not (home / name / "truth.parquet").exists():
                write_hospital(home / name, profile, data.patients, study.seed)
            watch(Step("records", done, len(names), f"{name}: {data.patients} patients"))
        if data.partition is not None:
            mixed = _mixed(records, home)
            parts = partition(MedsDataset.open(mixed), data.partition, home / "sites", seed=study.seed)
            records = {site.name: site.path for site in parts.sites}
            notes = told(parts, data.partition.by)
    else:
        if data.path is None or data.partition is None:
            raise ConfigError("data.path and [data.partition] are needed to split a dataset")
        parts = partition(
            MedsDataset.open(data.path),
            data.partition,
            home,
            seed=study.seed,
            progress=lambda done, total: watch(Step("records", done, total)),
        )
        records = {site.name: site.path for site in parts.sites}
        notes = told(parts, data.partition.by)
    # Devices are handed out in turn, so that sites which are played at the same time seldom share one.
    devices = study.engine.devices or ("cpu",)
    machines = (Machine(device=device) for device in itertools.cycle(devices))
    return tuple(
        SiteFiles(name, records[name], folder / "state" / name, machine=machine)
        for name, machine in zip(sorted(records), machines, strict=False)
    ), notes


def _mixed(records: Mapping[str, Path], home: Path) -> Path:
    """Put made-up hospitals' patients in one dataset, to be split anew; their true risks go where the sites will be."""
    mixed = home / "mixed"
    if not mixed.exists():
        (home / "sites").mkdir(exist_ok=True)
        truth = pl.concat([pl.read_parquet(path.parent / "truth.parquet") for path in records.values()])
        buffer = io.BytesIO()
        truth.write_parquet(buffer)
        durable.write_bytes(home / "sites" / "truth.parquet", buffer.getvalue())
        write_meds(mixed, shards_of(records), name="the patients of all hospitals")
    return mixed
