"""Recipes: described the same everywhere, refused early, built from a seed alone."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import cpnb
from cpnb import Hook, ParameterRatio, Recipe
from cpnb._compare.describe import describe
from cpnb.recipes import NETWORKS


def tiny(generator):
    """A linear network for 8×8 images."""
    return nn.Sequential(nn.Flatten(), cpnb.CPLinear(64, 10, generator=generator))


def measured(network, data, seed):
    """Something to measure."""
    return {"seed": seed}


def scaled(by):
    """A normalizer that takes a number from around it."""

    def scale(network):
        network[1].lam.data *= by
        return network

    return scale


DIGITS = cpnb.load_data()

EVERYTHING = Recipe(
    "all-of_it+1.0",
    tiny,
    "canonical",
    {"rank": ParameterRatio(0.5), "init": cpnb.unified},
    hooks=(Hook, partial(Hook)),
    settings={"epochs": 2, "optimizer": "sgd", "schedule": None},
    measure=measured,
)


def test_recipe_is_described_in_the_types_of_json():
    said = EVERYTHING.describe()
    assert json.loads(json.dumps(said)) == said
    assert said["network"] == f"{__name__}.tiny"
    assert said["options"] == {
        "rank": {"call": "cpnb.ParameterRatio", "ratio": 0.5},
        "init": "cpnb.unified",
    }
    assert said["hooks"] == ["cpnb.Hook", {"call": "cpnb.Hook"}]


def test_recipe_survives_the_way_to_another_process():
    again = pickle.loads(pickle.dumps(EVERYTHING))
    assert again.describe() == EVERYTHING.describe()


def test_describe_tells_arguments_of_partials_apart():
    first, second = (describe(partial(cpnb.load_data, seed=seed)) for seed in (0, 1))
    assert first == {"call": "cpnb.load_data", "seed": 0} != second


@pytest.mark.parametrize("value", [object(), torch.zeros(2), {1, 2}])
def test_recipe_refuses_what_a_record_cannot_describe(value):
    with pytest.raises(TypeError, match=f"options holds a {type(value).__name__}"):
        Recipe("x", "LeNet", options={"given": value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, r"name is 'a/b', expected letters, digits"),
        ({"network": "LeNet5"}, r"network is 'LeNet5', expected one of 'DigitsNet'"),
        ({"normalizer": "wieght"}, r"normalizer is 'wieght', expected one of 'none'"),
        ({"settings": {"epoch": 1}}, r"settings holds \['epoch'\], expected arguments"),
        ({"settings": {"seed": 1}}, r"settings holds \['seed'\]"),
    ],
)
def test_recipe_refuses_what_would_fail_after_the_first_training(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"name": "x", "network": "LeNet"} | changes)


def test_recipe_builds_the_same_network_from_the_same_seed():
    recipe = Recipe("x", "DigitsNet", "canonical", {"rank": 2, "init": "power"})
    first, again, other = (recipe.build(DIGITS, seed) for seed in (0, 0, 1))
    assert first.state_dict().keys() == again.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert tensor.equal(again.state_dict()[name])
    assert not first.conv2.weight.equal(other.conv2.weight)
    assert list(cpnb.cp_layers(first)) == ["conv1", "conv2", "fc1", "fc2"]


def test_recipe_leaves_torchs_generator_alone():
    state = torch.get_rng_state()
    for normalizer in cpnb.NORMALIZERS:
        Recipe("x", "DigitsNet", normalizer).build(DIGITS, 0)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("name", cpnb.NORMALIZERS)
def test_recipe_builds_every_normalizer_from_its_seed(name):
    recipe = Recipe("x", "DigitsNet", name)
    first, again, other = (recipe.build(DIGITS, seed) for seed in (0, 0, 1))
    images = DIGITS.test.standardized()[:4]
    with torch.no_grad():
        scores = [net.eval()(images) for net in (first, again, other)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=0)
    assert not scores[0].equal(scores[2])


def test_recipe_starts_from_the_first_training_images():
    network = Recipe("x", "DigitsNet", "weight_data_init").build(DIGITS, 0)
    batch = DIGITS.train.standardized()[:256]
    with torch.no_grad():
        hidden = network.eval().conv1(batch).transpose(0, 1).flatten(1)
    torch.testing.assert_close(hidden.mean(1), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.std(1), torch.ones(16), atol=1e-3, rtol=0)


def test_recipe_takes_a_normalizer_of_the_readers_own():
    def halved(network, by):
        for parameter in network.parameters():
            parameter.data.mul_(by)
        return network

    plain = Recipe("x", "DigitsNet").build(DIGITS, 0)
    own = Recipe("x", "DigitsNet", halved, {"by": 0.5}).build(DIGITS, 0)
    torch.testing.assert_close(own.conv1.weight, plain.conv1.weight / 2)


def test_recipe_gives_a_generator_to_a_normalizer_that_takes_one():
    def noisy(network, generator):
        with torch.no_grad():
            network.fc2.bias.normal_(generator=generator)
        return network

    recipe = Recipe("x", "DigitsNet", noisy)
    first, again, other = (recipe.build(DIGITS, seed).fc2.bias for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)


@pytest.mark.parametrize("name", NETWORKS)
def test_recipe_builds_every_network_with_the_wanted_classes(name):
    data = replace(DIGITS, classes=tuple("abcdefg"))
    network = Recipe("x", name).build(data, 0)
    assert list(network.parameters())[-1].shape == (7,)


def test_description_tells_functions_of_one_name_apart():
    alike = [describe(scaled(by)) for by in (1, 1, 2)]
    assert alike[0] == alike[1] != alike[2]
    one, other = (lambda network: network), (lambda network: network.eval())
    assert describe(one) != describe(other)
    assert describe(one) == describe(one)
    objects = [nn.ReLU(), nn.ReLU()]
    first, again, second = (describe(scaled(objects[n])) for n in (0, 0, 1))
    assert first == again != second
    assert describe(tiny) == "test_recipes.tiny"
    with pytest.raises(TypeError, match=r"value holds list\.append"):
        describe(partial([].append))


def test_description_of_a_script_changes_with_its_code(tmp_path):
    def described(body):
        script = tmp_path / "script.py"
        script.write_text(
            "from cpnb._compare.describe import describe\n"
            f"def own(network):\n    return {body}\n"
            "class Made:\n    def __init__(self):\n        super().__init__()\n"
            f"        self.kinds = {{'b', 'a', 'c'}} & {{{body!r}}}\n"
            "if __name__ == '__main__':\n    print(describe([own, Made]))\n"
        )
        command = [sys.executable, str(script)]
        options = {"check": True, "capture_output": True, "text": True}
        return subprocess.run(command, **options).stdout

    first = described("network")
    assert "__main__.own#" in first and "__main__.Made#" in first
    assert described("network") == first
    changed = described("network.eval()")
    assert [a == b for a, b in zip(first.split(), changed.split(), strict=True)] == [
        False,
        False,
    ]
