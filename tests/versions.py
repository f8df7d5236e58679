"""Run tests with the lowest or the newest transformers, peft and trl that pyproject.toml allows.

``python tests/versions.py lowest|newest [pytest arguments]``; without arguments the laws and what meets those packages. The environment is made once, in
.cache/versions-lowest or -newest. torch is the one of constraints.txt.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
HOSTS = ("transformers", "peft", "trl")
TESTS = ("tests/laws", "tests/test_peft.py", "tests/test_loading.py", "tests/test_refusals.py", "tests/integrations")


def requirements(which: str) -> list[str]:
    """What is installed of the hosts: their lower bounds, or what their ranges allow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    found = {}
    for line in [*project["dependencies"], *extras]:
        requirement = Requirement(line)
        if requirement.name in HOSTS:
            lowest = next(part.version for part in requirement.specifier if part.operator == ">=")
            found[requirement.name] = f"{requirement.name}=={lowest}" if which == "lowest" else line
    return list(found.values())


def main() -> None:
    """Make the environment where there is none, and run the tests in it."""
    if len(sys.argv) < 2 or sys.argv[1] not in ("lowest", "newest"):
        sys.exit(__doc__)
    which, tests = sys.argv[1], sys.argv[2:] or [*TESTS, "-n", "auto", "-m", "not slow"]
    folder = ROOT / ".cache" / f"versions-{which}"
    python = folder / "bin" / "python"
    if not (folder / ".done").exists():
        venv.create(folder, with_pip=True, clear=True)
        torch = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *torch], check=True)
        subprocess.run([*install, "--editable", f"{ROOT}[test]", *torch, *requirements(which)], check=True)
        (folder / ".done").touch()
    script = f"from importlib.metadata import version as v; print(*(f'{{p}} {{v(p)}}' for p in {HOSTS}), sep=', ')"
    subprocess.run([str(python), "-c", script], check=True)
    sys.exit(subprocess.run([str(python), "-m", "pytest", *tests], cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
