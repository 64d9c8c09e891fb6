"""Every normalizer on whole models: what it claims, removes, copies and refuses."""

import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import cpnb
from cpnb.base import CPLayer

NAMES = [
    *("none", "batch", "group", "layer", "weight", "weight_data_init", "spectral"),
    *("orthogonal", "standardized", "centered", "oni", "conditioned", "scaling"),
    "canonical",
]
COMPUTED = ["weight", "spectral", "orthogonal", "standardized", "centered", "oni"]
WITH_CP = ["none", "batch", "group", "layer", "conditioned", "scaling", "canonical"]
NETWORKS = {
    "lenet": (cpnb.LeNet, (1, 28, 28)),
    "alexnet": (cpnb.AlexNet, (3, 32, 32)),
    "vgg": (cpnb.VGG, (3, 32, 32)),
    "resnet": (cpnb.ResNet, (3, 32, 32)),
    "short resnet": (partial(cpnb.ResNet, 8), (3, 32, 32)),
}


def network(kind, cp=False, dtype=torch.float64):
    """A network and a few images for it; in CP form if asked for."""
    make, shape = NETWORKS[kind]
    generator = torch.Generator().manual_seed(0)
    model = make(generator=generator)
    if cp:
        model = cpnb.canonicalize(model, rank=0.05, generator=generator)
    for module in model.modules():  # as after some training
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    images = torch.randn(2, *shape, generator=generator, dtype=dtype)
    return model.to(dtype), images


def small(dtype=torch.float64):
    """A network with every kind of layer that can be normalised."""
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(2)),
        *(nn.Conv1d(6, 5, 2, stride=2), nn.ReLU(), nn.Unflatten(2, (2, 2, 2))),
        *(nn.Conv3d(5, 6, 2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)),
    ).to(dtype)


def plane(dtype=torch.float64):
    """A network that every normalizer takes, also scaling."""
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3)),
    ).to(dtype)


def small_images(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(16, 2, 6, 6, generator=generator, dtype=dtype)


def options(name, images):
    return {"data": images} if name == "weight_data_init" else {}


def normalized(model, name, images, **others):
    return cpnb.normalize(model, name, **options(name, images), **others)


def output(model, images):
    """What a model computes, with the same dropout each time."""
    torch.manual_seed(0)
    return copy.deepcopy(model)(images)


def error(result, expected):
    return ((result - expected).norm() / expected.norm()).item()


def outputs_of(modules, model, images):
    """What some submodules return while the model runs."""
    caught = []
    handles = [
        module.register_forward_hook(lambda *args: caught.append(args[2]))
        for module in modules
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return caught


def assert_stock(model):
    for module in model.modules():
        assert not parametrize.is_parametrized(module)
        assert not isinstance(module, CPLayer)
        assert type(module).__module__.startswith(
            ("torch.nn", "cpnb.models", "cpnb.resnet")
        )


def train(model, images, steps=3, lr=0.05):
    optimizer = torch.optim.SGD(cpnb.param_groups(model, 0.01), lr=lr, momentum=0.5)
    labels = torch.arange(len(images)) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images)[:, :3], labels).backward()
        optimizer.step()
        yield


# --- the table ------------------------------------------------------------------------


def test_table_has_every_normalizer_and_says_what_each_is():
    assert list(cpnb.NORMALIZERS) == NAMES
    for entry in cpnb.NORMALIZERS.values():
        assert entry.summary.endswith(".")
        assert entry.constrains
        assert entry.source


def test_normalize_documents_every_option():
    text = inspect.getdoc(cpnb.normalize)
    for name, entry in cpnb.NORMALIZERS.items():
        assert f'"{name}"' in text or name in ("none", "weight", "centered")
        for option in entry.options:
            assert option in text, (name, option)


@pytest.mark.parametrize("name", NAMES)
def test_table_claims_of_the_function_at_the_start_are_true(name):
    model, images = network("lenet")
    new = normalized(model.train(), name, images)
    change = error(output(new, images), output(model, images))
    if cpnb.NORMALIZERS[name].keeps_function:
        assert change < 1e-12
    else:
        assert change > 1e-2


KEEPERS = [name for name, entry in cpnb.NORMALIZERS.items() if entry.keeps_function]


