"""Supervised models on the same patients: what a question gets without a generative model, from one table of features.

Features of a prediction come from its prompt alone, the tokens that rollouts begin with, so nothing dated after the
prediction can be in them: how often each code was recorded, its last value, the days since it was last seen, how much
there is, and how old the patient is. Logistic regression and gradient boosting are trained on the train patients, at
each site alone and pooled; the strength of both is chosen on tuning patients; held-out ones are only predicted.
"""

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.cohort import Cohort, cohort
from model.tasks import Task
from tokenizer.codebook import Codebook
from tokenizer.encode import decode
from tokenizer.errors import ConfigError
from tokenizer.store import TokenStore

Floats = NDArray[np.float64]

LOGISTIC, BOOSTING = "logistic regression", "gradient boosting"
METHOD = 1
"""Of features and models; counts up when either changes, so that answers that were kept are not taken for new ones."""

FEWEST = 10
"""Of each answer, among the train patients: with fewer nothing is trained."""

_DAY_US = 86_400e6
_STRENGTHS = (0.003, 0.03, 0.3)
_TREES = (30, 100, 200)


@dataclass(frozen=True)
class Features:
    """What is told of each prediction: float64 [P, F] by name; a value or time that isn't known is nan."""

    names: tuple[str, ...]
    table: Floats


Events = Sequence[tuple[str, int | None, float | None]]
"""Of a prompt: code, time in microseconds, value."""


def read(asked: Cohort, codebook: Codebook) -> list[Events]:
    """Give the events of each prompt of a cohort; it takes milliseconds a prompt, so read a cohort once."""
    found: list[Events] = []
    for prompt in asked.prompts:
        events = decode(prompt.tokens, codebook)
        columns = (events["code"], events["time"].to_physical(), events["numeric_value"])
        found.append(list(zip(*(column.to_list() for column in columns), strict=True)))
    return found


def features(
    asked: Cohort, codebook: Codebook, codes: Sequence[str], known: Sequence[Events] | None = None
) -> Features:
    """Make the features of a cohort's predictions.

    Args:
        asked: whose prompts are read.
        codebook: the one that wrote them.
        codes: that have columns of their own; choose them on train patients.
        known: what `read` gave of the cohort, if it was read.
    """
    place, width = {code: column for column, code in enumerate(codes)}, len(codes)
    table = np.full((len(asked), 3 * width + 3), np.nan)
    table[:, :width] = 0.0
    known = read(asked, codebook) if known is None else known
    for row, (prompt, events) in enumerate(zip(asked.prompts, known, strict=True)):
        now = int(codebook.advance_us[prompt.tokens].sum()) + prompt.elapsed_us
        birth = None
        for code, time, value in events:
            if code == "MEDS_BIRTH":
                birth = time
            column = place.get(code)
            if column is None:
                continue
            table[row, column] += 1
            if value is not None:
                table[row, width + column] = value
            if time is not None:
                table[row, 2 * width + column] = (now - time) / _DAY_US
        table[row, -3:] = (
            len(prompt.tokens),
            prompt.elapsed_us / _DAY_US,
            np.nan if birth is None else (now - birth) / (365.25 * _DAY_US),
        )
    names = (
        *(f"{kind} {code}" for kind in ("count of", "last value of", "days since") for code in codes),
        "tokens",
        "days since the last event",
        "age in years",
    )
    return Features(names, table)


def codes_of(prompts: Sequence[Events], least: int = 5) -> tuple[str, ...]:
    """Give the codes that at least so many prompts hold, in alphabetical order."""
    seen: dict[str, int] = {}
    for events in prompts:
        for code in {code for code, _, _ in events}:
            seen[code] = seen.get(code, 0) + 1
    return tuple(sorted(code for code, count in seen.items() if count >= least and code != "MEDS_BIRTH"))


def baselines(
    task: Task, stores: Mapping[str, TokenStore], codebook: Codebook, asked: Cohort, seed: int
) -> dict[str, Floats]:
    """Train both models pooled and at every site, and answer a question about held-out patients.

    Args:
        task: the question.
        stores: of the sites by name; their train and tuning patients are used.
        codebook: the one that made them.
        asked: the predictions to make.
        seed: of the boosting.

    Returns:
        Risks, float64 [P], by arm: `<model>, pooled` and `<model>, <site>`. A site with fewer than `FEWEST` train
        predictions of one answer has none.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    parts = {
        site: [cohort(task, store.split(split), codebook).labelled() for split in ("train", "tuning")]
        for site, store in stores.items()
    }
    events = {site: [read(part, codebook) for part in both] for site, both in parts.items()}
    wanted_events = read(asked, codebook)
    found: dict[str, Floats] = {}
    for where, sites in {"pooled": list(parts), **{site: [site] for site in parts}}.items():
        codes = tuple(sorted({code for site in sites for code in codes_of(events[site][0])}))
        told = [
            [
                features(part, codebook, codes, known).table
                for part, known in zip(parts[site], events[site], strict=True)
            ]
            for site in sites
        ]
        tables = [np.concatenate([site[split] for site in told]) for split in (0, 1)]
        labels = [np.concatenate([parts[site][split].labels for site in sites]) for split in (0, 1)]
        if min((labels[0] == answer).sum() for answer in (0, 1)) < FEWEST:
            continue
        differs = _differs(tables[0])
        tables = [table[:, differs] for table in tables]
        wanted = features(asked, codebook, codes, wanted_events).table[:, differs]
        for name, models in _models(seed).items():
            found[f"{name}, {where}"] = _chosen(models, tables, labels).predict_proba(wanted)[:, 1]
    return found


def _differs(table: Floats) -> NDArray[np.bool_]:
    """Tell which columns have at least two values; the others tell nothing."""
    return np.array([len(np.unique(column[~np.isnan(column)])) > 1 for column in table.T], bool)


def _chosen(models: Sequence[Any], tables: Sequence[Floats], labels: Sequence[NDArray[np.int8]]) -> Any:
    """Fit all, and give the one with the lowest loss on tuning predictions; the middle one if there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # columns without any value; slow convergence
        fitted = [model.fit(tables[0], labels[0]) for model in models]
        if not len(labels[1]):
            return fitted[len(fitted) // 2]
        losses = []
        for model in fitted:
            risk = np.clip(model.predict_proba(tables[1])[:, 1], 1e-6, 1 - 1e-6)
            losses.append(-np.log(np.where(labels[1] == 1, risk, 1 - risk)).mean())
    return fitted[int(np.argmin(losses))]


def check_installed() -> None:
    """Refuse to begin where scikit-learn is missing, rather than to stop when all else is done.

    Raises:
        ConfigError: it is.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(
            "Supervised baselines need scikit-learn: pip install 'fedcomet[baselines]', or leave them out of arms."
        )


def _models(seed: int) -> dict[str, list[Any]]:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    linear = [
        make_pipeline(
            FunctionTransformer(_squeezed),
            SimpleImputer(strategy="median", keep_empty_features=True),
            StandardScaler(),
            LogisticRegression(C=strength, max_iter=500),
        )
        for strength in _STRENGTHS
    ]
    trees = [
        HistGradientBoostingClassifier(
            max_iter=count, learning_rate=0.05, max_leaf_nodes=15, l2_regularization=1.0, early_stopping=False,
            random_state=seed,
        )
        for count in _TREES
    ]  # fmt: skip
    return {LOGISTIC: linear, BOOSTING: trees}


def _squeezed(table: Floats) -> Floats:
    """Counts, days and values reach over magnitudes; a line through their logarithms bends less."""
    return np.asarray(np.sign(table) * np.log1p(np.abs(table)))
