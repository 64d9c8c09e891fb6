"""Set cpnb up in ``.venv`` and start it, with nothing but Python 3.11 or newer.

``python3 start.py lab`` opens JupyterLab on the tour, ``python3 start.py test`` runs
the whole test suite; what follows is passed on to JupyterLab or pytest. The install
is skipped as long as pyproject.toml and constraints.txt stay as they are.
"""

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "cpnb-installed.txt"
EXTRAS = {"lab": "notebooks", "test": "notebooks,test"}
ARGUMENTS = {
    "lab": ["-m", "jupyterlab", "notebooks/00_tour.ipynb"],
    "test": ["-m", "pytest", "-m", ""],
}


def run(*command):
    """Run a command in the repository and return its exit status once it has ended."""
    # Ctrl-C reaches the command too, which decides when to end. A handler that raised
    # here could lose the status of a command that ends at the same moment.
    signal.signal(signal.SIGINT, lambda *_: None)
    process = subprocess.Popen([str(word) for word in command], cwd=str(ROOT))
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    status = process.wait()
    return status if status >= 0 else 128 - status


def install(extras):
    """Make the environment hold cpnb with these extras, unless it already does."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    wanted = f"{digest.hexdigest()} {extras}"
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text().startswith(wanted):
        return
    if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
        sys.exit(
            "This Python cannot make a virtual environment: it lacks venv or ensurepip."
            " On Debian and Ubuntu: apt install python3-venv"
        )
    STAMP.unlink(missing_ok=True)
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check"]
    fresh = [] if PYTHON.exists() else ["--clear"]
    status = run(sys.executable, "-m", "venv", *fresh, VENV)
    status = status or run(*pip, "-c", "constraints.txt", "-e", f".[{extras}]")
    if status != 0:
        sys.exit(status)
    STAMP.write_text(wanted)


def main(arguments):
    """Install what the command needs, run it and return its exit status."""
    if not arguments or arguments[0] not in EXTRAS:
        sys.exit("usage: python3 start.py {lab,test} [options of JupyterLab or pytest]")
    command, *options = arguments
    install(EXTRAS[command])
    if command == "lab" and hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-root")  # containers; JupyterLab refuses otherwise
    return run(PYTHON, *ARGUMENTS[command], *options)


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 (a sentence, no traceback)
        sys.exit(f"cpnb needs Python 3.11 or newer; this is {sys.version.split()[0]}.")
    sys.exit(main(sys.argv[1:]))
