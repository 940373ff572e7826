"""MB of FHIR ndjson per second and core, beside parsers that only parse.

    python -m benchmarks.fhir --megabytes 200     made-up resources
    python -m benchmarks.fhir PATH                the resources of a folder of ndjson files

All rows are the best of some runs in turn, in seconds of processor time (other work on the machine disturbs it less
than the clock), on one core. "json", "orjson" and "msgspec" turn each line into Python objects and throw them away;
"msgspec, typed" is the ceiling of this importer: it decodes only the members that are read.
"""

import argparse
import json
import os
import random
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

os.environ.setdefault("POLARS_MAX_THREADS", "1")  # before polars is imported: one core is what is measured

import msgspec

from tokenizer.sources.fhir import import_fhir
from tokenizer.sources.fhir_resources import DECODERS

LOINC, UCUM = "http://loinc.org", "http://unitsofmeasure.org"


def observation(patient: str, stay: str, number: int, draw: random.Random) -> dict[str, Any]:
    def concept(code: str) -> dict[str, Any]:
        return {"coding": [{"system": LOINC, "code": code, "display": f"What {code} measures, in some words"}]}

    def quantity(unit: str) -> dict[str, Any]:
        return {"value": round(draw.lognormvariate(3, 1), 2), "unit": unit, "system": UCUM, "code": unit}

    made: dict[str, Any] = {
        "resourceType": "Observation",
        "id": f"{number:08x}-0000-4000-8000-000000000000",
        "meta": {"profile": ["http://hl7.org/fhir/us/core/StructureDefinition/us-core-observation-lab"]},
        "status": "final",
        "category": [{"coding": [{"system": "http://terminology.hl7.org/CodeSystem/observation-category"}]}],
        "code": concept(f"{draw.randint(1000, 1200)}-1"),
        "subject": {"reference": f"Patient/{patient}"},
        "encounter": {"reference": f"Encounter/{stay}"},
        "effectiveDateTime": f"2020-{1 + number // 50 % 12:02}-{1 + number // 600 % 28:02}T08:30:00-05:00",
        "issued": "2020-03-01T09:12:33.123-05:00",
    }
    kind = draw.random()
    if kind < 0.75:
        made["valueQuantity"] = quantity(draw.choice(["mg/dL", "mmol/L", "%", "g/dL"]))
    elif kind < 0.9:
        made["valueCodeableConcept"] = concept(f"LA{draw.randint(1, 50)}-1")
    else:
        made["component"] = [
            {"code": concept(code), "valueQuantity": quantity("mm[Hg]")} for code in ("8480-6", "8462-4")
        ]
    return made


def write(folder: Path, megabytes: int) -> None:
    """Patients of 400 observations in 20 encounters each."""
    draw = random.Random(0)
    files = {kind: (folder / f"{kind}.ndjson").open("w") for kind in ("Patient", "Encounter", "Observation")}
    patient = number = 0
    while files["Observation"].tell() < megabytes * 1_000_000:
        patient += 1
        person = {"resourceType": "Patient", "id": f"p{patient}", "gender": "male", "birthDate": "1950-01-01"}
        files["Patient"].write(json.dumps(person, separators=(",", ":")) + "\n")
        for stay in range(20):
            visit = {
                "resourceType": "Encounter",
                "id": f"p{patient}-{stay}",
                "status": "finished",
                "class": {"code": "AMB"},
                "subject": {"reference": f"Patient/p{patient}"},
                "period": {
                    "start": f"2020-01-{1 + stay:02}T08:00:00-05:00",
                    "end": f"2020-01-{1 + stay:02}T09:00:00-05:00",
                },
            }
            files["Encounter"].write(json.dumps(visit, separators=(",", ":")) + "\n")
            for _ in range(20):
                number += 1
                made = observation(f"p{patient}", f"p{patient}-{stay}", number, draw)
                files["Observation"].write(json.dumps(made, separators=(",", ":")) + "\n")
    for file in files.values():
        file.close()


def lines(folder: Path) -> list[tuple[str, bytes]]:
    """Type and text of every resource that is read."""
    found = []
    for file in sorted(folder.glob("*.ndjson")):
        for line in file.read_bytes().splitlines():
            kind = json.loads(line)["resourceType"]
            if kind in DECODERS:
                found.append((kind, line))
    return found


def parse(decode: Callable[[bytes], Any], texts: list[tuple[str, bytes]]) -> None:
    for _, text in texts:
        decode(text)


def typed(texts: list[tuple[str, bytes]]) -> None:
    for kind, text in texts:
        DECODERS[kind].decode(text)


def timed(work: Callable[..., object], *arguments: object) -> float:
    start = process_time()
    work(*arguments)
    return process_time() - start


def main() -> None:
    arguments = argparse.ArgumentParser(description="MB of FHIR ndjson per second and core.")
    arguments.add_argument("source", type=Path, nargs="?", help="a folder of ndjson files; made up where missing")
    arguments.add_argument("--megabytes", type=int, default=200)
    arguments.add_argument("--runs", type=int, default=3)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source = chosen.source or root / "source"
        if chosen.source is None:
            source.mkdir()
            write(source, chosen.megabytes)
        compare(source, root, chosen.runs)


def compare(source: Path, root: Path, runs: int) -> None:
    megabytes = sum(file.stat().st_size for file in source.glob("*.ndjson")) / 1e6
    start = process_time()
    flow = import_fhir(source, root / "out", name="benchmark")
    ours = [process_time() - start]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    texts = lines(source)
    parsers: dict[str, Callable[[], object]] = {
        "json, parse only": lambda: parse(json.loads, texts),
        "msgspec, parse only": lambda: parse(msgspec.json.Decoder().decode, texts),
        "msgspec, typed": lambda: typed(texts),
    }
    try:
        import orjson

        parsers["orjson, parse only"] = lambda: parse(orjson.loads, texts)
    except ImportError:
        print("orjson isn't installed; its row is left out (pip install orjson)")
    seconds: dict[str, list[float]] = {name: [] for name in parsers}
    for _ in range(runs):
        for name, work in parsers.items():
            seconds[name].append(timed(work))
        ours.append(timed(lambda: import_fhir(source, root / "out", name="benchmark")))
    print(f"{megabytes:,.0f} MB of ndjson, {len(texts):,} resources -> {flow.events_total:,} events; ")
    print(f"peak memory of the import {peak:,.0f} MiB")
    rows = {name: min(times) for name, times in seconds.items()} | {"import_fhir, to MEDS on disk": min(ours)}
    for name, best in rows.items():
        print(f"{name:30} {best:8.2f} s {megabytes / best:8.1f} MB/s")


if __name__ == "__main__":
    main()
