"""What a site's people type to see tasks and whom they ask about; nothing leaves the machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Column, Table

    from model.cohort import Decision, Finder
    from model.tasks import Task
    from tokenizer.codebook import Codebook
    from tokenizer.labels import Labels
    from tokenizer.store import TokenSplit, TokenStore

app = typer.Typer()
tasks = typer.Typer(help="Questions to a model: see them, and whom they ask about at this site.", no_args_is_help=True)
app.add_typer(tasks, name="tasks", rich_help_panel="For a site")

Store = Annotated[Path, typer.Argument(help="A token store (fedcomet tokenize).")]
Wanted = Annotated[
    list[str], typer.Option("--task", help="A task file, or the name of a shipped task or set; may be repeated.")
]
Words = Annotated[Path | None, typer.Option(help="The store's codebook.", show_default="codebook.json beside it")]
Split = Annotated[str, typer.Option(help="Whom: train, tuning or held_out.")]
LabelFile = Annotated[Path | None, typer.Option(help="A MEDS label file, for tasks with given = true.")]


@tasks.command("list")
def list_tasks() -> None:
    """List the tasks that come with the software."""
    from rich.console import Console
    from rich.table import Column

    from model.task_files import shipped

    table = _table(Column("task", no_wrap=True), "kind", "question")
    for name, group in shipped().items():
        table.add_section()
        table.add_row(f"[bold]{name}[/]")
        for task in group:
            table.add_row(f"  {task.name}", task.kind, task.question)
    Console().print(table)


@tasks.command()
def show(
    name: Annotated[str, typer.Argument(help="A task file, or the name of a shipped task or set.")],
) -> None:
    """Print a task as canonical JSON, with the hash that names it in reports."""
    from json import dumps, loads

    from model.task_files import find

    for task in find(name):
        print(f"{task.name}: {task.hash}")
        print(dumps(loads(task.to_json()), indent=2, ensure_ascii=False))


@tasks.command()
def check(
    store: Store,
    task: Wanted,
    codebook: Words = None,
    split: Split = "held_out",
    labels: LabelFile = None,
    out: Annotated[
        Path | None,
        typer.Option(help="List every possible prediction in a Parquet file: whose, when, its answer, or why not."),
    ] = None,
) -> None:
    """Count whom tasks ask about, whom they leave out and why, and what the codebook can't tell apart."""
    from rich.console import Console
    from rich.table import Column

    from model.cohort import cohort

    opened, words, given, asked = _opened(store, codebook, labels, task)
    console, patients = Console(), opened.split(split)
    heads = (Column(head, justify="right") for head in ("patients", "predictions", "yes", "no", "unknown"))
    table = _table(Column(f"{split} patients", no_wrap=True), *heads)
    notes, listed = [], []
    for each in asked:
        found = cohort(each, patients, words, given=given if each.given else None)
        counts = found.counts()
        numbers = (counts.patients, counts.predictions, counts.positive, counts.negative, counts.censored)
        table.add_row(each.name, *(f"{number:,}" for number in numbers))
        notes += [f"{each.name}: {count:,} left out: {reason}" for reason, count in counts.excluded.items() if count]
        notes += [f"[yellow]note[/] {each.name}: {note}" for note in found.notes]
        if "repeat" in found.told and each.onset == "any" and found.told["repeat"].any():
            repeats = int(found.told["repeat"].sum())
            notes.append(f"{each.name}: {repeats:,} of {counts.predictions:,} had the outcome before")
        if out is not None:
            listed.append(_listed(each, patients, words, given if each.given else None))
    if out is not None:
        _write(out, listed)
    console.print(table)
    for note in notes:
        console.print(note)
    if split == "train":
        console.print("[yellow]note[/] these patients train: tasks can be looked at on them, but models are not judged")


