"""What a coordinator's people type to begin a plan; imports stand inside the commands."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from federation.manifest import SecureAggregation
    from server.central import CentralPlan

app = typer.Typer()

_MOST_TOKENS = 1 << 24
_OWN = "The coordinator's own questions, and early stopping"
_METRICS = ("auroc", "brier", "loss")


@app.command()
def plan(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a site in a round.")] = 100,
    batch_tokens: Annotated[int, typer.Option(min=16, help="Most tokens of a step's batch.")] = 8192,
    model: Annotated[str, typer.Option(help="The preset to train.")] = "1m",
    context: Annotated[
        int | None, typer.Option(min=16, help="Most tokens that it sees at once.", show_default="the preset's")
    ] = None,
    min_sites: Annotated[int, typer.Option(min=1, help="Fewest sites of a round.")] = 3,
    epsilon: Annotated[
        float | None,
        typer.Option(help="The most that the run may cost a patient.", show_default="no differential privacy"),
    ] = None,
    patients: Annotated[
        int | None, typer.Option(min=2, help="With --epsilon: training patients of the smallest site.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="With --epsilon: patients of a step, on average.")] = 64,
    in_clear: Annotated[
        bool, typer.Option("--in-clear", help="Without secure aggregation: the coordinator reads single updates.")
    ] = False,
    home: Annotated[
        Path,
        typer.Option(
            help="The coordinator's home, whose enrolled sites the sums are of.",
            envvar="FEDCOMET_HOME",
            show_default="here",
            show_envvar=True,
        ),
    ] = Path(),
    central: Annotated[
        Path | None,
        typer.Option(
            help="A MEDS dataset of the coordinator, about which it asks the global model by itself.",
            show_default="none",
            rich_help_panel=_OWN,
        ),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(
            help="With --central: a task file, or the name of a shipped task or set; repeatable.",
            show_default="the loss only",
            rich_help_panel=_OWN,
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --central: rounds between two evaluations.", show_default="1", rich_help_panel=_OWN
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="With --central: what the best round is chosen by: auroc, brier or loss.",
            show_default="auroc; loss without --ask",
            rich_help_panel=_OWN,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --central: end the run after so many evaluations in a row without a better one.",
            show_default="never",
            rich_help_panel=_OWN,
        ),
    ] = None,
    foreign: Annotated[
        bool | None,
        typer.Option(
            "--foreign",
            help="With --central: none of its patients is at a site, so all may be asked about.",
            show_default="only those whom the run's split keeps for tuning",
            rich_help_panel=_OWN,
        ),
    ] = None,
) -> None:
    """Print a plan (JSON) with every setting a run has, to be edited and started: ... > plan.json.

    Updates are summed under masks over the sites that have joined. With --epsilon, training is private, and the noise
    follows from it; a site's strict policy asks for both. With --central, the coordinator asks the model of every round
    about patients of its own, and may end the run early.
    """
    import json
    import sys

    from federation.manifest import LocalWork
    from model.settings import preset
    from server.plan import FederationPlan, PrivacyPlan
    from tokenizer.codebook import TokenizerOptions
    from tokenizer.split import SplitRule

    private = None
    if epsilon is not None:
        if patients is None:
            raise typer.BadParameter("--epsilon needs it: noise depends on how rarely a patient is drawn", None, None,
                                     "--patients")  # fmt: skip
        private = PrivacyPlan(sampling_rate=min(1.0, batch / patients), delta=1e-6, epsilon=epsilon)
    wishes = {"ask": ask, "every": every, "metric": metric, "patience": patience, "foreign": foreign}
    own = _central(central, wishes)
    # Without tokens of their own, answers would hide among those of other codes.
    asked = own.tasks if own else ()
    shape = preset(model, 100, context)
    made = FederationPlan(
        name=run,
        rounds=rounds,
        split=SplitRule("fedcomet"),
        local=LocalWork(steps=steps, batch_tokens=max(batch_tokens, shape.context)),
        model=model,
        context=context,
        min_sites=min_sites,
        expect_sites=min_sites,
        privacy=private,
        secure_aggregation=None if in_clear else _sums(home, min_sites, patients),
        central=own,
        tokenizer=TokenizerOptions(named=tuple(code for task in asked for code in task.codes)),
        purposes=tuple(task.question for task in asked),
    )
    print(json.dumps(json.loads(made.to_bytes()), indent=2))
    for what, there in (("differential privacy (--epsilon)", private), ("secure aggregation", not in_clear)):
        if not there:
            print(f"The run is without {what}; sites whose policies demand it will refuse.", file=sys.stderr)


def _sums(home: Path, min_sites: int, patients: int | None) -> "SecureAggregation":
    """Sums over the sites that have joined.

    Raises:
        ConfigError: they are too few.
    """
    from federation.manifest import SecureAggregation
    from federation.masking import MaskingOptions
    from federation.pki import Role
    from server.home import CoordinatorHome
    from server.ledger import Ledger
    from server.tables import SiteStatus
    from tokenizer.errors import ConfigError

    opened = CoordinatorHome.open(home)
    with Ledger.open(opened.ledger_url, backups=opened.backups) as ledger:
        enrolled = [each for each in ledger.members.all() if each.status == SiteStatus.ENROLLED]
        roster = {each.name: each.ed25519 for each in enrolled if each.role == Role.SITE}
    if len(roster) < max(3, min_sites):
        raise ConfigError(
            f"{len(roster)} sites have joined, too few for sums over {max(3, min_sites)}: "
            "wait for more, or take --in-clear where all of them agree."
        )
    threshold = len(roster) // 2 + 1
    options = MaskingOptions(threshold=threshold, clip=1.0, max_weight=patients or _MOST_TOKENS)
    return SecureAggregation(max(min_sites, threshold), options, roster)


def _central(records: Path | None, wishes: Mapping[str, Any]) -> "CentralPlan | None":
    """What the coordinator asks by itself.

    Args:
        records: a MEDS dataset.
        wishes: options by name, None where they weren't given.

    Raises:
        ConfigError: there is no such task, or they don't go together.
        DataError: no MEDS dataset is there.
    """
    from model import task_files
    from server.central import CentralPlan
    from tokenizer.events import MedsDataset

    given = {name: value for name, value in wishes.items() if value is not None}
    if records is None:
        if given:
            raise typer.BadParameter(f"--{next(iter(given))} needs it: name the coordinator's records", None, None,
                                     "--central")  # fmt: skip
        return None
    MedsDataset.open(records)
    tasks = tuple(task for name in given.pop("ask", ()) for task in task_files.find(name))
    given.setdefault("metric", "auroc" if tasks else "loss")
    if given["metric"] not in _METRICS:
        raise typer.BadParameter(f"choose {', '.join(_METRICS[:-1])} or {_METRICS[-1]}", param_hint="--metric")
    return CentralPlan(str(records.absolute()), tasks, **given)
