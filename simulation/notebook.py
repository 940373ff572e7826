"""For notebooks: a dataset, its sites, a federation of them, and results as polars data frames.

    import simulation

    data = simulation.Dataset.synthetic("general-lifelike", 300, "work/data", seed=1)
    sites = data.partition("work/sites", by="chapters", prefixes=("DIAGNOSIS//ICD10CM",), sites=3)
    results = sites.federation("work/run", rounds=3, local_steps=20).run()
    results.rounds

Thin: each step is what a study does (`simulation.study`), with a study's settings, and leaves the same files. The same
call on the same folder goes on where it stopped. For questions, arms and reports write a study file.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from client.files import SiteFiles
from server.app import Outcome
from server.journal import Journal
from server.plan import FederationPlan
from server.rounds import Event
from simulation.contrast import SiteSummary, contrast, divergences
from simulation.engine import run_federation
from simulation.hospital import profile_of, write_hospital
from simulation.partition import partition, rule_of
from simulation.plans import training_plan
from simulation.pool import Pool
from simulation.scenario import Scenario
from tokenizer.events import MedsDataset

Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Dataset:
    """A MEDS dataset; `truth` are the true risks of synthetic patients, None for others."""

    path: Path
    truth: pl.DataFrame | None = None

    @classmethod
    def open(cls, path: Path | str) -> "Dataset":
        """Open a MEDS dataset.

        Raises:
            DataError: there is none.
        """
        return cls(MedsDataset.open(Path(path)).path)

    @classmethod
    def synthetic(cls, hospital: str, patients: int, folder: Path | str, *, seed: int = 0) -> "Dataset":
        """Make up a hospital (a name of `simulation.hospital.profile_of`) in a folder.

        Raises:
            ConfigError: an unknown hospital, or a negative number of patients.
        """
        files = write_hospital(Path(folder), profile_of(hospital), patients, seed)
        return cls(files.records, pl.read_parquet(files.truth))

    def events(self) -> pl.DataFrame:
        """Give all events: subject_id, time, code, numeric_value."""
        dataset = MedsDataset.open(self.path)
        return pl.concat([dataset.read(shard) for shard in dataset.shards])

    def partition(self, folder: Path | str, *, by: str, seed: int = 0, **rule: Any) -> "Sites":
        """Split it into sites; see `simulation.config.Partition` for what `by` may be and what else it needs.

        Raises:
            ConfigError: a wrong rule.
            DataError: the dataset can't be split by it.
        """
        parts = partition(MedsDataset.open(self.path), rule_of(by=by, **rule), Path(folder), seed=seed)
        return Sites({site.name: site.path for site in parts.sites})


@dataclass(frozen=True)
class Sites:
    """MEDS datasets by the name of their site."""

    paths: dict[str, Path]

    @classmethod
    def of(cls, **datasets: Dataset) -> "Sites":
        """Take datasets as sites."""
        return cls({name: dataset.path for name, dataset in datasets.items()})

    def summaries(self) -> list[SiteSummary]:
        """Look at the records of every site."""
        return contrast(self.paths)

    def summary(self) -> pl.DataFrame:
        """Give one row per site: site, patients, events, deaths, codes (how many different ones)."""
        return pl.DataFrame(
            [
                {"site": s.name, "patients": s.patients, "events": s.events, "deaths": s.deaths, "codes": len(s.codes)}
                for s in self.summaries()
            ]
        )

    def distances(self) -> pl.DataFrame:
        """Give the Jensen-Shannon divergence of each two sites' codes, in bits: site, other, bits."""
        found = self.summaries()
        return pl.DataFrame(
            [
                {"site": one.name, "other": other.name, "bits": bits}
                for one, row in zip(found, divergences(found), strict=True)
                for other, bits in zip(found, row, strict=True)
            ]
        )

    def federation(self, folder: Path | str, *, seed: int = 0, context: int = 512, **training: Any) -> "Federation":
        """Plan a federation of these sites.

        Args:
            folder: of the run and of what its sites keep.
            seed: of the run.
            context: tokens of the longest window.
            training: `rounds`, `local_steps` or `local_epochs`, and all else of `simulation.config.Training`.

        Raises:
            ConfigError: a wrong setting.
        """
        home = Path(folder)
        files = [SiteFiles(name, path, home / "state" / name) for name, path in sorted(self.paths.items())]
        return Federation(home, tuple(files), training_plan(home.name, seed, context, training))


@dataclass(frozen=True)
class Federation:
    """A planned run: its folder, its sites, and all of its settings."""

    folder: Path
    sites: tuple[SiteFiles, ...]
    plan: FederationPlan

    def with_plan(self, **changes: Any) -> "Federation":
        """Change settings of the plan (`server.plan.FederationPlan`)."""
        return replace(self, plan=replace(self.plan, **changes))

    def run(
        self, *, workers: int | None = None, scenario: Scenario | None = None, listen: Sequence[Listener] = ()
    ) -> "Results":
        """Train to the end, on this machine.

        Args:
            workers: processes that play sites; as many as there are cores when not given.
            scenario: what goes wrong.
            listen: told of every step, such as `simulation.trackers`.

        Raises:
            FedcometError: see `server.app.coordinate`.
        """

        def tell(event: Event) -> None:
            for each in listen:
                each(event)

        with Pool(workers) as pool:
            outcome = run_federation(self.plan, self.sites, self.folder / "run", pool, tell, scenario)
        return Results(self.folder / "run", outcome)


@dataclass(frozen=True)
class Results:
    """A finished run; data frames come from its ledger."""

    folder: Path
    outcome: Outcome

    @property
    def updates(self) -> pl.DataFrame:
        """One row per round and site: round, site, status, reason, tokens, steps, loss, norm, bytes, seconds."""
        with Journal(self.folder / "ledger.sqlite") as journal:
            rows = [asdict(entry) for n in range(1, journal.committed() + 1) for entry in journal.replies(n)]
        frame = pl.DataFrame(rows, infer_schema_length=None).with_columns(pl.col("status").cast(pl.String))
        return frame.drop("update_sha256").sort("round", "site")

    @property
    def rounds(self) -> pl.DataFrame:
        """One row per round: round, accepted, tokens, bytes, loss (of tuning patients, nats a token; null: untold)."""
        with Journal(self.folder / "ledger.sqlite") as journal:
            losses = journal.losses("tuning")
        good = pl.col("status") == "accepted"
        told = pl.DataFrame(
            {"round": list(losses), "loss": list(losses.values())}, schema={"round": pl.Int64, "loss": pl.Float64}
        )
        return (
            self.updates.group_by("round")
            .agg(
                accepted=good.sum(),
                tokens=pl.col("tokens").filter(good).sum(),
                bytes=pl.col("bytes").filter(good).sum(),
            )
            .join(told, on="round", how="left")
            .sort("round")
        )
