"""Experiments: what is defined can be run, and the committed records are whole."""

import csv
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import cpnb
from cpnb.methods import first_and_last
from cpnb.train import Comparison, Recipe, build, comparison, load_data
from cpnb.train.data import Dataset, Split

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
import experiments
from experiments import CHECKPOINTS, EXPERIMENTS, RESULTS, STARTS, read_results, status
from networks import SmallConvNet

SETTINGS = {"epochs": 1, "batch_size": 64}
TINY = replace(
    EXPERIMENTS["initialization-mnist"],
    data=partial(load_data, train_size=64),
    recipes=[Recipe(n, "DigitsNet", n, settings=SETTINGS) for n in ("none", "batch")],
    rates=(1e-2,),
    seeds=(0, 1),
)
SHAPES = {"LeNet5": (1, 28, 28), "LeNet": (1, 28, 28), "SmallConvNet": (3, 32, 32)}
RECIPES = {
    f"{recipe.network}-{recipe.name}": recipe
    for each in EXPERIMENTS.values()
    for recipe in each.recipes
    if recipe.network in SHAPES
}


@pytest.fixture
def tiny(monkeypatch):
    """One small experiment in the place of all."""
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"tiny": TINY})
    return "tiny"


@pytest.fixture
def command(tmp_path, capfd):
    """Runs the command on a folder of its own; its exit status and what it said."""
    return lambda *words: (experiments.main(words, tmp_path), capfd.readouterr().out)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_is_of_a_size_for_its_device(name):
    experiment = EXPERIMENTS[name]
    names = [recipe.name for recipe in experiment.recipes]
    assert len(set(names)) == len(names)
    assert not {*experiment.seeds} & {*experiment.tune_seeds}
    assert ("GPU" in experiment.title) == (experiment.device == "cuda")


