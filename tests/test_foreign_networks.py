"""Networks that nobody here wrote go through every operation, and into other runtimes.

Their topologies are those of the papers, built without torchvision; they are narrow, so
that a test takes seconds.
"""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import cpnb
from cpnb.explore import to_chain

WIDTH = 8


class Residual(nn.Module):
    """A basic block of ResNet-18, with a projection where the shape changes."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x):
        branch = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(branch + self.shortcut(x))


def resnet18():
    sizes = [WIDTH * n for n in (1, 1, 1, 2, 2, 4, 4, 8, 8)]
    strides = [1, 1, 2, 1, 2, 1, 2, 1]
    blocks = [Residual(*sizes[n : n + 2], strides[n]) for n in range(8)]
    stem = nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * WIDTH, 10)
    return nn.Sequential(*stem, *blocks, *head)


def vgg16():
    layers, before = [], 3
    for size, count in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(before, size * WIDTH, 3, padding=1), nn.ReLU()]
            before = size * WIDTH
        layers += [nn.MaxPool2d(2)]
    head = [nn.Linear(before, before), nn.ReLU(), nn.Dropout(), nn.Linear(before, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


class Inverted(nn.Module):
    """A block of MobileNetV2: wide, depthwise, narrow."""

    def __init__(self, before, after, stride):
        super().__init__()
        wide = 6 * before
        self.parts = nn.Sequential(
            *(nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            *(nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after)),
        )
        self.adds = stride == 1 and before == after

    def forward(self, x):
        return x + self.parts(x) if self.adds else self.parts(x)


def mobilenet():
    shapes = [(8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 16, 2), (16, 16, 1)]
    stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    return nn.Sequential(*stem, *(Inverted(*shape) for shape in shapes), *head)


class Attention(nn.Module):
    """A vision transformer with one block of torch's own attention."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.place = nn.Parameter(torch.zeros(16, 24))
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(2))
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.mix = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place
        first = self.norms[0](tokens)
        tokens = tokens + self.attention(first, first, first, need_weights=False)[0]
        tokens = tokens + self.mix(self.norms[1](tokens))
        return self.head(tokens.mean(1))


class UNet(nn.Module):
    """One step down and, by a transposed convolution, up again."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding=1)
        self.mid = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        wide = F.relu(self.down(x))
        joined = torch.cat([wide, self.up(F.relu(self.mid(wide)))], 1)
        return self.head(joined.mean((2, 3)))


NETWORKS = {"ResNet-18": resnet18, "VGG-16": vgg16, "MobileNetV2": mobilenet}
NETWORKS |= {"ViT": Attention, "U-Net": UNet}
# Attention applies its projection by itself, and torch makes it of a subclass.
SKIP = {"ViT": ("attention.out_proj",)}
IMAGES = torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)
LABELS = torch.arange(4)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A canonical network after a step of training, in evaluation mode."""
    torch.manual_seed(0)
    plain = NETWORKS[request.param]()
    options = {"rank": 0.5, "skip": SKIP.get(request.param, ()), "progress": False}
    net = cpnb.canonicalize(plain, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    F.cross_entropy(net(IMAGES), LABELS).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    optimizer.step()
    return net.eval()


def test_attention_is_refused_by_name_unless_it_is_skipped():
    with pytest.raises(TypeError, match=r"'attention.out_proj'.*and no subclass"):
        cpnb.canonicalize(Attention(), init="unified")


def test_network_is_cut_swept_and_turned_into_stock_layers(network):
    cut = cpnb.truncate(network, keep=0.5, refit=True)
    name = [*cpnb.cp_layers(network)][1]
    rank = cpnb.cp_layers(cut)[name].rank
    sweep = cpnb.rank_sweep(
        network, (IMAGES, LABELS), ranks={name: [rank]}, progress=False
    )
    alone = cpnb.truncate(network, rank={name: rank})
    assert sweep.accuracy({name: rank}) == cpnb.accuracy(alone, (IMAGES, LABELS))
    for stock in (cpnb.to_dense(network), to_chain(network)):
        assert not cpnb.cp_layers(stock)
        assert_close(stock(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-4)


def test_network_compiles_exports_copies_and_takes_mixed_precision(network):
    expected = network(IMAGES)
    torch.compiler.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    exported = torch.export.export(network, (IMAGES,)).module()
    twins = copy.deepcopy(network), pickle.loads(pickle.dumps(network))
    for other in (compiled, exported, *twins):
        assert_close(other(IMAGES), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(IMAGES).float()
    assert (rough - expected).norm() < 0.05 * expected.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporters' own making
@pytest.mark.parametrize("dynamo", [False, True], ids=["tracing", "dynamo"])
@pytest.mark.parametrize("form", ["canonical", "chain"])
def test_network_runs_in_onnxruntime(network, form, dynamo, tmp_path):
    import onnxruntime

    model = to_chain(network) if form == "chain" else network
    path = str(tmp_path / "net.onnx")
    torch.onnx.export(model, (IMAGES,), path, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    (scores,) = session.run(None, {name: IMAGES.numpy()})
    assert_close(
        torch.from_numpy(scores), network(IMAGES).detach(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_checkpoint_loads_in_a_new_process(network, tmp_path, request):
    name = request.node.callspec.params["network"]
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    code = f"""
import sys, torch, cpnb
sys.path.insert(0, {str(__file__).rsplit("/", 1)[0]!r})
from test_foreign_networks import IMAGES, NETWORKS, SKIP
options = {{"rank": 1, "init": "unified", "skip": SKIP.get({name!r}, ())}}
net = cpnb.canonicalize(NETWORKS[{name!r}](), **options).eval()
net.load_state_dict(torch.load({str(tmp_path / "weights.pt")!r}))
torch.save(net(IMAGES), {str(tmp_path / "scores.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert_close(torch.load(tmp_path / "scores.pt"), network(IMAGES))


def one_step(net, images, labels):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()


def seeded_unet():
    torch.manual_seed(0)
    return cpnb.canonicalize(UNet(), init="unified")


def one_of_two(place, folder):
    """A step in one of two processes that share a batch."""
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", meeting, rank=place, world_size=2)
    net = seeded_unet()
    shared = nn.parallel.DistributedDataParallel(net)
    one_step(shared, IMAGES[place::2], LABELS[place::2])
    torch.save(net.state_dict(), f"{folder}/{place}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    alone = seeded_unet()
    one_step(alone, IMAGES, LABELS)
    for place in (0, 1):
        state = torch.load(tmp_path / f"{place}.pt")
        assert_close(state, dict(alone.state_dict()), rtol=1e-4, atol=1e-6)
