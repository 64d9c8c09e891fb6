"""Factored layers in other hands: autograd, tracers, export, ONNX, vmap, pickle."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from cpnb import CPConv1d, CPConv2d, CPConv3d, CPLinear, to_dense
from cpnb.layers import CPConvTranspose2d, CPLayer
from cpnb.methods import LowRankConv2d, LowRankLinear

MODES = ["dense", "chain"]
GEOMETRY = {"groups": 2, "padding": 1, "padding_mode": "circular"}
# Class, arguments, shape of an input.
LAYERS = {
    "Conv1d": (CPConv1d, (3, 4, 3), {"signed": False}, (3, 9)),
    "Conv2d": (CPConv2d, (4, 6, 3, 2), GEOMETRY, (4, 7, 7)),
    "pointwise": (CPConv2d, (4, 6, 1, 2), {}, (4, 7, 7)),
    "Conv3d": (CPConv3d, (2, 3, 2), {}, (2, 5, 5, 5)),
    "Linear": (CPLinear, (6, 4), {}, (6,)),
    "transposed": (CPConvTranspose2d, (4, 6, 3, 2), {"groups": 2}, (4, 5, 5)),
    "low rank": (LowRankConv2d, (4, 6, (2, 3), 1, 1), {"groups": 2}, (4, 7, 7)),
    "low-rank pointwise": (LowRankConv2d, (4, 6, 1, 2), {}, (4, 7, 7)),
    "low-rank linear": (LowRankLinear, (6, 4), {}, (6,)),
}


@pytest.fixture(params=LAYERS)
def case(request):
    """A function that makes a layer for a forward mode, and the shape of its input."""
    kind, arguments, options, shape = LAYERS[request.param]

    def make(mode):
        layer = kind(*arguments, **options, rank=5)
        if isinstance(layer, CPLayer):  # a low-rank layer has one way
            layer.forward_mode = mode
        return layer

    return make, shape


@pytest.mark.parametrize("mode", MODES)
def test_layer_passes_gradcheck_and_reaches_every_parameter(case, mode):
    make, shape = case
    layer = make(mode).double()
    names, values = zip(*layer.named_parameters(), strict=True)

    def output(inputs, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, state, (inputs,))

    inputs = torch.randn(1, *shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(output, (inputs, *values))
    layer(inputs).square().sum().backward()
    assert all(value.grad.any() for value in values)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit itself
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are constants
def test_traced_layer_follows_its_parameters(case, mode, training):
    """By torch.jit.trace and make_fx: neither must hold a kernel as a constant."""
    make, shape = case
    layer = make(mode).train(training)
    inputs = torch.randn(2, *shape)
    traced = torch.jit.trace(layer, inputs)
    parameters = dict(layer.named_parameters())

    def call(state, inputs):
        return torch.func.functional_call(layer, state, (inputs,))

    graph = make_fx(call)(parameters, inputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(-1.5).add_(0.5)
    fresh = torch.randn(2, *shape)
    assert_close(traced(fresh), layer(fresh))
    assert_close(graph(parameters, fresh), layer(fresh))


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_layer_compiles_into_one_graph_with_gradients(case, mode):
    make, shape = case
    layer = make(mode)
    torch.compiler.reset()  # the cases are many for one piece of code
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = torch.randn(2, *shape)
    compiled(inputs).square().sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    output = layer(inputs)
    output.square().sum().backward()
    assert_close(compiled(inputs), output)
    assert_close(gradients, [p.grad for p in layer.parameters()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", MODES)
def test_layer_exports_for_any_batch_size_and_maps(case, mode, training):
    make, shape = case
    layer = make(mode).train(training)
    sizes = ({0: torch.export.Dim("batch")},)
    example = (torch.randn(3, *shape),)
    program = torch.export.export(layer, example, dynamic_shapes=sizes, strict=False)
    for batch in (2, 3, 7):
        inputs = torch.randn(batch, *shape)
        assert_close(program.module()(inputs), layer(inputs))
        expected = torch.stack([layer(one[None]) for one in inputs])
        assert_close(torch.vmap(layer)(inputs[:, None]), expected)


TRACING = {"dynamo": False, "opset_version": 17, "input_names": ["x"]}
TRACING["dynamic_axes"] = {"x": {0: "batch"}}
GRAPH = {"dynamo": True, "verbose": False}


@pytest.mark.filterwarnings("ignore")  # of the exporters' own making
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [TRACING, pytest.param(GRAPH, marks=pytest.mark.slow)],
    ids=["tracing", "graph"],
)
def test_layer_exported_to_onnx_runs_in_onnx_runtime(case, mode, options, tmp_path):
    import onnxruntime

    make, shape = case
    layer = make(mode).eval()
    path = tmp_path / "layer.onnx"
    torch.onnx.export(layer, (torch.randn(2, *shape),), path, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    for batch in (2, 2 if options["dynamo"] else 5):
        inputs = torch.randn(batch, *shape)
        (outputs,) = session.run(None, {name: inputs.numpy()})
        expected = layer(inputs).detach()
        assert_close(torch.from_numpy(outputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_layer_follows_default_device_and_dtype_in_its_parameters_only(case, mode):
    make, shape = case
    layer = make(mode)
    inputs = torch.randn(2, *shape)
    expected = layer(inputs)
    with torch.device("meta"):
        assert_close(layer(inputs), expected)
        assert_close(layer.weight, to_dense(layer).weight)
        abstract = make(mode)
        assert {p.device.type for p in abstract.parameters()} == {"meta"}
        assert abstract(torch.empty(2, *shape)).shape == expected.shape
    torch.set_default_dtype(torch.float64)
    try:
        assert_close(layer(inputs), expected)
        assert make(mode)(inputs.double()).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_dense_network_needs_no_cpnb_to_unpickle(tmp_path):
    """A stock layer that came out of cpnb loads where cpnb is not installed."""
    path = tmp_path / "net.pt"
    torch.save(to_dense(nn.Sequential(CPConv2d(1, 8, 3), nn.BatchNorm2d(8))), path)
    code = (
        "import sys, torch; sys.modules['cpnb'] = None; "
        f"print(type(torch.load({str(path)!r}, weights_only=False)[0]).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "Conv2d", done.stderr


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize("kind", [CPConv2d, LowRankConv2d])
def test_vmap_trains_an_ensemble_of_convolutions(kind, mode, innermost):
    twins = [kind(3, 4, 3, rank=5).double() for _ in range(2)]
    for twin in twins:
        twin.forward_mode = mode
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
