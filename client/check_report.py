"""The check of a site for people: tables for a terminal of 80 columns, and one HTML page that needs no network."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from rich import box
from rich.markup import escape as literally
from rich.table import Table

from client.check import SiteCheck
from federation import page
from federation.page import show_bytes, show_count, show_duration, show_share
from tokenizer import durable, sketch
from tokenizer.check import Lengths
from tokenizer.codebook import Survey

# Longer lists are cut: the terminal shows the first few, the page many, the JSON all.
_FEW, _MANY = 8, 300


def write_page(path: Path, check: SiteCheck) -> None:
    """Write the page, at once or not at all."""
    durable.write_bytes(path, render(check).encode())


def render(check: SiteCheck) -> str:
    """Give the HTML page."""
    survey = check.outgoing.survey
    return (
        page.environment(Path(__file__).parent / "templates")
        .get_template("check.html.j2")
        .render(
            check=check,
            survey=survey,
            source=source_rows(check),
            histogram=_histogram(check.timelines.lengths, check.plan.context),
            codes=_code_lists(check),
            conflicts=_most(_conflicts(check), _MANY),
            converted=_most(_converted(check), _MANY),
            sketches=[(code, *_sketched(cells, survey)) for code, cells in sorted(survey.values.items())],
            gaps=[(text, sum(cells.values())) for text, cells in survey.gaps.items()],
            raw=check.outgoing.data.decode(),
            many=_MANY,
        )
    )


def terminal_tables(check: SiteCheck) -> list[Table]:
    """Give everything but the longest lists as tables for a terminal."""
    tables = [_records_table(check)]
    if check.source is not None:
        tables.append(_source_table(check))
    tables += [_flow_table(check)]
    tables += [_list_table(title, codes) for title, _, codes in _code_lists(check) if codes]
    tables += [
        _list_table("Values whose unit could not be brought together (events)", _conflicts(check)),
        _list_table("Times that are odd", {name: n for name, n in check.accounting.faults.items() if n}),
        _timeline_table(check),
        _cost_table(check),
        _outgoing_table(check),
    ]
    return [table for table in tables if table.row_count]


def source_rows(check: SiteCheck) -> list[tuple[str, int, int, Mapping[str, int], Mapping[str, int]]]:
    """Per table of the source: rows read, events kept, rows dropped per filter, rows set aside per reason."""
    flow = check.source
    if flow is None:
        return []
    names = dict.fromkeys([*flow.rows, *flow.events, *flow.dropped, *flow.quarantined])
    return [
        (
            name,
            flow.rows.get(name, 0),
            flow.events.get(name, 0),
            flow.dropped.get(name, {}),
            flow.quarantined.get(name, {}),
        )
        for name in names
    ]


def _table(title: str, *headings: str, wide: int = 0) -> Table:
    """A table whose first column is text and the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    first, *others = headings
    table.add_column(first, overflow="fold", max_width=wide or None)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _facts(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, literally(value))
    return table


def _records_table(check: SiteCheck) -> Table:
    made = "this site's survey alone" if check.own_codebook else "the codebook given"
    return _facts(
        "Records",
        [
            ("dataset", check.name),
            ("patients", show_count(check.subjects)),
            ("events", show_count(check.events)),
            ("fingerprint", check.fingerprint[:16]),
            ("codebook", f"{check.codebook[:16]}, {show_count(sum(check.vocabulary.values()))} tokens, from {made}"),
        ],
    )


def _source_table(check: SiteCheck) -> Table:
    table = _table("What became of the source's rows", "table", "rows", "events", "dropped", "set aside", wide=34)
    for name, rows, events, dropped, aside in source_rows(check):
        table.add_row(literally(name), *map(show_count, (rows, events, sum(dropped.values()), sum(aside.values()))))
        for reason, n in dropped.items():
            table.add_row(f"  [dim]dropped: {literally(reason)}[/]", "", "", show_count(n), "")
        for reason, n in aside.items():
            table.add_row(f"  [dim]set aside: {literally(reason)}[/]", "", "", "", show_count(n))
    return table


