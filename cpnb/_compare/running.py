"""Run tasks here or through an executor, and lose nothing that is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from typing import Any

from cpnb._compare.cells import Task, train


def run_tasks(
    tasks: Sequence[Task],
    executor: Executor | None,
    keep: Callable[[Task, dict[str, Any]], None],
    title: str | None,
) -> None:
    """Run tasks and keep the outcome of each as soon as it is there.

    Args:
        tasks: What to run.
        executor: Where to; here, in turn, if None.
        keep: Called with a task and its outcome.
        title: Of the progress bar; none is shown if None.

    Raises:
        KeyboardInterrupt: After Ctrl-C, with everything kept that had finished.
    """

    def take(task: Task, found: dict[str, Any] | None) -> None:
        if found is not None:
            keep(task, found)
            bar.set_postfix_str(_line(found["cells"][-1]), refresh=False)
            bar.update(len(found["cells"]))

    with _bar(title, tasks) as bar:
        if executor is None:
            for task in tasks:
                take(task, train(task))
            return
        waiting = {executor.submit(train, task): task for task in tasks}
        try:
            for future in as_completed(list(waiting)):
                take(waiting[future], future.result())
                del waiting[future]
        finally:
            # After Ctrl-C or an error: nothing new, and nothing finished is lost.
            for future, task in waiting.items():
                if not future.cancel() and future.done() and not future.exception():
                    take(task, future.result())


def _bar(title: str | None, tasks: Sequence[Task]) -> Any:
    from tqdm import tqdm

    total = sum(len(task.cells) for task in tasks)
    disable = title is None or not total
    return tqdm(total=total, desc=title, unit=" cells", disable=disable)


def _line(cell: dict[str, Any]) -> str:
    scores = cell["validation_accuracy"]
    last = f", validation {scores[-1]:.1%}" if scores else ""
    return f"lr {cell['lr']:g}, seed {cell['seed']}: {cell['status']}{last}"
