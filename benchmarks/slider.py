"""Time from a key press on a slider to the new frame, in a real browser.

``python benchmarks/slider.py`` takes about a minute and needs Chromium. "page" is the
file that `RankSweep.to_html` writes, opened from disk without a network; "live" is
`RankExplorer` answering from its table in JupyterLab as ``start.py lab`` starts it,
"budget" its slider that allocates ranks; "plain" is a JupyterLab without
`cpnb_lab.PromptConnection`. A frame counts as new when the browser has painted after
the marker has moved or the picture has changed; "change" is the time until then without
the painting. Keys are pressed one after the other, each when the frame of the last is
there. Medians and 90 % quantiles over the steps.
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
from lab_server import (  # noqa: E402
    CONNECTION,
    NotebookPage,
    chromium,
    find_browser,
    jupyterlab,
)

GOALS = {"page": 10, "live": 65, "budget": 65, "plain": 65}

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

NOTEBOOK = """import cpnb
sweep = cpnb.RankSweep.load("sweep.json")
explorer = cpnb.RankExplorer(sweep)
explorer"""


def make_sweep(folder):
    """A sweep of the digits network, saved as JSON and as a page."""
    data = cpnb.load_data("digits")
    generator = torch.Generator().manual_seed(0)
    net = cpnb.canonicalize(cpnb.DigitsNet(generator=generator), generator=generator)
    cpnb.fit(net, data, epochs=2, progress=False)
    sweep = cpnb.rank_sweep(net, data, progress=False)
    sweep.save(folder / "sweep.json")
    sweep.to_html(folder / "sweep.html")
    cell = nbformat.v4.new_code_cell(NOTEBOOK)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "live.ipynb")


def measure(page, slider, watched, attribute, steps):
    """Milliseconds from key press to frame, and until the change, for each step."""
    page.evaluate(RECORD, [watched.element_handle(), attribute])
    slider.scroll_into_view_if_needed()
    slider.focus()
    for step in range(steps):
        slider.press("ArrowLeft")
        page.evaluate(UNTIL, step)
    return page.evaluate("window.frames")


def on_page(browser, folder, steps):
    """Steps of the exported page, by name."""
    page = browser.new_context(offline=True).new_page()
    page.goto((folder / "sweep.html").as_uri())
    slider = page.get_by_role("slider", name="conv2")
    return {"page": measure(page, slider, page.locator("circle").first, "cx", steps)}


def live(browser, folder, steps):
    """Steps of the explorer in JupyterLab, by name."""
    return in_lab(browser, folder, steps, CONNECTION, live="conv2", budget="budget")


def plain(browser, folder, steps):
    """Steps of the explorer in a JupyterLab with the server's own connection."""
    return in_lab(browser, folder, steps, None, plain="conv2")


def in_lab(browser, folder, steps, connection, **sliders):
    """Steps of the sliders with these labels, by name."""
    home = Path(tempfile.mkdtemp(dir=folder))
    variables = {"connection": connection, "PYTHONPATH": str(ROOT)}
    with jupyterlab(folder, home, **variables) as address:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(120_000)
        notebook = NotebookPage(page, address, "live.ipynb", seconds=120)
        notebook.run_all()
        output = page.locator(".jp-OutputArea-output", has=page.get_by_role("status"))
        image = output.locator("img").first
        image.wait_for()
        found = {}
        for name, axis in sliders.items():
            row = output.locator(".widget-slider").filter(has_text=axis)
            slider = row.get_by_role("slider")
            found[name] = measure(page, slider, image, "src", steps)
        assert notebook.ask("explorer.ranks['conv2']") < 84
    return found


def main():
    """Measure both and print what it was run with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--page-only", action="store_true")
    options = parser.parse_args()
    if find_browser() is None:
        sys.exit("no Chromium (Debian: apt install chromium)")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_sweep(folder)
        browser = stack.enter_context(chromium(find_browser()))
        print(
            f"Chromium {browser.version}, cpnb {cpnb.__version__}, "
            f"{platform.machine()}, {options.steps} steps; the page is "
            f"{(folder / 'sweep.html').stat().st_size / 1000:.0f} kB"
        )
        for run in (on_page,) if options.page_only else (on_page, live, plain):
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