def test_table_claims_to_keep_the_function_for_the_normalizers_tested_here():
    assert KEEPERS == ["none", "weight", "scaling"]


@pytest.mark.parametrize("kind", ["lenet", "alexnet", "vgg", "resnet"])
@pytest.mark.parametrize(
    ("name", "cp"), [("weight", False), ("scaling", False), ("scaling", True)]
)
def test_function_is_kept_where_claimed(name, cp, kind):
    model, images = network(kind, cp)
    new = normalized(model, name, images)
    for training in (True, False):
        expected = output(model.train(training), images)
        assert error(output(new.train(training), images), expected) < 1e-12


@pytest.mark.parametrize("name", KEEPERS)
def test_function_is_kept_in_float32(name):
    model, images = network("lenet", dtype=torch.float32)
    new = normalized(model, name, images)
    assert error(output(new, images), output(model, images)) < 1e-5


# --- the constraints ------------------------------------------------------------------


def matrices(layer):
    """The kernel as one matrix per group."""
    groups = getattr(layer, "groups", 1)
    return layer.weight.detach().reshape(groups, len(layer.weight) // groups, -1)


def gain(layer):
    kernel = layer.parametrizations.weight
    return (
        kernel[0].gain if len(kernel[0].state_dict()) else kernel.original0
    ).detach()


def check_length(layer):
    lengths = matrices(layer).flatten(0, 1).norm(dim=1)
    assert_close(lengths, gain(layer).flatten().abs())


def check_centered(layer):
    check_length(layer)
    assert matrices(layer).mean(-1).abs().max() < 1e-12


def check_spectral(layer):
    assert abs(torch.linalg.matrix_norm(layer.weight.flatten(1), 2) - 1) < 0.02


def check_orthogonal(layer):
    matrix = matrices(layer) / gain(layer)
    matrix = matrix.mT if matrix.shape[1] > matrix.shape[2] else matrix
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype)
    assert_close(matrix @ matrix.mT, eye.expand(len(matrix), -1, -1))


def check_standardized(layer):
    assert matrices(layer).mean(-1).abs().max() < 1e-12
    assert (matrices(layer).std(-1) - 1).abs().max() < 1e-3


def check_oni(layer):
    assert matrices(layer).mean(-1).abs().max() < 1e-12
    assert torch.linalg.svdvals(matrices(layer)).max() <= 2**0.5 + 1e-9


def check_conditioned(layer):
    lengths = matrices(layer).norm(dim=-1)
    assert_close(lengths, torch.full_like(lengths, 2**0.5))


CHECKS = {
    "weight": check_length,
    "weight_data_init": check_length,
    "spectral": check_spectral,
    "orthogonal": check_orthogonal,
    "standardized": check_standardized,
    "centered": check_centered,
    "oni": check_oni,
    "conditioned": check_conditioned,
}


@pytest.mark.parametrize("name", CHECKS)
def test_constraint_holds_after_every_optimizer_step(name):
    model = normalized(small(), name, small_images())
    layers = [m for m in model.modules() if parametrize.is_parametrized(m)]
    assert len(layers) == (5 if name == "standardized" else 6)
    before = [layer.weight.detach().clone() for layer in layers]
    # Behind standardised kernels signals grow from layer to layer.
    for _ in train(model, small_images(), lr=1e-4 if name == "standardized" else 0.05):
        model.eval()
        for layer in layers:
            CHECKS[name](layer)
        model.train()
    for layer, weight in zip(layers, before, strict=True):
        assert not torch.equal(layer.weight, weight)


def test_scaling_brings_the_rows_back_after_every_step():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    model = cpnb.normalize(net, "scaling", c=2.0)
    (hook,) = model.training_hooks
    assert repr(hook).startswith("Rescaling(mode='unit', c=2.0, every=1")
    pair = (torch.randn(64, 6), torch.randint(3, (64,)))
    cpnb.fit(model, pair, epochs=1, lr=0.1, progress=False)
    assert_close(model[0].weight.norm(dim=1), torch.full((5,), 2.0))
    assert not hasattr(net, "training_hooks")


# --- norm layers ----------------------------------------------------------------------


