"""The truncation report against direct computation."""

import pytest
import torch
from torch import nn

import cpnb
from cpnb.explore.report import count_flops, truncation_report


@pytest.fixture
def networks():
    net = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)]
    generator = torch.Generator().manual_seed(0)
    before = cpnb.canonicalize(nn.Sequential(*net), rank=5, generator=generator)
    return before, cpnb.truncate(before, keep=0.5)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_report_counts_parameters_against_the_dense_network(networks):
    before, after = networks
    report = truncation_report(before, after)
    assert list(report.index) == ["0", "3", "total"]
    parts = [(before.get_submodule(n), after.get_submodule(n)) for n in ("0", "3")]
    for name, (old, new) in zip(report.index, [*parts, networks], strict=True):
        row = report.loc[name]
        assert (row["parameters_before"], row["parameters"]) == (count(old), count(new))
        assert row["over_dense"] == count(new) / count(cpnb.to_dense(new))
    assert report["rank_before"].tolist() == [5, 5, 10]
    assert report["rank"].tolist() == [2, 2, 4]
    assert report.loc["0", "relative_rank"] == 2 / after[0].break_even_rank
    assert report["relative_rank"].isna().tolist() == [False, False, True]


def test_report_measures_kernel_errors(networks):
    before, after = networks
    report = truncation_report(before, after)
    kernels = [
        [net.get_submodule(name).weight.flatten() for name in ("0", "3")]
        for net in (before, after)
    ]
    for whole in kernels:
        whole.append(torch.cat(whole))
    for found, kernel, cut in zip(report["relative_error"], *kernels, strict=True):
        error = ((kernel - cut).norm() / kernel.norm()).item()
        assert found == pytest.approx(error, rel=1e-5)


def test_report_measures_accuracy_and_flops_when_data_is_given(networks):
    before, after = networks
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 1, 8, 8, generator=generator)
    pair = images, torch.randint(10, (40,), generator=generator)
    assert "flops" not in truncation_report(before, after)
    after.train()
    report = truncation_report(before, after, pair)
    assert after.training and after[0].forward_mode == "auto"
    for model, column in ((before, "accuracy_before"), (after, "accuracy")):
        right = model(pair[0]).argmax(1) == pair[1]
        assert report.loc["total", column] == pytest.approx(right.float().mean().item())
    # 2 FLOPs a multiply-add: 64 pixels times a 4x1x3x3 kernel, then a 10x256 matrix.
    # Rank 2: window 9 and output 4 per pixel; 256 in and 10 out.
    dense = [2 * 64 * 4 * 9, 2 * 2560, 2 * (64 * 4 * 9 + 2560)]
    chain = [2 * 64 * 2 * (9 + 4), 2 * 2 * (256 + 10), 4 * (64 * 13 + 266)]
    assert report["flops"].tolist() == chain
    shares = [c / d for c, d in zip(chain, dense, strict=True)]
    assert report["flops_over_dense"].tolist() == shares


def test_report_takes_a_layer_alone():
    layer = cpnb.CPLinear(20, 10, rank=6)
    data = torch.randn(5, 20), torch.arange(5)
    report = truncation_report(layer, cpnb.truncate(layer, rank=3), data)
    assert list(report.index) == ["layer", "total"]
    assert report["flops"].tolist() == [2 * 3 * 30] * 2


def test_flops_of_a_layer_used_twice_count_twice():
    layer = nn.Linear(3, 3)
    net = nn.Sequential(layer, nn.Sequential(layer, nn.Linear(3, 2)))
    flops = count_flops(net, torch.zeros(1, 3))
    assert (flops[""], flops["1.1"]) == (2 * (9 + 9 + 6), 2 * 6)


def test_report_refuses_networks_that_do_not_match(networks):
    before, _ = networks
    other = cpnb.canonicalize(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="Pass a network and its truncated copy"):
        truncation_report(before, other)
    with pytest.raises(ValueError, match="after has the CP layers"):
        truncation_report(nn.ReLU(), nn.ReLU())
