"""Ranks from a budget or an error, and nested training."""

import copy
import itertools
from functools import partial

import pytest
import torch
from shared import count, randn, seeded
from torch import nn
from torch.testing import assert_close

import cpnb
from cpnb import CPConv2d, CPLinear, canonicalize, cp_layers, from_layer, truncate
from cpnb.cp import relative_error
from cpnb.decompose import als, power_method
from cpnb.methods import factorize
from cpnb.methods.ranks import NestedRank, fit_rank, ranks_for
from cpnb.truncation import select_components


class Net(nn.Module):
    """Groups, one input channel, batch norm, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2)
        self.twice = nn.Conv2d(16, 16, (3, 1), padding="same")
        self.head = nn.Linear(16 * 9, 10)


NAMES = ["stem", "down", "twice", "head"]


@pytest.mark.parametrize("share", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("skip", [(), ("stem",)], ids=str)
@pytest.mark.parametrize(
    ("form", "convert", "init"),
    [("cp", canonicalize, "unified"), ("low_rank", factorize, "kaiming")],
)
def test_ranks_for_equals_brute_force_and_stays_within_the_budget(
    form, convert, init, skip, share
):
    """The last of all rank tables that one fraction of break-even can give."""
    model, convert = Net(), partial(convert, init=init, skip=skip)
    whole = convert(model, rank="same")
    chosen = [name for name in NAMES if name not in skip]
    even = {name: whole.get_submodule(name).break_even_rank for name in chosen}
    steps = {(k + 0.5) / e for e in even.values() for k in range(e)} | {1.0}
    within = []
    for step, tilt in itertools.product(sorted(steps), (-1e-9, 0, 1e-9)):
        fraction = min(1.0, step * (1 + tilt))
        table = {name: max(1, round(fraction * e)) for name, e in even.items()}
        if count(convert(model, rank=table)) > share * count(model):
            break
        within.append(table)
    assert ranks_for(model, share, form=form, skip=skip) == within[-1]


def test_ranks_for_a_cp_network_are_taken_by_truncate():
    """At most what a layer holds, and the share is of the dense network."""
    model = Net()
    net = canonicalize(model, rank=ranks_for(model, 0.6), init="unified")
    ranks = ranks_for(net, 0.3)
    cut = truncate(net, rank=ranks)
    assert {name: layer.rank for name, layer in cp_layers(cut).items()} == ranks
    assert count(cut) <= 0.3 * count(model)
    held = {name: layer.rank for name, layer in cp_layers(net).items()}
    assert ranks_for(net, 1.0) == held


def test_ranks_for_refuses_what_no_rank_reaches_and_names_a_share_that_does():
    with pytest.raises(ValueError, match=r"share is 1.1, expected a share in \(0, 1\]"):
        ranks_for(Net(), 1.1)
    text = r"a budget of \d+ of [\d,]+ parameters, but rank 1 in each of 4 layers"
    with pytest.raises(ValueError, match=text) as caught:
        ranks_for(Net(), 0.01)
    least = float(str(caught.value).split()[-1].rstrip("."))
    assert set(ranks_for(Net(), least + 1e-4).values()) == {1}


@pytest.mark.parametrize("error", [0.95, 0.6, 0.35])
@pytest.mark.parametrize("method", [power_method, als], ids=["power", "als"])
@pytest.mark.parametrize("shape", [(9, 8, 3, 3), (6, 5, 4), (12, 9)], ids=str)
def test_fit_rank_is_the_first_whose_fit_is_close_enough(shape, method, error):
    tensor = randn(*shape)
    name = "als" if method is als else "power"
    rank = fit_rank(error, method=name)(tensor)
    reached = method(tensor, rank, generator=seeded()).relative_error
    assert reached <= error
    if rank > 1:
        less = method(tensor, rank - 1, generator=seeded()).relative_error
        assert less > error


def test_from_layer_reaches_the_error_it_was_asked_for():
    for layer in (nn.Conv2d(1, 12, (5, 3)), nn.Conv1d(6, 8, 3), nn.Linear(6, 5)):
        new = from_layer(layer, rank=fit_rank(0.3), generator=seeded())
        # The layer is rounded to float32.
        assert relative_error(layer.weight, new.weight).item() <= 0.3 + 1e-6


def test_fit_rank_refuses_bad_errors_and_says_what_reaches_one():
    with pytest.raises(ValueError, match=r"error is 1.0, expected .* in \(0, 1\)"):
        fit_rank(1.0)
    text = r"error is 1e-09, but the fit of method 'power' leaves 0.\d+ with 12.*als"
    with pytest.raises(ValueError, match=text):
        fit_rank(1e-9)(randn(5, 4, 3))


def network():
    generator = seeded()
    return nn.Sequential(
        CPConv2d(1, 6, 3, padding=1, rank=6, generator=generator),
        nn.ReLU(),
        nn.Flatten(),
        CPLinear(6 * 64, 10, rank=8, generator=generator),
    )


def active(net):
    return [layer.active_rank for layer in cp_layers(net).values()]


def lengths(hook, net, steps):
    """The active ranks of each step, as the training loop calls the hook."""
    ranks = []
    hook.start(net, None)
    for step in range(steps):
        hook.before_forward(net, step)
        ranks.append(active(net))
        hook.after_step(net, None, step)
        assert active(net) == [None, None]
    return ranks


@pytest.mark.parametrize("mode", ["dense", "chain"])
@pytest.mark.parametrize("name", ["0", "3"])
def test_active_rank_computes_what_the_first_components_do(mode, name):
    layer = network().double().get_submodule(name)
    layer.forward_mode = mode
    shape = {"0": (2, 1, 8, 8), "3": (2, 384)}[name]
    inputs = torch.randn(shape, dtype=torch.float64)
    cut = select_components(layer, range(3))
    rank = layer.rank
    layer.active_rank = 3
    assert_close(layer(inputs), cut(inputs))
    assert_close(layer.weight, cut.weight)
    assert layer.rank == rank
    layer(inputs).square().sum().backward()
    for gradient in (layer.lam.grad, *(factor.grad.T for factor in layer.factors)):
        assert gradient[:3].abs().min() > 0
        assert not gradient[3:].any()


def test_nested_rank_draws_every_length_alike_and_per_layer():
    ranks = lengths(NestedRank(smallest=0.5), network(), 4001)[1::2]
    first = torch.tensor([one[0] for one in ranks])
    assert first.unique().tolist() == [3, 4, 5, 6]
    # 2000 draws, four values: 500 each, standard deviation 19; five of them.
    assert (torch.bincount(first)[3:] - 500).abs().max() < 100
    pairs = torch.tensor(ranks).double().T
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.11  # five standard deviations


def test_nested_rank_draws_depend_on_seed_and_step_only():
    net = network()
    state = torch.get_rng_state()
    whole = lengths(NestedRank(seed=2**60), net, 8)
    hook = NestedRank(seed=2**60)
    hook.before_forward(net, 5)
    assert active(net) == whole[5]
    hook.stop(net)  # as after a training that ends within a step
    assert active(net) == [None, None]
    assert lengths(NestedRank(seed=2), net, 8) != whole
    assert torch.equal(torch.get_rng_state(), state)


def test_nested_rank_makes_the_first_components_worth_more_than_the_last():
    """The order is by construction: no key looks for it, and reversed it is worse."""
    net, data = network(), cpnb.load_data("digits")
    cpnb.fit(net, data, epochs=9, lr=0.01, hooks=[NestedRank()], progress=False)
    backward = copy.deepcopy(net)
    with torch.no_grad():
        for layer in cp_layers(backward).values():
            for tensor in (layer.lam, *layer.factors):
                tensor.copy_(tensor.flip(-1))
    first, last = (
        cpnb.accuracy(truncate(one, keep=0.5, key="nested"), data)
        for one in (net, backward)
    )
    assert first > 0.7
    assert first > last + 0.2


def test_nested_rank_refuses_bad_shares_and_a_network_without_cp_layers():
    with pytest.raises(ValueError, match=r"smallest is 0, expected .* in \(0, 1\]"):
        NestedRank(0)
    with pytest.raises(ValueError, match="model is a Linear without CP layers"):
        NestedRank().start(nn.Linear(4, 2), None)