@tasks.command()
def explain(
    store: Store,
    patient: Annotated[int, typer.Option(help="The patient's subject_id.")],
    task: Wanted,
    codebook: Words = None,
    labels: LabelFile = None,
    tail: Annotated[int, typer.Option(min=1, help="How many of the last known tokens to show.")] = 8,
) -> None:
    """Tell why a patient is in a task's cohort or not, what the prompt ends with, and the answer."""
    from rich.console import Console

    from model.cohort import Finder
    from tokenizer.errors import DataError
    from tokenizer.split import SPLITS

    opened, words, given, asked = _opened(store, codebook, labels, task)
    console = Console(highlight=False)
    for name in SPLITS:
        split = opened.split(name)
        places = (split.subject_ids == patient).nonzero()[0].tolist()
        for place in places:
            for each in asked:
                finder = Finder(each, words, given if each.given else None)
                console.print(f"[bold]{each.name}[/]: {each.question} ({name} patient)")
                decided = list(finder.decisions(split, place))
                for decision in decided:
                    console.print(_told(decision, finder, tail), markup=False)
                if not decided:
                    console.print("  out: not in the label file")
        if places:
            return
    raise DataError(f"{store}: there is no subject {patient}")


def _table(*heads: "Column | str") -> "Table":
    """A narrow table: names are typed again, so terminals of 80 columns must show them whole."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(*heads, box=SIMPLE_HEAD, pad_edge=False)


def _opened(
    store: Path, codebook: Path | None, labels: Path | None, names: list[str]
) -> "tuple[TokenStore, Codebook, Labels | None, list[Task]]":
    from model.task_files import find
    from tokenizer.codebook import Codebook
    from tokenizer.labels import read_labels
    from tokenizer.store import TokenStore

    words = Codebook.load(codebook or store.absolute().parent / "codebook.json")
    asked = [task for name in names for task in find(name)]
    return TokenStore.open(store, words.hash), words, None if labels is None else read_labels(labels), asked


def _listed(task: "Task", split: "TokenSplit", words: "Codebook", given: "Labels | None") -> "pl.DataFrame":
    """Every possible prediction of a task: rows without a reason are those of a MEDS label file."""
    import numpy as np
    import polars as pl

    from model.cohort import Finder

    finder = Finder(task, words, given)
    rows = [
        {
            "subject_id": decision.subject_id,
            "prediction_time": decision.asked_us,
            "task": task.name,
            "boolean_value": None if decision.label < 0 else bool(decision.label),
            "reason": decision.reason or None,
            **{name: np.asarray(value).tolist() for name, value in dict(decision.told).items()},
        }
        for place in range(len(split))
        for decision in finder.decisions(split, place)
    ]
    kinds: dict[str, Any] = {
        "subject_id": pl.Int64,
        "prediction_time": pl.Datetime("us"),
        "task": pl.String,
        "boolean_value": pl.Boolean,
        "reason": pl.String,
    }
    return pl.DataFrame(rows, schema_overrides=kinds, infer_schema_length=None) if rows else pl.DataFrame(schema=kinds)


def _write(path: Path, tables: "list[pl.DataFrame]") -> None:
    import io

    import polars as pl

    from tokenizer import durable

    buffer = io.BytesIO()
    pl.concat(tables, how="diagonal_relaxed").write_parquet(buffer)
    durable.write_bytes(path, buffer.getvalue())


def _told(decision: "Decision", finder: "Finder", tail: int) -> str:
    """A possible prediction in a few lines."""
    from model.history import when

    if decision.asked_us is None or decision.start_us is None:
        return f"  out: {decision.reason}"
    start = f"  {when(decision.asked_us)}"
    if decision.asked_us != decision.start_us:
        start += f" (from {when(decision.start_us)})"
    if decision.prompt is None:
        return f"{start} out: {decision.reason}"
    known = [finder.text(int(token)) for token in decision.prompt.tokens[-tail:]]
    answer = {1: "yes", 0: "no", -1: "unknown, the record ends"}[decision.label]
    more = ", ".join(f"{name} {finder.answer(name, value)}" for name, value in decision.told.items())
    silent = decision.prompt.elapsed_us / 3_600_000_000
    return (
        f"{start} in: {len(decision.prompt.tokens)} tokens known, the last {silent:.1f} h before\n"
        f"    ends with: {' | '.join(known)}\n    answer: {answer}; {more}"
    )
