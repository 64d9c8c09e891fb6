"""The rank explorer without a browser: sliders, numbers, picture, threads."""

import base64
import gc
import html
import io
import re
import threading

import matplotlib
import numpy as np
import pytest
import torch
from parts import LONG, Net, gated
from PIL import Image
from torch import nn

from cpnb._explorer import controls
from cpnb._explorer.figure import ExplorerFigure
from cpnb._explorer.state import explorer_state, size_words, status_lines
from cpnb.evaluation import accuracy
from cpnb.layers import CPLinear
from cpnb.sweep import rank_sweep
from cpnb.truncation import kept_rank, truncate
from cpnb.widgets import RankExplorer


def other_draw(model, data):
    """A sweep whose components were ordered by a draw of its own."""
    generator = torch.Generator().manual_seed(5)
    options = {"key": "random", "generator": generator, "progress": False}
    return rank_sweep(model, data, ["fc"], [3], **options)


class Splits:
    """A data set with other images to train on than to validate."""

    def __init__(self, data):
        images, labels = data
        self.train = images.flip(0), labels.flip(0)
        self.validation = self.test = data


def words(explorer):
    """The status as a reader hears it."""
    return html.unescape(re.sub("<[^>]*>", "\n", explorer.status.value))


def pixels(png):
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def shown_afresh(explorer, axis):
    """The picture of an explorer that never showed anything else."""
    sweep, ranks = explorer.sweep, explorer.ranks
    source = re.search(r"\((table|measured)\)", words(explorer)).group(1)
    percent = explorer.sliders["*"].value
    state = explorer_state(sweep, ranks, axis, percent, source)
    return ExplorerFigure().png(state), status_lines(state, sweep)


@pytest.mark.parametrize("key", ["lam", "greedy"])
def test_explorer_measures_what_the_library_measures(explore, model, data, key):
    explorer = explore(model, data, key=key, refit=True, background=False)
    seen = {explorer.image.value}
    for conv, fc in ((8, 5), (3, 5), (3, 1), (7, 6)):
        explorer.sliders["conv"].value = conv
        explorer.sliders["fc"].value = fc
        ranks = {"conv": conv, "fc": fc}
        cut = truncate(model, rank=ranks, key=key, refit=True)
        expected = accuracy(cut, data)
        count = sum(p.numel() for p in cut.parameters())
        error = (model.fc.weight - cut.fc.weight).norm() / model.fc.weight.norm()
        assert explorer.ranks == ranks
        assert explorer.accuracy == expected
        assert accuracy(explorer.truncated(), data) == expected
        text = words(explorer)
        assert f"Accuracy {100 * expected:.2f} % (measured) on 80 images" in text
        assert f"{count:,} parameters, {count / 185:.2f} × dense (185)" in text
        assert (
            f"fc: rank {fc} of 6, {fc / 4:.2f} × break-even rank 4; relative " in text
        )
        assert f"relative kernel error {error.item():.3f}" in text
        seen.add(explorer.image.value)
    assert len(seen) == 5


def test_explorer_answers_from_the_table(explore, model, data, sweep):
    explorer = explore(sweep)
    for row in sweep.to_rows()[::6]:
        if row["layer"] == "*":
            explorer.sliders["*"].value = round(100 * row["keep"])
        else:
            (other,) = {"conv", "fc"} - {row["layer"]}
            explorer.sliders[other].value = explorer.sliders[other].max
            explorer.sliders[row["layer"]].value = row["rank"]
        assert explorer.accuracy == row["accuracy"]
        text = words(explorer)
        assert f"Accuracy {100 * row['accuracy']:.2f} % (table)" in text
        assert f"relative kernel error {row['relative_error']:.3f}" in text or (
            f"kernel error of all layers {row['relative_error']:.3f}" in text
        )
        assert f"{row['parameters']:,} parameters" in text
        assert f"{row['network_parameters']:,} parameters" in text