def _flow_table(check: SiteCheck) -> Table:
    table = _table("Filters and maps, in order", "step", "patients", "events", "patients gone", "events gone", wide=24)
    for step in check.accounting.flow:
        gone = (step.patients_before - step.patients_after, step.events_before - step.events_after)
        table.add_row(literally(step.name), *map(show_count, (step.patients_after, step.events_after, *gone)))
    return table


def _list_table(title: str, counts: Mapping[str, int]) -> Table:
    table = _table(title, "", "events", wide=62)
    for name, n in _most(counts, _FEW):
        table.add_row(literally(name), show_count(n))
    if len(counts) > _FEW:
        rest = sum(counts.values()) - sum(n for _, n in _most(counts, _FEW))
        table.add_row(f"[dim]and {show_count(len(counts) - _FEW)} more[/]", show_count(rest))
    return table


def _timeline_table(check: SiteCheck) -> Table:
    lengths = check.timelines.lengths
    spread = ", ".join(f"{_quantile_name(share)} {show_count(n)}" for share, n in lengths.quantiles.items())
    table = _table(
        f"Tokens per patient: mean {lengths.mean:.0f}; {spread}\nWhat a context costs",
        *("context", "patients longer", "", "tokens out of sight", "", "windows a pass"),
    )
    patients, tokens = max(check.timelines.patients, 1), max(check.timelines.tokens, 1)
    for cut in check.timelines.truncation:
        cells = (
            show_count(cut.patients),
            show_share(cut.patients / patients),
            show_count(cut.tokens),
            show_share(cut.tokens / tokens),
            show_count(cut.windows),
        )
        table.add_row(show_count(cut.context), *cells, style="bold" if cut.context == check.plan.context else "")
    return table


def _cost_table(check: SiteCheck) -> Table:
    splits = check.timelines.splits
    facts = [
        (
            name,
            f"{show_count(c['patients'])} patients, {show_count(c['events'])} events, {show_count(c['tokens'])} tokens",
        )
        for name, c in splits.items()
    ]
    facts.append(("disk", f"{show_bytes(check.timelines.store_bytes)} for the tokens"))
    if (training := check.training) is None:
        facts.append(("training", check.training_note))
    else:
        facts[-1] = ("disk", f"{facts[-1][1]}, {show_bytes(training.state_bytes)} for the model's state")
        facts.append(
            (
                "training",
                f"about {show_duration(training.seconds_per_pass)} a pass, {show_duration(training.seconds)} for"
                f" {training.passes:g} (an estimate: {show_count(round(training.rate))} tokens/s in"
                f" {training.steps} steps of preset {training.model} here, on {training.device})",
            )
        )
    return _facts("Tokens, disk and time", facts)


def _outgoing_table(check: SiteCheck) -> Table:
    survey = check.outgoing.survey
    buckets = sum(map(len, survey.values.values()))
    rows = [
        ("size", f"{show_bytes(len(check.outgoing.data))}, sha256 {check.outgoing.sha256[:16]}"),
        ("patients", show_count(survey.patients)),
        ("codes", f"{show_count(len(survey.codes))} with a time, {show_count(len(survey.statics))} without"),
        ("parents", f"{show_count(len(survey.prefixes) + len(survey.static_prefixes))}, for codes that are too rare"),
        ("values", f"histograms of {show_count(len(survey.values))} codes, {show_count(buckets)} cells"),
        ("gaps", f"histograms of {len(survey.gaps)} interval classes"),
        ("floor", f"no count and no cell stands for fewer than {survey.options.min_patients} patients"),
    ]
    return _facts("What the survey would send (--out or --json shows all of it)", rows)


