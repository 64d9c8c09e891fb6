"""Keys that look at images, against what they are said to be, and λ refit on data."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import cpnb
from cpnb._sweep.memory import PeakMemory
from cpnb.importance import DATA_KEYS, KEYS, component_orders
from cpnb.probing import probe

RANKS = {"first": 5, "layer": 6, "fc": 4}


class Net(nn.Module):
    """Two convolutions, one of them grouped and used twice, and a linear layer."""

    def __init__(self, signed=True):
        super().__init__()
        options = {"padding": 1, "signed": signed}
        self.first = cpnb.CPConv2d(2, 4, 3, rank=5, **options)
        self.layer = cpnb.CPConv2d(
            4, 4, 3, groups=2, padding_mode="circular", rank=6, **options
        )
        self.norm = nn.BatchNorm2d(4)
        self.fc = cpnb.CPLinear(64, 3, rank=4, signed=signed)

    def forward(self, images):
        hidden = self.first(images).tanh_()  # in place
        hidden = self.layer(self.norm(self.layer(hidden)).tanh())
        return self.fc(hidden.flatten(1))


def made(**options):
    model = Net(**options).double().eval()
    with torch.no_grad():
        for layer in cpnb.cp_layers(model).values():
            layer.lam.mul_(torch.randn(layer.rank, dtype=torch.float64))
            layer.scale.fill_(-1.5)
    return model


@pytest.fixture
def net():
    return made()


@pytest.fixture
def data():
    scale = torch.tensor([2.0, 0.2], dtype=torch.float64)[:, None, None]
    images = scale * torch.randn(70, 2, 4, 4, dtype=torch.float64)
    return images.cumsum(3), torch.arange(70) % 3


def scaled_scores(model, name, component, by, images):
    """Scores of the network with one component of one layer multiplied."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule(name).lam[component] *= by
        return other(images)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", RANKS)