def test_explorer_says_that_a_point_is_not_in_the_table(explore, sweep):
    explorer = explore(sweep)
    explorer.sliders["conv"].value = 3
    assert explorer.accuracy is not None
    explorer.sliders["fc"].value = 5
    assert explorer.accuracy is None and explorer.wait(0) is None
    assert words(explorer).strip().startswith("Accuracy not in the table;")
    # The kernel error of each layer depends on its own rank alone and is known.
    error = sweep.point({"fc": 5}).relative_error["fc"]
    assert f"relative kernel error {error:.3f}" in words(explorer)
    with pytest.raises(ValueError, match="made from a sweep alone"):
        explorer.truncated()


def test_explorer_tells_table_from_measured(explore, model, data, sweep):
    explorer = explore(model, data, sweep=sweep, background=False)
    explorer.sliders["conv"].value = 3
    assert "(table)" in words(explorer)
    explorer.sliders["fc"].value = 5
    assert "(measured)" in words(explorer)
    assert explorer.sweep.point(explorer.ranks).accuracy == explorer.accuracy
    assert sweep.point(explorer.ranks).accuracy is None, "the given table has grown"


def test_explorer_starts_at_full_rank(explore, model, data):
    explorer = explore(model, data)
    assert explorer.ranks == {"conv": 8, "fc": 6}
    assert explorer.sliders["*"].value == 100
    assert explorer.accuracy == 1.0
    assert "Accuracy 100.00 % (measured)" in words(explorer)


def test_explorer_links_slider_and_number_box_both_ways(explore, sweep):
    explorer = explore(sweep)
    for axis, value in (("conv", 3), ("fc", 2), ("*", 40)):
        explorer.sliders[axis].value = value
        assert explorer.boxes[axis].value == value
        explorer.boxes[axis].value = value + 1
        assert explorer.sliders[axis].value == value + 1
        assert f"{value + 1}" in words(explorer)
    explorer.boxes["conv"].value = 99
    assert explorer.boxes["conv"].value == explorer.sliders["conv"].value == 8


def test_explorer_global_slider_sets_every_layer(explore, model, sweep):
    explorer = explore(sweep)
    for percent in (50, 13, 1, 99, 100):
        explorer.sliders["*"].value = percent
        expected = {n: kept_rank(r, percent / 100) for n, r in (("conv", 8), ("fc", 6))}
        assert explorer.ranks == expected
        assert {n: explorer.boxes[n].value for n in expected} == expected
        assert f"All layers keep {percent} % of their components" in words(explorer)
    explorer.sliders["conv"].value = 1
    assert explorer.ranks == {"conv": 1, "fc": 6}
    assert explorer.sliders["*"].value == explorer.boxes["*"].value == 50  # 7 of 14
    assert "All layers keep" not in words(explorer)


def test_explorer_picture_does_not_depend_on_what_was_shown_before(explore, sweep):
    explorer = explore(sweep)
    for axis, value in (("conv", 3), ("*", 30), ("fc", 2), ("fc", 4), ("*", 31)):
        explorer.sliders[axis].value = value
        if explorer.accuracy is not None:
            picture, lines = shown_afresh(explorer, axis)
            assert explorer.image.value == picture
            assert words(explorer).split("\n")[1 : 1 + len(lines)] == lines


def test_explorer_calls_only_fewer_parameters_than_dense_compression(explore, sweep):
    explorer = explore(sweep)
    lines = words(explorer).splitlines()
    (conv,) = [line for line in lines if line.startswith("conv:")]
    assert "rank 8 of 8, 1.60 × break-even rank 5" in conv
    assert "111 parameters, 1.85 × dense (60), no compression" in conv
    explorer.sliders["conv"].value = 4
    lines = words(explorer).splitlines()
    (conv,) = [line for line in lines if line.startswith("conv:")]
    assert "59 parameters, 0.98 × dense (60), compression 1.02" in conv
    assert size_words(60, 60).endswith("1.00 × dense (60), no compression")


def test_explorer_leaves_the_model_as_it_was_and_works_on_a_copy(explore, model, data):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explorer = explore(model, data, background=False)
    explorer.sliders["conv"].value = 2
    assert model.training and model.conv.rank == 8
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    shown = explorer.accuracy
    nn.init.zeros_(model.fc.lam)  # training goes on; the explorer is not about it
    explorer.sliders["conv"].value = 3
    explorer.sliders["conv"].value = 2
    assert explorer.accuracy == shown == accuracy(explorer.truncated(), data)