def spec_norm(outputs, name, group_size=1):
    """Normalise with loops: per channel over the batch, or per image over groups."""
    flat = outputs.reshape(*outputs.shape[:2], -1)
    result = flat.clone()
    images, channels = flat.shape[:2]
    if name == "batch":
        cells = [[(n, c) for n in range(images)] for c in range(channels)]
    else:
        size = channels if name == "layer" else group_size
        cells = [
            [(n, c) for c in range(first, first + size)]
            for n in range(images)
            for first in range(0, channels, size)
        ]
    for cell in cells:
        values = [v for n, c in cell for v in flat[n, c].tolist()]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        for n, c in cell:
            result[n, c] = (flat[n, c] - mean) / (variance + 1e-5) ** 0.5
    return result.view(outputs.shape)


@pytest.mark.parametrize("name", ["batch", "group", "layer"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 6), (5, 4)),
        (nn.Conv1d(2, 6, 2), (5, 2, 4)),
        (nn.Conv2d(2, 6, 2), (5, 2, 3, 4)),
        (nn.Conv3d(2, 6, 2), (5, 2, 3, 3, 3)),
        (cpnb.CPConv2d(2, 6, 2), (5, 2, 3, 4)),
        (cpnb.CPLinear(4, 6), (5, 4)),
        (cpnb.LowRankConv2d(2, 6, 2, rank=3), (5, 2, 3, 4)),
    ],
    ids=["linear", "conv1d", "conv2d", "conv3d", "cp conv", "cp linear", "low rank"],
)
def test_norm_layer_equals_loops(name, layer, shape):
    layer = layer.double()
    extra = {"group_size": 3} if name == "group" else {}
    new = cpnb.normalize(layer, name, **extra)
    inputs = torch.randn(shape, dtype=torch.float64)
    assert_close(new(inputs), spec_norm(layer(inputs), name, group_size=3))


@pytest.mark.parametrize("name", ["batch", "group", "layer"])
def test_norm_layers_hold_their_constraint_after_every_step(name):
    model = cpnb.normalize(small(), name)
    pairs = [m for m in model.modules() if type(m) is nn.Sequential and len(m) == 2]
    assert len(pairs) == 5
    for _ in train(model, small_images()):
        for pair in pairs:
            norm = pair[1]
            groups = getattr(norm, "num_groups", 1)
            (result,) = outputs_of([norm], model, small_images())
            shape = [-1] + [1] * (result.ndim - 2)
            units = (result - norm.bias.view(shape)) / norm.weight.view(shape)
            units = (
                units.movedim(1, 0).flatten(1)
                if name == "batch"
                else units.reshape(len(units) * groups, -1)
            )
            assert units.mean(1).abs().max() < 1e-9
            assert (units.square().mean(1) - 1).abs().max() < 0.01


@pytest.mark.parametrize(
    ("channels", "group_size", "groups"),
    [(64, 16, 4), (16, 16, 1), (10, 16, 1), (24, 16, 1), (36, 16, 2), (13, 4, 1)],
)
def test_group_norm_keeps_at_least_the_wanted_channels_together(
    channels, group_size, groups
):
    layer = cpnb.normalize(nn.Linear(3, channels), "group", group_size=group_size)
    assert layer[1].num_groups == groups


def test_norm_layers_stand_behind_every_layer_but_skipped_and_output_ones():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)).double()
    for extra, expected in [
        ({}, [0, 1]),
        ({"output": True}, [0, 1, 2]),
        ({"skip": "1"}, [0]),
        ({"skip": lambda name, layer: name == "0", "output": True}, [1, 2]),
    ]:
        new = cpnb.normalize(net.eval(), "batch", **extra)
        assert [n for n in range(3) if type(new[n]) is nn.Sequential] == expected
        assert all(type(new[n][1]) is nn.BatchNorm1d for n in expected)
    assert new[1][1].weight.dtype == torch.float64
    assert not any(module.training for module in new.modules())


