"""Compare recipes: a rate tuned for each, then fresh seeds, the test set read once."""

from __future__ import annotations

import csv
import inspect
import itertools
import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock

from cpnb.methods.factorized import FrobeniusDecay, ProximalL1
from cpnb.methods.normalizers import NORMALIZERS
from cpnb.methods.ranks import NestedRank
from cpnb.train.batches import Augment
from cpnb.train.data import Dataset
from cpnb.train.evaluation import accuracy, evaluate, paired_difference
from cpnb.train.loop import fit
from cpnb.train.models import DigitsNet, LeNet
from cpnb.train.records import MEASURES, write_text

# What recipes name; add your own: REGISTRY["my_net"] = MyNet. Called are networks with
# num_classes and generator, hooks with their options, normalizers with a network, their
# options and, if they take these, a generator and data, a batch of images; measures
# with (network, data, recipe, seed).
REGISTRY: dict[str, Callable[..., Any]] = {
    "DigitsNet": DigitsNet,
    "LeNet": LeNet,
    "NestedRank": NestedRank,
    "FrobeniusDecay": FrobeniusDecay,
    "ProximalL1": ProximalL1,
    **{name: partial(function, skip=()) for name, function in NORMALIZERS.items()},
}

# A network's random numbers and the order of the images come from different seeds.
_START_SEED_OFFSET = 1_000_000
_START_IMAGES = 256
_DIGITS = 5  # after the point, in a record

CELL = ["recipe", "phase", "lr", "seed"]  # what tells one training from all others
WHERE = ["device", "processor", "threads", "cpnb", "torch", "python", "commit", "date"]
RUN_COLUMNS = [
    *CELL, "status", "epochs", "validation_accuracy", "test_accuracy",
    "start_validation_loss", "start_seconds", "seconds", "images_per_second", *WHERE,
]  # fmt: skip
CURVE_COLUMNS = [*CELL, "epoch", *MEASURES, "seconds"]
TEXTS = {"recipe", "phase", "status", *WHERE} - {"threads"}  # all others are numbers
_cell = itemgetter(*CELL)