def test_explorer_takes_a_layer_alone_and_a_layer_of_rank_one(explore):
    layer = CPLinear(6, 3, rank=1)
    images = torch.randn(10, 6)
    explorer = explore(layer, (images, layer(images).argmax(1)), background=False)
    assert explorer.sliders[""].disabled
    explorer.sliders["*"].value = 50
    assert explorer.ranks == {"": 1} and explorer.accuracy == 1.0
    assert "layer: rank 1 of 1" in words(explorer)


class Fragile(nn.Module):
    """Fails when the layer before it has been cut to one component."""

    def __init__(self):
        super().__init__()
        self.fc = CPLinear(6, 3, rank=4)

    def forward(self, images):
        if self.fc.rank == 1:
            raise RuntimeError("<b>too small</b> & broken")
        return self.fc(images)


@pytest.mark.parametrize("background", [False, True])
def test_explorer_shows_errors_in_the_status_and_recovers(explore, background):
    data = torch.randn(20, 6), torch.zeros(20, dtype=torch.long)
    explorer = explore(Fragile(), data, background=background)
    explorer.sliders["fc"].value = 1
    assert explorer.wait(LONG) is None
    assert explorer.status.value.startswith('<div role="alert"')
    assert "&lt;b&gt;too small&lt;/b&gt; &amp; broken" in explorer.status.value
    assert "<b>" not in explorer.status.value
    assert "Failed at rank fc 1" in words(explorer)
    explorer.sliders["fc"].value = 2
    assert explorer.wait(LONG) is not None
    assert explorer.status.value.startswith('<div role="status"')


def test_explorer_escapes_layer_names(explore):
    model = nn.ModuleDict({"<i>$x$</i>": CPLinear(6, 3, rank=2)})
    sweep = rank_sweep(
        nn.Sequential(CPLinear(6, 3, rank=2)),
        (torch.randn(9, 6), torch.zeros(9, dtype=torch.long)),
        progress=False,
    )
    (name,) = model
    object.__setattr__(sweep.layers[0], "name", name)
    sweep._errors[name] = sweep._errors.pop("0")
    explorer = explore(sweep)
    explorer.sliders[name].value = 1
    assert "&lt;i&gt;$x$&lt;/i&gt;: rank 1 of 2" in explorer.status.value


def test_explorer_shows_an_error_of_the_drawing_itself(explore, sweep, monkeypatch):
    def broken(self, state):
        raise RuntimeError("no ink")

    explorer = explore(sweep)
    monkeypatch.setattr(ExplorerFigure, "png", broken)
    explorer.sliders["conv"].value = 2
    assert explorer.status.value.startswith('<div role="alert"')
    assert "no ink" in words(explorer)


def test_explorer_is_a_picture_and_text_for_pages_without_a_kernel(explore, sweep):
    explorer = explore(sweep)
    explorer.sliders["conv"].value = 3
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]) == explorer.image.value
    assert pixels(explorer.image.value).shape == (320, 1000, 3)
    for line in words(explorer).split("\n")[1:-1]:
        assert line in bundle["text/plain"]


def test_explorer_looks_the_same_in_any_style_of_the_notebook(explore, sweep):
    from cpnb import plots

    before = explore(sweep).image.value
    with matplotlib.rc_context():
        plots.use_style()
        styled = explore(sweep).image.value
    assert styled == before


def test_explorer_controls_are_labelled_and_wide_enough(explore, sweep):
    explorer = explore(sweep)
    axes = ["conv", "fc", "*", "*budget"]
    assert list(explorer.sliders) == list(explorer.boxes) == axes
    for axis, slider in explorer.sliders.items():
        box = explorer.boxes[axis]
        assert slider.description and box.description
        assert slider.tooltip and box.tooltip
        bar = int(slider.layout.width[:-2]) - int(slider.style.description_width[:-2])
        assert bar >= 500
        assert (slider.min, slider.max) == (box.min, box.max)
    assert explorer.sliders["conv"].max == 8
    assert "break-even 5" in explorer.sliders["conv"].tooltip


def test_explorer_image_has_no_tooltip_which_the_front_end_cannot_draw(explore, sweep):
    assert explore(sweep).image.tooltip is None


