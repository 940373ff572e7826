"""fedcomet: train generative medical event models across hospitals that may not pool their records.

The command line. It reads arguments, calls one function of a room, shows progress and prints what came out; imports
stand inside the commands, so that a hospital's machine needs no more than the rooms it uses.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenizer.errors import FedcometError
from tokenizer.progress import Step

if TYPE_CHECKING:
    from datetime import datetime

    from rich.progress import TaskID

    from federation.planner import Row
    from model.tasks import Task
    from server.results import Report
    from simulation.private_cost import Cost
    from tokenizer.codebook import TokenizerOptions

app = typer.Typer(
    help="Train generative medical event models across hospitals that may not pool their records.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_SITE, _COORDINATOR, _RESEARCH = "For a site", "For a coordinator", "For a researcher"
_SOURCE, _TOKENS, _TRAINING, _WORK = "Records", "Tokens", "Training", "Work"
_WHOM, _FUTURES = "Whom and when", "Futures"
_PRIVACY, _ATTACKS, _FINISHED = "Privacy that is claimed", "Attacks", "A finished model"
_COUNTED = ("patient", "event", "token")

site = typer.Typer(help="What a site does by itself.", no_args_is_help=True)
app.add_typer(site, name="site", rich_help_panel=_SITE)
coordinator = typer.Typer(help="What a coordinator does by itself.", no_args_is_help=True)
app.add_typer(coordinator, name="coordinator", rich_help_panel=_COORDINATOR)
model_app = typer.Typer(help="Look at a model, and exchange it with other software.", no_args_is_help=True)
app.add_typer(model_app, name="model", rich_help_panel=_RESEARCH)

privacy = typer.Typer(help="What private releases cost, planned and spent.", no_args_is_help=True)
app.add_typer(privacy, name="privacy", rich_help_panel=_SITE)


def _mount(group: typer.Typer, room: str, commands: str = "commands") -> None:
    """Add a room's own commands; a hospital's installation may lack the coordinator's room."""
    try:
        group.add_typer(import_module(f"{room}.{commands}").app)
    except ModuleNotFoundError as missing:
        if not f"{room}.{commands}.".startswith(f"{missing.name}."):
            raise


_mount(site, "client")
_mount(app, "client", "task_commands")
_mount(coordinator, "server")
_mount(app, "simulation", "studies.commands")
_mount(app, "simulation", "sizing_commands")
_mount(app, "simulation", "reproduce_commands")

# What several commands take.
Records = Annotated[
    str, typer.Argument(help="The records: a file or folder, or the SQLAlchemy URL of an OMOP database.")
]
Kind = Annotated[
    str, typer.Option("--source", help="What they are: meds, omop, fhir or tables.", rich_help_panel=_SOURCE)
]
Mapping = Annotated[
    Path | None,
    typer.Option(help="tables: the TOML file that says what the columns mean.", rich_help_panel=_SOURCE),
]
Codes = Annotated[
    str | None,
    typer.Option(
        help="omop: standard codes, or those of the source.", show_default="standard", rich_help_panel=_SOURCE
    ),
]
Cdm = Annotated[
    str | None,
    typer.Option(help="omop: 5.2, 5.3 or 5.4, whose columns files without a header have.", rich_help_panel=_SOURCE),
]
TableSpec = Annotated[
    Path | None, typer.Option(help="omop: a file that names these columns instead.", rich_help_panel=_SOURCE)
]
Schema = Annotated[str | None, typer.Option(help="omop: the database's schema.", rich_help_panel=_SOURCE)]
VocabularySchema = Annotated[
    str | None, typer.Option(help="omop: the schema of its vocabulary, if apart.", rich_help_panel=_SOURCE)
]
Eras = Annotated[
    bool, typer.Option("--eras", help="omop: read the era tables too, which repeat others.", rich_help_panel=_SOURCE)
]
VisitDetails = Annotated[
    bool,
    typer.Option("--visit-details", help="omop: read changes of department inside visits.", rich_help_panel=_SOURCE),
]
ObservedOnly = Annotated[
    bool,
    typer.Option("--observed-only", help="omop: keep only what lies in observation periods.", rich_help_panel=_SOURCE),
]
ConditionTime = Annotated[
    str | None,
    typer.Option(
        help="fhir: place diagnoses when they were recorded, or at their onset.",
        show_default="recorded",
        rich_help_panel=_SOURCE,
    ),
]
Quarantine = Annotated[
    bool,
    typer.Option("--quarantine", help="Set bad rows aside with their reasons, and go on.", rich_help_panel=_SOURCE),
]
Config = Annotated[
    str | None,
    typer.Option(
        help="A settings file (TOML): filters, map files, units; none leaves codes and units as they are.",
        show_default="the standard preparation, or the codebook's",
        rich_help_panel=_SOURCE,
    ),
]
Values = Annotated[
    str,
    typer.Option(help="separate: value tokens after codes; fused: both in one token.", rich_help_panel=_TOKENS),
]
Bins = Annotated[int, typer.Option(help="Quantile bins of a code's values.", rich_help_panel=_TOKENS)]
MinPatients = Annotated[
    int, typer.Option(help="Codes of fewer patients are told by their parents.", rich_help_panel=_TOKENS)
]
Intervals = Annotated[
    str,
    typer.Option(
        help="comet13: classes of gaps from a minute; ethos19: finer, from 5 minutes.", rich_help_panel=_TOKENS
    ),
]
Spell = Annotated[
    list[str] | None,
    typer.Option(
        help="Letters of a code's pieces but the last: ICD10CM=3,1 or ATC=whole; may be repeated.",
        show_default="ICD10CM=3,3 ATC=3,1 ICD10PCS=whole",
        rich_help_panel=_TOKENS,
    ),
]
SplitKey = Annotated[str, typer.Option(help="Key of the hash that splits patients.", rich_help_panel=_TOKENS)]
Checkpoint = Annotated[Path, typer.Argument(help="A model's folder, such as runs/NAME/model, or a checkpoint file.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Worker processes.", show_default="one per core if it pays off", rich_help_panel=_WORK),
]
Ray = Annotated[
    str | None,
    typer.Option(
        help="Work on a Ray cluster instead: its address, auto for the one here, local to start one.",
        rich_help_panel=_WORK,
    ),
]

SiteFolder = Annotated[Path, typer.Argument(help="The site's home, or its state folder alone.", envvar="FEDCOMET_HOME")]


