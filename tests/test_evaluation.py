"""Loss and accuracy of a model: exact, without side effects, on checked data."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cpnb.data import Split
from cpnb.evaluation import (
    accuracy,
    evaluate,
    evaluation_mode,
    images_and_labels,
    place,
)


def random_pair(n=23, classes=5, features=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, features, generator=generator)
    return images, torch.randint(classes, (n,), generator=generator)


def linear_model(features=6, classes=5, seed=1):
    model = nn.Linear(features, classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


class Recorder(nn.Module):
    """Scores every image alike and remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
        self.calls = []

    def forward(self, images):
        self.calls.append((self.training, torch.is_grad_enabled(), images.dtype))
        return images @ self.weight


@given(n=st.integers(1, 40), batch_size=st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_evaluate_equals_loop_over_single_images(n, batch_size):
    images, labels = random_pair(n)
    model = linear_model()
    loss, correct = 0.0, 0
    for image, label in zip(images, labels, strict=True):
        scores = (model.weight @ image + model.bias).tolist()
        loss += math.log(sum(math.exp(score) for score in scores)) - scores[label]
        correct += max(range(5), key=scores.__getitem__) == label
    measured = evaluate(model, (images, labels), batch_size=batch_size)
    assert measured["loss"] == pytest.approx(loss / n, rel=1e-5, abs=1e-6)
    assert measured["accuracy"] == correct / n
    assert accuracy(model, (images, labels), batch_size=batch_size) == correct / n


def test_evaluate_runs_without_gradients_in_evaluation_mode_and_model_dtype():
    model = Recorder().train()
    result = evaluate(model, random_pair(), batch_size=10)
    assert model.calls == [(False, False, torch.float64)] * 3
    assert result["loss"] == pytest.approx(math.log(5))
    assert model.training


def test_evaluate_restores_each_training_flag_when_the_model_fails():
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.BatchNorm1d(4))
    model.train()
    model[1].eval()
    with pytest.raises(RuntimeError, match="running_mean"):
        evaluate(model, random_pair())
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_evaluation_mode_yields_model_and_restores_flags():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with evaluation_mode(model) as inner:
        assert inner is model
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]


def test_evaluate_leaves_parameters_and_random_state_alone():
    model = nn.Sequential(linear_model(), nn.Dropout())
    before, state = model[0].weight.clone(), torch.get_rng_state()
    evaluate(model, random_pair())
    assert torch.equal(before, model[0].weight)
    assert model[0].weight.grad is None
    assert torch.equal(state, torch.get_rng_state())


def test_evaluate_works_when_model_has_no_parameters():
    images, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert accuracy(nn.Identity(), (images, labels)) == 0.75


def test_evaluate_ignores_integer_tensors_when_it_looks_for_the_dtype():
    model = nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Identity())
    model[0].running_mean.add_(0.0)
    model.register_buffer("steps", torch.tensor(3))
    assert 0 <= accuracy(model, random_pair(classes=6)) <= 1


def test_data_set_gives_its_validation_split_unless_told():
    pairs = {name: random_pair(n) for name, n in [("train", 4), ("test", 6)]}
    data = SimpleNamespace(validation=random_pair(5), **pairs)
    assert images_and_labels(data)[0] is data.validation[0]
    assert images_and_labels(data, "train")[1] is data.train[1]
    assert images_and_labels(data.test, "train")[0] is data.test[0]
    one_class = nn.Linear(6, 5)
    nn.init.zeros_(one_class.weight)
    with torch.no_grad():
        one_class.bias.copy_(torch.tensor([0.0, 0, 1, 0, 0]))
    share = (data.validation[1] == 2).double().mean().item()
    assert accuracy(one_class, data) == share


