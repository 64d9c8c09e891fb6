"""Loss slices: directions of the right lengths, losses of the moved model."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import cpnb
from cpnb import filter_directions, loss_slice, plots


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 1, 5, 5, generator=generator, dtype=torch.float64)
    return images, torch.arange(10) % 3


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def make_net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        cpnb.CPLinear(36, 3, rank=2),
    ).double()


def test_directions_have_the_norm_of_each_filter_and_leave_the_rest():
    net = make_net()
    found = filter_directions(net, generator=seeded())
    assert set(found) == {"0.weight", "5.lam", "5.factors.0", "5.factors.1"}
    for o in range(4):
        assert_close(found["0.weight"][o].norm(), net[0].weight[o].detach().norm())
    for n, factor in enumerate(net[5].factors):
        for r in range(2):
            moved = found[f"5.factors.{n}"][:, r]
            assert_close(moved.norm(), factor[:, r].detach().norm())
    assert_close(found["5.lam"].norm(), net[5].lam.detach().norm())


def test_directions_take_lengths_of_weight_normalization_as_one_filter():
    layer = parametrizations.weight_norm(nn.Linear(5, 4))
    found = filter_directions(layer, generator=seeded())
    lengths = found["parametrizations.weight.original0"]
    assert_close(
        lengths.norm(), layer.parametrizations.weight.original0.detach().norm()
    )
    assert lengths.abs().unique().numel() == 4  # not ± the old lengths


def test_directions_leave_zero_filters_where_they_are():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0] = 0
    found = filter_directions(layer, generator=seeded())
    assert found["weight"][0].tolist() == [0, 0, 0]
    assert found["weight"].isfinite().all()


def moved_by_hand(net, steps, pair):
    """Loss of a copy whose parameters are moved by Σ offset · direction."""
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            for offset, line in steps:
                if name in line:
                    parameter += offset * line[name]
    return cpnb.evaluate(moved, pair)["loss"]


@pytest.mark.parametrize("chunk_size", [1000, 3])
def test_line_holds_the_losses_of_the_moved_model(batch, chunk_size):
    net = make_net()
    found = loss_slice(
        *(net, batch), span=0.5, points=5, generator=seeded(), chunk_size=chunk_size,
        progress=False,
    )  # fmt: skip
    line = filter_directions(net, generator=seeded())
    expected = [moved_by_hand(net, [(t, line)], batch) for t in found.offsets]
    assert found.offsets == (-0.5, -0.25, 0.0, 0.25, 0.5)
    assert found.complete
    assert found.losses.tolist() == pytest.approx(expected)


def test_plane_holds_the_losses_of_the_model_moved_along_both(batch):
    net, generator = make_net(), seeded()
    lines = [filter_directions(net, generator=generator) for _ in range(2)]
    found = loss_slice(
        net, batch, directions=2, points=3, generator=seeded(), progress=False
    )
    assert found.losses.shape == (3, 3)
    for i, s in enumerate(found.offsets):
        for k, t in enumerate(found.offsets):
            steps = [(s, lines[0]), (t, lines[1])]
            expected = moved_by_hand(net, steps, batch)
            assert found.losses[i, k].item() == pytest.approx(expected)


def test_slice_leaves_the_model_exactly_as_it_was(batch):
    net = make_net()
    net[4].eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    pointers = [p.data_ptr() for p in net.parameters()]
    rng = torch.get_rng_state()
    for batch_statistics in (False, True):
        loss_slice(
            *(net, batch), points=3, generator=seeded(), progress=False,
            batch_statistics=batch_statistics,
        )  # fmt: skip
    assert [p.data_ptr() for p in net.parameters()] == pointers
    assert all(p.requires_grad for p in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])
    assert net.training and net[1].training and not net[4].training
    assert torch.equal(torch.get_rng_state(), rng)


def test_batch_statistics_make_the_slice_blind_to_the_scale_before_batch_norm(batch):
    net = make_net()
    net[5].requires_grad_(False)
    with torch.no_grad():
        net[0].weight.mul_(1e3)
    options = {"points": 3, "generator": seeded(), "progress": False}
    trained = loss_slice(net, batch, batch_statistics=True, **options).losses
    recorded = loss_slice(net, batch, **options | {"generator": seeded()}).losses
    assert recorded.max() > 10 * trained.max()


def test_interrupted_slice_returns_its_middle(batch, monkeypatch):
    net, calls = make_net(), []

    def interrupt(module, inputs):
        calls.append(1)
        if len(calls) == 5:  # one for the check of the data, three points
            raise KeyboardInterrupt

    with_hook = net.register_forward_pre_hook(interrupt)
    before = copy.deepcopy(net.state_dict())
    found = loss_slice(net, batch, points=9, generator=seeded(), progress=False)
    with_hook.remove()
    assert not found.complete
    known = found.losses.isfinite()
    assert known.tolist() == [False] * 3 + [True] * 3 + [False] * 3
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_slice_shows_its_progress(batch, capsys):
    loss_slice(make_net(), batch, points=3)
    assert "loss slice: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"directions": 3}, "directions is 3, expected 1 or 2"),
        ({"points": 1}, "points is 1, expected at least 2"),
        ({"span": 0}, "span is 0, expected a finite number above 0"),
        ({"span": math.inf}, "span is inf"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_slice_refuses_bad_arguments(batch, options, match):
    with pytest.raises(ValueError, match=match):
        loss_slice(make_net(), batch, progress=False, **options)
    with pytest.raises(TypeError, match="model is a list"):
        filter_directions([])


def test_plot_landscape_draws_lines_by_method(batch):
    found = loss_slice(make_net(), batch, points=5, progress=False)
    ax = plots.plot_landscape({"dense": found, "canonical": found})
    assert [line.get_label() for line in ax.lines] == ["dense", "canonical (CP)"]
    assert ax.lines[0].get_ydata().tolist() == found.losses.tolist()
    ax.figure.canvas.draw()
    assert len(plots.plot_landscape(found).lines) == 1


def test_plot_landscape_draws_a_plane_with_gaps(batch):
    found = loss_slice(make_net(), batch, directions=2, points=5, progress=False)
    found.losses[0, 0] = math.nan
    ax = plots.plot_landscape(found)
    assert ax.get_xlabel().startswith("second direction")
    assert len(ax.figure.axes) == 2
    ax.figure.canvas.draw()
    with pytest.raises(ValueError, match=r"slices\['dense'\] is a plane"):
        plots.plot_landscape({"dense": found})
    with pytest.raises(ValueError, match="slices is empty"):
        plots.plot_landscape({})
