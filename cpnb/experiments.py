"""Experiments that are too long for a notebook, and the command that runs them.

``python -m cpnb.experiments list`` says what is defined, ``run NAME`` fills the records
of one experiment cell by cell (a finished cell is never run again: stop it with Ctrl-C
and start it again as you like), and ``status`` says what exists and what is
outstanding. Records live in ``notebooks/results/`` of the repository.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch

from cpnb._experiments.definitions import EXPERIMENTS, Experiment
from cpnb._experiments.starts import STARTS
from cpnb._experiments.status import text_of_records
from cpnb.comparison import Comparison, compare

__all__ = [
    "EXPERIMENTS",
    "RESULTS",
    "STARTS",
    "Experiment",
    "read_results",
    "run_experiment",
    "status_text",
]

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results"


def run_experiment(
    experiment: Experiment,
    folder: Path = RESULTS,
    *,
    device: str | None = None,
    executor: Executor | None = None,
    limit: float = math.inf,
    remark: str = "",
) -> Comparison:
    """Run what the records of an experiment do not hold yet.

    Args:
        experiment: What to run.
        folder: Folder of all records; this experiment's are in the one of its name.
        device: Device to train on; the one that the experiment is made for if None.
        executor: As in `cpnb.compare`.
        limit: As in `cpnb.compare`.
        remark: Kept with the cells: what a reader should know, as of the data.

    Returns:
        The comparison, as `cpnb.compare` leaves it.
    """
    note = {"command": f"python -m cpnb.experiments run {experiment.name}"}
    return compare(
        experiment.recipes,
        experiment.data,
        seeds=experiment.seeds,
        tune=experiment.tune,
        tune_seeds=experiment.tune_seeds,
        executor=executor,
        results=folder / experiment.name,
        device=device or experiment.device,
        limit=limit,
        note=note | ({"remark": remark} if remark else {}),
    )


def read_results(folder: Path | str = RESULTS) -> dict[str, Comparison]:
    """The comparisons in a folder of records, by experiment, as they are defined."""
    found = {}
    for name, experiment in EXPERIMENTS.items():
        there = {path.stem for path in (Path(folder) / name).glob("*.json")}
        names = [recipe.name for recipe in experiment.recipes if recipe.name in there]
        if names:
            found[name] = Comparison.load(Path(folder) / name, names)
    return found


def status_text(folder: Path | str = RESULTS) -> str:
    """What exists in a folder of records and what is outstanding, in Markdown."""
    return text_of_records(EXPERIMENTS.values(), read_results(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, whose words are in the module's docstring; its exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "list":
        for experiment in EXPERIMENTS.values():
            print(f"{experiment.name}: {experiment.title}")
        return 0
    if options.command == "run":
        experiment = EXPERIMENTS[options.name]
        device = options.device or experiment.device
        if device.startswith("cuda") and not torch.cuda.is_available():
            print(
                f"{experiment.name} is made for a CUDA device and this machine has "
                "none. Pass --device cpu to run it here, however long it takes."
            )
            return 1
        try:
            with _processes(options.processes) as executor:
                done = run_experiment(
                    experiment,
                    options.results,
                    device=device,
                    executor=executor,
                    limit=60 * options.limit_minutes,
                    remark=options.note,
                )
        except KeyboardInterrupt:
            print("stopped; the same command goes on with the next cell")
            return 130
        print(done)
        if not done.is_complete:
            print("not complete; the same command goes on with the next cell")
    text = status_text(options.results)
    if options.command == "run" or options.write:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "README.md").write_text(text, encoding="utf-8")
    if options.command == "status":
        print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cpnb.experiments", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what is defined")
    run = commands.add_parser("run", help="fill the records of one experiment")
    run.add_argument("name", choices=EXPERIMENTS)
    run.add_argument(
        "--device", help="such as cpu or cuda; the experiment's own if not"
    )
    run.add_argument("--processes", type=int, default=1, help="one thread each")
    run.add_argument(
        "--limit-minutes",
        type=float,
        default=math.inf,
        metavar="M",
        help="stop after so many minutes, at the end of an epoch",
    )
    run.add_argument("--note", default="", help="a remark to keep, such as on the data")
    status = commands.add_parser("status", help="what exists, what is outstanding")
    status.add_argument("--write", action="store_true", help="also write README.md")
    for command in (run, status):
        command.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    return parser


@contextmanager
def _processes(count: int) -> Iterator[Executor | None]:
    """So many processes of one thread each; None for this one alone, as it is."""
    if count == 1:
        yield None
        return
    with ProcessPoolExecutor(
        count,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        yield pool


if __name__ == "__main__":
    sys.exit(main())
