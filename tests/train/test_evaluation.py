"""Loss and accuracy of a model: exact, without side effects, NaN is not a class."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import cpnb
from cpnb.train.data import Split
from cpnb.train.evaluation import accuracy, evaluate, images_and_labels


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_pair(n=23, seed=0):
    images = torch.randn(n, 6, generator=seeded(seed))
    return images, torch.randint(5, (n,), generator=seeded(seed + 100))


def linear_model():
    model = nn.Linear(6, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=seeded(1))
    return model


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (23, 10), (40, 50), (120, None)])
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


def test_evaluate_runs_without_gradients_in_evaluation_mode_and_model_dtype():
    model, calls = nn.Linear(6, 5).double(), []

    def note(model, inputs, scores):
        calls.append((model.training, torch.is_grad_enabled(), scores.dtype))

    model.register_forward_hook(note)
    evaluate(model, random_pair(), batch_size=10)
    assert calls == [(False, False, torch.float64)] * 3


def test_evaluate_leaves_model_data_and_random_state_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), linear_model(), nn.Dropout().eval())
    (images, labels), state = random_pair(), torch.get_rng_state()
    before = images.clone()
    evaluate(model, (images, labels))
    assert torch.equal(before, images)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == [True, True, True, False]


def test_accuracy_of_a_data_set_is_that_of_its_validation_split():
    splits = {"train": random_pair(4), "test": random_pair(6)}
    data = SimpleNamespace(validation=random_pair(50, seed=1), **splits)
    assert images_and_labels(data)[0] is data.validation[0]
    assert images_and_labels(data, "train")[1] is data.train[1]
    model = linear_model()
    assert accuracy(model, data) == evaluate(model, data.validation)["accuracy"]
    assert accuracy(model, data) != accuracy(model, data.test)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluate_standardises_a_split_as_its_pair_of_floats(dtype):
    images = torch.randint(256, (23, 2, 1, 3), generator=seeded(0)).byte()
    split = Split(images, random_pair()[1], mean=(90.0, 130.0), std=(60.0, 70.0))
    model = nn.Sequential(nn.Flatten(), linear_model()).to(dtype)
    pair = split.standardized(dtype), split.labels
    assert evaluate(model, split, batch_size=10) == evaluate(model, pair, batch_size=10)
    assert torch.equal(images_and_labels(split)[0], split.standardized())


def test_accuracy_refuses_nan_scores_and_counts_them():
    images, labels = random_pair()
    images[-13:, 2] = math.nan
    text = "model gives NaN scores for 13 of 23 images, expected numbers. Look for NaN"
    with pytest.raises(ValueError, match=text):
        accuracy(linear_model(), (images, labels), batch_size=10)


@pytest.mark.parametrize(
    ("model", "shape"),
    [(nn.Flatten(0), "(18,)"), (nn.Linear(6, 4), "(3, 4)")],
    ids=["one axis", "four classes"],
)
def test_evaluate_refuses_scores_that_do_not_fit_the_labels(model, shape):
    text = f"scores of shape {shape}, expected (3, n) with n >= 5, as the labels go up"
    with pytest.raises(ValueError, match=re.escape(text)):
        evaluate(model, (torch.zeros(3, 6), torch.full((3,), 4)))


class Reader(nn.Module):
    """Scores of a text of tokens; in training a second time, for a second loss."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.fc(self.embedding(tokens).mean(1))


class TwoScores(nn.Sequential):
    def forward(self, inputs):
        scores = super().forward(inputs)
        return (scores, scores) if self.training else scores


def test_tokens_go_through_every_operation_that_takes_data():
    data = torch.randint(9, (24, 5), generator=seeded(0)), torch.arange(24) % 3
    net = cpnb.canonicalize(Reader(), rank=3)
    cpnb.fit(net, data, epochs=1, progress=False)
    sweep = cpnb.rank_sweep(net, data, progress=False)
    assert sweep.accuracy({"fc": 3}) == accuracy(net, data)
    cut = cpnb.truncate(net, rank=2, key="activation", data=data)
    assert cpnb.truncation_report(net, cut, data).accuracy.iloc[-1] == accuracy(
        cut, data
    )


def test_fit_says_what_a_network_with_two_outputs_returned():
    with pytest.raises(
        TypeError, match=r"a tuple, expected .*scores \(23, n\). Wrap it"
    ):
        cpnb.fit(TwoScores(linear_model()), random_pair(), epochs=1, progress=False)
