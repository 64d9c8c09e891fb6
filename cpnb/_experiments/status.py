"""What the records of a folder hold, in words and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

from cpnb._experiments.cells import Experiment
from cpnb._experiments.record import (
    Record,
    is_complete,
    read_record,
    record_path,
    select,
)


def text_of_records(experiments: Iterable[Experiment], folder: Path) -> str:
    """What exists in a folder of records and what is outstanding, in Markdown."""
    lines = [
        "# Records",
        "",
        "Made by `python -m cpnb.experiments status --write`; do not edit. The",
        "notebooks read these records where an experiment is too long to run in them.",
    ]
    for experiment in experiments:
        path = record_path(folder, experiment.name)
        lines += ["", f"## {experiment.name}", "", f"{experiment.title}.", ""]
        record = read_record(path) if path.exists() else None
        lines += _status_of(record) if record else ["**Outstanding**: never run."]
        lines += ["", f"`python -m cpnb.experiments run {experiment.name}`"]
    return "\n".join(lines) + "\n"


def _status_of(record: Record) -> list[str]:
    """Lines about one record: provenance, then a table of the tested networks."""
    done = record["cells"]
    places = [cell["provenance"] for cell in done]
    dates = sorted(place["date"][:10] for place in places)
    seconds = sum(cell["start_seconds"] + sum(cell["seconds"]) for cell in done)

    def all_of(*names: str) -> str:
        found = {" ".join(str(place[name]) for name in names) for place in places}
        return ", ".join(sorted(found))

    versions = [
        ", ".join(sorted({str(place["versions"][name]) for place in places}))
        for name in ("cpnb", "torch", "python")
    ]
    state = "complete" if is_complete(record) else "**outstanding**: not complete"
    lines = [
        f"- {state}, {len(done)} cells, {seconds / 60:.0f} minutes of training in all",
        f"- made {dates[0]} to {dates[-1]} on {all_of('device', 'machine')}, "
        f"{all_of('threads')} thread(s) per cell",
        f"- cpnb {versions[0]}, torch {versions[1]}, Python {versions[2]}; "
        f"commit {all_of('commit')}",
        f"- {record['data']}",
        "",
        "| start | rate (tuned) | n | validation accuracy | test accuracy | diverged |",
        "|---|---|---|---|---|---|",
    ]
    for start in record["settings"]["starts"]:
        cells = select(record, phase="test", start=start)
        good = [cell for cell in cells if cell["status"] == "finished"]
        if good:
            lines.append(
                f"| {start} | {cells[0]['lr']:g} | {len(good)} | "
                f"{_spread([cell['validation_accuracy'][-1] for cell in good])} | "
                f"{_spread([cell['test_accuracy'] for cell in good])} | "
                f"{len(cells) - len(good)} |"
            )
    return lines


def _spread(shares: Sequence[float]) -> str:
    text = f"{mean(shares):.2%}"
    return text + (f" ± {100 * stdev(shares):.2f}" if len(shares) > 1 else "")