def test_explorer_curve_and_marker_are_the_known_points(explore, model, data):
    sweep = rank_sweep(model, data, ["conv"], [1, 2, 5], progress=False)
    explorer = explore(sweep)
    explorer.sliders["conv"].value = 2
    panel = explorer.figure.axes[0]
    curves = [line for line in panel.lines if line.get_color() == "#0072b2"]
    x, y = map(np.asarray, curves[0].get_data())
    known = np.isfinite(y)
    assert x[known].tolist() == [1, 2, 5, 8]
    expected = [100 * row["accuracy"] for row in sweep.to_rows()]
    assert y[known].tolist() == pytest.approx(expected)
    # Between ranks that are not neighbours nothing is drawn.
    assert np.isnan(y).sum() == 2
    (marker,) = [line for line in panel.lines if line.get_markersize() == 9]
    assert marker.get_xydata().tolist() == [[2, pytest.approx(expected[1])]]
    explorer.sliders["conv"].value = 3
    assert len(marker.get_xydata()) == 0


def test_explorer_picture_is_what_matplotlib_draws(explore, sweep):
    explorer = explore(sweep)
    explorer.sliders["conv"].value = 3
    fast, saved = pixels(explorer.image.value), io.BytesIO()
    explorer.figure.savefig(saved, format="png")
    slow = pixels(saved.getvalue())
    assert fast.shape == slow.shape == (320, 1000, 3)
    assert np.abs(fast - slow)[40:].mean() < 0.5
    titles = [np.argwhere(picture[:40].sum(2) < 300) for picture in (fast, slow)]
    corners = [[*where.min(0), *where.max(0)] for where in titles]
    assert np.abs(np.subtract(*corners)).max() <= 10, "titles of the same extent"


def test_explorer_accuracy_panel_marks_break_even_of_the_layer(explore, sweep):
    explorer = explore(sweep)
    panel = explorer.figure.axes[0]
    (dotted,) = [line for line in panel.lines if line.get_linestyle() == ":"]
    assert not dotted.get_visible()  # all layers together have none
    explorer.sliders["conv"].value = 5
    assert dotted.get_visible() and set(dotted.get_xdata()) == {5}
    assert panel.get_xlabel() == "rank of conv (break-even, dotted: 5)"


def test_explorer_size_panel_shows_all_that_is_known_and_its_front(
    explore, model, data, sweep
):
    explorer = explore(model, data, sweep=sweep, background=False)
    explorer.sliders["conv"].value = 3
    explorer.sliders["fc"].value = 5  # not in the sweep
    cut = truncate(model, rank={"conv": 3, "fc": 5})
    size = sum(p.numel() for p in cut.parameters()) / 185
    here = [pytest.approx(size), pytest.approx(100 * accuracy(cut, data))]
    panel = explorer.figure.axes[2]
    known, front = (
        next(line for line in panel.lines if line.get_color() == color)
        for color in ("#999999", "#009e73")
    )
    (marker,) = [line for line in panel.lines if line.get_markersize() == 9]
    assert marker.get_xydata().tolist() == [here]
    points = known.get_xydata().tolist()
    assert len(points) == len(sweep) + 1 and points[-1] == here
    # Every known point has one on the front that is no larger and no worse.
    best = front.get_xydata()
    for x, y in points:
        assert any((x0 <= x + 1e-9) and (y0 >= y - 1e-9) for x0, y0 in best)
    assert (np.diff(best, axis=0) > 0).all()
    assert all(point.tolist() in points for point in best)
    (dashed,) = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert set(dashed.get_xdata()) == {1}


def test_explorer_measures_the_latest_position_and_lands_nothing_stale(explore, model):
    network, gate, entered, ran = gated(model)
    images = torch.randn(30, 1, 4, 4)
    labels = model(images).argmax(1)
    explorer = explore(network, (images, labels))
    entered.clear()
    gate.clear()
    ran.clear()
    explorer.sliders["net.conv"].value = 7
    assert entered.wait(LONG)
    for rank in (6, 5, 4, 3, 2):
        explorer.sliders["net.conv"].value = rank
    assert words(explorer).strip().startswith("Accuracy being measured;")
    assert explorer.accuracy is None
    gate.set()
    shown = explorer.wait(LONG)
    assert ran[:2] == [7, 2]
    expected = accuracy(truncate(model, rank={"conv": 2}), (images, labels))
    assert shown == expected
    assert f"Accuracy {100 * expected:.2f} % (measured)" in words(explorer)


