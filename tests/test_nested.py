"""Nested ranks: shortened steps, the order they bring, and nothing left behind."""

import copy

import pytest
import torch
from torch import nn

import cpnb
from cpnb import CPConv2d, CPLinear, NestedRank, cp_layers, fit, truncate


def network(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.Sequential(
        CPConv2d(1, 6, 3, padding=1, rank=6, generator=generator),
        nn.ReLU(),
        nn.Flatten(),
        CPLinear(6 * 64, 10, rank=8, generator=generator),
    )


def digits():
    return cpnb.load_data("digits", train_size=200)


# --- active_rank ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dense", "chain"])
@pytest.mark.parametrize("layer", ["0", "3"])
def test_active_rank_computes_what_the_first_components_do(mode, layer):
    net = network().double()
    cp = net.get_submodule(layer)
    cp.forward_mode = mode
    inputs = torch.randn(2, 1, 8, 8).double() if layer == "0" else torch.randn(2, 384)
    cut = cpnb.select_components(cp, range(3))
    cp.active_rank = 3
    torch.testing.assert_close(cp(inputs.double()), cut(inputs.double()))
    torch.testing.assert_close(cp.weight, cut.weight)
    assert cp.rank == 6 or cp.rank == 8


def test_active_rank_is_not_answered_from_the_kept_kernel():
    cp = CPLinear(6, 5, rank=4).eval()
    with torch.no_grad():
        whole = cp(torch.eye(6))
        cp.active_rank = 1
        assert not torch.equal(cp(torch.eye(6)), whole)
        cp.active_rank = None
        assert torch.equal(cp(torch.eye(6)), whole)


def test_active_rank_gives_later_components_no_gradient():
    cp = CPLinear(6, 5, rank=4)
    cp.active_rank = 2
    cp(torch.randn(3, 6)).square().sum().backward()
    for gradient in (cp.lam.grad, *(factor.grad.T for factor in cp.factors)):
        assert gradient[:2].abs().min() > 0
        assert not gradient[2:].any()


# --- the hook -------------------------------------------------------------------------


def lengths(hook, net, steps):
    """The active ranks of each step."""
    found = []
    for step in range(steps):
        hook.before_forward(net, step)
        found.append([layer.active_rank for layer in cp_layers(net).values()])
        hook.after_step(net, None, step)
        assert [layer.active_rank for layer in cp_layers(net).values()] == [None, None]
    return found


def test_nested_rank_trains_the_whole_network_every_period():
    found = lengths(NestedRank(period=3), network(), 9)
    assert [n for n, ranks in enumerate(found) if ranks == [None, None]] == [0, 3, 6]


def test_nested_rank_draws_every_length_alike_and_per_layer():
    found = lengths(NestedRank(smallest=0.5), network(), 4001)[1::2]
    first = torch.tensor([ranks[0] for ranks in found])
    assert first.unique().tolist() == [3, 4, 5, 6]
    # 2000 draws, four values: 500 each, standard deviation 19; five of them.
    assert (torch.bincount(first)[3:] - 500).abs().max() < 100
    pairs = torch.tensor(found).double().T
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.11  # five standard deviations


def test_nested_rank_draws_depend_on_seed_and_step_only():
    net = network()
    whole = lengths(NestedRank(seed=1), net, 8)
    hook = NestedRank(seed=1)
    hook.before_forward(net, 5)
    assert [layer.active_rank for layer in cp_layers(net).values()] == whole[5]
    assert lengths(NestedRank(seed=2), net, 8) != whole


def test_nested_rank_of_period_one_is_plain_training():
    nets = network(), network()
    for net, hooks in zip(nets, ([], [NestedRank(period=1)]), strict=True):
        fit(net, digits(), epochs=1, hooks=hooks, progress=False)
    for plain, nested in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(plain, nested)


def test_nested_rank_leaves_full_rank_behind_after_an_error():
    net = network()

    def fail(epoch, model, record):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        fit(
            net,
            digits(),
            epochs=1,
            hooks=[NestedRank()],
            callback=fail,
            progress=False,
        )
    assert [layer.active_rank for layer in cp_layers(net).values()] == [None, None]


def test_nested_rank_makes_the_first_components_worth_more_than_the_last():
    """The order is by construction: no key looks for it, and reversed it is worse."""
    data = cpnb.load_data("digits")
    net = cpnb.canonicalize(
        cpnb.DigitsNet(generator=torch.Generator().manual_seed(0)),
        init="gaussian",
        generator=torch.Generator().manual_seed(0),
    )
    fit(net, data, epochs=6, lr=0.01, hooks=[NestedRank()], progress=False)
    backward = copy.deepcopy(net)
    with torch.no_grad():
        for layer in cp_layers(backward).values():
            for tensor in (layer.lam, *layer.factors):
                tensor.copy_(tensor.flip(-1))
    first, last = (
        cpnb.accuracy(truncate(n, keep=0.5, key="nested"), data)
        for n in (net, backward)
    )
    assert first > 0.7
    assert first > last + 0.2


def test_nested_key_keeps_the_first_components():
    layer = CPLinear(6, 5, rank=4)
    cut = truncate(layer, rank=2, key="nested")
    assert torch.equal(cut.lam, layer.lam[:2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"smallest": 0}, ValueError, r"smallest is 0, expected a share in \(0, 1\]"),
        ({"smallest": "half"}, TypeError, "smallest is 'half', expected a share"),
        ({"period": 0}, ValueError, "period is 0, expected at least 1"),
        ({"seed": -1}, ValueError, "seed is -1, expected at least 0"),
    ],
)
def test_nested_rank_refuses_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        NestedRank(**arguments)


def test_nested_rank_refuses_a_network_without_cp_layers():
    data = torch.randn(8, 4), torch.arange(8) % 2
    with pytest.raises(ValueError, match="without CP layers"):
        fit(nn.Linear(4, 2), data, hooks=[NestedRank()], progress=False)


def test_nested_rank_takes_any_seed():
    net = nn.Sequential(cpnb.CPLinear(8, 4, rank=5))
    data = torch.randn(8, 8), torch.arange(8) % 4
    hooks = [cpnb.NestedRank(seed=2**60)]
    run = cpnb.fit(net, data, epochs=2, hooks=hooks, progress=False)
    assert run.status == "finished"