def example(pixels, statistics):
    split = Split(pixels, torch.arange(len(pixels)) % 10, *statistics)
    return Dataset("x", split, split, split, tuple("0123456789"), "none", 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_experiments_train_a_step(name):
    recipe, generator = RECIPES[name], torch.Generator().manual_seed(0)
    size = (40, *SHAPES[recipe.network])
    pixels = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    data = example(pixels, [(127.5,) * size[1], (73.9,) * size[1]])
    recipe = replace(recipe, settings={**recipe.settings, "epochs": 1})
    found = cpnb.compare([recipe], data, seeds=[0], rates=[1e-3], progress=False)
    assert found.runs.start_validation_loss[0] < 20


@pytest.mark.slow
@pytest.mark.parametrize("row", range(1, 7))
@pytest.mark.parametrize("name", ["cifar10-resnet32-tenth", "cifar10-small-15"])
def test_compressed_networks_hold_their_share_of_the_parameters(name, row):
    share = 0.1 if name.endswith("tenth") else 0.25
    recipes = EXPERIMENTS[name].recipes
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    data = example(pixels, [(0.0,) * 3, (1.0,) * 3])
    dense, small = (build(recipe, data, 0) for recipe in (recipes[0], recipes[row]))
    assert 0.9 * share < count(small) / count(dense) <= share
    for end in first_and_last(dense):
        assert type(small.get_submodule(end)).__module__.startswith("torch.nn.modules")


def test_unified_small_has_the_variance_of_torchs_default():
    generator = torch.Generator().manual_seed(0)
    shape = (64, 32, 3, 3)
    options = {"generator": generator, "dtype": torch.float64}
    lam, factors = STARTS["unified_small"](shape, 64, **options)
    # n = 18,432 entries; components are independent, so that the relative spread of
    # the mean square is about 1 % (see test_initializers): five of them.
    variance = cpnb.cp_to_kernel(lam, factors).square().mean().item()
    assert variance * 3 * 32 * 9 == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("hooks", [[], ["NestedRank"]], ids=["plain", "nested"])
def test_truncation_curve_measures_before_and_after_fine_tuning(monkeypatch, hooks):
    monkeypatch.setattr(experiments, "KEPT", (1.0, 0.5))
    data = load_data(train_size=128)
    recipe = Recipe("x", "DigitsNet", "canonical", {"rank": 8}, hooks)
    network = build(recipe, data, 0)
    cpnb.fit(network, data, epochs=3, progress=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    how = {"epochs": 1, "lr": 0.01, "batch_size": 32}
    whole, half = experiments.truncation_curve(network, data, recipe, 5, **how)
    assert (whole["keep"], half["keep"]) == (1.0, 0.5)
    assert whole["before"] == cpnb.accuracy(network, data.test)
    key = "nested" if hooks else "lam"
    cut = cpnb.truncate(network, keep=0.5, key=key)
    assert half["parameters"] == count(cut)
    assert half["before"] == cpnb.accuracy(cut, data.test)
    cpnb.fit(cut, data, seed=5, progress=False, **how)
    assert half["after"] == cpnb.accuracy(cut, data.test)
    for name, value in network.state_dict().items():
        assert value.equal(before[name])
    gap, _ = experiments.truncation_curve(network, data, recipe, 0, epochs=1, lr=1e30)
    assert gap["after"] is None and gap["before"] == whole["before"]


def test_command_runs_an_experiment_once(command, tiny, tmp_path, monkeypatch):
    def stops(cell, *rest):
        if cell[0] == "batch":
            raise KeyboardInterrupt
        return train_cell(cell, *rest)

    train_cell = comparison.train_cell
    assert command("list") == (0, f"tiny: {TINY.title}\n")
    assert command("status") == (0, "tiny: no record\n")
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "train_cell", stops)
        result, said = command("run", tiny)
    assert result == 130 and "the same command goes on" in said
    assert "tiny: not complete, 2 trainings" in command("status")[1]
    result, said = command("run", tiny)
    assert result == 0 and "test_std" in said
    assert "tiny: complete, 4 trainings" in command("status")[1]
    made = (tmp_path / tiny / "runs.csv").read_bytes()
    result, said = command("run", tiny)
    assert result == 0 and "4 trainings" in said and "nothing trained" in said
    assert (tmp_path / tiny / "runs.csv").read_bytes() == made
    command("run", tiny, "--again")
    assert (tmp_path / tiny / "runs.csv").read_bytes() != made  # other seconds


@pytest.mark.slow
def test_command_runs_an_experiment_in_processes(command, tiny, tmp_path):
    assert command("run", tiny, "--workers", "2")[0] == 0
    found = Comparison.load(tmp_path / tiny)
    assert len(found.runs) == 4 and set(found.runs.threads) == {1}


def test_status_says_which_records_are_of_old_definitions(command, tiny, monkeypatch):
    command("run", tiny)
    changed = replace(TINY.recipes[1], options={"skip": ["fc1"]})
    for change in ({"recipes": [TINY.recipes[0], changed]}, {"seeds": (0, 1, 2)}):
        monkeypatch.setitem(experiments.EXPERIMENTS, tiny, replace(TINY, **change))
        assert "tiny: not as it is defined now" in command("status")[1]
    monkeypatch.setitem(experiments.EXPERIMENTS, tiny, replace(TINY, recipes=[changed]))
    result, said = command("run", tiny)
    assert result == 1 and "was made with another" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_command_says_when_the_device_is_missing(command, tiny, tmp_path):
    for words in ((), ("--again",)):  # which deletes nothing, either
        result, said = command("run", tiny, "--device", "cuda", *words)
        assert result == 1 and "made for a GPU and there is none" in said
    assert list(tmp_path.iterdir()) == []


def test_readme_says_how_long_the_list_for_a_gpu_takes(capfd):
    experiments.main(["gpu", "--dry-run"])
    (total,) = re.findall(r"in all (\d+ minutes on one H100)", capfd.readouterr().out)
    text = " ".join((RESULTS.parents[1] / "README.md").read_text().split())
    assert f"{total} (estimated" in text


@pytest.mark.slow
def test_gpu_command_does_all_of_its_list_and_keeps_to_its_time(
    command, tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(experiments, "GUESSES", {"tiny": 50_000})
    result, said = command("gpu", "--minutes", "5", "--dry-run")
    assert result == 0 and re.search(r"in all \d+ minutes on one H100, estimated", said)
    assert list(tmp_path.iterdir()) == []
    assert command("gpu", "--minutes", "0.01", "--device", "cpu")[0] == 0
    assert list(tmp_path.iterdir()) == []
    words = ["--minutes", "5", "--device", "cpu", "--workers", "2"]
    result, said = command("gpu", *words)
    assert result == 0 and re.search(r"batch +8 .*canonical chain +\d", said)
    made = read_results(tmp_path)["tiny"]
    assert status("tiny", made).startswith("complete, 4 trainings")


def test_a_folder_of_records_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder is '.*nix', which is not"):
        read_results(tmp_path / "nix")


COMMITTED = read_results()


def loaded(folder):
    """A checkpoint's canonical network, and the sweep beside it."""
    kept = torch.load(folder / "cifar10-small.pt")
    network = cpnb.canonicalize(SmallConvNet(), init="unified")
    network.load_state_dict(kept["canonical"])
    assert sum(v.numel() for v in kept["dense"].values()) == count(SmallConvNet())
    return network, cpnb.RankSweep.load(folder / "cifar10-small-sweep.json")


@pytest.mark.slow
def test_checkpoint_holds_a_network_and_the_sweep_of_its_canonical_form(
    tmp_path, monkeypatch
):
    pixels = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8)
    data = example(pixels, [(127.5,) * 3, (73.9,) * 3])
    made = replace(EXPERIMENTS["cifar10-small"], data=lambda: data)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"cifar10-small": made})
    record = COMMITTED["cifar10-small"]
    experiments.checkpoint(record, tmp_path, epochs=1, progress=False)
    for folder in (tmp_path, CHECKPOINTS):
        network, sweep = loaded(folder)
        sweep.check_model(network)
    assert sweep.images == 5000 and sweep.status == "finished"
    finals = record.finals.query("recipe == 'none'").validation_accuracy
    assert abs(sweep.curve("*").accuracy.iloc[-1] - finals.mean()) < 0.03