def main() -> None:
    """Run the command line; what a person can mend is told in one message, without a traceback.

    Exit codes: 0 done, 1 it could not be done (the message says why), 2 wrong arguments, 3 an audit or a
    reproduction contradicts what is claimed, 4 a run waits for sites that have signed a sum, 130 interrupted.
    """
    debug = "--debug" in sys.argv
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR" if debug else "NONE")  # its own lines, beside our message
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app(prog_name="fedcomet")
    except FedcometError as error:
        if debug:
            raise
        print(f"fedcomet: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as problem:
        if debug:
            raise
        print(f"fedcomet: {_said(problem)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("fedcomet: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def _said(problem: OSError) -> str:
    """What the system refused, where, and what to do."""
    todo = {
        errno.ENOSPC: "Free some room there, or write to another disk.",
        errno.EDQUOT: "Free some room there, or write to another disk.",
        errno.EFBIG: "Files there may not be so large; write to another disk.",
        errno.EACCES: "Ask for the right to it, or choose another place.",
        errno.EPERM: "Ask for the right to it, or choose another place.",
        errno.EROFS: "Choose a place that can be written to.",
    }
    place = f"{problem.filename}: " if problem.filename else ""
    return f"{place}{problem.strerror or problem}. {todo.get(problem.errno or 0, '--debug shows where.')}"


def _print_version(wanted: bool) -> None:
    if wanted:
        from federation.manifest import software_version

        print(f"fedcomet {software_version()}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version, and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Take options of all commands (`--debug` may also stand after the command)."""


@app.command(rich_help_panel=_SITE)
def tokenize(
    records: Records,
    out: Annotated[
        Path, typer.Option(help="The folder to write: codebook.json, store/ and, unless they are MEDS, records/.")
    ],
    source: Kind = "meds",
    mapping: Mapping = None,
    codes: Codes = None,
    cdm: Cdm = None,
    table_spec: TableSpec = None,
    schema: Schema = None,
    vocabulary_schema: VocabularySchema = None,
    eras: Eras = False,
    visit_details: VisitDetails = False,
    observed_only: ObservedOnly = False,
    condition_time: ConditionTime = None,
    quarantine: Quarantine = False,
    config: Config = None,
    codebook: Annotated[
        Path | None,
        typer.Option(
            help="Use this codebook, as a federation gave it, instead of making one.", rich_help_panel=_TOKENS
        ),
    ] = None,
    values: Values = "separate",
    bins: Bins = 10,
    min_patients: MinPatients = 10,
    intervals: Intervals = "comet13",
    spell: Spell = None,
    split_key: SplitKey = "fedcomet",
    workers: Workers = None,
    ray: Ray = None,
) -> None:
    """Turn a site's records into tokens.

    Reads MEDS, OMOP, FHIR or tables, surveys the events, makes a codebook from the survey (or takes the one given), and
    encodes every timeline. Nothing leaves the machine.
    """
    from rich.console import Console

    from tokenizer.codebook import Codebook, merge
    from tokenizer.output import CODEBOOK, RECORDS, STORE, output
    from tokenizer.prepare import records_of
    from tokenizer.settings import agreed
    from tokenizer.shards import Crew
    from tokenizer.sources.intake import FLOW, QUARANTINE
    from tokenizer.sources.source import Source, open_source
    from tokenizer.split import SPLITS, SplitRule
    from tokenizer.store import build_store
    from tokenizer.survey import survey
    from tokenizer.wording import several

    options = _options_of(values, bins, min_patients, intervals, spell)
    rule, crew = SplitRule(split_key), Crew(workers, ray)
    place = Source(
        *(records, source, quarantine, mapping, codes, cdm, table_spec, schema, vocabulary_schema),
        *(eras or None, visit_details or None, observed_only or None, condition_time),
    )
    words = None if codebook is None else Codebook.load(codebook)
    asked = agreed(config, words)
    with output(out, place.searched) as aside, _bars() as watch:
        dataset, flow = open_source(place, aside / RECORDS, watch, crew)
        events = records_of(dataset, asked.preparation)
        if words is None:
            words = Codebook.build(merge([survey(events, rule, options, _counter(watch, "survey"), crew)]))
        store = build_store(events, words, rule, aside / STORE, _counter(watch, "encode"), crew)
        words.save(aside / CODEBOOK)
    kept = out / RECORDS if dataset.path == aside / RECORDS else dataset.path
    console = Console()
    for note in (*(flow.notes if flow else ()), *dataset.notes):
        console.print(f"[yellow]note[/] {note}")
    if flow is not None and flow.dropped_total:
        console.print(
            f"{several(flow.dropped_total, 'row was', 'rows were')} left out by named filters, counted in {kept / FLOW}"
        )
    if flow is not None and flow.quarantined_total:
        reasons = kept / QUARANTINE
        aside_rows = several(flow.quarantined_total, "row was", "rows were")
        console.print(f"[yellow]{aside_rows} set aside[/], with the reasons in {reasons}")
    console.print(f"{len(words)} tokens in the codebook {words.hash[:16]} ({out / CODEBOOK})")
    for name in SPLITS:
        counts = store.manifest["splits"][name]
        console.print(f"{name:>9}: {', '.join(several(counts[f'{each}s'], each) for each in _COUNTED)}")
    by_ancestor, unknown = (sum(store.manifest["fallbacks"][level].values()) for level in ("ancestor", "unknown"))
    if by_ancestor or unknown:
        console.print(
            f"{several(by_ancestor + unknown, 'event has a code', 'events have codes')} too rare to be named:"
            f" {by_ancestor:,} told by an ancestor, {unknown:,} by the code's system only"
        )


@site.command()
def check(
    records: Records,
    source: Kind = "meds",
    mapping: Mapping = None,
    codes: Codes = None,
    cdm: Cdm = None,
    table_spec: TableSpec = None,
    schema: Schema = None,
    vocabulary_schema: VocabularySchema = None,
    eras: Eras = False,
    visit_details: VisitDetails = False,
    observed_only: ObservedOnly = False,
    condition_time: ConditionTime = None,
    quarantine: Quarantine = False,
    config: Config = None,
    codebook: Annotated[
        Path | None,
        typer.Option(help="The federation's codebook, if there is one; else this site's own.", rich_help_panel=_TOKENS),
    ] = None,
    values: Values = "separate",
    bins: Bins = 10,
    min_patients: MinPatients = 10,
    intervals: Intervals = "comet13",
    spell: Spell = None,
    split_key: SplitKey = "fedcomet",
    model: Annotated[
        str, typer.Option(help="The preset whose training time to estimate.", rich_help_panel=_TRAINING)
    ] = "1m",
    context: Annotated[
        int, typer.Option(min=16, help="Most tokens that the model sees at once.", rich_help_panel=_TRAINING)
    ] = 1024,
    passes: Annotated[float, typer.Option(help="Passes over the training patients.", rich_help_panel=_TRAINING)] = 10.0,
    seconds: Annotated[
        float,
        typer.Option(min=0, help="How long to measure the training; 0 measures nothing.", rich_help_panel=_TRAINING),
    ] = 8.0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda.", rich_help_panel=_TRAINING)] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write all of it to this HTML page, too.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON instead of tables.")] = False,
    workers: Workers = None,
    ray: Ray = None,
) -> None:
    """See what a federation would see, before anything leaves.

    What became of the records at each filter, codes that are not mapped, units in conflict, odd times, lengths of
    timelines and what a context costs, tokens, disk and time for training, and exactly what the survey would send.
    Nothing leaves the machine.
    """
    import tempfile

    from rich.console import Console

    from client import check as checks
    from client.check_report import terminal, write_page
    from tokenizer.codebook import Codebook
    from tokenizer.prepare import records_of
    from tokenizer.settings import agreed
    from tokenizer.shards import Crew
    from tokenizer.sources.source import Source, open_source
    from tokenizer.split import SplitRule

    options, crew = _options_of(values, bins, min_patients, intervals, spell), Crew(workers, ray)
    place = Source(
        *(records, source, quarantine, mapping, codes, cdm, table_spec, schema, vocabulary_schema),
        *(eras or None, visit_details or None, observed_only or None, condition_time),
    )
    words = None if codebook is None else Codebook.load(codebook)
    asked = agreed(config, words)
    plan = checks.Plan(options, SplitRule(split_key), model, context, passes, seconds, device, asked.survey_privacy)
    with tempfile.TemporaryDirectory(prefix="fedcomet-") as aside, _bars() as watch:
        dataset, flow = open_source(place, Path(aside, "records"), watch, crew)
        found = checks.check(
            records_of(dataset, asked.preparation),
            plan,
            codebook=words,
            source=flow,
            watch=watch,
            crew=crew,
        )
    console = Console()
    if json:
        print(found.to_json())
    else:
        console.print(terminal(found))
    if out is not None:
        write_page(out, found)
        Console(stderr=True).print(f"all of it: [bold]{out}[/]")


@site.command()
def policy() -> None:
    """Print a strict policy with a word on every rule: fedcomet site policy > policy.toml."""
    from client.policy import TEMPLATE

    print(TEMPLATE.read_text(encoding="utf-8"), end="")


@site.command()
def approve(
    manifest: Annotated[
        str,
        typer.Argument(
            help="A manifest's file, or the beginning of the hash of one that waits or was refused; none lists them.",
            show_default=False,
        ),
    ] = "",
    home: Annotated[
        Path | None,
        typer.Option(
            help="The site's home, whose site.toml says all that follows.", envvar="FEDCOMET_HOME", show_envvar=True
        ),
    ] = None,
    state: Annotated[Path | None, typer.Option(help="Instead: the site's state folder.", show_default="here")] = None,
    policy: Annotated[Path | None, typer.Option(help="The site's policy, which the run must keep.")] = None,
    device: Annotated[str, typer.Option(help="Where the site would train: cpu, cuda.")] = "cpu",
    budget: Annotated[
        str, typer.Option(help="The SQLAlchemy URL of its privacy budget.", show_default="a file in the state folder")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Sign without asking.")] = False,
) -> None:
    """See what a run would do here, and sign it.

    What will run, what will leave, and what it costs a patient. A run that breaks the policy is kept with the rules
    that it breaks, and can't be signed. The approval holds for this manifest and for no other, not even one that
    differs in a single bit. With a home, the coordinator is told at once.
    """
    from rich.console import Console

    from client.approval import Approvals
    from client.approval_page import listed, terminal
    from client.budget import FILE, Budget
    from client.policy import Broken, Policy, PolicyRefusal
    from federation import protection
    from federation.manifest import Manifest

    opened = None
    if home is not None and state is None:
        from client.home import SiteHome

        opened = SiteHome.open(home)
        state, policy = opened.state, policy or opened.policy
        device, budget = opened.settings.site.device, budget or opened.settings.site.budget
    state = state or Path()
    console, approvals = Console(soft_wrap=True), Approvals(state)
    rules = None if policy is None or not (manifest or approvals.refused()) else Policy.read(policy)

    def forbidden(asked: Manifest) -> list[Broken]:
        if rules is None:
            return []
        broken = rules.check(asked, device=device)
        if rules.limit is not None and asked.privacy is not None:
            with Budget.open(budget or state / FILE, rules.limit) as ledger:
                broken += rules.check_total(asked, ledger.mechanisms(but=asked.hash))
        return broken

    if not manifest:
        for line in listed(approvals, forbidden):
            console.print(line, highlight=False, markup=False)
        return
    asked = approvals.find(manifest)
    protection.check(asked.manifest)
    broken = forbidden(asked.manifest)
    console.print(terminal(asked, rules, broken))
    if broken:
        raise PolicyRefusal("this site", broken)
    if not yes and not typer.confirm("Sign it?"):
        console.print("not signed")
        return
    approval = approvals.approve(asked.manifest, None if rules is None else rules.sha256)
    console.print(f"approved: {approval.manifest_hash}", highlight=False)
    if opened is None:
        return
    from client.link import Link

    try:
        with Link(opened) as link:
            link.approve(approval)
    except FedcometError as error:
        console.print(f"The coordinator could not be told ({error}) Tell it; the approval holds.", highlight=False)
    else:
        console.print("The coordinator knows: a run that goes on asks again soon, one that ended when it is resumed.")


@site.command()
def audit(
    home: SiteFolder,
    key: Annotated[
        str | None,
        typer.Option(
            help="The public key that must have signed, as it was noted elsewhere.", show_default="the site's"
        ),
    ] = None,
    expect: Annotated[
        str | None, typer.Option(help="The head of an earlier audit, which must still be in the list.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON instead of tables.")] = False,
) -> None:
    """Check the list of everything that left the site, and show what it says.

    Names the first entry that was changed, left out or put in between. The exit code is 1 if there is one.
    """
    from json import dumps

    from rich.console import Console

    from client.audit import audit as check_list
    from client.audit import terminal
    from client.site_view import run_names
    from tokenizer.errors import DataError

    state = _state_of(home)
    found = check_list(state, key, expect)
    if json:
        print(dumps(found.to_plain(), indent=2, ensure_ascii=False))
    else:
        Console(soft_wrap=True).print(terminal(found, run_names(state, found.runs)))
    if found.broken is not None:
        raise DataError(f"the list of what left the site is broken at {found.broken}.")


@site.command("key")
def site_key(home: SiteFolder) -> None:
    """Show the public key of a site, and make its key on first use."""
    from client.approval import site_key as place
    from federation.identity import Identity

    print(Identity.at(place(_state_of(home))).public)


@coordinator.command("key")
def coordinator_key(
    runs: Annotated[Path, typer.Argument(help="The folder of all runs, which FEDCOMET_RUNS names.")],
) -> None:
    """Show the public key that sites list in their policies, and make the key on first use."""
    from federation.identity import Identity
    from server.app import coordinator_key as place

    print(Identity.at(place(runs)).public)


@coordinator.command("give-up")
def give_up(
    run: Annotated[Path, typer.Argument(help="The folder of a run whose round waits for sites that have signed.")],
    yes: Annotated[bool, typer.Option("--yes", help="Give the round up; without, what it waits for is shown.")] = False,
) -> None:
    """Give up a round whose sum can't be opened, as too many of the sites that signed it have left.

    Its updates are lost: the round ends with the weights that it began with, and the next start of the run goes on with
    the round after. What sites have spent on it stays spent. Nothing of it is opened later, either.
    """
    from server.app import give_up_sum

    number, reason = give_up_sum(run, really=yes)
    print(f"round {number} {'is given up' if yes else 'waits'}: {reason}")
    if not yes:
        print("nothing was changed; --yes gives the round up for good")


@privacy.command("plan")
def plan_privacy(
    patients: Annotated[int, typer.Option(min=2, help="Patients who train at the site; take the smallest site.")],
    epsilon: Annotated[float, typer.Option(help="The most that the whole training may cost a patient.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the run.")],
    delta: Annotated[float, typer.Option(help="At this delta; well below 1 / patients.")] = 1e-6,
    steps_per_round: Annotated[int | None, typer.Option(min=1, help="Private steps in a round.")] = None,
    passes: Annotated[
        float | None, typer.Option(help="Or: how often each patient is seen in the whole run, on average.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Patients in a batch, on average; larger and smaller ones are compared."),
    ] = None,
    model: Annotated[str, typer.Option(help="The preset to train.")] = "1m",
    sites: Annotated[
        int | None, typer.Option(min=3, help="Also plan noise on the updates of so many sites, own and shared out.")
    ] = None,
    honest_sites: Annotated[
        int | None,
        typer.Option(min=2, help="Of these, sites relied on for their share.", show_default="what masks need"),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also train with and without it, on a made-up hospital with as many patients."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Tell how much noise a protection needs, and what it will probably cost.

    The noise multiplier is computed: with it, all steps of all rounds are proven to cost at most epsilon. Progress per
    step and the cost in loss are estimates, for comparing batch sizes. With --measure the wanted batch is trained as
    one site, on public made-up records; it takes as long as such a training.
    """
    from rich.console import Console
    from rich.table import Table

    from federation import canonical
    from federation.planner import Wish, batches_around, honest_by_default, plan, plan_updates
    from model.settings import preset

    parameters = preset(model, vocab=5000).parameters()
    wish = Wish(patients, epsilon, delta, rounds, steps_per_round, passes, parameters)
    if batch is not None and batch > patients:
        raise typer.BadParameter(f"the site has {patients} patients", param_hint="--batch")
    rows = plan(wish, batches_around(patients, batch))
    chosen = next((row for row in rows if row.batch == batch), rows[len(rows) // 2])
    updates = () if sites is None else plan_updates(wish, sites, honest_sites or honest_by_default(sites))
    cost = _measured(chosen, patients, model) if measure else None
    if json:
        print(canonical.encode({"wish": wish, "rows": rows, "updates": updates, "measured": cost}).decode())
        return
    table = Table(title=f"At most epsilon {epsilon:g} at delta {delta:g} for each of {patients:,} patients")
    for name in ("batch", "rate", "steps", "noise", "ε 1 round", "ε all"):
        table.add_column(name, justify="right")
    for name in ("noise/batch", "progress*", "loss*"):
        table.add_column(name, justify="right", style="dim")
    for row in rows:
        table.add_row(
            *(f"{row.batch:,}", f"{row.sampling_rate:.4g}", f"{row.steps:,}", f"{row.noise_multiplier:.4g}"),
            *(f"{row.epsilon_of_one_round:.3f}", f"{row.epsilon:.3f}", f"{row.noise_per_patient:.2e}"),
            *(f"{row.progress:.1%}", f"{row.loss:+.2f}"),
            style="bold" if row.batch == batch else None,
        )
    Console().print(table)
    print("rate: chance of a patient to be in a batch; noise: multiplier, standard deviation / clipping bound.")
    print("* Progress of a step against one without noise, and what it costs in nats per token: rough estimates, for")
    print("  comparing rows. docs/privacy.md says what they assume.")
    for update in updates:
        whose = f"shared by {update.honest_sites} honest ones" if update.honest_sites else "each one's own"
        print(
            f"Noise on the updates of {sites} sites, {whose} ({update.mechanism}): multiplier "
            f"{update.noise_multiplier:.4g}, ε {update.epsilon:.3f}; its length in the mean is {update.length:,.0f} "
            "clips."
        )
    if cost is not None:
        print(
            f"Measured with batches of {chosen.batch:,} on a made-up hospital: {cost.private:.3f} nats per token, "
            f"{cost.plain:.3f} without privacy, {cost.untrained:.3f} before training."
        )


def _measured(row: "Row", patients: int, model: str) -> "Cost":
    """Train with and without privacy on records that are nobody's."""
    from tempfile import TemporaryDirectory

    from simulation.private_cost import Trial, measure

    trial = Trial(patients, row.sampling_rate, row.noise_multiplier, row.steps, model=model)
    with TemporaryDirectory(prefix="fedcomet-") as folder, _bars() as watch:
        return measure(trial, Path(folder), watch=watch)


@privacy.command("budget")
def show_budget(
    state: Annotated[
        list[Path] | None, typer.Option(help="A site's state folder; several are added up for a patient of all.")
    ] = None,
    database: Annotated[list[str] | None, typer.Option(help="Or the SQLAlchemy URL of a site's budget.")] = None,
    policy: Annotated[Path | None, typer.Option(help="The site's policy, to see what its limit leaves.")] = None,
    delta: Annotated[
        float | None, typer.Option(help="The delta at which epsilon is told.", show_default="the limit's, or 1e-6")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show what a site has spent of its privacy budget, on what, and what is left."""
    from contextlib import ExitStack

    from rich.console import Console

    from client.budget import FILE, Budget
    from client.budget_report import of_sites, report, tables
    from client.policy import Policy
    from federation import canonical

    places: list[Path | str] = [*(folder / FILE for folder in state or ()), *(database or ())]
    if not places:
        raise typer.BadParameter("give a site's state folder, or its database", param_hint="--state")
    most = None if policy is None else Policy.read(policy).limit
    with ExitStack() as opened:
        budgets = [opened.enter_context(Budget.open(place, most, begin=False)) for place in places]
        found = [report(budget, delta) for budget in budgets]
        together = of_sites(budgets, delta)
    if json:
        print(canonical.encode({"sites": found, "across": together}).decode())
        return
    console = Console()
    for place, each in zip(places, found, strict=True):
        if len(places) > 1:
            console.rule(str(place))
        for part in tables(each):
            console.print(part)
    if len(places) > 1:
        console.print(f"a patient of one of these sites: epsilon {together.one_site:.3f}")
        console.print(f"a patient of all of them: epsilon {together.all_sites:.3f}")


@privacy.command("free")
def free_reservations(
    run: Annotated[
        str,
        typer.Argument(
            help="The beginning of the hash of a run that is abandoned; none shows what all runs have reserved.",
            show_default=False,
        ),
    ] = "",
    state: Annotated[Path | None, typer.Option(help="The site's state folder.", show_default="here")] = None,
    database: Annotated[str | None, typer.Option(help="Or the SQLAlchemy URL of the site's budget.")] = None,
    delta: Annotated[float, typer.Option(help="The delta at which epsilon is told.")] = 1e-6,
    yes: Annotated[bool, typer.Option("--yes", help="Free it; without, it is only shown.")] = False,
) -> None:
    """Give back what an abandoned run has reserved of a site's privacy budget and never charged.

    Shows it first. What is freed has its key destroyed: the site refuses these rounds from then on, as no noise can be
    drawn for them any more. The ledger keeps a record of it. What was charged stays spent.
    """
    from rich.console import Console

    from client.budget import FILE, Budget
    from client.budget_report import reservations, table_of_reservations
    from tokenizer.errors import ConfigError

    if yes and not run:
        raise typer.BadParameter("name the run whose reservations are freed", param_hint="RUN")
    if state is not None and database is not None:
        raise typer.BadParameter("give the state folder or the database, not both", param_hint="--database")
    console = Console()
    with Budget.open(database or (state or Path()) / FILE, begin=False) as budget:
        found = reservations(budget.charges(), run)
        if not found:
            console.print("nothing is reserved that was not charged")
            return
        if run and len({each.release.run for each in found}) > 1:
            raise ConfigError(f"{run!r} begins the hashes of several runs; write more of the one that is meant.")
        console.print(table_of_reservations(found, delta))
        if not yes:
            console.print("nothing was freed; --yes with a RUN frees it for good", highlight=False)
            return
        before = budget.spent(delta)
        freed = budget.free([each.release for each in found])
        after = budget.spent(delta)
    console.print(f"{len(freed)} freed; spent or reserved: epsilon {after:.3f} at delta {delta:g}, before {before:.3f}")


@app.command(rich_help_panel=_RESEARCH)
def synthesize(
    hospital: Annotated[str, typer.Argument(help="heart, surgical, general or oncology.")],
    out: Annotated[Path, typer.Argument(help="The folder to write: records/ and truth.parquet.")],
    form: Annotated[str, typer.Option(help="meds, omop, fhir or tables.")] = "meds",
    patients: Annotated[int, typer.Option(min=0, help="How many.")] = 700,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 1,
) -> None:
    """Make up a hospital's records, with the true risk of every patient, to try everything out with."""
    from simulation.forms import write

    made = write(hospital, out, form=form, patients=patients, seed=seed)  # type: ignore[arg-type]
    print(f"{made.patients:,} patients, {made.events:,} events: {made.records}")


@app.command(rich_help_panel=_RESEARCH)
def simulate(
    study: Annotated[Path, typer.Argument(help="A study file (TOML), such as those in examples/.")],
    data: Annotated[Path | None, typer.Option(help="The MEDS dataset to split into sites.")] = None,
    out: Annotated[Path | None, typer.Option(help="The study's folder; runs/NAME when not given.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; as many as there are cores when not given.")
    ] = None,
) -> None:
    """Run a study: several sites on one machine train together, and are compared.

    Stop it whenever you like, even with kill -9: the same command goes on where it stopped. It ends with a table here
    and report.html in the study's folder.
    """
    from simulation import config
    from simulation.findings import report_of
    from simulation.patients_page import write_patients
    from simulation.study import run_study

    settings = config.read(study, data=data)
    folder = out or Path("runs") / settings.name
    command = " ".join(["fedcomet", *sys.argv[1:]])
    with _bars() as watch:
        result = run_study(settings, folder, workers=workers, watch=watch)
    _show(folder, lambda: report_of(result, command))
    if (page := write_patients(result)) is not None:
        print(f"patients and simulated futures: {page}")


@app.command(rich_help_panel=_RESEARCH)
def partition(
    dataset: Annotated[Path, typer.Argument(help="A MEDS dataset.")],
    out: Annotated[Path, typer.Option(help="The folder of the sites: each gets a MEDS dataset of its own.")],
    by: Annotated[
        str,
        typer.Option(
            help="code, column, system, iid, quantity, time, dirichlet or chapters (simulation/partition.py)."
        ),
    ] = "iid",
    prefix: Annotated[
        list[str] | None,
        typer.Option(help="What codes begin with, for code, system, dirichlet and chapters; may be given again."),
    ] = None,
    column: Annotated[str | None, typer.Option(help="An extra column of the files, for column.")] = None,
    sites: Annotated[int | None, typer.Option(min=2, help="How many sites.")] = None,
    alpha: Annotated[float, typer.Option(help="The smaller, the more sites differ.")] = 0.5,
    min_patients: Annotated[int, typer.Option(min=0, help="Smaller groups are put together.")] = 0,
    seed: Annotated[int, typer.Option(help="Of all that is dealt out at random.")] = 0,
) -> None:
    """Split one dataset into sites, and show how they differ: a page partition.html beside them."""
    from simulation.contrast import contrast, write_contrast
    from simulation.partition import partition as split
    from simulation.partition import rule_of
    from simulation.partition import told as account
    from tokenizer.events import MedsDataset

    rule = rule_of(
        by=by, prefixes=tuple(prefix or ()), column=column, sites=sites, alpha=alpha, min_patients=min_patients
    )
    source = MedsDataset.open(dataset)
    parts = split(source, rule, out, seed=seed)
    notes = account(parts, by)
    write_contrast(
        out / "partition.html", source.name or dataset.name, contrast({s.name: s.path for s in parts.sites}), notes
    )
    for site in parts.sites:
        print(f"{site.name}: {site.patients} patients, {site.events} events")
    for note in notes:
        print(note)
    print(out / "partition.html")


@app.command(rich_help_panel=_RESEARCH)
def report(
    folder: Annotated[Path, typer.Argument(help="A finished study's folder.")],
) -> None:
    """Show a finished study again: the table here, and report.html anew."""
    from server.report import load

    _show(folder, lambda: load(folder / "report.json"))


@app.command(rich_help_panel=_RESEARCH)
def rollout(
    model: Annotated[Path, typer.Argument(help="A model's folder, such as runs/NAME/model.")],
    store: Annotated[Path, typer.Argument(help="A token store made with the model's codebook (fedcomet tokenize).")],
    subject: Annotated[
        int | None, typer.Option(help="One patient's subject_id: the futures are shown.", rich_help_panel=_WHOM)
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="All patients of train, tuning or held_out: their futures are written to --out.", rich_help_panel=_WHOM
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            help="Where the known history ends, as 2150-03-01T12:00; the record's end if left out.",
            rich_help_panel=_WHOM,
        ),
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(
            help="With --split: a study file; its questions say when to predict and how far to look, and are answered.",
            rich_help_panel=_WHOM,
        ),
    ] = None,
    days: Annotated[
        float | None,
        typer.Option(min=0.0, help="How far to look; as far as it goes if left out.", rich_help_panel=_FUTURES),
    ] = None,
    until: Annotated[
        list[str] | None,
        typer.Option(
            help="With --split: a code, or what codes begin with, that ends a future, such as ENCOUNTER_END; may be"
            " given again.",
            rich_help_panel=_FUTURES,
        ),
    ] = None,
    trajectories: Annotated[
        int, typer.Option(min=1, help="How many futures of each to simulate.", rich_help_panel=_FUTURES)
    ] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one future.", rich_help_panel=_FUTURES)] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            help="With --split: below 1 likely tokens become likelier; estimates need 1.", rich_help_panel=_FUTURES
        ),
    ] = 1.0,
    top_p: Annotated[
        float,
        typer.Option(
            help="With --split: draw from the likeliest tokens that together reach this; estimates need 1.",
            rich_help_panel=_FUTURES,
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal futures.", rich_help_panel=_FUTURES)] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda.", rich_help_panel=_FUTURES)] = "cpu",
    history: Annotated[bool, typer.Option("--history", help="With --split: write what was known before, too.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="With --subject: write all events to this Parquet file, too. With --split: the folder."),
    ] = None,
) -> None:
    """Simulate futures: of one patient, shown as events, or of a split's patients, written as a MEDS dataset."""
    from rich.console import Console

    from server.futures import Model, futures
    from tokenizer.store import TokenStore

    if (subject is None) == (split is None):
        raise typer.BadParameter("give either --subject or --split", param_hint="--subject")
    if split is not None:
        from server.trajectories import Moment, Sampling, write_trajectories

        if out is None:
            raise typer.BadParameter("name the folder to write", param_hint="--out")
        if study is not None and (at is not None or days is not None or until):
            raise typer.BadParameter("the study says when and how far; leave out --at, --days, --until")
        asked = Moment(_time(at), days, tuple(until or ())) if study is None else _tasks(study)
        sampling = Sampling(trajectories, max_tokens, seed, temperature, top_p)
        with _bars() as watch:
            written = write_trajectories(
                Model.at(model, device),
                TokenStore.open(store),
                split,
                asked,
                out,
                sampling=sampling,
                history=history,
                progress=_counter(watch, "rollouts"),
            )
        console = Console()
        for note in written.notes:
            console.print(f"[yellow]note[/] {note}")
        for reason, count in written.excluded.items():
            if count:
                console.print(f"not asked about: {count:,} ({reason})")
        ends = ", ".join(f"{count:,} {reason}" for reason, count in written.reasons.items())
        console.print(f"{written.predictions:,} predictions x {trajectories}: {written.events:,} events; ends: {ends}")
        console.print(f"all of it: {out}")
        return
    if study is not None or until or history or (temperature, top_p) != (1.0, 1.0):
        raise typer.BadParameter("--study, --until, --history, --temperature and --top-p need --split")
    assert subject is not None
    with _bars() as watch:
        told = futures(
            Model.at(model, device),
            TokenStore.open(store),
            subject,
            at=_time(at),
            days=days,
            trajectories=trajectories,
            max_tokens=max_tokens,
            seed=seed,
            progress=_counter(watch, "rollouts"),
        )
    console = Console()
    for table in told.tables():
        console.print(table)
    if out is not None:
        told.write(out)
        console.print(f"all events: {out}")


@app.command(rich_help_panel=_RESEARCH)
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model's folder, such as runs/NAME/model.")],
    store: Annotated[Path, typer.Argument(help="A token store made with the model's codebook (fedcomet tokenize).")],
    study: Annotated[Path, typer.Argument(help="A study file; its questions and its [evaluation] are used.")],
    split: Annotated[str, typer.Option(help="Whom to ask about: tuning or held_out.")] = "held_out",
    labels: Annotated[
        Path | None, typer.Option(help="A MEDS label file: predictions and answers of tasks with given = true.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write every prediction to this Parquet file, too.")] = None,
    groups: Annotated[
        str,
        typer.Option(help="With --out: columns to split patients by, of age, sex and race as known at the prediction."),
    ] = "age,sex,race",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; as many as there are cores when not given.")
    ] = None,
) -> None:
    """Ask a trained model the questions of a study about the patients of a store."""
    from rich.console import Console

    from server.futures import Model
    from server.report import question_table
    from simulation import config
    from simulation.findings import question_of
    from simulation.pool import Pool
    from simulation.questions import about, write
    from simulation.questions import evaluate as ask
    from tokenizer.codebook import Codebook
    from tokenizer.labels import read_labels
    from tokenizer.split import SPLITS
    from tokenizer.store import TokenStore

    if split not in SPLITS:
        raise typer.BadParameter(f"choose one of {', '.join(SPLITS)}", param_hint="--split")
    if unknown := sorted({*filter(None, groups.split(","))} - {"age", "sex", "race"}):
        raise typer.BadParameter(f"{unknown[0]} is none of age, sex, race", param_hint="--groups")
    settings = config.read(study, records=False)
    with _bars() as watch, Pool(workers) as pool:
        given = None if labels is None else read_labels(labels)
        asked, patients = Model.at(model), TokenStore.open(store)
        answers = ask(asked, patients, settings, split, pool, watch, given=given)
    console = Console()
    for found in answers:
        console.print(question_table(question_of(settings, found, ())))
    if out is not None:
        chosen = tuple(filter(None, groups.split(",")))
        words = Codebook.load(asked.codebook)
        write(out, answers, about(asked, patients, split, answers), groups=chosen, codebook=words)
        console.print(f"all predictions: {out}")


@app.command(rich_help_panel=_RESEARCH)
def score(
    predictions: Annotated[Path, typer.Argument(help="A Parquet table of predictions: subject_id, task, label, risk.")],
    group: Annotated[
        list[str] | None, typer.Option(help="A column whose values split the patients, such as sex; repeatable.")
    ] = None,
    horizon: Annotated[
        float | None,
        typer.Option(
            help="Days at which the AUC over time is taken.", show_default="each task's own, where the file says it"
        ),
    ] = None,
    resamples: Annotated[int, typer.Option(min=50, help="Draws of patients for the intervals.")] = 500,
    out: Annotated[Path | None, typer.Option(help="Write all figures, with intervals, to this JSON file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a report to this page, with pictures, and JSON beside it.")
    ] = None,
    title: Annotated[str, typer.Option(help="Of the report.", show_default="the file's name")] = "",
) -> None:
    """Measure predictions for all patients and by group, with intervals over patients."""
    import polars as pl
    from rich.console import Console

    from federation import canonical
    from server.loose import horizons_of, report_of_file
    from server.report import write_report
    from server.scorecard import scorecards, table
    from tokenizer import durable

    days = horizons_of(predictions) if horizon is None else horizon
    cards = scorecards(pl.read_parquet(predictions), group or (), horizon_days=days, resamples=resamples)
    for card in cards:
        Console().print(table(card))
    if out is not None:
        durable.write_bytes(out, canonical.encode(cards))
    if html is not None:
        command = " ".join(["fedcomet", *sys.argv[1:]])
        write_report(html, report_of_file(predictions, cards, title=title, resamples=resamples, command=command))
        Console().print(f"report: [bold]{html}[/]")


@app.command(rich_help_panel=_RESEARCH)
def view(
    model: Annotated[Path, typer.Argument(help="A model's folder, such as runs/NAME/model.")],
    store: Annotated[Path, typer.Argument(help="A token store made with the model's codebook (fedcomet tokenize).")],
    task: Annotated[list[str], typer.Option(help="A task file, or the name of a shipped task or set; repeatable.")],
    out: Annotated[Path, typer.Option(help="The page to write; it holds records, and only you may read it.")],
    patient: Annotated[
        list[int] | None,
        typer.Option(help="Whom to show, by subject_id; repeatable.", show_default="a few whom the tasks ask about"),
    ] = None,
    split: Annotated[str, typer.Option(help="Where they are: train, tuning or held_out.")] = "held_out",
    most: Annotated[int, typer.Option(min=1, help="How many to show, where nobody is named.")] = 6,
    trajectories: Annotated[int, typer.Option(min=1, help="Futures of each, for the risk; eight are shown.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one future.")] = 256,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal futures.")] = 0,
    names: Annotated[
        Path | None, typer.Option(help="A MEDS dataset whose metadata/codes.parquet says what codes are called.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda.")] = "cpu",
) -> None:
    """Look at patients: their timelines, and beside them what the model believes may come, as one page."""
    from rich.console import Console

    from model.task_files import find
    from server.futures import Model
    from server.lifeline_page import write_page
    from server.lifelines import lifelines, names_of
    from tokenizer.split import SPLITS
    from tokenizer.store import TokenStore

    if split not in SPLITS:
        raise typer.BadParameter(f"choose one of {', '.join(SPLITS)}", param_hint="--split")
    patients = TokenStore.open(store)
    books = lifelines(
        Model.at(model, device),
        patients,
        [each for name in task for each in find(name)],
        split=split,
        patients=patient or (),
        most=most,
        trajectories=trajectories,
        max_tokens=max_tokens,
        seed=seed,
        names=None if names is None else names_of(names),
    )
    write_page(out, books, f"Patients of {patients.manifest['dataset']}", made_up=False)
    shown = len({line.patient for book in books for line in book.lifelines})
    Console().print(f"page: [bold]{out}[/]")
    Console(stderr=True).print(
        f"[yellow]note[/] {out} holds the records of {shown} patients: keep it where records may be, and delete it "
        "when you have looked"
    )


@app.command(rich_help_panel=_RESEARCH)
def plausibility(
    futures: Annotated[Path, typer.Argument(help="What fedcomet rollout wrote: a MEDS dataset of simulated futures.")],
    records: Annotated[Path, typer.Argument(help="A MEDS dataset with the records of the same patients.")],
    days: Annotated[float, typer.Option(help="How far the rollouts looked, in days.")],
    config: Config = None,
    out: Annotated[Path | None, typer.Option(help="Write the HTML page here, and JSON beside it.")] = None,
) -> None:
    """Hold simulated futures against what the records say of the same spans of time."""
    import polars as pl
    from rich.console import Console

    from server.plausibility import in_words_of
    from server.plausibility import plausibility as compare
    from server.plausibility_page import table, write_page
    from tokenizer.codebook import Codebook
    from tokenizer.events import MedsDataset
    from tokenizer.prepare import records_of
    from tokenizer.settings import agreed

    for told in ("trajectories.parquet", "codebook.json"):
        if not (futures / told).is_file():
            raise typer.BadParameter(
                f"{futures / told} is missing; name what fedcomet rollout wrote", param_hint="FUTURES"
            )
    words = Codebook.load(futures / "codebook.json")
    source = records_of(MedsDataset.open(records), agreed(config, words).preparation)
    made = MedsDataset.open(futures)
    real = in_words_of(words, pl.concat([source.read(shard) for shard in source.shards]))
    events = pl.concat([made.read(shard) for shard in made.shards])
    found = compare(real, events, pl.read_parquet(futures / "trajectories.parquet"), days)
    Console().print(table(found))
    if out is not None:
        write_page(out, found, f"Simulated futures of {days:g} day{'' if days == 1 else 's'}")


@app.command("audit", rich_help_panel=_RESEARCH)
def audit_by_attack(
    run: Annotated[
        Path | None, typer.Argument(help="A finished study's folder: its training is done again, with canaries.")
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(
            help="Make the training private: deviation of the noise in clips.",
            show_default="what the run's manifest states",
            rich_help_panel=_PRIVACY,
        ),
    ] = None,
    sampling_rate: Annotated[
        float | None, typer.Option(help="Chance of each patient to be in a private step.", rich_help_panel=_PRIVACY)
    ] = None,
    patient_clip: Annotated[
        float, typer.Option(help="Largest norm of a patient's share of a private step.", rich_help_panel=_PRIVACY)
    ] = 1.0,
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="The epsilon that is claimed.",
            show_default="what the noise and the steps cost",
            rich_help_panel=_PRIVACY,
        ),
    ] = None,
    delta: Annotated[float, typer.Option(help="The delta that is claimed.", rich_help_panel=_PRIVACY)] = 1e-5,
    site: Annotated[
        str | None,
        typer.Option(
            help="Whose training.", show_default="the site with the fewest patients", rich_help_panel=_TRAINING
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="How many.", show_default="as many as in the study", rich_help_panel=_TRAINING),
    ] = None,
    canaries: Annotated[
        int, typer.Option(min=10, help="Made-up patients, each in by a coin.", rich_help_panel=_ATTACKS)
    ] = 200,
    confidence: Annotated[
        float, typer.Option(help="Of the bound; a true claim raises the alarm no more often.", rich_help_panel=_ATTACKS)
    ] = 0.95,
    most: Annotated[
        int, typer.Option(min=1, help="Patients of each kind whom slow attacks ask about.", rich_help_panel=_ATTACKS)
    ] = 300,
    model: Annotated[
        Path | None, typer.Option(help="Instead of a study: a finished model's folder.", rich_help_panel=_FINISHED)
    ] = None,
    members: Annotated[
        Path | None,
        typer.Option(
            help="With --model: the token store whose train patients it learned from.", rich_help_panel=_FINISHED
        ),
    ] = None,
    nonmembers: Annotated[
        Path | None,
        typer.Option(
            help="With --model: the token store whose held_out patients it didn't.",
            show_default="that of --members",
            rich_help_panel=_FINISHED,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="With --model: a model of other patients, which makes attacks sharper.", rich_help_panel=_FINISHED
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of coins and choices.", show_default="drawn anew", rich_help_panel=_ATTACKS)
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda.", rich_help_panel=_TRAINING)] = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML page to write, with its JSON beside it.", show_default="audit.html in the folder"),
    ] = None,
) -> None:
    """Attack what was trained, and see whether a privacy claim holds.

    Bounds epsilon from below by canaries, tells members from others, asks for rare courses, and reads updates with and
    without secure aggregation. Exit code 3: the attacks contradict the claim. A bound from below never proves privacy.
    """
    from rich.console import Console

    from model.private import PrivateOptions
    from simulation.attacks.audit_plan import Plan
    from simulation.attacks.audit_report import summary, write_audit

    if (run is None) == (model is None):
        raise typer.BadParameter("give either a study's folder or --model", param_hint="--model")
    if (noise_multiplier is None) != (sampling_rate is None):
        raise typer.BadParameter("--noise-multiplier and --sampling-rate go together", param_hint="--noise-multiplier")
    private = None
    if noise_multiplier is not None and sampling_rate is not None:
        private = PrivateOptions(patient_clip, noise_multiplier, sampling_rate)
    plan = Plan(
        private=private,
        epsilon=epsilon,
        delta=delta,
        confidence=confidence,
        canaries=canaries,
        most=most,
        steps=steps,
        site=site,
        seed=seed,
        device=device,
    )
    command = " ".join(["fedcomet", *sys.argv[1:]])
    with _bars() as watch:
        if run is not None:
            from simulation.attacks.audit_run import audit_run
            from simulation.attacks.finished_run import open_run

            found = audit_run(open_run(run), plan, command=command, watch=watch)
        else:
            from simulation.attacks.audit_model import audit_model, open_subject

            if members is None or epsilon is not None or private is not None:
                raise typer.BadParameter(
                    "--model needs --members, and no claim: only a run can be audited for that", param_hint="--members"
                )
            assert model is not None
            found = audit_model(
                open_subject(model, members, nonmembers or members, reference), plan, command=command, watch=watch
            )
    page = out or (run or Path()) / "audit.html"
    write_audit(page, found)
    console = Console()
    for line in summary(found):
        console.print(line, highlight=False)
    console.print(f"report: [bold]{page}[/]")
    if found.alarm:
        raise typer.Exit(3)


