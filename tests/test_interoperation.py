"""Factorized networks in other hands: compile, export, ONNX, pickle, a light import."""

import copy
import pickle
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import cpnb

FORMS = {
    "CP": cpnb.canonicalize,
    "low rank": partial(cpnb.factorize, skip=(), middle=True),
}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def network(request):
    generator = torch.Generator().manual_seed(0)
    return request.param(cpnb.DigitsNet(), rank=0.5, generator=generator).eval()


IMAGES = torch.linspace(-1, 1, 3 * 64).view(3, 1, 8, 8)


@pytest.mark.parametrize(
    "make",
    [
        partial(cpnb.CPConv2d, forward_mode="auto"),
        partial(cpnb.CPConv2d, forward_mode="dense"),
        partial(cpnb.CPConv2d, forward_mode="chain"),
        partial(cpnb.LowRankConv2d, middle=True),
    ],
    ids=["auto", "dense", "chain", "low rank"],
)
def test_layer_compiles_into_one_graph_with_gradients(make):
    layer = make(3, 8, 3, rank=6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 8, 8)
    assert_close(compiled(images), layer(images))
    compiled(images).square().sum().backward()
    found = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(images).square().sum().backward()
    assert_close(found, [p.grad for p in layer.parameters()], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of Inductor's own making
def test_layer_compiles_with_the_default_backend():
    layer = cpnb.CPLinear(20, 10, rank=4)
    rows = torch.randn(3, 20)
    with torch.no_grad():
        assert_close(torch.compile(layer, fullgraph=True)(rows), layer(rows))


@pytest.mark.parametrize("dense", [False, True])
def test_network_exports_for_any_batch_size(network, dense):
    model = cpnb.to_dense(network) if dense else network
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        model, (IMAGES,), dynamic_shapes=({0: batch},), strict=False
    )
    for images in (IMAGES, IMAGES[:2], IMAGES.repeat(7, 1, 1, 1)):
        assert_close(program.module()(images), network(images))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter's own making
@pytest.mark.parametrize("dense", [False, True])
def test_network_runs_in_onnx_runtime(network, dense, tmp_path):
    import onnxruntime

    path = tmp_path / "net.onnx"
    model = cpnb.to_dense(network) if dense else network
    torch.onnx.export(model, (IMAGES,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    (scores,) = session.run(None, {name: IMAGES.numpy()})
    with torch.no_grad():
        assert_close(torch.from_numpy(scores), network(IMAGES), rtol=1e-4, atol=1e-5)


def test_dense_network_needs_no_cpnb_to_unpickle(network, tmp_path):
    """A stock layer that came out of cpnb loads where cpnb is not installed."""
    path = tmp_path / "layer.pt"
    torch.save(cpnb.to_dense(network).conv2, path)
    code = (
        "import sys, torch; sys.modules['cpnb'] = None; "
        f"print(type(torch.load({str(path)!r}, weights_only=False)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "Conv2d", done.stderr


def test_network_pickles_and_copies(network):
    for twin in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
        assert torch.equal(twin(IMAGES), network(IMAGES))
        own = {p.data_ptr() for p in network.parameters()}
        assert own.isdisjoint(p.data_ptr() for p in twin.parameters())


def test_vmap_runs_an_ensemble_of_networks(network):
    twins = [network, copy.deepcopy(network)]
    with torch.no_grad():
        for parameter in twins[1].parameters():
            parameter.mul_(1.1)
    parameters, buffers = torch.func.stack_module_state(twins)

    def scores(parameters, buffers):
        return torch.func.functional_call(network, (parameters, buffers), (IMAGES,))

    with torch.no_grad():
        together = torch.vmap(scores)(parameters, buffers)
        assert_close(together, torch.stack([twin(IMAGES) for twin in twins]))


@pytest.mark.parametrize("mode", ["dense", "chain"])
@pytest.mark.parametrize("innermost", [False, True])
def test_vmap_trains_an_ensemble_of_cp_convolutions(mode, innermost):
    twins = [
        cpnb.CPConv2d(3, 4, 3, rank=5, forward_mode=mode).double() for _ in range(2)
    ]
    images = torch.randn(2, 6, 3, 5, 5, dtype=torch.float64)
    if innermost:
        images = images.movedim(2, -1).contiguous().movedim(-1, 2)
    parameters, buffers = torch.func.stack_module_state(twins)

    def loss(parameters, buffers, images):
        state = parameters, buffers
        return torch.func.functional_call(twins[0], state, (images,)).square().sum()

    torch.vmap(loss)(parameters, buffers, images).sum().backward()
    for n, (twin, own) in enumerate(zip(twins, images, strict=True)):
        twin(own).square().sum().backward()
        for name, parameter in twin.named_parameters():
            assert_close(parameters[name].grad[n], parameter.grad)


def test_import_is_light():
    heavy = "matplotlib ipywidgets IPython sklearn scipy safetensors tqdm jupytext "
    heavy += "pooch requests"
    code = (
        "import sys, torch, numpy\n"
        "before = set(sys.modules)\n"
        "import cpnb\n"
        f"print(*[m for m in {heavy.split()!r} if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_every_public_name_is_there_and_unknown_ones_are_not():
    for name in cpnb.__all__:
        assert getattr(cpnb, name).__doc__
    assert set(cpnb.__all__) <= set(dir(cpnb))
    with pytest.raises(AttributeError, match="no attribute 'CPConv4d'"):
        cpnb.CPConv4d  # noqa: B018