@dataclass
class Recipe:
    """How a network is made and trained, in JSON's types; functions by their name.

    Attributes:
        name: Its name in tables and figures.
        network, normalizer: Names in `REGISTRY`.
        options: Keyword arguments of the normalizer.
        hooks: Names in `REGISTRY`, or dicts of a ``name`` and options.
        settings: Keyword arguments of `cpnb.fit`, for ``augment`` those of `Augment`.
    """

    name: str
    network: str
    normalizer: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)
    hooks: Sequence[str | Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make lists of tuples, so that a recipe equals the one read from its file."""
        text = json.dumps([self.options, self.hooks, self.settings])
        self.options, self.hooks, self.settings = json.loads(text)


@dataclass(repr=False)
class Comparison:
    """What is planned and what is known of some recipes on the same data.

    Attributes:
        recipes, data: By name; what the data set says of itself.
        rates, tune_seeds, seeds, measure, tune_epochs: See `cpnb.compare`.
        runs: A row per training: ``phase`` "tune" or "final", ``status`` of `Run`,
            accuracies after the last epoch, ``start_seconds`` of making the network.
        curves, measured: A row per training and epoch; what ``measure`` returned.
    """

    recipes: dict[str, Recipe]
    data: str
    rates: list[float]
    tune_seeds: list[int]
    seeds: list[int]
    measure: Any = None
    tune_epochs: int | None = None

    def __post_init__(self) -> None:
        """Begin with empty tables."""
        self.runs = _empty(RUN_COLUMNS)
        self.curves = _empty(CURVE_COLUMNS)
        self.measured = _empty(CELL)

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read a record but for damaged lines and trainings without a whole curve."""
        path = Path(path).expanduser()
        plan = json.loads((path / "recipes.json").read_text(encoding="utf-8"))
        recipes = [Recipe(**recipe) for recipe in plan.pop("recipes")]
        found = cls({recipe.name: recipe for recipe in recipes}, **plan)
        tables = [
            _read(path / f"{name}.csv") for name in ("runs", "curves", "measured")
        ]
        # A run is written after its curve: without all epochs it is not done.
        epochs = Counter(map(_cell, tables[1]))
        done = {_cell(run) for run in tables[0] if epochs[_cell(run)] == run["epochs"]}
        if lacking := sum(_cell(run) not in done for run in tables[0]):
            warnings.warn(
                f"{path}: {lacking} trainings lack whole curves", stacklevel=2
            )
        found.add(*([row for row in rows if _cell(row) in done] for rows in tables))
        return found

    def save(self, path: str | Path) -> None:
        """Write the record to a folder, as text; a crash leaves whole files."""
        path = Path(path).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        plan = asdict(self)
        recipes = ",\n".join(json.dumps(each) for each in plan.pop("recipes").values())
        head = json.dumps(plan, ensure_ascii=False).removesuffix("}")
        texts = {"recipes.json": f'{head}, "recipes": [\n{recipes}\n]}}\n'}
        texts["curves.csv"] = self.curves.to_csv(index=False)
        if len(self.measured):
            texts["measured.csv"] = self.measured.to_csv(index=False)
        texts["runs.csv"] = self.runs.to_csv(index=False)
        for name, text in texts.items():
            write_text(path / name, text)

    def add(self, runs: list[dict], curves: list[dict], measured: list[dict]) -> None:
        """Take in rows of trainings that are not held yet, in any order."""
        held = {*self.runs[CELL].itertuples(index=False, name=None)}

        def new(rows: list[dict]) -> list[dict]:
            return [row for row in rows if _cell(row) not in held]

        self.runs = self._joined(self.runs, new(runs))
        self.curves = self._joined(self.curves, new(curves))
        self.measured = self._joined(self.measured, new(measured))

    def exchange(self, path: str | Path) -> None:
        """Take in what a folder's record has beyond this one, then write it all there.

        One process at a time; a record of something else is refused.
        """
        path = Path(path).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path / ".lock"):
            if (path / "recipes.json").exists():
                self._take_in(Comparison.load(path), path)
            self.save(path)

    def _take_in(self, found: Comparison, path: Path) -> None:
        fixed = ("data", "measure", "tune_epochs")
        old = {name: getattr(found, name) for name in fixed} | found.recipes
        new = old | {name: getattr(self, name) for name in fixed} | self.recipes
        for name in old:
            if old[name] != new[name]:
                raise ValueError(
                    f"{path} was made with another {name}: {old[name]}, expected "
                    f"{new[name]}. Move it away or choose another folder."
                )
        self.recipes |= found.recipes
        tables = (found.runs, found.curves, found.measured)
        self.add(*(table.to_dict("records") for table in tables))

    def _joined(self, table: pd.DataFrame, rows: list[dict]) -> pd.DataFrame:
        place = {name: number for number, name in enumerate(self.recipes)}
        rows = [*table.to_dict("records"), *rows]
        rows.sort(key=lambda row: (place[row["recipe"]], *_cell(row)[1:]))
        return pd.DataFrame(rows) if rows else table

    @property
    def best(self) -> dict[str, float | None]:
        """The rate of each recipe with the best mean validation accuracy in tuning.

        One under which any diverged is out. None if all are, or while a run is missing.
        """
        return {name: self._tuned(name)[1] for name in self.recipes}

    def _tuned(self, name: str) -> tuple[list[float], float | None]:
        """The rates to try of a recipe and, when all are tried, the best of them.

        Where the best is the smallest or largest, the next one is to be tried, too;
        where all are alike, as networks that learn nothing are, some smaller ones.
        """
        rates = sorted(self.rates)
        if len(rates) == 1:  # nothing to choose
            return rates, rates[0]
        runs: Any = self.runs[(self.runs.recipe == name) & (self.runs.phase == "tune")]
        runs = runs[runs.seed.isin(self.tune_seeds)]
        counts = runs.groupby("lr").size()
        scores = runs.validation_accuracy.where(runs.status == "finished", -math.inf)
        means = scores.groupby(runs.lr).mean()
        while all(counts.get(lr, 0) == len(self.tune_seeds) for lr in rates):
            own = means[rates]
            inner, top = own[1:-1].max(), own.max()
            alike = own.min() == top and rates[0] > min(self.rates) / 100  # as chance
            if top == -math.inf or (inner == top and not alike):
                return rates, None if top == -math.inf else own[1:-1].idxmax()
            ends = rates[:2] if own.idxmax() == rates[0] else rates[:-3:-1]
            rates = sorted([*rates, float(f"{ends[0] ** 2 / ends[1]:.3g}")])
        return rates, None

    @property
    def finals(self) -> pd.DataFrame:
        """The runs of the fresh seeds at the chosen rates, those that diverged too."""
        runs: Any = self.runs
        chosen = runs.lr == runs.recipe.map(self.best).astype(float)
        return runs[chosen & (runs.phase == "final") & runs.seed.isin(self.seeds)]

    @property
    def final_curves(self) -> pd.DataFrame:
        """The curves of those that did not diverge, for `plots.plot_training`."""
        finals = self.finals
        return self.curves.merge(finals.loc[finals.status == "finished", CELL])

    def missing(self) -> list[tuple[str, str, float, int]]:
        """The next trainings, as `CELL`: final ones once their rate is chosen."""
        cells: list[tuple[str, str, float, int]] = []
        for name in self.recipes:
            rates, best = self._tuned(name)
            if len(rates) > 1:
                cells += itertools.product([name], ["tune"], rates, self.tune_seeds)
            if best is not None:
                cells += [(name, "final", best, seed) for seed in self.seeds]
        done = set(self.runs[CELL].itertuples(index=False, name=None))
        return [cell for cell in cells if cell not in done]

    def recipe(self, name: str, phase: str) -> Recipe:
        """A recipe as it is trained in a phase."""
        recipe = self.recipes[name]
        if phase == "final" or self.tune_epochs is None:
            return recipe
        return replace(recipe, settings={**recipe.settings, "epochs": self.tune_epochs})

    def table(self) -> pd.DataFrame:
        """One row per recipe, from its final runs.

        ``lr`` is the chosen rate, ``n`` networks were tested, deviations of a sample.
        """
        finals = self.finals
        finished = finals[finals.status == "finished"]
        groups = finished.groupby("recipe")
        table = pd.DataFrame({"lr": pd.Series(self.best, dtype=float)})
        table["n"] = [(finished.recipe == n).sum() for n in self.recipes]
        table["diverged"] = [(finals.recipe == n).sum() for n in self.recipes] - table.n
        for split in ("test", "validation"):
            table[split] = groups[f"{split}_accuracy"].mean()
            table[f"{split}_std"] = groups[f"{split}_accuracy"].std()
        return table.join(groups[["seconds", "images_per_second"]].mean())

    def against(self, reference: str) -> pd.DataFrame:
        """Test accuracy of each recipe less that of one, in points, seed by seed.

        Columns as in `paired_difference`: ``mean``, ``half``, ``n``, ``told_apart``.
        """
        finals = self.finals.assign(points=100 * self.finals.test_accuracy)
        points = finals.pivot(index="seed", columns="recipe", values="points")
        names = [name for name in self.recipes if name in points]
        rows = [paired_difference(points[n], points[reference]) for n in names]
        table = pd.DataFrame(rows, index=names)
        return table.assign(told_apart=[row.told_apart for row in rows])


