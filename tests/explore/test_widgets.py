"""`explore`: what a control becomes, what is drawn, and what goes wrong in words."""

import base64
import subprocess
import sys

import ipywidgets
import numpy as np
import pytest

from cpnb.explore import widgets
from cpnb.explore.widgets import explore


def draw(figure, **values):
    """Draw the values as bars, and say them."""
    figure.subplots().bar(list(values), [float(v) for v in values.values()])
    return f"values < {values}"


def test_explore_makes_the_control_that_fits_the_values():
    own = ipywidgets.Checkbox(True, description="own")
    options = {"rank": range(1, 85), "ridge": [0.0, 1e-3], "method": ["als", "power"]}
    box = explore(lambda figure, **values: str(values), **options, log=False, own=own)
    kinds = [type(control).__name__ for control in box.controls.values()]
    assert kinds == [*2 * ["SelectionSlider"], "Dropdown", *2 * ["Checkbox"]]
    assert box.controls["own"] is own
    first = {"rank": 1, "ridge": 0.0, "method": "als", "log": False, "own": True}
    assert box.words == str(first)
    box = explore(lambda figure, n: str(n), n=np.arange(10_001, 10_004))
    assert [*dict(box.controls["n"].options)] == ["10001", "10002", "10003"]


def test_explore_draws_anew_when_a_control_moves_also_for_pages_without_a_kernel():
    drawn = []
    box = explore(lambda figure, n: drawn.append(n) or draw(figure, n=n), n=range(5))
    before = bytes(box.image.value)
    assert before.startswith(b"\x89PNG")
    box.controls["n"].value = 3
    assert drawn == [0, 3]
    assert box.image.value != before
    assert box.status.value == '<p role="status">values &lt; {&#x27;n&#x27;: 3}</p>'
    bundle = box._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == box.image.value
    assert bundle["text/plain"] == box.words == "values < {'n': 3}"
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_explore_gives_each_slider_a_menu_of_the_same_name_that_follows_it():
    box = explore(draw, n=[1, 2, 5])
    slider, menu = box.children[0].children
    assert isinstance(menu, ipywidgets.Dropdown)  # a select with a label of its own
    assert menu.description == "n ="
    slider.value = 5
    assert menu.value == 5
    menu.value = 2
    assert box.controls["n"].value == 2
    assert "2" in box.words


def test_explore_says_what_went_wrong_and_recovers():
    box = explore(lambda figure, n: draw(figure, n=1 // n), n=[1, 0, 2])
    picture = box.image.value
    box.controls["n"].value = 0
    assert box.words.startswith("ZeroDivisionError: ")
    assert 'role="alert"' in box.status.value
    assert box.image.value == picture
    box.controls["n"].value = 2
    assert 'role="status"' in box.status.value


@pytest.fixture
def executing(monkeypatch):
    """Pretend that a cell of JupyterLab is executing."""
    shell = type("Shell", (), {"get_parent": lambda self: self.request})()
    monkeypatch.setattr(widgets, "get_ipython", lambda: shell)

    def execute(cell, run):
        shell.request = {"metadata": {"cellId": cell}, "header": {"msg_id": run}}

    return execute


def test_close_previous_closes_what_the_last_run_of_the_cell_made(executing):
    executing("a", "1")
    first, second = explore(draw, n=[1]), explore(draw, n=[1])
    executing("b", "2")
    other = explore(draw, n=[1])
    assert first.comm is not None
    executing("a", "3")
    third = explore(draw, n=[1])
    closed = [box.comm is None for box in (first, second, other, third)]
    assert closed == [True, True, False, False]


@pytest.mark.parametrize(
    ("missing", "name", "text"),
    [
        ("ipywidgets", "explore", "Sliders need ipywidgets. Install it with pip inst"),
        ("anywidget", "RankExplorer", 'RankExplorer needs anywidget: pip install "cp'),
    ],
)
def test_widget_libraries_that_are_missing_are_named(missing, name, text):
    code = f"import sys, cpnb; sys.modules[{missing!r}] = None; cpnb.explore.{name}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert text in run.stderr