@pytest.mark.parametrize("kind", ["vgg", "short resnet"])
@pytest.mark.parametrize("cp", [False, True], ids=["dense", "cp"])
def test_norm_layers_exchange_batch_norm(kind, cp):
    model, images = network(kind, cp)
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        model.get_submodule(norms[0]).weight.fill_(0.5)
    for name, kinds in [("group", nn.GroupNorm), ("layer", nn.GroupNorm)]:
        new = cpnb.normalize(model, name)
        assert [n for n, m in new.named_modules() if isinstance(m, kinds)] == norms
        assert new.get_submodule(norms[0]).weight.eq(0.5).all()
        assert new(images).isfinite().all()
    same = cpnb.normalize(model.eval(), "batch")
    assert torch.equal(same(images), model(images))


# --- the start from data --------------------------------------------------------------


def test_weight_data_init_gives_outputs_of_mean_0_and_variance_1():
    model = cpnb.normalize(
        small(),
        "weight_data_init",
        data=small_images(),
        generator=torch.Generator().manual_seed(1),
    )
    layers = [m for m in model.modules() if parametrize.is_parametrized(m)]
    caught = []
    for layer in layers:
        assert not layer._forward_hooks
        layer.register_forward_hook(lambda m, i, o: caught.append(o))
    model(small_images())
    for result in caught:
        variance, mean = torch.var_mean(
            result.movedim(1, 0).flatten(1), 1, correction=0
        )
        assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-9)
        assert_close(variance, torch.ones_like(variance), rtol=1e-5, atol=0)


def test_weight_data_init_equals_the_formula():
    layer = nn.Linear(6, 400).double()
    data = torch.randn(9, 6, dtype=torch.float64)
    new = cpnb.normalize(layer, "weight_data_init", data=data)
    v = new.parametrizations.weight.original1.detach()
    t = data @ (v / v.norm(dim=1, keepdim=True)).T
    g = 1 / (t.var(0, correction=0) + 1e-8).sqrt()
    assert_close(new.parametrizations.weight.original0[:, 0], g)
    assert_close(new.bias, -t.mean(0) * g)
    # 2400 draws: the relative error of their deviation is 1/√4800 = 1.4 %.
    assert v.std().item() == pytest.approx(0.05, rel=0.06)
    assert abs(v.mean()) < 4 * 0.05 / 2400**0.5


def test_weight_data_init_without_bias_sets_the_variance_alone():
    data = torch.randn(20, 6) + 1
    new = cpnb.normalize(nn.Linear(6, 4, bias=False), "weight_data_init", data=data)
    assert_close(new(data).var(0, correction=0), torch.ones(4))
    assert new(data).mean(0).abs().min() > 1e-3


def test_weight_data_init_repeats_with_a_generator_and_leaves_the_modes_alone():
    model, images = network("short resnet", dtype=torch.float32)
    model.train()
    model.fc.eval()
    before = torch.get_rng_state()
    one, two = (
        cpnb.normalize(
            model,
            "weight_data_init",
            data=images,
            generator=torch.Generator().manual_seed(5),
        )
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)
    assert one.training
    assert not one.fc.training
    assert torch.equal(one.bn1.running_mean, model.bn1.running_mean)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, features):
        return self.layer(self.layer(features))


@pytest.mark.parametrize(
    ("model", "data", "skip", "error", "text"),
    [
        (small(), None, (), TypeError, "data is a NoneType, expected a tensor.*256"),
        (small(), torch.ones(4).int(), (), TypeError, "data has dtype torch.int32"),
        (small(), small_images()[:1], (), ValueError, "data holds 1 images, expected"),
        (
            *(nn.Linear(3, 2), torch.ones(5, 3), (), ValueError),
            r"layer '' has an output of variance 0.0e\+00 on data",
        ),
        (
            *(Twice(), torch.randn(5, 3), "unused", ValueError),
            "layer 'layer' was called twice on data",
        ),
        (
            *(Twice(), torch.randn(5, 3), "layer", ValueError),
            r"layers \['unused'\] were not called on data",
        ),
    ],
    ids=["none", "int", "one image", "constant", "twice", "unused"],
)
def test_weight_data_init_refuses_bad_data(model, data, skip, error, text):
    with pytest.raises(error, match=text):
        cpnb.normalize(model, "weight_data_init", data=data, skip=skip)


