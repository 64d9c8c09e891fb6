"""Generate the notebooks from their percent scripts, one way, and execute them.

``python notebooks/build.py`` brings every stale notebook up to date,
``python notebooks/build.py 00 05`` only these, ``--force`` executes them in any case
(after a change in the library) and ``--check`` says which are stale and changes
nothing. Edited text is taken over without a new execution; edited code is executed in
full mode, whose outputs are kept, and in fast mode, whose time is kept. A notebook that
is over a limit (`faults`) is refused. ``--site OUT`` makes a site of what is committed.
"""

import argparse
import base64
import hashlib
import os
import re
import statistics
import sys
import time
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).resolve().parent
README_FIGURE = HERE.parent / "docs" / "readme.png"
EXPLORERS = HERE.parent / "docs" / "explorers"  # a sweep NN.json for the site
CELL_TIMEOUT = 900  # seconds
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WORDS, CELL_LINES, MEDIAN_LINES = 1800, 20, 8  # what a student reads to the end
PICTURE_TEXT = "**Figure:** "  # the text alternative in the cell below a picture
PROGRESS = re.compile(r"\d+%\|.*\||\d+it \[\d")  # a line that tqdm drew
# Runs after the last cell: a widget dies with its kernel, the table in it stays.
PRINT_SWEEP = """
if hasattr(globals().get("explorer"), "to_html"):
    import pathlib, tempfile
    file = pathlib.Path(tempfile.mkdtemp(), "sweep.json")
    sweep.save(file)
    print(file.read_text("utf-8"), end="")
"""
METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def code_hash(notebook):
    """Hash what outputs depend on: the code cells, in their order."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def from_script(script):
    """Read a percent script as a notebook whose cell ids follow from the sources."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata.clear()
    notebook.metadata.update(METADATA)
    seen = {}
    for cell in notebook.cells:
        seen[cell.source] = seen.get(cell.source, 0) + 1
        text = f"{cell.cell_type} {seen[cell.source]} {cell.source}"
        cell.id = hashlib.sha256(text.encode()).hexdigest()[:8]
    return notebook


def stale(script):
    """Say what keeps the notebook from being its script's: "", "text" or "code"."""
    target = script.with_suffix(".ipynb")
    if not target.exists():
        return "code"
    new, old = from_script(script), nbformat.read(target, as_version=4)
    executed = old.metadata.get("cpnb", {}).get("code_hash")
    # The notebook's own code differs from what was executed where somebody edited it.
    if code_hash(new) != executed or code_hash(old) != executed:
        return "code"

    def cells(notebook):
        return [(c.cell_type, c.id, c.source, c.metadata) for c in notebook.cells]

    return "" if cells(old) == cells(new) else "text"


def faults(notebook):
    """List what makes a notebook longer, or less accessible, than the course allows.

    Words are what stands in text cells between spaces and holds a letter or a digit;
    lines of code are those that are not empty, in every cell, solutions included.

    Args:
        notebook: Notebook node. Its pictures are seen only once it is executed.

    Returns:
        One sentence per fault.
    """
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    words = sum(bool(re.search(r"\w", word)) for text in texts for word in text.split())
    found = [f"{words} words, at most {WORDS}"] if words > WORDS else []
    sizes = []
    for cell, below in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        if cell.cell_type != "code" or not lines:
            continue
        sizes.append(len(lines))
        if len(lines) > CELL_LINES:
            found.append(f"{len(lines)} lines, at most {CELL_LINES}: {lines[0]}")
        pictures = any("image/png" in out.get("data", {}) for out in cell.outputs)
        if pictures and not (below and below.source.startswith(PICTURE_TEXT)):
            found.append(f"the cell below does not begin {PICTURE_TEXT!r}: {lines[0]}")
    if statistics.median(sizes or [0]) > MEDIAN_LINES:
        found.append(f"median {statistics.median(sizes)} lines, at most {MEDIAN_LINES}")
    return found


