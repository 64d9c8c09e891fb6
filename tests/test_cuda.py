"""What a GPU computes is what the CPU computes; skipped where there is none."""

import copy
import os

import pytest
import torch
from shared import seeded
from torch.testing import assert_close

import cpnb
from cpnb.methods import NORMALIZERS, normalize
from cpnb.train import Augment, DigitsNet, fit, load_data

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # read when CUDA starts
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

QUIET = {"progress": False}
CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # float32, sums in another order, TF32 off


def digits_net(**options):
    net = DigitsNet(generator=seeded())
    return cpnb.canonicalize(net, generator=seeded(), **options) if options else net


def pixels(count=32):
    return torch.randn(count, 1, 8, 8, generator=seeded())


@pytest.mark.parametrize("mode", ["dense", "chain"])
def test_layers_compute_and_learn_the_same(mode):
    here = digits_net(rank=0.5, init="unified")
    for layer in cpnb.cp_layers(here).values():
        layer.forward_mode = mode
    there = copy.deepcopy(here).cuda()
    for net, images in ((here, pixels()), (there, pixels().cuda())):
        net(images).square().sum().backward()
    assert_close(there(pixels().cuda()).cpu(), here(pixels()), **CLOSE)
    for gpu, cpu in zip(there.parameters(), here.parameters(), strict=True):
        assert_close(gpu.grad.cpu(), cpu.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("init", ["power", "als", "unified", "gaussian"])
def test_conversion_and_truncation_stay_on_the_device(init):
    options = {"rank": 0.9, "init": init, "generator": seeded()}
    net = cpnb.canonicalize(DigitsNet(generator=seeded()).cuda(), **options)
    cut = cpnb.truncate(net, keep=0.5, refit=True, **QUIET)
    dense = cpnb.to_dense(cut)
    parameters = [p for m in (net, cut, dense) for p in m.parameters()]
    assert {p.device.type for p in parameters} == {"cuda"}
    assert_close(dense(pixels().cuda()), cut(pixels().cuda()), **CLOSE)
    again = digits_net(rank=0.9, init=init)
    again.load_state_dict(net.state_dict())
    assert_close(again(pixels()), net(pixels().cuda()).cpu(), **CLOSE)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizers_stay_on_the_device(name):
    options = {"data": pixels()} if name == "scaling" else {}
    here = normalize(digits_net(), name, generator=seeded(), **options)
    there = normalize(digits_net().cuda(), name, generator=seeded(), **options)
    assert {p.device.type for p in there.parameters()} == {"cuda"}
    if name != "canonical":  # the power method may end in another component
        assert_close(there(pixels().cuda()).cpu(), here(pixels()), **CLOSE)


def test_sweep_counts_the_same_answers():
    net, data = digits_net(rank="same", init="power"), load_data()
    fit(net, data, epochs=3, **QUIET)
    here = cpnb.rank_sweep(net, data, **QUIET).table
    there = cpnb.rank_sweep(net.cuda(), data, **QUIET).table
    assert (here.right - there.right).abs().max() <= 2


@pytest.mark.filterwarnings("ignore:TensorFloat32")  # that it is off
@pytest.mark.parametrize("options", [{}, {"amp": True}, {"compile": "reduce-overhead"}])
@pytest.mark.parametrize("rank", [None, "same"])
def test_fit_trains_as_on_the_cpu(rank, options):
    form = {} if rank is None else {"rank": rank, "init": "unified"}
    plain, moved = digits_net(**form), digits_net(**form)
    settings = {"epochs": 3, "augment": Augment(crop=1, flip=False), **QUIET}
    state = torch.cuda.get_rng_state()
    same = {"amp": True} if "amp" in options else {}
    expected = fit(plain, load_data(), **settings, **same).history
    history = fit(moved.cuda(), load_data(), **settings, **options).history
    assert torch.equal(state, torch.cuda.get_rng_state())
    for cpu, gpu in zip(expected, history, strict=True):
        assert gpu["train_loss"] == pytest.approx(cpu["train_loss"], rel=0.05)