def _quantile_name(share: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(share, f"{100 * share:g} %")


def _code_lists(check: SiteCheck) -> list[tuple[str, str, Mapping[str, int]]]:
    """Title, explanation and events per code of what didn't become a token of its own."""
    levels = check.timelines.fallbacks
    return [
        (
            "Codes that a map was for, and that it does not have (events)",
            "Add them to the map file, or leave them as they are.",
            check.accounting.unmapped,
        ),
        (
            "Codes of no shared vocabulary (events)",
            "Other sites can't know these names: give them a map file with their LOINC, RxNorm or ICD codes.",
            check.accounting.local,
        ),
        (
            "Codes too rare to be named, told by an ancestor (events)",
            "Fewer patients have them than the floor asks for, or the codebook doesn't know them.",
            levels.get("ancestor", {}),
        ),
        (
            "Codes of which only the system is told, if that (events)",
            "No ancestor of theirs is in the codebook.",
            levels.get("unknown", {}),
        ),
    ]


def _conflicts(check: SiteCheck) -> dict[str, int]:
    """Values per code that is known in units that don't meet, and per unit that is not understood."""
    found = {}
    for code, keys in check.accounting.collisions.items():
        units = ", ".join(key.removeprefix(f"{code}//") if key != code else "no unit" for key in sorted(keys))
        found[f"{code} in {units}"] = sum(keys.values())
    for unit, n in check.accounting.unknown_units.items():
        found[f"unit {unit!r} is not understood"] = n
    return found


def _converted(check: SiteCheck) -> dict[str, int]:
    return {f"{code} from {unit} to {key}": n for (code, unit, key), n in check.accounting.converted.items()}


def _most(counts: Mapping[str, int], most: int) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most]


def _sketched(cells: sketch.Sketch, survey: Survey) -> tuple[int, int, float, float, float]:
    """Events, cells, and the values at 5 %, 50 % and 95 % as far as the cells tell."""
    total, seen = sum(cells.values()), 0
    wanted = [0.05, 0.5, 0.95]
    found: list[float] = []
    for bucket in sorted(cells):
        seen += cells[bucket]
        while len(found) < len(wanted) and seen >= wanted[len(found)] * total:
            found.append(sketch.bucket_value(bucket, survey.options.sketch_accuracy))
    low, middle, high = found
    return total, len(cells), low, middle, high


def _histogram(lengths: Lengths, context: int) -> Markup:
    """Bars of patients per power of two of tokens, and a line at the context."""
    if not lengths.edges:
        return Markup("")
    width, height, left, bottom = 640.0, 240.0, 8.0, 44.0
    step = (width - 2 * left) / len(lengths.edges)
    most = max(lengths.patients)
    scale = (height - bottom - 26) / most
    parts: list[Any] = []
    for place, (edge, n) in enumerate(zip(lengths.edges, lengths.patients, strict=True)):
        x, tall = left + place * step, n * scale
        top = height - bottom - tall
        parts.append(f'<rect x="{x + 2:.1f}" y="{top:.1f}" width="{step - 4:.1f}" height="{tall:.1f}" rx="2"/>')
        parts.append(f'<text x="{x + step / 2:.1f}" y="{top - 6:.1f}" class="n">{show_count(n)}</text>')
        parts.append(f'<text x="{x + 2:.1f}" y="{height - bottom + 17:.1f}">{show_count(edge)}</text>')
    parts.append(f'<line x1="{left}" x2="{width - left}" y1="{height - bottom}" y2="{height - bottom}"/>')
    parts += _context_mark(lengths.edges, context, left, step, height - bottom)
    parts.append(f'<text x="{width / 2}" y="{height - 4}" class="n">tokens of a patient (from … on)</text>')
    said = "; ".join(f"from {edge}: {n}" for edge, n in zip(lengths.edges, lengths.patients, strict=True))
    label = escape(f"Patients by tokens. {said}.")
    return Markup(f'<svg role="img" aria-label="{label}" class="bars" viewBox="0 0 {width:g} {height:g}">') + Markup(
        "".join(parts) + "</svg>"
    )


def _context_mark(edges: Sequence[int], context: int, left: float, step: float, base: float) -> list[str]:
    place = next((n for n, edge in enumerate(edges) if edge <= context < 2 * edge), None)
    if place is None:
        return []
    x = left + (place + (context - edges[place]) / edges[place]) * step
    return [
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{base:g}"/>',
        f'<text class="mark" x="{x + 5:.1f}" y="13">context {show_count(context)}</text>',
    ]