# --- copies ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_normalize_leaves_the_source_alone(name):
    model, images = network("short resnet" if name == "scaling" else "lenet")
    model.conv1.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    new = normalized(model, name, images)
    for p in new.parameters():
        with torch.no_grad():
            p.add_(1.0)
    assert [type(module) for module in model.modules()] == kinds
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.conv1.weight.requires_grad
    frozen = [p for p in new.conv1.parameters() if not p.requires_grad]
    assert frozen


@pytest.mark.parametrize("name", COMPUTED)
def test_normalize_keeps_a_frozen_layer_frozen(name):
    source = nn.Linear(4, 3).requires_grad_(False)
    layer = cpnb.normalize(source, name)
    assert not any(p.requires_grad for p in layer.parameters())
    plain = cpnb.remove_normalizer(layer)
    assert not any(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize(
    ("name", "cp"), [*((name, False) for name in NAMES), *((n, True) for n in WITH_CP)]
)
def test_remove_normalizer_gives_stock_layers_and_the_same_function(name, cp):
    model, images = network("short resnet", cp)
    new = normalized(model, name, images)
    for p in new.parameters():  # somewhere else than at the start
        with torch.no_grad():
            p.add_(0.01 * torch.randn_like(p))
    for training in (True, False):
        removed = cpnb.remove_normalizer(new.train(training))
        assert_stock(removed)
        pickle.dumps(removed)
        assert all(module.training == training for module in removed.modules())
        assert not getattr(removed, "training_hooks", [])
        if name != "spectral" or not training:
            expected = output(new, images)
            assert error(output(removed, images), expected) < 1e-12


@pytest.mark.parametrize("name", [*COMPUTED, "conditioned", "canonical"])
def test_remove_normalizer_from_a_copy_leaves_the_others_working(name):
    model = normalized(small(), name, small_images()).eval()
    images, twin = small_images(), copy.deepcopy(model)
    expected = model(images)
    for one, other in ((twin, model), (model, twin)):
        removed = cpnb.remove_normalizer(one)
        assert_close(removed(images), expected)
        for left in (one, other, copy.deepcopy(other)):
            assert torch.equal(left(images), expected)
            left(images).sum().backward()
    fresh = normalized(small(), name, small_images())
    fresh.load_state_dict(twin.state_dict())  # still parametrised


def test_remove_normalizer_keeps_cp_layers_if_asked_to():
    model, images = network("lenet", cp=True)
    plain = cpnb.remove_normalizer(model, keep_cp=True)
    assert len(cpnb.cp_layers(plain)) == 4
    new = cpnb.normalize(model.eval(), "conditioned")
    plain = cpnb.remove_normalizer(new, keep_cp=True)
    kinds = [type(layer) for layer in cpnb.cp_layers(plain).values()]
    assert kinds == [type(layer) for layer in cpnb.cp_layers(model).values()]
    assert error(plain(images), new(images)) < 1e-12


def test_remove_normalizer_keeps_a_shared_layer_shared_and_the_order_of_parameters():
    layer = cpnb.normalize(nn.Linear(3, 3), "weight")
    removed = cpnb.remove_normalizer(nn.Sequential(layer, nn.ReLU(), layer))
    assert removed[0] is removed[2]
    assert list(removed.state_dict())[:2] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("name", NAMES)
def test_normalized_model_loads_the_state_of_another(name):
    one = normalized(plane(), name, small_images())
    two = normalized(plane(), name, small_images())
    for _ in train(one, small_images(), steps=2, lr=1e-5):
        pass
    two.load_state_dict(one.state_dict())
    one.eval(), two.eval()
    assert torch.equal(one(small_images()), two(small_images()))


@pytest.mark.parametrize("name", NAMES)
def test_normalized_model_trains_apart_from_its_copy(name):
    one = normalized(plane(), name, small_images())
    two = copy.deepcopy(one)
    before = output(two.eval(), small_images())
    start = output(one.eval(), small_images())
    for _ in train(one.train(), small_images(), steps=2, lr=1e-5):
        pass
    assert torch.equal(output(two, small_images()), before)
    assert not torch.equal(output(one.eval(), small_images()), start)


# --- how it runs ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_normalized_model_runs_in_channels_last_and_autocast(name):
    images = small_images(torch.float32)
    model = normalized(plane(torch.float32), name, images).eval()
    expected = model(images)
    packed = copy.deepcopy(model).to(memory_format=torch.channels_last)
    innermost = images.contiguous(memory_format=torch.channels_last)
    assert error(packed(innermost), expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images)
    assert error(low.float(), expected) < 0.03
    low.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    ("name", "cp"),
    [
        *((name, False) for name in [*COMPUTED, "group", "layer", "conditioned"]),
        *((name, True) for name in ["group", "layer", "conditioned"]),
    ],
)
def test_normalized_models_run_together_under_vmap(name, cp):
    net = cpnb.canonicalize(small(), rank=3) if cp else small()
    models = [cpnb.normalize(net, name) for _ in range(2)]
    for model in models:
        model.eval()  # as torch's spectral norm updates in place in training
        for p in model.parameters():
            with torch.no_grad():
                p.add_(0.1 * torch.randn_like(p))
    names = [n for n, p in models[0].named_parameters() if p.requires_grad]
    images = small_images()
    parameters, buffers = torch.func.stack_module_state(models)

    def loss(parameters, buffers):
        state = (parameters, buffers)
        result = torch.func.functional_call(models[0], state, (images,))
        return result.square().mean()

    gradients = torch.func.vmap(torch.func.grad(loss))(parameters, buffers)
    for n, model in enumerate(models):
        model(images).square().mean().backward()
        for key in names:
            expected = model.get_parameter(key).grad
            assert_close(gradients[key][n], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cp"), [*((name, False) for name in NAMES), *((n, True) for n in WITH_CP)]
)
def test_normalized_model_compiles_into_one_graph(name, cp):
    net = cpnb.canonicalize(plane(), rank=3) if cp else plane()
    model = normalized(net, name, small_images()).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert error(compiled(small_images()), model(small_images())) < 1e-12


