"""The curve explorer without a kernel: what is chosen is drawn and said."""

import threading

import ipywidgets
import pytest

from cpnb import Comparison, CurveExplorer
from cpnb._compare.record import Cell, Record
from cpnb._explorer.curves import CurveFigure, result_lines


def record(name, tests, *, epochs=3, status="finished"):
    """A record whose networks end at the given test accuracies."""
    course = [0.5 + 0.1 * epoch for epoch in range(epochs)]
    cells = [
        {
            **Cell("test", 0.01, 0.0, seed)._asdict(),
            "status": status,
            "together": 1,
            "train_loss": [1 - value + 0.01 * seed for value in course],
            "train_accuracy": course,
            "validation_loss": [1 - value for value in course],
            "validation_accuracy": [value + 0.01 * seed for value in course],
            "seconds": [4.0] * epochs,
            "test_accuracy": test,
            "provenance": {},
        }
        for seed, test in enumerate(tests)
    ]
    plan = {"tune": {"lr": [0.01], "weight_decay": [0.0]}, "tune_seeds": [9]}
    return Record({"name": name}, {**plan, "seeds": [0, 1]}, {"images": [60]}, cells)


def comparison(**tests):
    """A comparison with test accuracies by method."""
    return Comparison({name: record(name, values) for name, values in tests.items()})


@pytest.fixture
def explorer():
    made = CurveExplorer(
        {
            "mnist": comparison(none=(0.9, 0.92), weight=(0.95, 0.97), own=(0.5, 0.5)),
            "fashion": comparison(batch=(0.8, 0.8), canonical=(0.7, 0.7)),
            "empty": Comparison({"none": record("none", [0.5], status="diverged")}),
        }
    )
    yield made
    made.close()


def test_explorer_shows_all_methods_of_the_first_comparison(explorer):
    assert explorer.experiment.options == ("mnist", "fashion")
    assert explorer.chosen == ("none", "weight", "own")
    assert bytes(explorer.image.value).startswith(b"\x89PNG")
    words = explorer.status.value
    assert 'role="status"' in words
    assert "weight: test accuracy 96.00% ± 1.41 (n = 2), rate 0.01, 12.0 s" in words
    assert words.index("weight:") < words.index("none:") < words.index("own:")


@pytest.mark.parametrize(
    ("menu", "value"),
    [
        ("experiment", "fashion"),
        ("measure", "train_loss"),
        ("axis", "seconds"),
    ],
)
def test_explorer_draws_what_is_chosen(explorer, menu, value):
    before = explorer.image.value
    first = getattr(explorer, menu).value
    getattr(explorer, menu).value = value
    assert explorer.image.value != before
    assert 'role="status"' in explorer.status.value
    getattr(explorer, menu).value = first
    assert explorer.chosen == ("none", "weight", "own")
    assert explorer.image.value == before


def test_explorer_shows_and_says_the_ticked_methods_only(explorer):
    before = explorer.image.value
    explorer.methods["weight"].value = False
    assert explorer.image.value != before
    assert explorer.chosen == ("none", "own")
    assert "own: test" in explorer.status.value
    assert "weight" not in explorer.status.value
    for box in explorer.methods.values():
        box.value = False
    assert "No method is chosen." in explorer.status.value


def test_explorer_offers_the_methods_of_the_experiment(explorer):
    gone = explorer.methods["own"]
    explorer.methods["own"].value = False
    explorer.experiment.value = "fashion"
    assert explorer.chosen == ("batch", "canonical")
    assert "batch: test accuracy 80.00% ± 0.00" in explorer.status.value
    assert gone.comm is None, "boxes that are not shown any more are closed"


def test_figure_keeps_the_look_of_a_method_whatever_else_is_chosen():
    shown = comparison(own=(0.5,), other=(0.6,), none=(0.7,))
    painter = CurveFigure()

    def looks(*names):
        painter.png(shown, names, "train_loss", "epoch")
        lines = painter.figure.axes[0].get_lines()
        return {
            line.get_label(): (line.get_color(), line.get_marker()) for line in lines
        }

    everything = looks("own", "other", "none")
    assert len(set(everything.values())) == 3
    assert looks("other").items() <= everything.items()


def test_figure_draws_against_seconds():
    painter = CurveFigure()
    painter.png(comparison(none=(0.5, 0.5)), ["none"], "train_loss", "seconds")
    (line,) = painter.figure.axes[0].get_lines()
    assert line.get_xdata().tolist() == [4, 8, 12]


def test_explorer_shows_an_error_in_its_status(explorer, monkeypatch):
    def fail(*_):
        raise RuntimeError("no <ink>")

    picture = explorer.image.value
    monkeypatch.setattr(explorer._painter, "png", fail)
    explorer.measure.value = "train_loss"
    assert 'role="alert"' in explorer.status.value
    assert "Failed: RuntimeError: no &lt;ink&gt;" in explorer.status.value
    assert explorer.image.value == picture


def test_explorer_bundles_picture_and_words_for_pages_without_a_kernel(explorer):
    bundle = explorer._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert data["image/png"]
    assert data["text/plain"].startswith("CurveExplorer: mnist\nweight: test accuracy")


def test_explorer_survives_two_threads_that_choose(explorer):
    def choose(menu, values):
        for value in values:
            menu.value = value

    measures = ["train_loss", "validation_loss"] * 3
    experiments = ["fashion", "mnist"] * 3
    threads = [
        threading.Thread(target=choose, args=(explorer.measure, measures)),
        threading.Thread(target=choose, args=(explorer.experiment, experiments)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert explorer.experiment.value == "mnist"
    assert 'role="status"' in explorer.status.value
    shown = explorer.image.value
    explorer.axis.value = "seconds"
    explorer.axis.value = "epoch"
    assert explorer.image.value == shown


def test_explorer_closes_all_its_widgets(explorer):
    explorer.close()
    assert all(
        not isinstance(widget, ipywidgets.Widget) or widget.comm is None
        for widget in (explorer.measure, explorer.image, explorer)
    )


def test_explorer_refuses_to_show_nothing():
    with pytest.raises(ValueError, match="results holds no tested network, expected"):
        CurveExplorer({"empty": Comparison({"x": record("x", [])})})


def test_result_lines_count_what_diverged():
    shown = comparison(none=(0.5, 0.7))
    shown.records["none"].cells[1]["status"] = "diverged"
    assert result_lines(shown, ["none"]) == [
        "none: test accuracy 50.00% (n = 1), rate 0.01, 12.0 s of training, 1 diverged."
    ]