@model_app.command("show")
def show_model(checkpoint: Checkpoint) -> None:
    """Tell a model's shape, size and provenance, once its content is seen to be what was saved."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from model.checkpoint import describe, load

    table = Table.grid(padding=(0, 2))
    for name, text in describe(load(_file_of(checkpoint))).items():
        table.add_row(f"[bold]{name}[/]", Text(text))
    Console().print(table)


@model_app.command("export")
def export_model(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    codebook: Annotated[
        Path | None,
        typer.Option(
            help="The model's codebook, to go with it.", show_default="the codebook.json beside it, if there is one"
        ),
    ] = None,
) -> None:
    """Write a model as a Hugging Face folder (Qwen2ForCausalLM, safetensors)."""
    from model.checkpoint import load
    from model.interchange import export_folder
    from tokenizer.codebook import Codebook

    path = _file_of(checkpoint)
    beside = path.with_name("codebook.json")
    words = codebook or (beside if beside.exists() else None)
    export_folder(load(path), out, None if words is None else Codebook.load(words))
    print(f"exported: {out}" if words else f"exported without a codebook, which --codebook would add: {out}")


@model_app.command("import")
def import_model(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder of a Qwen2ForCausalLM.")],
    out: Annotated[Path, typer.Argument(help="The model's folder to write; new or empty.")],
    codebook: Annotated[
        Path | None,
        typer.Option(help="What its tokens mean.", show_default="the folder's codebook.json"),
    ] = None,
) -> None:
    """Make a model's folder (checkpoint and codebook) of a Hugging Face folder."""
    from model.interchange import import_folder, save_model
    from tokenizer.codebook import Codebook

    words = Codebook.load(codebook or folder / "codebook.json")
    save_model(import_folder(folder, words), words, out)
    print(f"imported: {out}")


