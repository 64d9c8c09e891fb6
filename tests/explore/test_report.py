"""The truncation report, chains of stock layers, and costs, against direct ways."""

import pytest
import torch
from shared import count, seeded
from torch import nn
from torch.testing import assert_close

import cpnb
from cpnb import CPConv1d, CPConv2d, CPConv3d, CPLinear
from cpnb.explore.report import cost_table, count_flops, to_chain, truncation_report
from cpnb.layers import CPConvTranspose2d


@pytest.fixture
def networks():
    net = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)]
    before = cpnb.canonicalize(nn.Sequential(*net), rank=5, generator=seeded())
    return before, cpnb.truncate(before, keep=0.5)


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
    images = torch.randn(40, 1, 8, 8, generator=seeded())
    pair = images, torch.randint(10, (40,), generator=seeded())
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


def test_flops_are_found_by_the_name_that_cp_layers_has():
    layer = cpnb.CPLinear(3, 3, rank=1)
    net = nn.Sequential(layer)
    net.body = nn.Sequential(layer)  # a second name
    assert count_flops(net, torch.zeros(1, 3), chains=True)["0"] == 2 * 2 * (3 + 3)
    encoder = nn.TransformerEncoderLayer(4, 1, 6, batch_first=True)
    encoder = cpnb.canonicalize(encoder, rank=2, skip="self_attn.out_proj")
    flops = count_flops(encoder, torch.zeros(1, 5, 4), chains=True)
    assert flops["linear1"] == 2 * 5 * 2 * (4 + 6)


def test_report_refuses_networks_that_do_not_match(networks):
    before, _ = networks
    other = cpnb.canonicalize(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="Pass a network and its truncated copy"):
        truncation_report(before, other)
    with pytest.raises(ValueError, match="after has the CP layers"):
        truncation_report(nn.ReLU(), nn.ReLU())


CIRCULAR = {"padding_mode": "circular"}
# Class, arguments, options, shape of an input.
CHAINS = {
    "grouped": (CPConv2d, (4, 6, 3, 2, 1, 2, 2), CIRCULAR, (4, 9, 9)),
    "one channel": (CPConv2d, (1, 6, 3), {"bias": False}, (1, 7, 7)),
    "pointwise": (CPConv2d, (4, 6, 1, 2), {}, (4, 7, 7)),
    "same": (CPConv1d, (3, 4, 3), {"padding": "same", "dilation": 2}, (3, 9)),
    "3d": (CPConv3d, (2, 3, 2), {}, (2, 5, 5, 5)),
    "linear": (CPLinear, (6, 4), {}, (5, 6)),
    "transposed": (CPConvTranspose2d, (4, 6, 3, 2, 1, 1, 2), {}, (4, 5, 5)),
}


@pytest.mark.parametrize("case", CHAINS)
def test_chain_computes_the_layer_with_stock_layers_alone(case):
    kind, arguments, options, shape = CHAINS[case]
    layer = kind(*arguments, **options, rank=2).double()
    chain = to_chain(layer.eval())
    assert all(type(m).__module__.startswith("torch.nn") for m in chain.modules())
    assert not any(module.training for module in chain.modules())
    inputs = torch.randn(2, *shape, dtype=torch.float64)
    assert_close(chain(inputs), layer(inputs))
    biases = [n for n, _ in chain.named_parameters() if n.endswith("bias")]
    assert len(biases) == (layer.bias is not None), "only in the last"


def test_cost_table_counts_what_each_form_of_a_layer_takes():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(*net, CPLinear(8 * 36, 10, rank=3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    table = cost_table(net, (5, 4, 6, 6), turns=2)
    conv, linear = table.loc["0"], table.loc["3"]
    assert (conv.parameters, linear.parameters) == (8 * 4 * 9 + 8, count(net[3]))
    assert conv.break_even == cpnb.from_layer(net[0], rank=9).break_even_rank
    assert conv.flops_dense == 2 * 5 * 36 * 8 * 4 * 9
    assert linear.flops_dense == 2 * 5 * 288 * 10
    assert linear.flops_chain == 2 * 5 * 3 * (288 + 10)
    assert conv[["flops_rebuilt", "flops_chain", "ms_chain"]].isna().all()
    assert linear.flops_rebuilt > linear.flops_dense, "and the kernel's product"
    # Kept are the inputs of both layers, and for a chain what lies between its two.
    assert conv.kept_bytes_dense == 4 * 5 * 4 * 36
    assert linear.kept_bytes_dense == 4 * 5 * 288
    assert linear.kept_bytes_chain == 4 * 5 * (288 + 3)
    assert (table.filter(like="ms_dense") > 0).all().all()
    for name, value in net.state_dict().items():
        assert value.equal(before[name])