def compare(
    recipes: Sequence[Recipe],
    data: Dataset | Callable[[], Dataset],
    *,
    rates: Sequence[float],
    seeds: Iterable[int],
    tune_seeds: Iterable[int] = (100,),
    tune_epochs: int | None = None,
    measure: str | Mapping[str, Any] | None = None,
    device: str = "cpu",
    executor: Executor | None = None,
    path: str | Path | None = None,
    limit: float = math.inf,
    progress: bool = True,
) -> Comparison:
    """Tune the rate of each recipe, train it from fresh seeds, and test each network.

    The rate with the best mean validation accuracy after the last epoch wins. Only the
    networks of the fresh seeds meet the test split, once each, after their training.
    Stopped with Ctrl-C, the same call goes on from the record in ``path``; more
    recipes, rates or seeds may be asked for later.

    Args:
        recipes: What to compare.
        data: A data set, or a function that loads it, in each process for itself.
        rates: Learning rates to begin with. Where the best is the smallest or largest,
            the next beyond it, at the same ratio, is tried until it is not.
        seeds: Fresh seeds, of the networks that are tested at the chosen rate.
        tune_seeds: Other seeds, with which every recipe is trained at every rate.
        tune_epochs: Epochs of these trainings, if fewer than a recipe's own will do.
        measure: More to measure on each tested network: a function in `REGISTRY`, by
            its name or a dict of a ``name`` and options, that returns columns.
        device: Device to train on.
        executor: Trains in other processes, where the same must be registered.
        path: Folder of the record, to which each training is written when it ends.
        limit: Seconds after which no further training begins.
        progress: Show a progress bar over the trainings.
    """
    from tqdm import tqdm

    for recipe in recipes:  # what would fail after other trainings
        inspect.signature(fit).bind(None, None, **recipe.settings)
        for entry in (recipe.network, recipe.normalizer, *recipe.hooks, measure):
            if entry is not None:
                registered(entry)
    plan = Comparison(
        recipes={recipe.name: recipe for recipe in recipes},
        data=repr(data() if callable(data) else data),
        rates=[*dict.fromkeys(map(float, rates))],
        tune_seeds=[*dict.fromkeys(map(int, tune_seeds))],
        seeds=[*dict.fromkeys(map(int, seeds))],
        measure=measure,
        tune_epochs=tune_epochs,
    )
    if len(plan.recipes) < len(recipes):
        names = [recipe.name for recipe in recipes]
        raise ValueError(f"recipes have the names {names}, expected each once.")
    if shared := {*plan.seeds} & {*plan.tune_seeds}:
        raise ValueError(f"tune_seeds shares {[*shared]} with seeds, expected others.")
    if path is not None:
        plan.exchange(path)
    with tqdm(unit=" runs", disable=not progress) as bar:

        def take(run: dict, curve: list[dict], measured: list[dict]) -> None:
            plan.add([run], curve, measured)
            if path is not None:
                plan.exchange(path)
            bar.set_postfix_str("{recipe}, lr {lr:g}: {status}".format(**run))
            bar.update()

        end = time.monotonic() + limit
        while (cells := plan.missing()) and time.monotonic() < end:
            bar.total = bar.n + len(cells)
            tasks = [(c, plan.recipe(*c[:2]), data, measure, device) for c in cells]
            _run(tasks, executor, take, end)
    return plan


