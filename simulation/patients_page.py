"""A few of a study's made-up patients beside what the federation's model believes may come, as a page to look at.

Only where the study's records are synthetic: a page of real ones is written when somebody asks (`fedcomet view`).
"""

from pathlib import Path

from client.archive import Archive
from server.futures import Model
from server.lifeline_page import write_page
from server.lifelines import lifelines
from simulation.study import Result
from tokenizer.errors import DataError
from tokenizer.store import TokenStore

PAGE = "patients.html"
_TRAJECTORIES = 64


def write_patients(result: Result) -> Path | None:
    """Write `patients.html` into the folder of a study of synthetic hospitals.

    Returns:
        The page, or nothing where the records may be real, where it can't be had, or where it lies already.
    """
    study, outcome, path = result.study, result.arms[0].outcome, result.folder / PAGE
    if study.data.kind != "synthetic" or outcome is None or path.exists():
        return path if path.exists() else None
    asked = tuple(task for task in study.task if not task.given)
    for site in result.sites:
        archive = Archive(site.state)
        if (agreement := archive.run(outcome.manifest.hash).agreement()) is None:
            continue
        store = TokenStore.open(archive.store_path(agreement.store), outcome.manifest.codebook_hash)
        try:
            books = lifelines(
                Model(outcome.best_checkpoint, outcome.codebook),
                store,
                asked,
                trajectories=min(_TRAJECTORIES, study.evaluation.trajectories),
                max_tokens=study.evaluation.max_tokens,
                seed=study.seed,
            )
        except DataError:
            continue  # nobody to ask about at this site
        write_page(path, books, f"{study.title or study.name}: patients of {site.name}", made_up=True)
        return path
    return None