def execute(notebook, *, fast, folder=HERE, timeout=CELL_TIMEOUT):
    """Run all cells in place, in a new kernel that finds this checkout.

    Args:
        notebook: Notebook node; its outputs are replaced.
        fast: Whether the notebook runs in fast mode.
        folder: Working folder of the kernel.
        timeout: Longest time of one cell in seconds.

    Returns:
        Seconds from the start of the kernel to the last output.
    """
    from nbclient import NotebookClient  # not needed to check pairs

    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
    )
    ours = {"CPNB_FAST", "MPLBACKEND"}
    environment = {name: os.environ[name] for name in os.environ.keys() - ours}
    paths = [str(HERE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if fast:
        environment["CPNB_FAST"] = "1"
    start = time.perf_counter()
    client.execute(env=environment)
    return time.perf_counter() - start


def tidy(notebook):
    """Remove what would differ at the next execution or does not show without a kernel.

    Widget views point at a model that died with the kernel (the picture beside them
    stays), progress bars hold times; both go. Other text on stderr stays.
    """
    notebook.metadata.clear()
    notebook.metadata.update(METADATA)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                lines = re.split(r"(?<=[\r\n])", output.text)
                output.text = "".join(x for x in lines if not PROGRESS.search(x))
            output.get("data", {}).pop(WIDGET_VIEW, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _says(output)]


def _says(output):
    if output.output_type == "stream":
        return bool(output.text.strip())
    return "data" not in output or bool(output.data)


def readme_figure(notebook):
    """Return the picture of the cell tagged ``readme-figure``, None without one."""
    for cell in notebook.cells:
        if "readme-figure" in cell.metadata.get("tags", []):
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output.data["image/png"])
    return None


def build(script, *, reason):
    """Write the notebook beside a script, executed if its code changed.

    Args:
        script: Path of the percent script.
        reason: What changed, as `stale` says it.

    Returns:
        The notebook node.

    Raises:
        SystemExit: If it is over a limit; nothing is written then.
    """
    target = script.with_suffix(".ipynb")
    new = from_script(script)
    refuse(script, new)
    if reason == "code":
        fast = execute(from_script(script), fast=True)
        new.cells.append(nbformat.v4.new_code_cell(PRINT_SWEEP))
        full = execute(new, fast=False)
        printed = {output.name: output.text for output in new.cells.pop().outputs}
        tidy(new)
        seconds = {"fast": round(fast), "full": round(full), "cores": os.cpu_count()}
        new.metadata["cpnb"] = {"code_hash": code_hash(new), "seconds": seconds}
    else:
        old = nbformat.read(target, as_version=4)
        executed = [cell for cell in old.cells if cell.cell_type == "code"]
        cells = [cell for cell in new.cells if cell.cell_type == "code"]
        for cell, source in zip(cells, executed, strict=True):
            cell.outputs = source.outputs
            cell.execution_count = source.execution_count
        new.metadata["cpnb"] = old.metadata["cpnb"]
    refuse(script, new)
    nbformat.validate(new)
    nbformat.write(new, target)
    if figure := readme_figure(new):
        README_FIGURE.write_bytes(figure)
    if reason == "code":
        sweep = EXPLORERS / f"{script.name[:2]}.json"
        sweep.unlink(missing_ok=True)
        if "stdout" in printed:
            sweep.write_text(printed["stdout"], "utf-8")
    return new


def refuse(script, notebook):
    """Stop with the faults of a notebook, if it has any."""
    if found := faults(notebook):
        sys.exit("\n  ".join([f"{script.stem} is not written:", *found]))


def main(arguments=None):
    """Build or check the named notebooks; the exit status says whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="such as 00 05; all by default")
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--force", action="store_true", help="execute in any case")
    parser.add_argument("--site", metavar="OUT", help="write a site, execute nothing")
    options = parser.parse_args(arguments)
    if options.site:
        sys.path.insert(0, str(HERE.parent))  # the library of this checkout
        from pages import write_site  # needs the extra "site"

        return write_site(options.site)
    scripts = {path.name[:2]: path for path in sorted(HERE.glob("[0-9][0-9]_*.py"))}
    for number in set(options.numbers) - set(scripts):
        parser.error(f"no script notebooks/NN_*.py with number {number}")
    reasons = {
        scripts[number]: "code" if options.force else stale(scripts[number])
        for number in options.numbers or scripts
    }
    for script, reason in reasons.items():
        if reason:
            print(f"{script.stem}: {reason} changed", flush=True)
        if reason and not options.check:
            seconds = build(script, reason=reason).metadata.cpnb.seconds
            minutes = f"{seconds.full / 60:.1f} ({seconds.fast / 60:.1f})"
            print(f"{script.stem}: written, {minutes} minutes (fast)", flush=True)
    return int(options.check and any(reasons.values()))


if __name__ == "__main__":
    sys.exit(main())