def _run(tasks: list[tuple], executor: Executor | None, take: Any, end: float) -> None:
    """Do trainings here or through an executor, and take each as soon as it ended."""
    if executor is None:
        for task in tasks:
            if time.monotonic() < end:
                take(*train_cell(*task))
        return
    # A pool begins what is submitted to it, and one more; a cluster has a queue.
    most = getattr(executor, "_max_workers", len(tasks))
    left, waiting = iter(tasks), set[Future]()
    try:
        while True:
            room = most - len(waiting) if time.monotonic() < end else 0
            new = itertools.islice(left, room)
            waiting |= {executor.submit(train_cell, *task) for task in new}
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                take(*future.result())
                waiting.remove(future)
    finally:  # after Ctrl-C or an error: begin nothing, lose nothing that ended
        for future in waiting:
            if not future.cancel() and future.done() and not future.exception():
                take(*future.result())


def registered(entry: str | Mapping[str, Any]) -> partial[Any]:
    """The function of a name in `REGISTRY`, or of a dict of a ``name`` and options."""
    options = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = options.pop("name")
    if name not in REGISTRY:
        raise ValueError(f"name is {name!r}, expected one in REGISTRY: {[*REGISTRY]}.")
    return partial(REGISTRY[name], **options)


def build(recipe: Recipe, data: Dataset, seed: int) -> torch.nn.Module:
    """Make a recipe's network; a start that takes data gets the first images."""
    generator = torch.Generator().manual_seed(seed + _START_SEED_OFFSET)
    make = registered(recipe.network)
    network = make(num_classes=len(data.classes), generator=generator)
    apply = registered(recipe.normalizer)
    takes = inspect.signature(apply).parameters
    options = dict(recipe.options)
    if "generator" in takes:
        options["generator"] = generator
    if "data" in takes:
        first = replace(data.train, images=data.train.images[:_START_IMAGES])
        options["data"] = first.standardized()
    with warnings.catch_warnings():  # what is to be trained need keep nothing
        warnings.filterwarnings("ignore", "the CP form keeps")
        return apply(network.to(data.train.images.device), **options)


