"""Print the arguments of `buildah bud` by which pip inside the build finds what pip finds here, one a line.

Index, folder of wheels and certificate come from `pip config list`, the environment before files; what lies on this
machine's disk is mounted read-only. Nothing is printed where pip has no settings.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

SETTINGS = ("index-url", "extra-index-url", "find-links", "cert")
CERTIFICATE = "/run/pip-certificate.crt"


def arguments(settings: str) -> list[str]:
    """From the lines of `pip config list` to --build-arg and --volume."""
    values: dict[str, str] = {}
    # `global.cert='...'`, `install.cert='...'`, `:env:.cert='...'`; what is printed later is not always what wins.
    lines = [line.partition("=") for line in settings.splitlines()]
    for place, _, value in sorted(lines, key=lambda line: line[0].startswith(":env:")):
        name = place.rpartition(".")[2]
        if name in SETTINGS and value:
            values[name] = " ".join(ast.literal_eval(value).split())
    found = []
    for name, value in values.items():
        if name == "cert":
            found += ["--volume", f"{value}:{CERTIFICATE}:ro"]
            value = CERTIFICATE
        else:
            for folder in folders(value):
                found += ["--volume", f"{folder}:{folder}:ro"]
        found += ["--build-arg", f"PIP_{name.upper().replace('-', '_')}={value}"]
    return found


def folders(value: str) -> list[str]:
    """Local folders among the words of a setting; of an index the folder above it, where its files lie."""
    found = []
    for word in value.split():
        if word.startswith("file://"):
            path = Path(word.removeprefix("file://"))
            found.append(str(path.parent if path.name == "simple" else path))
        elif word.startswith("/"):
            found.append(word)
    return [folder for folder in dict.fromkeys(found) if Path(folder).exists()]


if __name__ == "__main__":
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    for argument in arguments(done.stdout):
        print(argument)