def test_committed_records_are_those_that_the_text_lists():
    text = (RESULTS / "README.md").read_text()
    folders = [path.name for path in RESULTS.iterdir() if path.is_dir()]
    assert sorted(COMMITTED) == sorted(folders)
    for name, found in COMMITTED.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert row.endswith(f"| {len(found.runs)} |")


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_record_is_of_the_present_definition(name):
    found = COMMITTED[name]
    assert re.match("(not )?complete, ", status(name, found))
    name_of_data, *sizes = EXPERIMENTS[name].data.args
    assert found.data.startswith(f"Dataset('{name_of_data}'")
    for what, size in zip(("train", "validation"), sizes, strict=False):
        assert f"{what} {size}" in found.data
    assert found.runs.commit.str.len().min() >= 40
    for path in (RESULTS / name).iterdir():
        assert path.stat().st_size < 200_000
        assert "/tmp/" not in path.read_text()


def test_committed_record_reads_as_its_rows_say():
    """Check the table of one recipe against arithmetic on the file itself."""
    with (RESULTS / "mnist-lenet5" / "runs.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["recipe"] == "weight"]
    scores = {}
    for row in rows:
        if row["phase"] == "tune":
            score = float(row["validation_accuracy"])
            scores[float(row["lr"])] = scores.get(float(row["lr"]), 0) + score
    best = max(scores, key=scores.get)
    assert min(scores) < best < max(scores)
    tests = [float(row["test_accuracy"]) for row in rows if row["phase"] == "final"]
    found = COMMITTED["mnist-lenet5"].table().loc["weight"]
    assert (found.lr, found.n) == (best, len(tests))
    assert found.test == pytest.approx(sum(tests) / len(tests))
