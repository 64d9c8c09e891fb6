"""Experiments: what is defined can be run, and the committed records are whole."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import cpnb
from cpnb import experiments
from cpnb._compare.describe import describe
from cpnb._compare.record import Record
from cpnb._experiments import truncation
from cpnb.data import Dataset, Split
from cpnb.experiments import (
    EXPERIMENTS,
    RESULTS,
    STARTS,
    read_results,
    run_experiment,
    status_text,
)

TINY = replace(
    EXPERIMENTS["initialization-mnist"],
    data=partial(cpnb.load_data, train_size=64),
    recipes=(
        cpnb.Recipe("unified", "DigitsNet", "canonical", settings={"epochs": 1}),
        cpnb.Recipe("none", "DigitsNet", settings={"epochs": 1}),
    ),
    tune={"lr": (1e-3, 1e-2)},
    seeds=(0, 1),
)
every_experiment = pytest.mark.parametrize("name", EXPERIMENTS)


@pytest.fixture
def defined(monkeypatch):
    """One small experiment in the place of all."""
    for module in (experiments,):
        monkeypatch.setattr(module, "EXPERIMENTS", {TINY.name: TINY})
    return TINY


def command(*arguments):
    """Run the command; its exit status."""
    return experiments.main([str(argument) for argument in arguments])


# --- definitions ----------------------------------------------------------------------


@every_experiment
def test_experiment_is_called_what_it_is_found_by(name):
    experiment = EXPERIMENTS[name]
    assert experiment.name == name
    names = [recipe.name for recipe in experiment.recipes]
    assert len(set(names)) == len(names)
    assert not set(experiment.seeds) & set(experiment.tune_seeds)
    assert experiment.device in ("cpu", "cuda")
    assert ("CPU" in experiment.title) == (experiment.device == "cpu")
    describe(experiment.data)


@pytest.fixture(scope="module")
def grey():
    """A few grey images of MNIST's size."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (40, 1, 28, 28), generator=generator, dtype=torch.uint8)
    split = Split(pixels, torch.arange(40) % 10, (127.5,), (73.9,))
    classes = tuple("0123456789")
    return Dataset("grey", split, split, split, classes, licence="none", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    {
        recipe.name: recipe
        for experiment in EXPERIMENTS.values()
        for recipe in experiment.recipes
        if recipe.network == "LeNet"
    }.values(),
    ids=lambda recipe: recipe.name,
)
def test_recipes_of_experiments_train_a_step(recipe, grey):
    settings = {**recipe.settings, "epochs": 1, "batch_size": 40}
    recipe = replace(recipe, settings=settings, measure=None)
    found = cpnb.compare([recipe], grey, seeds=[0], progress=False)
    (cell,) = found.records[recipe.name].cells
    assert cell["start_validation_loss"] < 10


@pytest.fixture
def kept(monkeypatch):
    """Two fractions instead of nine."""
    monkeypatch.setattr(truncation, "KEPT", (1.0, 0.5))
    return [1.0, 0.5]


def test_truncation_curve_measures_before_and_after_fine_tuning(kept):
    data = cpnb.load_data(train_size=128)
    recipe = cpnb.Recipe("x", "DigitsNet", "canonical", {"rank": 8})
    network = recipe.build(data, 0)
    cpnb.fit(network, data, epochs=3, progress=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    how = {"key": "lam", "epochs": 1, "lr": 0.01, "batch_size": 32}
    curve = truncation.truncation_curve(network, data, 5, **how)
    assert curve["keep"] == kept
    assert curve["before"][0] == round(cpnb.accuracy(network, data.test), 5)
    cut = cpnb.truncate(network, keep=0.5)
    assert curve["parameters"][1] == sum(p.numel() for p in cut.parameters())
    assert curve["before"][1] == round(cpnb.accuracy(cut, data.test), 5)
    how.pop("key")
    cpnb.fit(cut, data, seed=5, progress=False, **how)
    assert curve["after"][1] == round(cpnb.accuracy(cut, data.test), 5)
    for name, value in network.state_dict().items():
        assert value.equal(before[name])


def test_truncation_curve_has_a_gap_where_fine_tuning_diverges(kept):
    data = cpnb.load_data(train_size=32)
    network = cpnb.Recipe("x", "DigitsNet", "canonical", {"rank": 2}).build(data, 0)
    curve = truncation.truncation_curve(network, data, 0, key="lam", epochs=1, lr=1e30)
    assert curve["after"] == [None, None]
    assert None not in curve["before"]


def test_unified_small_has_the_variance_of_torchs_default():
    generator = torch.Generator().manual_seed(0)
    shape = (64, 32, 3, 3)
    lam, factors = STARTS["unified_small"](
        shape, 64, generator=generator, dtype=torch.float64
    )
    # n = 18,432 entries; components are independent, so that the relative spread of
    # the mean square is about 1 % (see test_initializers): five of them.
    variance = cpnb.cp_to_kernel(lam, factors).square().mean().item()
    assert variance * 3 * 32 * 9 == pytest.approx(1, abs=0.05)


# --- the command ----------------------------------------------------------------------


def test_command_lists_what_is_defined(capsys):
    assert command("list") == 0
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines()] == list(EXPERIMENTS)


