"""Time from a key press on a slider to the new frame, in a real browser.

``python benchmarks/slider.py`` takes about a minute and needs Chromium. "page" is the
file that `RankSweep.to_html` writes, opened from disk without a network; "live" is
`RankExplorer` in JupyterLab, where the table has the point; "explore" is a drawing
function in JupyterLab, whose picture comes from the kernel. A frame counts as new when
the browser has painted after the marker has moved or the picture has changed; "change"
is the time until then without the painting. Keys are pressed one after the other, each
when the frame of the last is there.
"""

import argparse
import contextlib
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import nbformat
import torch

import cpnb

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from lab_server import NotebookPage, chromium, find_browser, jupyterlab  # noqa: E402

GOALS = {"page": 10, "live": 12, "explore": 70}  # milliseconds

# Notes when a key goes down, and when the browser has painted after an attribute of an
# element has changed: the marker's place or the picture's address.
RECORD = """([watched, attribute]) => {
    const frames = window.frames = [];
    let pressed = null;
    window.addEventListener("keydown", () => { pressed = performance.now(); }, true);
    new MutationObserver(async () => {
        if (pressed === null) return;
        const began = pressed, script = performance.now() - began;
        pressed = null;
        if (watched.decode) await watched.decode();
        requestAnimationFrame(() => {
            const channel = new MessageChannel();
            channel.port1.onmessage = () => {
                frames.push([performance.now() - began, script]);
                window.told?.();
            };
            channel.port2.postMessage(null);
        });
    }).observe(watched, {attributeFilter: [attribute]});
}"""

# Waits without asking at every frame, which would keep the browser painting.
UNTIL = """count => new Promise((resolve, reject) => {
    if (window.frames.length > count) return resolve();
    window.told = resolve;
    setTimeout(() => reject(new Error("no new frame in 60 seconds")), 60000);
})"""

CELLS = [
    """import cpnb
data = cpnb.load_data("digits")
net = cpnb.canonicalize(cpnb.DigitsNet(), init="unified")
explorer = cpnb.RankExplorer(net, data, progress=False)
explorer""",
    """def draw(figure, rank):
    figure.subplots().plot(range(rank), "o-")
    return f"rank {rank}"

cpnb.explore.explore(draw, rank=range(84, 0, -1))""",
]


def measure(page, slider, watched, attribute, steps):
    """Milliseconds from key press to frame, and until the change, for each step."""
    page.evaluate(RECORD, [watched.element_handle(), attribute])
    slider.scroll_into_view_if_needed()
    slider.focus()
    for step in range(steps):
        slider.press("ArrowRight" if attribute == "src" else "ArrowLeft")
        page.evaluate(UNTIL, step)
    return page.evaluate("window.frames")


def on_page(browser, folder, steps):
    """Steps of the exported page, by name."""
    data = cpnb.load_data("digits")
    generator = torch.Generator().manual_seed(0)
    net = cpnb.DigitsNet(generator=generator)
    net = cpnb.canonicalize(net, init="unified", generator=generator)
    cpnb.rank_sweep(net, data, progress=False).to_html(folder / "sweep.html")
    size = (folder / "sweep.html").stat().st_size / 1000
    print(f"the page has {size:.0f} kB", flush=True)
    page = browser.new_context(offline=True).new_page()
    page.goto((folder / "sweep.html").as_uri())
    return {"page": measure_explorer(page, steps)}


def measure_explorer(page, steps):
    """Steps of one layer, whose small curve is shown as well."""
    page.locator("summary", has_text="Each layer").click()
    slider = page.get_by_role("slider", name="conv2")
    return measure(
        page, slider, page.locator(".cpnb-explorer circle").first, "cx", steps
    )


def in_lab(browser, folder, steps):
    """Steps of both explorers in JupyterLab, by name."""
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    (folder / "notebooks").mkdir()
    (folder / "home").mkdir()
    nbformat.write(notebook, folder / "notebooks" / "live.ipynb")
    variables = {"PYTHONPATH": str(ROOT)}
    with jupyterlab(folder / "notebooks", folder / "home", **variables) as address:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(120_000)
        notebook = NotebookPage(page, address, "live.ipynb", seconds=120)
        notebook.run_all()
        live = measure_explorer(page, steps)
        slider = page.locator(".widget-slider").get_by_role("slider")
        image = page.locator(".widget-image")
        return {"live": live, "explore": measure(page, slider, image, "src", steps)}


def main():
    """Measure all and print what it was run with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--page-only", action="store_true")
    options = parser.parse_args()
    if find_browser() is None:
        sys.exit("no Chromium (Debian: apt install chromium)")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        browser = stack.enter_context(chromium())
        print(
            f"Chromium {browser.version}, cpnb {cpnb.__version__}, "
            f"{platform.machine()}, {options.steps} steps"
        )
        for run in (on_page,) if options.page_only else (on_page, in_lab):
            for name, steps in run(browser, folder, options.steps).items():
                frames, script = zip(*steps, strict=True)
                tail = statistics.quantiles(frames, n=10)[-1]
                print(
                    f"{name}: key press to frame {statistics.median(frames):.1f} ms "
                    f"(goal {GOALS[name]}), 90 % within {tail:.1f} ms; change "
                    f"{statistics.median(script):.1f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    main()