def _file_of(checkpoint: Path) -> Path:
    return checkpoint / "checkpoint.safetensors" if checkpoint.is_dir() else checkpoint


def _state_of(folder: Path) -> Path:
    """The state folder of a site: of its home, or itself."""
    if not (folder / "site.toml").exists():
        return folder
    from client.home import SiteHome

    return SiteHome.open(folder).state


def _time(text: str | None) -> "datetime | None":
    from datetime import datetime

    try:
        return None if text is None else datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text} is not a time such as 2150-03-01T12:00", param_hint="--at") from None


def _tasks(study: Path) -> "tuple[Task, ...]":
    from simulation import config

    return config.read(study, records=False).task


def _options_of(
    values: str, bins: int, min_patients: int, intervals: str, spell: list[str] | None
) -> "TokenizerOptions":
    from tokenizer.options import INTERVAL_TABLES, TokenizerOptions

    for option, value, known in (
        ("--values", values, ("separate", "fused")),
        ("--intervals", intervals, INTERVAL_TABLES),
    ):
        if value not in known:
            raise typer.BadParameter(f"choose {' or '.join(known)}", param_hint=option)
    splits = dict(_split_of(each) for each in spell or ())
    return TokenizerOptions(
        values=values,  # type: ignore[arg-type]
        value_bins=bins,
        min_patients=min_patients,
        intervals=intervals,  # type: ignore[arg-type]
        **splits,  # type: ignore[arg-type]
    )


