"""What every result holds: the machine it was measured on, and names instead of places."""

from __future__ import annotations

import contextlib
import json
import pathlib
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import jax

from easyspec_jax.bfloat16 import fast_products


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = pathlib.Path("/proc/cpuinfo")
    names = (
        [s for s in cpu.read_text().splitlines() if s.startswith("model name")]
        if cpu.exists()
        else []
    )
    on_cpu = jax.default_backend() == "cpu"  # matrices that are stored so
    bfloat16 = {"bfloat16": "kept" if fast_products() else "widened"} if on_cpu else {}
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": f"{len(names)} x {names[0].partition(': ')[2]}" if names else platform.processor(),
        **bfloat16,
        "python": platform.python_version(),
        **versions("jax", "transformers"),
    }


def commit() -> str | None:
    """Short hash of the code that runs, marked if files differ; None without git."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=pathlib.Path(__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip() or None


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of those packages that are there."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def without_places(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a command line fit to be published: of a path only its last part."""
    places = {"base", "draft", "middle", "head", "base_hf", "draft_hf", "prompts"}

    def fit(name, value):
        if name == "set" and value is not None:
            pairs = [option.partition("=") for option in value]
            return [f"{key}={pathlib.Path(path).name}" for key, _, path in pairs]
        return pathlib.Path(value).name if name in places and value is not None else value

    return {name: fit(name, value) for name, value in options.items() if name != "out"}


def append(path: pathlib.Path | None, record: dict[str, Any]) -> str:
    """The record as one line of JSON, which is now the last of the file, if there is one."""
    line = json.dumps(record)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(line + "\n")
    return line