def test_explorer_measures_the_neighbours_while_idle(explore, model, data):
    order, done = [], threading.Event()

    class Watched(Net):
        def forward(self, images):
            order.append(self.conv.rank)
            if 4 in order and set(order[order.index(4) :]) == set(range(1, 8)):
                done.set()
            return super().forward(images)

    watched = Watched()
    watched.load_state_dict(model.state_dict())
    explorer = explore(watched, data)
    explorer.switches.details.value = False
    explorer.sliders["conv"].value = 4
    assert done.wait(LONG)
    # Whatever was prepared at the start, then the request, then the nearest first.
    assert order[order.index(4) :] == [4, 3, 5, 2, 6, 1, 7]
    explorer.close()
    assert len(explorer.sweep.curve("conv")) >= 7


def test_explorer_leaves_the_last_position_on_screen_when_moved_from_threads(
    explore, model, data, sweep
):
    explorer = explore(model, data, sweep=sweep)
    start = threading.Barrier(6)

    def move(axis, values):
        start.wait()
        for value in values:
            explorer.sliders[axis].value = value

    moves = [
        ("conv", [1, 8, 2, 7, 3, 6]),
        ("conv", [5, 4, 3, 2, 1]),
        ("fc", [1, 2, 3, 4, 5, 6]),
        ("fc", [6, 3, 1]),
        ("*", [10, 90, 50, 70]),
        ("*", [100, 20]),
    ]
    threads = [threading.Thread(target=move, args=each) for each in moves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    explorer.wait(LONG)
    explorer.close()  # nothing is measured ahead any more
    for axis, slider in explorer.sliders.items():
        assert explorer.boxes[axis].value == slider.value
    assert explorer.accuracy == accuracy(truncate(model, rank=explorer.ranks), data)
    axis = explorer._board.axis
    picture, lines = shown_afresh(explorer, axis)
    assert words(explorer).split("\n")[1 : 1 + len(lines)] == lines
    assert explorer.image.value == picture


def test_explorer_loses_no_move_that_comes_while_another_is_applied(explore, sweep):
    explorer = explore(sweep)
    entered, gate = threading.Event(), threading.Event()

    def hold(_):
        entered.set()
        assert gate.wait(LONG)

    explorer.boxes["conv"].observe(hold, "value")
    first = threading.Thread(
        target=lambda: explorer.sliders["conv"].set_trait("value", 3)
    )
    second = threading.Thread(
        target=lambda: explorer.sliders["fc"].set_trait("value", 2)
    )
    first.start()
    assert entered.wait(LONG)
    second.start()
    second.join(0.2)  # time to go wrong; it should wait for the first
    gate.set()
    first.join()
    second.join()
    assert explorer.boxes["fc"].value == 2 and explorer.boxes["conv"].value == 3
    assert "conv: rank 3 of 8" in words(explorer)
    assert "fc: rank 2 of 6" in words(explorer)


def test_explorer_close_ends_its_thread_and_widgets(explore, model, data):
    explorer = explore(model, data)
    explorer.sliders["conv"].value = 2
    assert explorer.wait(LONG) is not None
    (thread,) = [t for t in threading.enumerate() if t.name == "cpnb-latest-wins"]
    explorer.close()
    assert not thread.is_alive()
    assert explorer.comm is None and explorer.sliders["conv"].comm is None
    explorer.close()


def test_explorer_needs_no_thread_for_a_table(explore, model, data, sweep):
    explore(sweep).sliders["conv"].value = 2
    explore(model, sweep=sweep).sliders["conv"].value = 2
    explore(model, data, background=False).sliders["conv"].value = 2
    assert all(t.name != "cpnb-latest-wins" for t in threading.enumerate())


def test_explorer_closes_those_of_the_last_run_of_its_cell(explore, sweep, monkeypatch):
    def cell(name, run):
        monkeypatch.setattr(controls, "_executing_cell", lambda: (name, run))

    monkeypatch.setattr(controls, "_made_by", {})
    cell("a", "1")
    first, second = explore(sweep), explore(sweep)
    cell("b", "2")
    other = explore(sweep)
    assert first.comm is not None and second.comm is not None
    cell("a", "3")
    third = explore(sweep)
    assert first.comm is None and second.comm is None
    assert other.comm is not None and third.comm is not None
    cell(None, None)
    explore(sweep)
    assert third.comm is not None


def test_explorer_outside_a_notebook_belongs_to_no_cell():
    assert controls._executing_cell() == (None, None)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (lambda m, d, s: ((m,), {}), TypeError, "data and sweep are None"),
        (lambda m, d, s: (("net",), {}), TypeError, "model is a str, expected"),
        (
            lambda m, d, s: ((s, d), {}),
            TypeError,
            "model is a RankSweep, expected a net",
        ),
        (lambda m, d, s: ((m, d), {"sweep": []}), TypeError, "sweep is a list"),
        (lambda m, d, s: ((Net(), d), {"sweep": s}), ValueError, "other weights"),
        (
            lambda m, d, s: ((m, (d[0] + 1, d[1])), {"sweep": s}),
            ValueError,
            "measured on other images",
        ),
        (
            lambda m, d, s: (
                (m, d),
                {"sweep": other_draw(m, d)},
            ),
            ValueError,
            "sweep was cut by other images than data holds for it, or by another draw",
        ),
        (
            lambda m, d, s: ((m, d), {"sweep": s, "key": "greedy"}),
            ValueError,
            "key is 'greedy', expected 'lam' as in the sweep",
        ),
        (
            lambda m, d, s: ((s,), {"refit": True}),
            ValueError,
            "refit is True, expected False as in the sweep",
        ),
        (lambda m, d, s: ((m, d), {"key": "size"}), ValueError, "key is 'size'"),
        (lambda m, d, s: ((m, d[0]), {}), TypeError, "data is a Tensor"),
        (
            lambda m, d, s: ((nn.Linear(2, 2), d), {}),
            ValueError,
            "Linear without a CP layer",
        ),
        (lambda m, d, s: ((m, (d[0][:, :, :3], d[1])), {}), RuntimeError, "shape"),
    ],
)
def test_explorer_refuses_what_does_not_go_together(
    model, data, sweep, arguments, error, match
):
    args, options = arguments(model, data, sweep)
    with pytest.raises(error, match=match):
        RankExplorer(*args, **options)
    gc.collect()  # a half-made widget must go quietly