def _split_of(text: str) -> tuple[str, tuple[int, ...]]:
    """`ICD10CM=3,1` as an option of the tokenizer and its value."""
    system, _, letters = text.partition("=")
    name = f"{system.strip().lower()}_split"
    try:
        if name not in ("icd10cm_split", "icd10pcs_split", "atc_split"):
            raise ValueError
        return name, () if letters.strip() == "whole" else tuple(int(part) for part in letters.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: write ICD10CM, ICD10PCS or ATC, =, and numbers of letters such as 3,1, or whole",
            param_hint="--spell",
        ) from None


def _show(folder: Path, make: "Callable[[], Report]") -> None:
    """Write a study's report into its folder, and print its tables."""
    from rich.console import Console

    from server.report import terminal_tables, write_report

    console = Console()
    with console.status("writing the report ..."):
        found = make()
        write_report(folder / "report.html", found)
    for table in terminal_tables(found):
        console.print(table)
    console.print(f"report: [bold]{folder / 'report.html'}[/]")


@contextmanager
def _bars() -> Iterator[Callable[[Step], None]]:
    """Draw a bar for every label that is told of; on a pipe, only a line when one is full."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        rows: dict[str, TaskID] = {}

        def watch(step: Step) -> None:
            if step.label not in rows:
                rows[step.label] = progress.add_task(step.label, total=step.total, note="")
            progress.update(rows[step.label], completed=step.done, total=step.total, note=step.note)
            if not console.is_terminal and step.done == step.total:
                console.print(f"{step.label}: done {step.note}", highlight=False)

        yield watch


def _counter(watch: Callable[[Step], None], label: str) -> Callable[[int, int], None]:
    return lambda done, total: watch(Step(label, done, total))


if __name__ == "__main__":
    main()
