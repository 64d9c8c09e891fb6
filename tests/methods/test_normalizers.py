"""Every normalizer on whole models: what it claims, removes, copies and refuses."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import cpnb
from cpnb.cp import relative_error
from cpnb.methods import NORMALIZERS, normalize, remove_normalizer
from cpnb.methods.normalizers import orthogonalized
from cpnb.train import param_groups

NAMES = ["none", "batch", "weight", "oni", "conditioned", "scaling", "canonical"]
COMPUTED = ["weight", "oni"]
KEEPERS = ["none", "weight", "scaling"]
WITH_CP = ["none", "batch", "conditioned", "scaling", "canonical"]


def small():
    """A network with every kind of layer that can be normalised, and images."""
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(2)),
        *(nn.Conv1d(6, 5, 2, stride=2), nn.ReLU(), nn.Unflatten(2, (2, 2, 2))),
        *(nn.Conv3d(5, 6, 2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)),
    ).double(), torch.randn(16, 2, 6, 6, dtype=torch.float64)


def plane(cp=False):
    """A network that every normalizer takes, also scaling, and images."""
    net = nn.Sequential(
        *(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3)),
    ).double()
    net = cpnb.canonicalize(net, rank=0.9, init="unified") if cp else net
    return net, torch.randn(16, 2, 6, 6, dtype=torch.float64)


every_kind = pytest.mark.parametrize(
    ("name", "cp"), [*((name, False) for name in NAMES), *((n, True) for n in WITH_CP)]
)


def normalized(model, name, images, **options):
    if name == "scaling":
        options["data"] = images
    return normalize(model, name, **options)


def parametrized(model):
    return [m for m in model.modules() if parametrize.is_parametrized(m, "weight")]


def train(model, images, lr=0.05):
    optimizer = torch.optim.SGD(param_groups(model, 0.01), lr=lr, momentum=0.5)
    labels = torch.arange(len(images)) % 3
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        yield


# --- what the names promise -----------------------------------------------------------


def test_normalize_has_the_names_of_the_table_and_documents_their_options():
    assert list(NORMALIZERS) == NAMES
    text = inspect.getdoc(normalize)
    for entry in NORMALIZERS.values():
        parameters = inspect.signature(entry).parameters
        assert all(
            f"``{name}" in text for name in [*parameters][3:] if name != "options"
        )


@pytest.mark.parametrize("name", NAMES)
def test_normalize_keeps_the_function_where_it_says_so(name):
    model, images = plane()
    model.train()
    change = relative_error(model(images), normalized(model, name, images)(images))
    assert change < 1e-12 if name in KEEPERS else change > 1e-2


def expected_kernel(name, layer):
    """The kernel by its formula, from what is stored."""
    kernel = layer.parametrizations["weight"]
    stored = kernel.original1 if name == "weight" else kernel.original
    rows = stored.detach().flatten(1)
    if name == "weight":
        lengths = rows.square().sum(1, keepdim=True).sqrt()
        rows = kernel.original0.detach().flatten(1) * rows / lengths
    else:  # the iteration as it stands in the paper, group by group
        groups = getattr(layer, "groups", 1)
        parts = []
        for part in rows.chunk(groups):
            z = part - part.mean(1, keepdim=True)
            z = z.T if len(z) > len(z.T) else z
            s = z @ z.T + 1e-5 * torch.eye(len(z))
            b = torch.eye(len(z), dtype=s.dtype)
            for _ in range(5):
                b = 1.5 * b - 0.5 * b @ b @ b @ (s / s.norm())
            w = b @ z / s.norm().sqrt()
            parts.append(math.sqrt(2) * (w.T if len(part) > len(part.T) else w))
        rows = torch.cat(parts)
    return rows.view(stored.shape)


@pytest.mark.parametrize("name", COMPUTED)
def test_normalize_computes_the_kernel_of_its_formula_after_every_step(name):
    model, images = small()
    model = normalized(model, name, images)
    layers = parametrized(model)
    assert len(layers) == 6
    before = [layer.weight.detach().clone() for layer in layers]
    for _ in train(model, images):
        for layer in layers:
            kernel = expected_kernel(name, layer)
            assert_close(layer.weight, kernel, rtol=1e-6, atol=1e-9)
    for layer, weight in zip(layers, before, strict=True):
        assert not torch.equal(layer.weight, weight)


@settings(max_examples=40)
@given(
    *(st.integers(1, 40), st.integers(2, 40), st.integers(1, 7)),
    st.sampled_from(["normal", "zero", "zero row", "equal rows", "tiny", "huge"]),
)
def test_oni_stays_bounded_and_has_a_finite_gradient(rows, columns, iterations, kind):
    matrix = torch.randn(rows, columns)
    if kind == "zero row":
        matrix[0] = 0
    elif kind == "equal rows":
        matrix[:] = matrix[0].clone()
    else:
        matrix *= {"normal": 1, "zero": 0, "tiny": 1e-8, "huge": 1e8}[kind]
    matrix.requires_grad_()
    result = orthogonalized(matrix, iterations)
    result.sum().backward()
    assert torch.linalg.matrix_norm(result, 2) <= 1 + 1e-5
    assert matrix.grad.isfinite().all()


def test_oni_has_the_gradient_of_finite_differences():
    layer = normalize(nn.Conv2d(4, 6, 2, groups=2).double(), "oni")
    module = layer.parametrizations.weight[0]
    kernel = torch.randn(6, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, kernel)


def test_batch_norm_stands_behind_every_layer_but_skipped_and_output_ones():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)).double()
    for skip, expected in (((), [0, 1]), ("1", [0]), ("2", [0, 1])):
        new = normalize(net.eval(), "batch", skip=skip)
        assert [n for n in range(3) if type(new[n]) is nn.Sequential] == expected
    assert new[0][1].weight.dtype == torch.float64
    assert not any(module.training for module in new.modules())
    net = nn.Sequential(cpnb.CPConv2d(2, 6, 2), nn.Flatten(), nn.Linear(36, 2))
    new = normalize(net, "batch")
    outputs = new[0](torch.randn(5, 2, 3, 4)).movedim(1, 0).flatten(1)
    assert outputs.mean(1).abs().max() < 1e-5
    assert_close(outputs.var(1, correction=0), torch.ones(6), rtol=1e-2, atol=0)
    assert str(normalize(new, "batch")) == str(new), "it has batch norm already"


def test_scaling_brings_the_rows_back_after_every_step():
    net, images = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), (64, 6)
    model = normalize(net, "scaling", data=torch.randn(images), c=2.0)
    pair = (torch.randn(images), torch.randint(3, (64,)))
    cpnb.fit(model, pair, epochs=1, lr=0.1, progress=False)
    assert_close(model[0].weight.norm(dim=1), torch.full((5,), 2.0))
    assert not hasattr(net, "training_hooks")
    assert not remove_normalizer(model).training_hooks


# --- copies ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_normalize_leaves_the_source_and_torchs_generator_alone(name):
    model, images = plane()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    new = normalized(model, name, images, generator=generator)
    remove_normalizer(new)
    assert torch.equal(torch.get_rng_state(), state)
    for p in new.parameters():
        p.data.add_(1.0)
    assert [type(module) for module in model.modules()] == kinds
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not all(p.requires_grad for p in new[0].parameters())
    if name in COMPUTED:
        assert not remove_normalizer(new)[0].weight.requires_grad


@every_kind
def test_remove_normalizer_gives_stock_layers_and_the_same_function(name, cp):
    model, images = plane(cp)
    new = normalized(model, name, images)
    for p in new.parameters():  # somewhere else than at the start
        p.data.add_(0.01 * torch.randn_like(p))
    for training in (True, False):
        removed = remove_normalizer(new.train(training))
        for module in removed.modules():
            assert type(module).__module__.startswith("torch.nn.modules")
            assert module.training == training
        pickle.dumps(removed)
        assert relative_error(new(images), removed(images)) < 1e-12


@pytest.mark.parametrize("name", [*COMPUTED, "conditioned", "canonical"])
def test_remove_normalizer_from_a_copy_leaves_the_others_working(name):
    model, images = small()
    model = normalized(model, name, images).eval()
    twin, expected = copy.deepcopy(model), model(images)
    for one, other in ((twin, model), (model, twin)):
        assert_close(remove_normalizer(one)(images), expected)
        for left in (one, other, copy.deepcopy(other)):
            assert torch.equal(left(images), expected)
            left(images).sum().backward()


def test_remove_normalizer_keeps_cp_layers_and_shared_layers_if_asked_to():
    model, images = plane(cp=True)
    new = normalize(model.eval(), "conditioned")
    plain = remove_normalizer(new, keep_cp=True)
    kinds = [type(layer) for layer in cpnb.cp_layers(plain).values()]
    assert kinds == [type(layer) for layer in cpnb.cp_layers(model).values()]
    assert relative_error(new(images), plain(images)) < 1e-12
    assert plain[0].init is model[0].init
    layer = normalize(nn.Linear(3, 3), "weight")
    removed = remove_normalizer(nn.Sequential(layer, nn.ReLU(), layer))
    assert removed[0] is removed[2]


def test_remove_normalizer_refuses_what_would_be_lost():
    hooked, patched = (normalize(nn.Linear(3, 3), "weight") for _ in range(2))
    hooked.register_forward_hook(lambda module, args, out: 2 * out)
    patched.forward = lambda inputs: 0 * inputs
    for layer in (hooked, patched):
        with pytest.raises(TypeError, match="layer '0' is a Linear with hooks or a f"):
            remove_normalizer(nn.Sequential(layer))


@pytest.mark.slow
@every_kind
def test_normalized_model_compiles_into_one_graph(name, cp):
    net, images = plane(cp)
    model = normalized(net, name, images).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert relative_error(model(images), compiled(images)) < 1e-12


# --- errors ---------------------------------------------------------------------------


TIED = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
TIED[1].weight = TIED[0].weight
TURNED = nn.Sequential(nn.ConvTranspose2d(3, 3, 3))
CP = cpnb.CPLinear(3, 2)
CONDITIONED, ONI = normalize(CP, "conditioned"), normalize(nn.Linear(3, 2), "oni")
SKIPPING = {"skip": "0", "data": plane()[1]}
ANEW = "layer '' is a CPLinear, whose kernel is computed anew"
PARAMETRIZED = "it is parametrized; call cpnb.methods.remove_normalizer first"
NO_SKIP = "skip is '0', expected none for 'scaling'"


@pytest.mark.parametrize(
    ("model", "name", "options", "error", "text"),
    [
        (nn.Linear(2, 2), "batchnorm", {}, ValueError, "name is 'batchnorm', expected"),
        (nn.Linear(2, 2), "oni", {"rank": 3}, TypeError, "unexpected keyword argument"),
        (nn.ReLU(), "weight", {}, ValueError, "model is a ReLU with no convolution"),
        (nn.Linear(2, 2), "oni", {"skip": "a"}, ValueError, r"skip names \['a'\]"),
        (TIED, "oni", {}, ValueError, "layer '0' shares a parameter: 0.weight"),
        (TURNED, "weight", {}, TypeError, "layer '0' is a ConvTranspose2d"),
        (CP, "weight", {}, TypeError, ANEW),
        (CONDITIONED, "conditioned", {}, TypeError, "Call remove_normalizer first"),
        (ONI, "weight", {}, TypeError, PARAMETRIZED),
        (nn.Linear(2, 2), "scaling", {}, TypeError, "missing 1 required .* 'data'"),
        (plane()[0], "scaling", SKIPPING, ValueError, NO_SKIP),
    ],
)
def test_normalize_refuses_bad_input(model, name, options, error, text):
    with pytest.raises(error, match=text):
        normalize(model, name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_normalized_model_runs_in_channels_last_and_autocast(name):
    model, images = (part.float() for part in plane())
    model = normalized(model, name, images).eval()
    expected = model(images)
    packed = copy.deepcopy(model).to(memory_format=torch.channels_last)
    innermost = images.contiguous(memory_format=torch.channels_last)
    assert relative_error(expected, packed(innermost)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images)
    assert relative_error(expected, low.float()) < 0.03
    low.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