@pytest.mark.slow
def test_explorer_closes_the_last_run_of_its_cell_in_a_kernel():
    from jupyter_client.manager import start_new_kernel

    setup = """
import torch
from cpnb.layers import CPLinear
from cpnb.widgets import RankExplorer
layer, made = CPLinear(6, 3, rank=2), []
data = torch.randn(9, 6), torch.zeros(9, dtype=torch.long)
"""
    make = "made.append(RankExplorer(layer, data))"
    manager, client = start_new_kernel()

    def run(code, **metadata):
        message = client.session.msg(
            "execute_request",
            {
                "code": code,
                "silent": False,
                "user_expressions": {
                    "open": "[each.comm is not None for each in made]"
                },
            },
            metadata=metadata,
        )
        client.shell_channel.send(message)
        while True:
            reply = client.get_shell_msg(timeout=60)
            if reply["parent_header"]["msg_id"] == message["header"]["msg_id"]:
                break
        content = reply["content"]
        assert content["status"] == "ok", content
        return content["user_expressions"]["open"]["data"]["text/plain"]

    try:
        assert run(setup) == "[]"
        assert run(make, cellId="a") == "[True]"
        assert run(make, cellId="b") == "[True, True]"
        assert run(make + "  # edited", cellId="a") == "[False, True, True]"
        assert run(make) == "[False, True, True, True]"
        assert run(make) == "[False, True, True, False, True]"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("options", [{"key": "gradient"}, {"refit": "data"}])
def test_explorer_refuses_a_table_cut_by_other_training_images(model, data, options):
    splits = Splits(data)
    sweep = rank_sweep(model, splits, ["fc"], [3], progress=False, **options)
    RankExplorer(model, splits, sweep=sweep, background=False).close()
    with pytest.raises(ValueError, match="sweep was cut by other images"):
        RankExplorer(model, splits.validation, sweep=sweep)