def test_command_runs_an_experiment_and_goes_on(defined, tmp_path, capsys):
    run = ("run", TINY.name, "--results", tmp_path)
    assert command(*run, "--limit-minutes", 0) == 0
    assert "not complete; the same command goes on" in capsys.readouterr().out
    assert "**Outstanding**: not run" in (tmp_path / "README.md").read_text()
    assert command(*run, "--note", "64 images only") == 0
    assert "not complete" not in capsys.readouterr().out
    text = (tmp_path / "README.md").read_text()
    assert text == status_text(tmp_path)
    assert "- complete; 8 cells" in text and "- 64 images only" in text
    (cell, *_) = Record.load(tmp_path / TINY.name / "none.json").cells
    assert cell["provenance"]["command"] == (
        f"python -m cpnb.experiments run {TINY.name}"
    )


def test_command_says_how_to_go_on_after_an_interrupt(
    defined, tmp_path, capsys, monkeypatch
):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "compare", interrupted)
    assert command("run", TINY.name, "--results", tmp_path) == 130
    assert "the same command goes on with the next cell" in capsys.readouterr().out


def test_command_says_status(defined, capsys, tmp_path):
    assert command("status", "--results", tmp_path, "--write") == 0
    assert capsys.readouterr().out == (tmp_path / "README.md").read_text() + "\n"


def test_command_refuses_an_unknown_experiment(capsys):
    with pytest.raises(SystemExit):
        command("run", "nothing")
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_command_says_when_the_device_is_missing(defined, tmp_path, capsys):
    run = ("run", TINY.name, "--results", tmp_path, "--device", "cuda")
    assert command(*run) == 1
    assert "made for a CUDA device and this machine has none" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# --- status ---------------------------------------------------------------------------


def test_status_names_the_recipes_that_are_outstanding(defined, tmp_path):
    run_experiment(TINY, tmp_path)
    path = tmp_path / TINY.name / "none.json"
    record = Record.load(path)
    record.cells.pop()
    record.save(path)
    assert "- **outstanding**: none; 7 cells" in status_text(tmp_path)
    path.unlink()
    assert "- **outstanding**: none; 4 cells" in status_text(tmp_path)


def test_status_says_of_which_recipe_no_rate_works(monkeypatch, tmp_path):
    def explode(network):
        with torch.no_grad():
            network.fc2.bias.fill_(torch.nan)
        return network

    bad = cpnb.Recipe("bad", "DigitsNet", explode, settings={"epochs": 1})
    experiment = replace(TINY, recipes=(TINY.recipes[1], bad))
    monkeypatch.setattr(experiments, "EXPERIMENTS", {TINY.name: experiment})
    run_experiment(experiment, tmp_path)
    assert "- complete; 6 cells" in status_text(tmp_path)
    assert "| bad | none works | 0 |  |  | 0 |  |" in status_text(tmp_path)


def test_status_says_which_records_the_definition_has_left_behind(
    defined, monkeypatch, tmp_path
):
    run_experiment(TINY, tmp_path)
    assert "- complete; 8 cells" in status_text(tmp_path)
    for change in (
        {"data": partial(cpnb.load_data, train_size=65)},
        {"recipes": (TINY.recipes[0], replace(TINY.recipes[1], normalizer="batch"))},
        {"seeds": (0, 1, 2)},
    ):
        changed = {TINY.name: replace(TINY, **change)}
        monkeypatch.setattr(experiments, "EXPERIMENTS", changed)
        said = status_text(tmp_path)
        assert "**made with another recipe, plan or data than now**: " in said


def test_status_and_run_take_folders_without_records_of_the_experiment(
    defined, tmp_path, capsys
):
    strange = tmp_path / TINY.name / "old_name.json"
    strange.parent.mkdir()
    strange.write_text("{}")
    assert "**Outstanding**: not run." in status_text(tmp_path)
    for words in (("status", "--write"), ("run", TINY.name, "--limit-minutes", 0)):
        folder = tmp_path / words[0]
        assert command(*words, "--results", folder) == 0
        assert (folder / "README.md").is_file()
    capsys.readouterr()


# --- committed records ----------------------------------------------------------------


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no records beside an installed copy")
def test_committed_records_are_small_listed_and_of_the_present_definitions():
    assert (RESULTS / "README.md").read_text() == status_text(RESULTS)
    for folder in filter(lambda path: path.is_dir(), RESULTS.iterdir()):
        experiment = EXPERIMENTS[folder.name]
        recipes = {recipe.name: recipe for recipe in experiment.recipes}
        assert {path.stem for path in folder.iterdir()} <= recipes.keys()
    for name, comparison in read_results(RESULTS).items():
        experiment = EXPERIMENTS[name]
        for recipe in experiment.recipes:
            path = RESULTS / name / f"{recipe.name}.json"
            if recipe.name not in comparison.records:
                continue
            assert path.stat().st_size < 200_000
            assert "/tmp/" not in path.read_text()
            record = comparison.records[recipe.name]
            assert record.recipe == recipe.describe()
            assert record.data["source"] == describe(experiment.data)
            assert record.plan["seeds"] == list(experiment.seeds)
            assert all(cell["provenance"]["commit"] for cell in record.cells)
