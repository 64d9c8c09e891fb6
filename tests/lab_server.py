"""An isolated JupyterLab and a Chromium page on one of its notebooks, for tests."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

TOKEN = "test"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
).split()
FOLDERS = {
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
    "JUPYTERLAB_SETTINGS_DIR": "settings",
    "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    "IPYTHONDIR": "ipython",
    "MPLCONFIGDIR": "matplotlib",
}
# Off-screen sliders vanish from role selectors unless every cell is in the page.
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "doNotDisturbMode": True},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
KERNEL_IS_READY = """() => {
    const panel = window.jupyterapp?.shell.currentWidget;
    const kernel = panel?.context?.isReady && panel.sessionContext.session?.kernel;
    return kernel?.status === "idle" && kernel.connectionStatus === "connected";
}"""
RUN_ALL = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
ERRORS = """() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells
    .flatMap(cell => cell.outputs ?? [])
    .filter(output => output.output_type === "error")
    .map(output => `${output.ename}: ${output.evalue}`)"""
ASK_KERNEL = """async code => {
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const future = kernel.requestExecute({code, store_history: false});
    let text = "";
    future.onIOPub = ({header, content}) => {
        if (header.msg_type === "stream") text += content.text;
        if (header.msg_type === "error") text += `${content.ename}: ${content.evalue}`;
    };
    const reply = await future.done;
    if (reply.content.status !== "ok") throw new Error(text);
    return text;
}"""


def find_browser():
    """Path of a Chromium on this machine, None without one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def _wait_until_up(url, process, log, *, seconds=60):
    """Return once the server answers; show its log if it ends or stays silent."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab does not answer:\n{log.read_text()[-3000:]}")


@contextlib.contextmanager
def jupyterlab(root, home, **variables):
    """Run JupyterLab on the folder ``root``, away from the user's own configuration.

    ``home`` is an empty folder for configuration, kernels' data and the log; kernels
    get ``variables``, too. Yields an address, such as ``http://127.0.0.1:8888``.
    """
    environment = dict(os.environ, **variables)
    environment.pop("MPLBACKEND", None)
    for variable, name in FOLDERS.items():
        (home / name).mkdir()
        environment[variable] = str(home / name)
    for name, settings in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = home / "lab.log"
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1"),
        *(f"--port={port}", "--ServerApp.port_retries=0", "--expose-app-in-browser"),
        *(f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={root}"),
        *("--LabApp.news_url=None", "--LabApp.extension_manager=readonly"),
        *("--ServerApp.allow_root=True", "--ServerApp.terminals_enabled=False"),
    ]
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_up(f"{address}/api/status?token={TOKEN}", process, log)
            yield address
        finally:
            process.terminate()


class NotebookPage:
    """A notebook open in the browser, with its kernel.

    Attributes:
        page: The playwright page.
        console: Errors that the browser's console has shown.
    """

    def __init__(self, page, address, name, *, seconds=60):
        """Open the notebook ``name`` and wait until its kernel is idle."""
        self.page = page
        self.console = []
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.goto(f"{address}/doc/tree/{name}?token={TOKEN}")
        page.wait_for_function(KERNEL_IS_READY, timeout=1000 * seconds)

    def run_all(self):
        """Run every cell and wait for the last; an error in a cell fails the test."""
        finished = self.page.evaluate(RUN_ALL)
        assert finished, self.errors()

    def errors(self):
        """List the errors that cells show."""
        return self.page.evaluate(ERRORS)

    def ask(self, expression):
        """Evaluate a Python expression in the kernel; its value travels as JSON."""
        code = f"import json; print(json.dumps({expression}))"
        return json.loads(self.page.evaluate(ASK_KERNEL, code))


@contextlib.contextmanager
def chromium():
    """Start a headless Chromium; yields playwright's browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_browser(), headless=True, args=BROWSER_ARGUMENTS
        )
        try:
            yield browser
        finally:
            browser.close()
