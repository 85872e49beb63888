"""What a newcomer waits for: seconds from a cold process to the first text; a conversion's memory.

    python experiments/cold_start.py --base CKPT --convert FOLDER --out FILE

`easyspec generate` starts with an empty cache folder, then twice more with what the first run
compiled; the clock runs from the start of the process to its first byte of text. The conversion's
peak is RssAnon of /proc, sampled every 2 ms (Linux only). The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from records import append, machine, without_places


def first_byte(base: str, cache: str) -> float:
    """Seconds until `easyspec generate` prints, with `cache` as its cache folder."""
    code = "import sys; from easyspec_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    options = ["generate", "--base", base, "--max-new-tokens", "8", "--no-stats"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options, "The capital of France is"],
        env=os.environ | {"XDG_CACHE_HOME": cache},
        stdout=subprocess.PIPE,
    )
    process.stdout.read(1)
    seconds = time.perf_counter() - start
    process.stdout.read()
    if process.wait():
        raise SystemExit(f"easyspec generate ended with status {process.returncode}")
    return round(seconds, 2)


def conversion(source: str, folder: str) -> dict[str, float]:
    """Seconds and peak anonymous memory of converting `source`."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "convert", "--quiet", source, folder + "/out"]
    )
    while process.poll() is None:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        peak = max(peak, int(found[1]) if found else 0)
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"the conversion ended with status {process.returncode}")
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 1), "peak_anonymous_mb": round(peak * 1024 / 1e6)}


def main() -> None:
    """Measure and append the record."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--base", required=True, help="converted checkpoint")
    p.add_argument("--convert", required=True, help="Hugging Face folder to convert")
    p.add_argument("--out", type=pathlib.Path, help="JSONL file to append the document to")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        seconds = [first_byte(args.base, temp) for _ in range(3)]
        converted = conversion(args.convert, temp)
    record = {
        "machine": machine(),
        **without_places({"base": args.base, "converted": args.convert}),
        "first_text_seconds": {"empty cache": seconds[0], "filled cache": seconds[1:]},
        "conversion": converted,
    }
    print(append(args.out, record))


if __name__ == "__main__":
    main()
