"""The truncation report against direct computation."""

import pytest
import torch
from torch import nn

import cpnb


@pytest.fixture
def networks():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )
    before = cpnb.canonicalize(
        model, rank=5, generator=torch.Generator().manual_seed(0)
    )
    return before, cpnb.truncate(before, keep=0.5)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 1, 8, 8, generator=generator)
    return images, torch.randint(10, (40,), generator=generator)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_report_counts_parameters_against_the_dense_network(networks):
    before, after = networks
    report = cpnb.truncation_report(before, after)
    for row, name in zip(report.rows, ("0", "3"), strict=True):
        assert row.layer == name
        assert (row.rank_before, row.rank_after) == (5, 2)
        assert row.parameters_before == count(before.get_submodule(name))
        assert row.parameters_after == count(after.get_submodule(name))
        dense = after.get_submodule(name).to_dense()
        assert row.dense_parameters == count(dense)
    assert report.total.parameters_after == count(after)
    assert report.total.dense_parameters == count(cpnb.to_dense(after))
    row = report.to_rows()[0]
    assert row["rank_over_break_even"] == 2 / row["break_even_rank"]


def test_report_measures_kernel_errors(networks):
    before, after = networks
    report = cpnb.truncation_report(before, after)
    kernels = [
        (
            before.get_submodule(n).weight.flatten(),
            after.get_submodule(n).weight.flatten(),
        )
        for n in ("0", "3")
    ]
    for row, (kernel, cut) in zip(report.rows, kernels, strict=True):
        error = ((kernel - cut).norm() / kernel.norm()).item()
        assert row.relative_error == pytest.approx(error, rel=1e-5)
    whole, cut = (torch.cat(parts) for parts in zip(*kernels, strict=True))
    error = ((whole - cut).norm() / whole.norm()).item()
    assert report.total.relative_error == pytest.approx(error, rel=1e-5)


def test_report_measures_accuracy_and_flops_when_data_is_given(networks, pair):
    before, after = networks
    report = cpnb.truncation_report(before, after, pair)
    assert report.images == 40
    for model, share in (
        (before, report.accuracy_before),
        (after, report.accuracy_after),
    ):
        right = model(pair[0]).argmax(1) == pair[1]
        assert share == pytest.approx(right.float().mean().item())
    # 2 FLOPs a multiply-add: 64 pixels times a 4x1x3x3 kernel, then a 10x256 matrix.
    assert report.dense_flops == 2 * (64 * 4 * 9 + 2560)
    # Rank 2: window 9 and output 4 per pixel; 256 in and 10 out.
    assert report.chain_flops == 2 * (64 * 2 * (9 + 4) + 2 * (256 + 10))


def test_report_reads_as_text_and_as_html(networks, pair):
    report = cpnb.truncation_report(*networks, pair)
    text, page = str(report), report._repr_html_()
    total = f"{report.total.parameters_after:,}"
    for shown in (text, page):
        assert f"{report.accuracy_after:.2%}" in shown
        assert total in shown
        assert "R/R_same" in shown
    assert page.count("<tr>") == 4
    assert "accuracy" not in str(cpnb.truncation_report(*networks))


def test_report_refuses_networks_that_do_not_match(networks):
    before, _ = networks
    other = cpnb.canonicalize(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="Pass a network and its truncated copy"):
        cpnb.truncation_report(before, other)
    with pytest.raises(ValueError, match="after has the CP layers"):
        cpnb.truncation_report(nn.ReLU(), nn.ReLU())
