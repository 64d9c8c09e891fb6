"""The site: README, notebooks and API as pages that open from disk.

``python notebooks/build.py --site OUT`` writes it. Sphinx reads copies of the committed
files and executes none; where a notebook shows a rank explorer, the page of that run's
sweep, which `build.py` keeps in ``docs/explorers``, takes the place of its picture.
"""

import html
import re
import shutil
import tempfile
from importlib import import_module
from pathlib import Path

import nbformat
from sphinx.cmd.build import main as run_sphinx

import cpnb

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
COPIES = ("CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE")
TOP = "cpnb"
MODULES = [*re.findall(r"`(cpnb\.\w+)`", cpnb.__doc__), "cpnb.explore.plots"]
EXPLORER = re.compile(r"^explorer = .*RankExplorer\(", re.MULTILINE)
CONTENTS = """
```{{toctree}}
:hidden:
:caption: {}

{}
```
"""
# The frame is as high as the page in it, also when a section is unfolded.
FIT_HEIGHT = (
    "const page = this.contentDocument.documentElement;"
    "new ResizeObserver(() => { this.style.height = page.offsetHeight + 'px'; })"
    ".observe(page)"
)


def write_site(out):
    """Write the site into a folder; a warning of Sphinx is an error.

    Args:
        out: Folder, made if it is not there.

    Returns:
        The exit status of Sphinx.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder))
        options = ["-qW", "--keep-going", f"-c{DOCS}", f"-d{folder}/.cache"]
        status = run_sphinx([*options, folder, str(out)])
    if status == 0:
        shutil.copy(Path(out) / "README.html", Path(out) / "index.html")
    return status


def write_sources(folder):
    """Write what Sphinx reads: copies, and a page of directives for each module."""
    for name in COPIES:
        shutil.copy(ROOT / name, folder)
    for name in ("docs", "notebooks", "api"):
        (folder / name).mkdir()
    for path in DOCS.glob("*.png"):
        shutil.copy(path, folder / "docs")
    titles = []
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        titles.append(f"{path.name[:2]} {title} <notebooks/{path.stem}>")
        prepare(notebook, DOCS / "explorers" / f"{path.name[:2]}.json")
        nbformat.write(notebook, folder / "notebooks" / path.name)
    for name in (TOP, *MODULES):
        (folder / "api" / f"{name}.rst").write_text(module_page(name), "utf-8")
    chapters = {
        "Notebooks": titles,
        "Python": [f"api/{name}" for name in (TOP, *MODULES)],
        "Project": ["CONTRIBUTING", "CHANGELOG"],
    }
    contents = [CONTENTS.format(name, "\n".join(chapters[name])) for name in chapters]
    readme = (ROOT / "README.md").read_text("utf-8")
    (folder / "README.md").write_text(readme + "".join(contents), "utf-8")


def prepare(notebook, sweep):
    """Fold solutions, say where pictures are described, and put sliders in.

    Args:
        notebook: Notebook node, changed in place.
        sweep: Path of what ``RankSweep.save`` wrote for its explorer, if it has one.
    """
    for cell in notebook.cells:
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.metadata.tags = [*cell.metadata.get("tags", []), "hide-input"]
        cell.metadata["mystnb"] = {"image": {"alt": "Figure, described in the text"}}
    if sweep.exists():
        page = cpnb.RankSweep.load(sweep).to_html()
        title = re.search("<title>(.*?)</title>", page)[1]
        frame = (
            f'<iframe class="explorer" title="Rank explorer: {title}" '
            f'onload="{html.escape(FIT_HEIGHT)}" srcdoc="{html.escape(page)}"></iframe>'
        )
        (cell,) = (each for each in notebook.cells if EXPLORER.search(each.source))
        cell.outputs = [nbformat.v4.new_output("display_data", {"text/html": frame})]


def module_page(name):
    """Name what autodoc documents on a module's page: all of its ``__all__``."""
    module, names = import_module(name), _public(name)
    lines = [name, "=" * len(name), "", f".. automodule:: {name}"]
    if name == TOP:  # a table of links, as each name is documented in its module
        homes = {each: home for home in MODULES[::-1] for each in _public(home)}
        links = [f"   ~{homes[each].removeprefix('cpnb.')}.{each}" for each in names]
        lines += ["", ".. autosummary::", "   :signatures: none", "", *links]
        return "\n".join(lines)
    for each in names:
        value = getattr(module, each)
        if isinstance(value, dict):
            entries = ", ".join(f"``{key!r}``" for key in value)
            lines += ["", f".. py:data:: {each}", "", f"   Entries: {entries}."]
        else:
            kind = "class" if isinstance(value, type) else "function"
            lines += ["", f".. auto{kind}:: {each}"]
            lines += ["   :members:"] if kind == "class" else []
    return "\n".join(lines)


def _public(name):
    """List the names that a module offers, without those of modules."""
    names = import_module(name).__all__
    return [each for each in names if f"{name}.{each}" not in MODULES]
