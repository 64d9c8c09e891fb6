"""Experiments that are too long for a notebook, and the command that runs them.

``python -m cpnb.experiments list`` says what is defined, ``run NAME`` fills the record
of one experiment cell by cell (a finished cell is never run again: stop it with Ctrl-C
and start it again as you like), and ``status`` says what exists and what is
outstanding. Records live in ``notebooks/results/`` of the repository.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from cpnb._experiments.cells import (
    STARTS,
    Cell,
    Experiment,
    experiment_data,
    fresh_cells,
    run_cell,
    tuning_cells,
)
from cpnb._experiments.record import (
    Record,
    missing,
    new_record,
    read_record,
    record_path,
    runs,
    select,
    settings,
    tuned_rates,
    write_record,
)
from cpnb._experiments.status import text_of_records

__all__ = [
    "EXPERIMENTS",
    "RESULTS",
    "STARTS",
    "Experiment",
    "read_record",
    "run_experiment",
    "runs",
    "select",
    "status_text",
    "tuned_rates",
]

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results"

# The authors' ranks, read from their public code.
_LENET_RANKS = {"conv1": 11, "conv2": 270, "fc1": 128, "fc2": 10}
_FULL = Experiment(
    name="initialization-mnist-full",
    title="MNIST, LeNet, six starts, full size: all images, 20 epochs, 10 seeds (GPU)",
    data="mnist",
    train_size=None,
    validation_size=None,
    ranks=_LENET_RANKS,
    starts=("power", "als", "gaussian", "uniform", "unified", "unified_small"),
    rates=(3e-4, 1e-3, 3e-3, 1e-2),
    tuning_seeds=(100, 101, 102),
    seeds=tuple(range(10)),
    epochs=20,
    batch_size=64,
    optimizer="adam",
)
EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        replace(
            _FULL,
            name="initialization-mnist",
            title="MNIST, LeNet, six starts, reduced size for a CPU: "
            "6,000 training images, 3 epochs, 5 seeds",
            train_size=6000,
            validation_size=1000,
            tuning_seeds=(100,),
            seeds=tuple(range(5)),
            epochs=3,
        ),
        _FULL,
    )
}


def run_experiment(
    experiment: Experiment,
    folder: Path,
    *,
    device: str = "cpu",
    executor: Executor | None = None,
    report: Callable[[str], Any] | None = None,
) -> Record:
    """Run the cells that an experiment's record does not hold yet.

    First all tuning cells, then the fresh seeds at each start's best rate; only these
    read the test split, once each, after their training. The record is written after
    each cell.

    Args:
        experiment: What to run.
        folder: Folder of the record.
        device: Device to train on.
        executor: Runs the cells, for example in several processes; in turn if None.
        report: Called with a line of text after each cell.

    Returns:
        The complete record.

    Raises:
        ValueError: If the folder's record was made with other settings, or a start
            diverged at every rate.
    """
    path = record_path(folder, experiment.name)
    record = read_record(path) if path.exists() else new_record(experiment)
    if record["settings"] != settings(experiment):
        raise ValueError(
            f"{path} was made with other settings than {experiment.name} has now. "
            "Move it away to run the experiment again."
        )
    cells = tuning_cells(experiment)
    for phase in ("tune", "test"):
        if phase == "test":
            cells = fresh_cells(experiment, tuned_rates(record))
        todo = missing(cells, record)
        if todo and not record["data"]:
            record["data"] = repr(
                experiment_data(
                    experiment.data, experiment.train_size, experiment.validation_size
                )
            )
        for number, found in enumerate(_run(experiment, todo, device, executor)):
            record["cells"].append(found)
            write_record(record, path)
            if report is not None:
                left = len(todo) - number - 1
                report(f"{_cell_line(found)}; {left} left to {phase}")
    return record


def _run(
    experiment: Experiment, cells: list[Cell], device: str, executor: Executor | None
) -> Iterator[dict[str, Any]]:
    """Results in the order in which the cells finish."""
    if executor is None:
        for cell in cells:
            yield run_cell(experiment, cell, device)
        return
    waiting = [executor.submit(run_cell, experiment, cell, device) for cell in cells]
    try:
        for future in as_completed(waiting):
            yield future.result()
    finally:
        for future in waiting:
            future.cancel()


def status_text(folder: Path = RESULTS) -> str:
    """What exists in a folder of records and what is outstanding, in Markdown."""
    return text_of_records(EXPERIMENTS.values(), folder)


def _cell_line(cell: dict[str, Any]) -> str:
    scores = cell["validation_accuracy"]
    last = f", validation {scores[-1]:.1%}" if scores else ""
    return (
        f"{cell['phase']} {cell['start']}, rate {cell['lr']:g}, seed {cell['seed']}: "
        f"{cell['status']} in {sum(cell['seconds']):.0f} s{last}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, whose words are in the module's docstring; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cpnb.experiments", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what is defined")
    run = commands.add_parser("run", help="fill the record of one experiment")
    run.add_argument("name", choices=EXPERIMENTS)
    run.add_argument("--device", default="cpu", help="such as cuda")
    run.add_argument("--processes", type=int, default=1, help="one thread each")
    status = commands.add_parser("status", help="what exists, what is outstanding")
    status.add_argument("--write", action="store_true", help="also write README.md")
    for command in (run, status):
        command.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)

    if options.command == "list":
        for experiment in EXPERIMENTS.values():
            print(f"{experiment.name}: {experiment.title}")
        return 0
    if options.command == "run":
        try:
            _run_in_processes(EXPERIMENTS[options.name], options)
        except KeyboardInterrupt:
            print("stopped; the same command goes on with the next cell")
            return 130
    text = status_text(options.results)
    if options.command == "run" or options.write:
        (options.results / "README.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def _run_in_processes(experiment: Experiment, options: argparse.Namespace) -> None:
    with ProcessPoolExecutor(
        options.processes,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        run_experiment(
            experiment,
            options.results,
            device=options.device,
            executor=pool,
            report=lambda line: print(line, flush=True),
        )


if __name__ == "__main__":
    sys.exit(main())
