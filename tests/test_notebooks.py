"""Notebooks: each pair agrees, its outputs are its code's, and it runs in a kernel."""

import importlib.util
import pydoc
import re
import shutil
from pathlib import Path

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
CELL_TIMEOUT = 240  # seconds, in fast mode

_spec = importlib.util.spec_from_file_location("notebook_build", FOLDER / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

every_notebook = pytest.mark.parametrize(
    "script", SCRIPTS, ids=[script.stem for script in SCRIPTS]
)


def read(script):
    """Read the committed notebook beside a script."""
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def outputs(notebook):
    """Yield every output of every code cell."""
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def text_of(output):
    """Join what an output says in words; pictures are left out."""
    data = output.get("data", {})
    words = [data[kind] for kind in data if kind.startswith("text/")]
    return "\n".join([output.get("text", ""), *words])


def test_notebooks_all_have_a_script():
    committed = {path.stem for path in FOLDER.glob("*.ipynb")}
    assert committed == {script.stem for script in SCRIPTS}


@every_notebook
def test_notebook_holds_the_cells_of_its_script(script):
    written, generated = (
        jupytext.read(script),
        jupytext.read(script.with_suffix(".ipynb")),
    )
    expected = [(cell.cell_type, cell.source) for cell in written.cells]
    assert [(cell.cell_type, cell.source) for cell in generated.cells] == expected


@every_notebook
def test_notebook_outputs_are_those_of_its_code(script):
    assert read(script).metadata.cpnb.code_hash == build.code_hash(
        jupytext.read(script)
    )
    assert build.stale(script) == ""


@every_notebook
def test_notebook_is_within_the_limits_of_the_course_and_folds_solutions(script):
    notebook = read(script)
    assert build.faults(notebook) == []
    for cell in notebook.cells:
        if "solution" in cell.metadata.get("tags", []):
            assert cell.metadata.jupyter == {"source_hidden": True}


@every_notebook
def test_notebook_names_only_what_exists(script):
    text = script.read_text().replace("\n# ", " ")
    names = set(re.findall(r"(?<![\w./])cpnb(?:\.[A-Za-z_]\w*)+", text))
    assert [name for name in sorted(names) if pydoc.locate(name) is None] == []


@every_notebook
def test_notebook_is_executed_in_order_without_errors(script):
    notebook = read(script)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells if cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1))
    assert any(cell.outputs for cell in cells)
    assert [out.ename for out in outputs(notebook) if out.output_type == "error"] == []


@every_notebook
def test_notebook_holds_nothing_that_does_not_last(script):
    notebook = read(script)
    assert script.with_suffix(".ipynb").stat().st_size < 1_000_000
    assert "widgets" not in notebook.metadata
    volatile = re.compile(r"/(home|root|tmp|work|Users)/|[A-Z]:\\|\bat 0x[0-9a-f]+")
    for output in outputs(notebook):
        assert build.WIDGET_VIEW not in output.get("data", {})
        assert volatile.search(text_of(output)) is None, text_of(output)


@every_notebook
def test_notebook_warns_of_nothing(script):
    said = [out.text for out in outputs(read(script)) if out.get("name") == "stderr"]
    assert said == []


@pytest.mark.notebooks
@every_notebook
def test_notebook_runs_from_top_to_bottom_in_fast_mode(script, tmp_path):
    folder = tmp_path / "notebooks"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.ipynb", ".*"))
    notebook = build.from_script(folder / script.name)
    build.execute(notebook, fast=True, folder=folder, timeout=CELL_TIMEOUT)
    assert all(cell.get("execution_count", 1) for cell in notebook.cells if cell.source)


SCRATCH = """\
# %% [markdown]
# # A scratch notebook

# %%
import os, sys
print("mode", os.environ.get("CPNB_FAST"))

# %%
import ipywidgets
from IPython.display import display
slider = ipywidgets.IntSlider(value=3)
display(slider, {"text/plain": "a picture stands here"}, raw=False)
slider

# %%
from tqdm import tqdm
for step in tqdm(range(3)):
    pass
print("a warning stays", file=sys.stderr)
class explorer:
    to_html = None
class sweep:
    save = lambda path: path.write_text("a sweep")

# %% tags=["solution"]
6 * 7
"""


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "EXPLORERS", tmp_path)
    script = tmp_path / "99_scratch.py"
    script.write_text(SCRATCH)
    return script


def test_build_calls_a_script_without_notebook_stale(scratch):
    assert build.stale(scratch) == "code"


@pytest.mark.notebooks
def test_build_writes_the_same_notebook_twice_without_what_does_not_last(scratch):
    build.build(scratch, reason="code")
    target = scratch.with_suffix(".ipynb")
    first, text = read(scratch), target.read_text()
    assert build.stale(scratch) == ""
    assert "widgets" not in first.metadata
    assert build.WIDGET_VIEW not in text
    assert "IntSlider(value=3)" in text
    assert "mode None" in text, "full mode is what is kept"
    stderr = [out.text for out in outputs(first) if out.get("name") == "stderr"]
    assert stderr == ["a warning stays\n"], "the progress bar goes, a warning stays"
    assert first.cells[-1].metadata.tags == ["solution"]
    assert first.metadata.cpnb.seconds.full < 60
    sweep = scratch.with_name("99.json")
    assert sweep.read_text() == "a sweep", "what the site shows"

    build.build(scratch, reason="code")
    second = read(scratch)
    first.metadata.cpnb.pop("seconds"), second.metadata.cpnb.pop("seconds")
    assert first == second


@pytest.mark.notebooks
def test_build_keeps_outputs_when_only_the_text_was_edited(scratch):
    build.build(scratch, reason="code")
    before = read(scratch)
    scratch.write_text(SCRATCH.replace("A scratch notebook", "Another title"))
    assert build.stale(scratch) == "text"
    build.build(scratch, reason="text")
    after = read(scratch)
    assert build.stale(scratch) == ""
    assert after.cells[0].source == "# Another title"
    assert list(outputs(after)) == list(outputs(before))

    scratch.write_text(SCRATCH.replace("6 * 7", "6 * 8"))
    assert build.stale(scratch) == "code"


@pytest.mark.notebooks
def test_build_refuses_a_notebook_whose_cell_raises(scratch):
    from nbclient.exceptions import CellExecutionError

    scratch.write_text(SCRATCH.replace("6 * 7", "1 / 0"))
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        build.build(scratch, reason="code")
    assert not scratch.with_suffix(".ipynb").exists()


def test_build_refuses_a_notebook_over_the_limits(scratch):
    long = "\n# %%\n" + "x = 1\n" * 21 + "\n# %% [markdown]\n# " + "word " * 1800
    scratch.write_text(SCRATCH.replace("6 * 7", "6 * 7\n" * 9) + long)
    with pytest.raises(
        SystemExit, match=r"1803 words, at most 1800\s+21 lines, at most"
    ):
        build.build(scratch, reason="code")
    notebook = build.from_script(scratch)
    notebook.cells[1].outputs = [
        nbformat.v4.new_output("display_data", {"image/png": ""})
    ]
    text = "the cell below does not begin '**Figure:** ': import os"
    assert text in "".join(build.faults(notebook))


def test_build_check_names_a_number_without_script(capsys):
    with pytest.raises(SystemExit):
        build.main(["--check", "98"])
    assert "no script notebooks/NN_*.py with number 98" in capsys.readouterr().err