def test_gradient_is_the_change_of_the_loss_to_first_order(data, name, signed):
    net, step = made(signed=signed), 1e-5
    images, labels = data
    found = probe(net, cpnb.cp_layers(net), data, "gradient")[name]
    for component, value in enumerate(found):
        lower, upper = (
            F.cross_entropy(scaled_scores(net, name, component, by, images), labels)
            for by in (1 - step, 1 + step)
        )
        assert_close((upper - lower).abs() / (2 * step), value, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", RANKS)
def test_hessian_is_the_change_of_the_loss_to_second_order_in_the_scores(
    net, data, name
):
    step = 1e-5
    found = probe(net, cpnb.cp_layers(net), data, "hessian")[name]
    with torch.no_grad():
        likely = net(data[0]).softmax(1)
    for component, value in enumerate(found):
        lower, upper = (
            scaled_scores(net, name, component, by, data[0])
            for by in (1 - step, 1 + step)
        )
        slope = (upper - lower) / (2 * step)
        mean = (likely * slope).sum(1, keepdim=True)
        curvature = (likely * (slope - mean).square()).sum(1).mean()
        assert_close(curvature / 2, value, rtol=1e-5, atol=1e-9)


LAYERS = {
    "conv": (lambda: cpnb.CPConv2d(3, 5, 3, stride=2, rank=4), (3, 7, 7)),
    "grouped": (
        lambda: cpnb.CPConv1d(4, 6, 3, groups=2, padding="same", rank=4),
        (4, 9),
    ),
    "linear": (lambda: cpnb.CPLinear(6, 5, rank=4), (6,)),
    "linear on four axes": (lambda: cpnb.CPLinear(6, 5, rank=4), (3, 2, 6)),
    "one channel": (lambda: cpnb.CPConv2d(1, 5, (1, 2), rank=4), (1, 3, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_activation_and_output_gram_are_mean_squares_of_what_is_added(kind):
    build, shape = LAYERS[kind]
    layer, inputs = build().double(), torch.randn(11, *shape, dtype=torch.float64)
    with torch.no_grad():
        layer.lam.copy_(torch.tensor([2.0, -1, 0.5, 3]))
        layer.scale.fill_(0.7)
        bias = layer(torch.zeros_like(inputs))
        alone = torch.stack(
            [cpnb.select_components(layer, [r])(inputs) - bias for r in range(4)]
        ).flatten(2)
    products = torch.einsum("rni,sni->rs", alone, alone) / len(inputs)
    lam = layer.lam.detach() * layer.scale.detach()
    gram = cpnb.output_gram(layer, inputs)
    assert_close(lam[:, None] * gram * lam, products)
    model = nn.Sequential(layer, nn.Flatten())
    data = inputs, torch.zeros(11, dtype=torch.long)
    found = probe(model, {"0": layer}, data, "activation")["0"]
    assert_close(found, products.diagonal())


@pytest.mark.parametrize("key", KEYS)
def test_truncate_sweep_and_component_order_agree_on_every_key(net, data, key):
    sweep = cpnb.rank_sweep(net, data, ["layer"], key=key, progress=False)
    order = cpnb.component_order(net.layer, key, model=net, data=data)
    assert sorted(order.tolist()) == list(range(6))
    for rank in range(1, 7):
        cut = cpnb.truncate(net, rank={"layer": rank}, key=key, data=data)
        expected = cpnb.select_components(net.layer, order[:rank])
        assert_close(cut.layer.weight, expected.weight)
        point = sweep.point({"layer": rank})
        assert point.accuracy == cpnb.accuracy(cut, data)


@pytest.mark.parametrize("key", DATA_KEYS)
def test_keys_that_look_at_images_order_by_what_they_measure(net, data, key):
    layers = cpnb.cp_layers(net)
    for name, scores in probe(net, layers, data, key).items():
        order = cpnb.component_order(layers[name], key, model=net, data=data)
        assert (scores[order].diff() <= 0).all()
        assert scores.min() >= 0 and len(scores.unique()) == len(scores)


def test_activation_sees_inputs_that_the_kernel_does_not():
    """The largest component reads a feature that is always zero."""
    layer = cpnb.CPLinear(3, 3, rank=3)
    with torch.no_grad():
        for factor in layer.factors:
            factor.copy_(torch.eye(3))
        layer.lam.copy_(torch.tensor([9.0, 2.0, 1.0]))
    images = torch.randn(20, 3) * torch.tensor([0.0, 1.0, 4.0])
    data = images, torch.zeros(20, dtype=torch.long)
    assert cpnb.component_order(layer).tolist() == [0, 1, 2]
    order = cpnb.component_order(layer, "activation", data=data)
    assert order.tolist() == [2, 1, 0]


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("signed", [True, False])
def test_refit_on_data_is_least_squares_on_the_outputs(data, rank, signed):
    net = made(signed=signed)
    inputs = data[0]
    outputs = net.first(inputs).detach()
    errors = {}
    for refit in (False, "weight", "data"):
        cut = cpnb.truncate(
            net, rank={"first": rank}, key="greedy", refit=refit, data=data
        )
        errors[refit] = (cut.first(inputs) - outputs).norm().item()
    assert errors["data"] <= min(errors.values()) + 1e-12
    if 1 < rank < 5:
        assert errors["data"] < 0.999 * errors["weight"]
    # Against a solver that is handed the outputs of every component.
    kept = cpnb.component_order(net.first, "greedy")[:rank].sort().values
    bias = net.first.bias.detach()[:, None, None]
    columns = [cpnb.select_components(net.first, [r])(inputs) - bias for r in kept]
    matrix = torch.stack([column.flatten() for column in columns], 1).detach()
    target = (outputs - bias).reshape(-1, 1)
    best = matrix @ torch.linalg.lstsq(matrix, target).solution
    expected = (best - target).norm().item()
    assert errors["data"] == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("refit", ["weight", "data"])
def test_refit_never_raises_its_error_when_components_are_dependent(refit):
    layer = cpnb.CPLinear(6, 5, rank=8)
    with torch.no_grad():
        for factor in layer.factors:  # four components, twice, all but equal
            factor[:, 4:] = factor[:, :4] + 1e-7 * torch.randn_like(factor[:, 4:])
        layer.lam.copy_(torch.tensor([1.0, -1, 1e3, 1, -1, 1, -1e3, 1]))
    inputs = torch.randn(4, 6)  # fewer than features
    data = inputs, torch.zeros(4, dtype=torch.long)

    def error(cut):
        if refit == "weight":
            return (layer.weight - cut.weight).norm().item()
        return (layer(inputs) - cut(inputs)).norm().item()

    for rank in range(1, 9):
        options = {"rank": rank, "key": "greedy", "data": data}
        plain = error(cpnb.truncate(layer, **options))
        fitted = error(cpnb.truncate(layer, refit=refit, **options))
        assert fitted <= plain * (1 + 1e-4) + 1e-3  # float32, λ of a thousand


@pytest.mark.parametrize("refit", ["weight", "data"])
def test_rank_sweep_refits_as_truncate_does(net, data, refit):
    options = {"key": "activation", "refit": refit}
    sweep = cpnb.rank_sweep(net, data, ["first"], progress=False, **options)
    assert sweep.methods == {"first": "together"}
    for rank in range(1, 6):
        cut = cpnb.truncate(net, rank={"first": rank}, data=data, **options)
        point = sweep.point({"first": rank})
        expected = cpnb.evaluate(cut, data)
        assert point.loss == pytest.approx(expected["loss"], rel=1e-9)
        error = cpnb.relative_error(net.first.weight, cut.first.weight).item()
        assert point.relative_error["first"] == pytest.approx(error, abs=1e-7)
    held = {"weight": True, "data": "data"}[refit]
    assert {row["refit"] for row in sweep.to_rows()} == {held}


def test_random_order_is_the_same_every_time_and_another_with_a_generator(net):
    fixed = [cpnb.component_order(net.layer, "random").tolist() for _ in range(2)]
    assert fixed[0] == fixed[1]
    generator = torch.Generator().manual_seed(1)
    drawn = {
        tuple(cpnb.component_order(net.layer, "random", generator=generator).tolist())
        for _ in range(20)
    }
    assert len(drawn) > 15
    orders = [
        component_orders(net, names, "random", generator=generator.manual_seed(2))
        for names in (list(cpnb.cp_layers(net))[-1:], cpnb.cp_layers(net))
    ]
    for name, order in orders[0].items():
        assert torch.equal(order, orders[1][name])
    state = torch.get_rng_state()
    cpnb.truncate(net, keep=0.5, key="random")
    assert torch.equal(state, torch.get_rng_state())


def test_keys_on_images_take_1000_training_images_of_a_data_set(net):
    """Evenly spaced ones, so that each class is seen where they are sorted."""

    class Splits:
        train = torch.randn(1999, 2, 4, 4).double(), torch.arange(1999) * 3 // 1999
        validation = test = torch.full((1, 2, 4, 4), torch.nan), torch.zeros(1).long()

    images, labels = Splits.train
    places = [n * 1999 // 1000 for n in range(1000)]
    pair = images[places], labels[places]
    assert pair[1].bincount().min() > 330
    for key in DATA_KEYS:
        order = cpnb.component_order(net.layer, key, model=net, data=Splits)
        expected = cpnb.component_order(net.layer, key, model=net, data=pair)
        assert order.tolist() == expected.tolist()


def test_keys_on_images_take_layers_that_get_their_input_by_keyword(net, data):
    class Named(Net):
        def forward(self, images):
            hidden = self.first(input=images).tanh_()
            hidden = self.norm(self.layer(input=hidden)).tanh()
            return self.fc(input=self.layer(input=hidden).flatten(1))

    named = copy.deepcopy(net)
    named.__class__ = Named
    for what in (*DATA_KEYS, "output"):
        found, expected = (
            probe(model, cpnb.cp_layers(model), data, what) for model in (named, net)
        )
        assert_close(found, expected)


def test_looking_at_images_leaves_the_network_as_it_was(net, data):
    net.train().requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():  # a caller's choice that the gradient must not depend on
        for key in DATA_KEYS:
            cpnb.truncate(net, keep=0.5, key=key, refit="data", data=data)
    assert net.training and net.norm.training
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_layer_that_is_not_used_has_no_importance(data):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.spare = cpnb.CPLinear(32, 3, rank=2), cpnb.CPLinear(3, 3)

        def forward(self, images):
            return self.fc(images.flatten(1))

    net = Spare().double()
    found = probe(net, {"spare": net.spare}, data, "gradient")["spare"]
    assert not found.any()
    cpnb.truncate(net, rank=1, key="hessian", refit="data", data=data)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"key": "gradient"}, TypeError, "data is None, expected images for key 'grad"),
        ({"refit": "data"}, TypeError, "data is None, expected images for refit='data"),
        ({"key": "size"}, ValueError, "key is 'size', expected one of .*'random'"),
        ({"refit": "kernel"}, ValueError, "refit is 'kernel', expected False, True or"),
        ({"refit": 2}, ValueError, "refit is 2, expected"),
    ],
)
def test_truncate_and_sweep_refuse_bad_keys_and_missing_data(
    net, data, options, error, match
):
    with pytest.raises(error, match=match):
        cpnb.truncate(net, keep=0.5, **options)
    if error is ValueError:
        with pytest.raises(error, match=match):
            cpnb.rank_sweep(net, data, progress=False, **options)


def test_component_order_refuses_a_layer_of_another_network(net, data):
    with pytest.raises(ValueError, match="layer is no part of the Net given as model"):
        cpnb.component_order(made().layer, "gradient", model=net, data=data)
    with pytest.raises(TypeError, match="layer is a Linear, expected a CP layer"):
        cpnb.component_order(nn.Linear(2, 2))


class Folded(nn.Module):
    """Eight tokens an image, one row each where they are folded into the batch."""

    def __init__(self, folded):
        super().__init__()
        self.layer, self.fc = cpnb.CPLinear(8, 6, rank=5), cpnb.CPLinear(6, 3, rank=6)
        self.folded = folded

    def forward(self, images):
        if self.folded:
            hidden = self.layer(images.reshape(-1, 8)).unflatten(0, (-1, 8))
        else:
            hidden = self.layer(images)
        return self.fc(hidden.tanh().mean(1))


@pytest.mark.parametrize("key", ["gradient", "hessian", "activation"])
def test_keys_do_not_depend_on_how_images_fill_the_batch(key):
    plain = Folded(False).double()
    folded = Folded(True).double()
    folded.load_state_dict(plain.state_dict())
    data = torch.randn(30, 8, 8, dtype=torch.float64), torch.arange(30) % 3
    found, expected = (
        probe(net, cpnb.cp_layers(net), data, key)["layer"] for net in (folded, plain)
    )
    assert_close(found, expected)


@pytest.mark.parametrize("key", ["gradient", "hessian"])
def test_keys_of_a_layer_for_images_and_for_anchors_are_its_derivatives(key):
    class Anchored(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = cpnb.CPLinear(8, 6, rank=5)
            self.register_buffer("anchors", torch.randn(4, 8))

        def forward(self, images):
            return self.layer(images) @ self.layer(self.anchors).T

    net = Anchored().double()
    images, labels = torch.randn(9, 8, dtype=torch.float64), torch.arange(9) % 4
    found = probe(net, cpnb.cp_layers(net), (images, labels), key)["layer"]
    lam, expected = net.layer.lam, []
    for image, label in zip(images, labels, strict=True):
        scores = net(image[None])[0]
        if key == "gradient":
            loss = F.cross_entropy(scores, label)
            expected.append(lam * torch.autograd.grad(loss, lam)[0])
            continue
        slopes = torch.stack(
            [lam * torch.autograd.grad(s, lam, retain_graph=True)[0] for s in scores]
        )
        likely = scores.softmax(0)[:, None]
        mean = (likely * slopes).sum(0)
        expected.append((likely * (slopes - mean).square()).sum(0) / 2)
    assert_close(found, torch.stack(expected).mean(0).abs().detach())


def test_keys_give_nothing_to_a_layer_that_runs_without_gradients(net, data):
    class Frozen(Net):
        def forward(self, images):
            with torch.no_grad():
                hidden = self.first(images)
            return self.fc(self.norm(self.layer(hidden)).tanh().flatten(1))

    frozen = copy.deepcopy(net)
    frozen.__class__ = Frozen
    for key in ("gradient", "hessian"):
        found = probe(frozen, cpnb.cp_layers(frozen), data, key)
        nothing = {name for name, values in found.items() if not values.any()}
        assert nothing == {"first"} & set(found)


def test_probe_keeps_to_the_memory_it_is_given(net, data):
    def needed(memory):
        with PeakMemory() as peak:
            found[memory] = probe(net, layers, data, "gradient", memory=memory)
        return peak.bytes

    layers, found = cpnb.cp_layers(net), {}
    whole = needed(None)
    assert needed(whole // 4) <= whole // 4
    for name, values in found.pop(None).items():
        for others in found.values():
            assert_close(others[name], values)
    with pytest.raises(ValueError, match=r"expected at least .* looks at in one image"):
        needed(100)
