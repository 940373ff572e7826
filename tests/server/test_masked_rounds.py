"""Claims about rounds whose updates are only ever seen as a sum."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from client.site import SiteFiles
from federation.manifest import OuterOptions
from model import checkpoint
from server.app import Outcome, coordinate
from server.journal import Journal
from tests import tiny
from tests.masked import Federation


def weights(outcome: Outcome) -> np.ndarray:
    from federation.update import to_vector

    decoder, _, _ = checkpoint.load(outcome.checkpoint, outcome.manifest.codebook_hash)
    return to_vector(decoder)


def plainly(played: Federation, **changes: object) -> tuple[Outcome, Path]:
    """The same work without masks, by the same sites with fresh memories."""
    fresh = [SiteFiles(f.name, f.data, played.root / "plain" / f.name) for f in played.files]
    grid = tiny.FunctionGrid(dict(enumerate(map(tiny.honest, fresh), 1)))
    plan = dataclasses.replace(played.plan, secure_aggregation=None, **changes)  # type: ignore[arg-type]
    return coordinate(grid, played.root / "plain-run", plan), played.root / "plain-run"


@pytest.mark.parametrize("weighing", ["tokens", "uniform"])
def test_a_masked_run_is_the_plain_run_within_the_stated_error(ram_path: Path, weighing: str) -> None:
    played = Federation(ram_path, outer=OuterOptions(weights=weighing), rounds=1)  # type: ignore[arg-type]
    masked = played.lead()
    plain, folder = plainly(played)
    with Journal(ram_path / "run/ledger.sqlite") as journal, Journal(folder / "ledger.sqlite") as clear:
        (entry,), (losses,) = journal.sums("train"), journal.sums("evaluate tuning")
        replies = clear.replies(1)
        scores = clear.scores()
        assert journal.work(1) == clear.work(1)
        assert journal.losses("tuning")[1] == pytest.approx(clear.losses("tuning")[1], abs=1e-4)
    assert entry.sites == "site-0,site-1,site-2,site-3"
    assert entry.clipped == 0
    assert 0 < entry.error < 1e-7
    rounding = np.abs(weights(plain)) * 2.0**-22
    assert np.all(np.abs(weights(masked) - weights(plain)) <= entry.error + rounding)
    assert (entry.tokens, entry.steps) == (sum(r.tokens for r in replies), sum(r.steps for r in replies))
    assert entry.nll == pytest.approx(sum(r.loss * r.tokens for r in replies), rel=1e-6)
    assert losses.tokens == sum(s.tokens for s in scores)