def train_cell(
    cell: tuple, recipe: Recipe, data: Any, measure: Any, device: str
) -> tuple[dict, list[dict], list[dict]]:
    """Train one network; its run, its curve, what else is measured, as rows."""
    key: dict[str, Any] = dict(zip(CELL, cell, strict=True))
    data = (data() if callable(data) else data).to(device)
    begin = time.perf_counter()
    network = build(recipe, data, key["seed"])
    start_seconds = time.perf_counter() - begin
    start_loss = evaluate(network, data.validation)["loss"]
    settings = {**recipe.settings, "lr": key["lr"], "seed": key["seed"]}
    if settings.get("augment"):
        settings["augment"] = Augment(**settings["augment"])
    hooks = [registered(hook)() for hook in recipe.hooks]
    run = fit(network, data, hooks=hooks, progress=False, **settings)
    if run.status == "interrupted":
        raise KeyboardInterrupt
    curve = [key | {name: _rounded(v) for name, v in e.items()} for e in run.history]
    images = len(data.train.labels) * len(run.history)
    is_tested = key["phase"] == "final" and run.status == "finished"
    row = {
        **key,
        "status": run.status,
        "epochs": len(run.history),
        "validation_accuracy": curve[-1]["validation_accuracy"] if curve else None,
        "test_accuracy": _rounded(accuracy(network, data.test)) if is_tested else None,
        "start_validation_loss": _rounded(start_loss),
        "start_seconds": _rounded(start_seconds),
        "seconds": _rounded(run.seconds),
        "images_per_second": _rounded(images / run.seconds) if images else None,
        **{name: run.provenance[name] or "" for name in WHERE},
    }
    measured = []
    if is_tested and measure is not None:
        table = pd.DataFrame(registered(measure)(network, data, recipe, key["seed"]))
        measured = [key | values for values in table.round(_DIGITS).to_dict("records")]
    return row, curve, measured


def _empty(columns: list[str]) -> pd.DataFrame:
    kinds = {name: str if name in TEXTS else float for name in columns}
    return pd.DataFrame({name: pd.Series(dtype=kinds[name]) for name in columns})


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows of a table; one that cannot be read is reported and left out."""
    if not path.exists():
        return []
    head, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
    names = head.strip().split(",")
    rows = []
    for number, line in enumerate(lines, start=2):
        try:
            if not line.endswith("\n"):
                raise ValueError("the line ends early")
            row: dict[str, Any] = dict(zip(names, *csv.reader([line]), strict=True))
            for name in row.keys() - TEXTS:
                row[name] = _value(name, row[name])
            rows.append(row)
        except ValueError as error:
            warnings.warn(f"{path}, line {number} is left out: {error}.", stacklevel=4)
    return rows


def _value(name: str, text: str) -> Any:
    """A number, or None; a measure's own columns may hold texts."""
    try:
        return json.loads(text or "null")
    except ValueError:
        if name in {*RUN_COLUMNS, *CURVE_COLUMNS}:
            raise
        return text


def _rounded(value: float) -> float | None:
    return round(value, _DIGITS) if math.isfinite(value) else None
