"""What the records of a folder hold, in words and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cpnb._compare.plan import planned
from cpnb._compare.table import percent
from cpnb._experiments.definitions import Experiment
from cpnb.comparison import Comparison

_HEAD = ["recipe", "rate (tuned)", "n", "validation", "test", "diverged", "seconds"]


def text_of_records(
    experiments: Iterable[Experiment], results: Mapping[str, Comparison]
) -> str:
    """What exists among some experiments and what is outstanding, in Markdown."""
    lines = [
        "# Records",
        "",
        "Made by `python -m cpnb.experiments status --write`; do not edit. The",
        "notebooks read these records where an experiment is too long to run in them.",
        "Accuracies are those after the last epoch, mean ± standard deviation over the",
        "seeds; seconds are those of training one network.",
    ]
    for experiment in experiments:
        lines += ["", f"## {experiment.name}", "", f"{experiment.title}.", ""]
        found = results.get(experiment.name)
        lines += _status(experiment, found) if found else ["**Outstanding**: not run."]
        lines += ["", f"`python -m cpnb.experiments run {experiment.name}`"]
    return "\n".join(lines) + "\n"


def _against(experiment: Experiment, found: Comparison) -> tuple[list[str], list[str]]:
    """Recipes with cells to run, and those recorded as they are not defined now."""
    missing, strange = [], []
    for plan in planned(
        *(experiment.recipes, experiment.data),
        *(experiment.seeds, experiment.tune, experiment.tune_seeds),
    ):
        record = found.records.get(plan.name)
        if record is None or not record.is_complete:
            missing.append(plan.name)
        if record is not None and (
            (record.recipe, record.plan) != (plan.recipe, plan.plan)
            or record.data["source"] != plan.data["source"]
        ):
            strange.append(plan.name)
    return missing, strange


def _status(experiment: Experiment, found: Comparison) -> list[str]:
    """Lines about one comparison: provenance, then a table of the tested networks."""
    missing, strange = _against(experiment, found)
    records = list(found.records.values())
    cells = [cell for record in records for cell in record.cells]
    places = [cell["provenance"] for cell in cells]
    dates = sorted(place["date"][:10] for place in places)
    minutes = sum(cell["start_seconds"] + sum(cell["seconds"]) for cell in cells) / 60

    def all_of(*names: str) -> str:
        said = {" ".join(str(place[name]) for name in names) for place in places}
        return ", ".join(sorted(said))

    versions = [
        ", ".join(sorted({str(place["versions"][name]) for place in places}))
        for name in ("cpnb", "torch", "python")
    ]
    state = f"**outstanding**: {', '.join(missing)}" if missing else "complete"
    if strange:
        names = ", ".join(strange)
        state += f"; **made with another recipe, plan or data than now**: {names}"
    remarks = sorted({place["remark"] for place in places if "remark" in place})
    lines = [
        f"- {state}; {len(cells)} cells, {minutes:.0f} minutes of training in all",
        f"- made {dates[0]} to {dates[-1]} on {all_of('device', 'machine')}, "
        f"{all_of('threads')} thread(s) per cell",
        f"- cpnb {versions[0]}, torch {versions[1]}, Python {versions[2]}; "
        f"commit {all_of('commit')}",
        *(f"- {text}" for text in sorted({r.data["holds"] for r in records})),
        *(f"- {remark}" for remark in remarks),
        "",
        f"| {' | '.join(_HEAD)} |",
        "|---" * len(_HEAD) + "|",
    ]
    for row in found.rows():
        if row["n"] or row["diverged"] or row["failed"]:
            seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
            rate = "none works" if row["failed"] else f"{row['lr']:g}"
            entries = [row["recipe"], rate, str(row["n"])]
            entries += [percent(row["validation"]), percent(row["test"])]
            lines.append(f"| {' | '.join([*entries, str(row['diverged']), seconds])} |")
    return lines
