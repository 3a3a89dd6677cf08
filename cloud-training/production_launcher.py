"""Runs the lab: `python cloud-training/production_launcher.py --domains general_health`.

The same as `python -m meetara_nb run` with these arguments, from any Python: outside the project's virtual environment
it starts itself again inside it.
"""

import importlib.util
import os
import subprocess
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(PROJECT, ".venv")
VENV_PYTHON = os.path.join(VENV, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))


def main():
    inside = os.path.realpath(sys.prefix) == os.path.realpath(VENV)
    if not inside and os.path.exists(VENV_PYTHON):
        return subprocess.call([VENV_PYTHON, os.path.abspath(__file__), *sys.argv[1:]])
    if importlib.util.find_spec("papermill") is None or importlib.util.find_spec("yaml") is None:
        print("error: the lab is not installed for this Python -> type: make -C " + PROJECT + " setup", file=sys.stderr)
        return 2
    sys.path.insert(0, PROJECT)
    from meetara_nb.cli import main as command_line

    return command_line(["run", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