def random_split(n=23, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 2, 1, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    return Split(images, labels, mean=(90.0, 130.0), std=(60.0, 70.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluate_standardises_a_split_as_its_pair_of_floats(dtype):
    split = random_split()
    model = nn.Sequential(nn.Flatten(), linear_model()).to(dtype)
    pair = split.standardized(dtype), split.labels
    assert evaluate(model, split, batch_size=10) == evaluate(model, pair, batch_size=10)
    data = SimpleNamespace(train=None, validation=split, test=None)
    assert accuracy(model, data) == accuracy(model, pair)


def test_evaluate_standardises_a_split_in_float32_when_model_has_no_parameters():
    split = random_split(classes=6)
    pair = split.standardized(), split.labels
    assert evaluate(nn.Flatten(), split) == evaluate(nn.Flatten(), pair)


@pytest.mark.parametrize("channels_last", [False, True])
def test_place_standardises_a_split_in_the_dtype_of_the_model(channels_last):
    split = random_split()
    images, labels = place(split, linear_model().double(), channels_last=channels_last)
    assert torch.equal(images, split.standardized(torch.float64))
    assert torch.equal(labels, split.labels)
    assert images.permute(0, 2, 3, 1).is_contiguous() == channels_last


def test_split_with_labels_that_are_no_class_numbers_is_refused():
    split = random_split()
    split.labels[3] = -2
    with pytest.raises(ValueError, match="labels contain -2, expected class numbers"):
        images_and_labels(split)


IMAGES, LABELS = torch.zeros(3, 6), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ("digits", TypeError, "data is a str, expected a data set with train"),
        ((IMAGES,), TypeError, "data is a tuple of length 1, expected"),
        (IMAGES, TypeError, "data is a Tensor, expected a data set"),
        ((IMAGES.numpy(), LABELS), TypeError, "images is a ndarray, expected a torch"),
        ((IMAGES, [0, 1, 2]), TypeError, "labels is a list, expected a torch.Tensor"),
        ((IMAGES.byte(), LABELS), TypeError, "images have dtype torch.uint8, expected"),
        ((IMAGES, LABELS.float()), TypeError, "labels have dtype torch.float32, expec"),
        ((IMAGES, LABELS.bool()), TypeError, "labels have dtype torch.bool, expected"),
        ((IMAGES, LABELS[:, None]), ValueError, "labels have shape (3, 1), expected"),
        ((IMAGES[:2], LABELS), ValueError, "images have shape (2, 6), expected (3, ."),
        ((IMAGES[0, :3], LABELS), ValueError, "images have shape (3,), expected (3, "),
        ((IMAGES[:0], LABELS[:0]), ValueError, "data holds no images"),
        ((IMAGES, LABELS - 1), ValueError, "labels contain -1, expected class numbers"),
    ],
)
def test_images_and_labels_refuses_malformed_data(data, error, text):
    with pytest.raises(error, match=re.escape(text)):
        images_and_labels(data)


def test_images_and_labels_refuses_unknown_split():
    with pytest.raises(ValueError, match="split is 'val', expected one of train, vali"):
        images_and_labels((IMAGES, LABELS), "val")


@pytest.mark.parametrize(
    ("batch_size", "error", "text"),
    [
        (0, ValueError, "batch_size is 0, expected at least 1"),
        (2.0, TypeError, "batch_size is 2.0, expected an int"),
        (True, TypeError, "batch_size is True, expected an int"),
    ],
)
def test_evaluate_refuses_batch_size(batch_size, error, text):
    with pytest.raises(error, match=re.escape(text)):
        evaluate(linear_model(), (IMAGES, LABELS), batch_size=batch_size)


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        (torch.relu, TypeError, "model is a builtin_function_or_method, expected a to"),
        (
            nn.Flatten(0),
            ValueError,
            "model returned scores of shape (18,), expected (3",
        ),
        (nn.LSTM(6, 2), TypeError, "model returned a tuple, expected a tensor of sco"),
        (nn.Linear(6, 2), ValueError, "labels contain class 4, but the model scores 2"),
    ],
)
def test_evaluate_refuses_model(model, error, text):
    with pytest.raises(error, match=re.escape(text)):
        evaluate(model, (IMAGES, LABELS + 4))