@pytest.mark.parametrize("name", [name for name in NAMES if name != "scaling"])
def test_normalize_skips_what_it_is_told_to(name):
    source = small()
    new = normalized(source, name, small_images(), skip=("0", "2"))
    for n in (0, 2):
        assert type(new[n]) is nn.Conv2d
        assert new[n] is not source[n]
        assert torch.equal(new[n].weight, source[n].weight)


@pytest.mark.parametrize("name", COMPUTED)
def test_param_groups_spare_gains_and_decay_directions(name):
    model = cpnb.normalize(nn.Linear(4, 3), name)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = cpnb.param_groups(model, 0.1)
    decay = [names[id(p)] for p in groups[0]["params"]]
    direction = "original1" if name == "weight" else "original"
    assert decay == [f"parametrizations.weight.{direction}"]
    assert "bias" in [names[id(p)] for p in groups[1]["params"]]


# --- errors ---------------------------------------------------------------------------


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def with_row(value):
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[1] = value
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("model", "name", "options", "error", "text"),
    [
        ("net", "none", {}, TypeError, "model is a str, expected a torch.nn.Module"),
        (nn.Linear(2, 2), "batchnorm", {}, ValueError, "name is 'batchnorm', expected"),
        (
            *(nn.Linear(2, 2), "oni", {"rank": 3}, TypeError),
            r"\['rank'\] are no options of 'oni', expected some of \['iterations', ",
        ),
        (nn.ReLU(), "weight", {}, ValueError, "model is a ReLU with no convolution"),
        (nn.Linear(2, 2), "none", {"skip": "a"}, ValueError, r"skip names \['a'\]"),
        (tied(), "centered", {}, ValueError, "layer '0' shares a parameter: 0.weight"),
        (
            *(nn.Sequential(nn.ConvTranspose2d(3, 3, 3)), "weight", {}, TypeError),
            "layer '0' is a ConvTranspose2d, expected exactly one of Conv1d",
        ),
        (nn.Bilinear(2, 2, 2), "oni", {}, TypeError, "layer '' is a Bilinear"),
        (
            *(cpnb.CPLinear(3, 2), "weight", {}, TypeError),
            "layer '' is a CPLinear, whose kernel .* for CP layers, 'conditioned'",
        ),
        (
            *(cpnb.LowRankLinear(3, 2, rank=1), "conditioned", {}, TypeError),
            "layer '' is a LowRankLinear, whose kernel .* Use a norm layer",
        ),
        (
            *(cpnb.normalize(nn.Linear(3, 2), "oni"), "weight", {}, ValueError),
            "is a ParametrizedLinear, normalised already. Call cpnb.remove_normalizer",
        ),
        (
            *(parametrizations.weight_norm(nn.Linear(3, 2)), "batch", {}, ValueError),
            "normalised already",
        ),
        (
            *(cpnb.normalize(cpnb.CPLinear(3, 2), "conditioned"), "conditioned", {}),
            *(ValueError, "is a ConditionedCPLinear, normalised already"),
        ),
        (
            *(plane(), "scaling", {"skip": "0"}, ValueError),
            "skip='0' is given, expected neither skip nor output for 'scaling'",
        ),
        (plane(), "scaling", {"c": -1.0}, ValueError, "c is -1.0"),
        (
            *(with_row(float("nan")), "oni", {}, ValueError),
            "0.weight has 4 NaN or infinite entries",
        ),
        (
            *(with_row(0.0), "weight", {}, ValueError),
            r"layer '0' has no weights but 0 for outputs \[1\]",
        ),
        (
            *(nn.Linear(1, 3), "centered", {}, ValueError),
            "layer '' has a single weight per output",
        ),
        (nn.Linear(1, 3), "oni", {}, ValueError, "has a single weight per output"),
        (
            *(nn.Linear(3, 3), "standardized", {"gain": -1}, ValueError),
            "gain is -1, expected a number above 0",
        ),
        (
            *(nn.Linear(3, 3), "orthogonal", {"orthogonal_map": "qr"}, ValueError),
            r"orthogonal_map is 'qr', expected None or one of \('householder', ",
        ),
        (
            *(nn.Linear(3, 3), "spectral", {"n_power_iterations": 0}, ValueError),
            "n_power_iterations is 0, expected at least 1",
        ),
        (
            *(nn.Linear(3, 3), "spectral", {"eps": -1}, ValueError),
            "eps is -1, expected a finite number above 0",
        ),
        (
            *(nn.Sequential(nn.Linear(3, 3)), "batch", {"output": 3}, TypeError),
            "output is 3, expected True or False",
        ),
        (
            *(nn.Linear(3, 3), "conditioned", {"detach": 1}, TypeError),
            "detach is 1, expected True or False",
        ),
        (
            *(nn.Linear(3, 3), "group", {"group_size": 0}, ValueError),
            "group_size is 0, expected at least 1",
        ),
        (
            *(nn.Sequential(nn.Linear(3, 3)), "layer", {}, ValueError),
            "no layer but the output one to normalise. Pass output=True",
        ),
        (
            *(cpnb.normalize(small(), "group"), "batch", {}, ValueError),
            "layer '0.1' is a GroupNorm, expected a model without norm layers, or",
        ),
        (
            *(cpnb.normalize(small(), "batch"), "group", {"skip": "0.0"}, ValueError),
            "skip='0.0' is given, expected neither skip nor output for a model with",
        ),
        (
            *(cpnb.normalize(small(), "batch"), "layer", {"output": True}, ValueError),
            "output=True is given, expected neither skip nor output for a model with",
        ),
    ],
)
def test_normalize_refuses_bad_input(model, name, options, error, text):
    with pytest.raises(error, match=text):
        cpnb.normalize(model, name, **options)


def test_spectral_draws_from_its_generator_alone_and_starts_as_torch_does(monkeypatch):
    layer = nn.Conv2d(3, 20, 3)
    torch.manual_seed(5)
    expected = parametrizations.spectral_norm(copy.deepcopy(layer))
    state = torch.get_rng_state()
    # In a thread this would reseed the generator under the hands of all others.
    monkeypatch.delattr(torch.random, "fork_rng")
    generator = torch.Generator().manual_seed(5)
    found = cpnb.normalize(layer, "spectral", generator=generator)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(
        found.state_dict(), expected.state_dict(), rtol=0, atol=0
    )
    assert str(found) == str(expected)


def test_spectral_refuses_a_zero_kernel():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="layer '' is zero everywhere"):
        cpnb.normalize(layer, "spectral")


def test_remove_normalizer_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="model is a str"):
        cpnb.remove_normalizer("net")
