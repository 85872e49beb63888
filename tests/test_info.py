"""`easyspec info`: what a checkpoint is, what a pair takes, what devices exchange."""

from __future__ import annotations

import pathlib
import re

import pytest

CONFIGS = pathlib.Path(__file__).parents[1] / "experiments" / "configs"


def test_info_says_what_a_checkpoint_is(easyspec):
    status, out, _ = easyspec("info", "draft", "--group-size", 2, "--layer", 2, "--tensor", 2)
    rows = dict(line.split("  ", 1) for line in out.splitlines() if line[0] != " ")
    rows = {name: value.strip() for name, value in rows.items()}
    count = 90 * 32 * 2 + 32 + 5 * (2 * 32 + 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48)
    assert status == 0
    assert rows["family"] == "llama"
    assert rows["dimensions"] == "L 5, D 32, F 48, N 4, K 2, H 8, V 90, context 256"
    assert rows["parameters"] == f"{count:,}, stored as float32"
    assert "KV cache 640 bytes per token" in rows["float32"]
    status, out, _ = easyspec("info", "draft", "--kv-dtype", "int8")
    assert status == 0 and out.count(f"KV cache of int8 {2 * 5 * 2 * (8 + 4)} bytes per token") == 2
    assert rows["groups"] == "1,2,1,1: 4 attention steps instead of 5"
    assert rows["chat template"] == "yes"
    assert rows["stop ids"] == "0"
    assert rows["mesh"] == "layer 2 x tensor 2"
    assert rows["as base"].startswith("kv heads over tensor, query heads of each over layer, MLP")
    assert rows["as draft"].startswith("layers of a group over layer, kv heads over tensor, MLP")


LLAMA3 = (str(CONFIGS / "llama3-70b.json"), "--draft", str(CONFIGS / "llama3-8b.json"))
QWEN2 = (str(CONFIGS / "qwen2-72b.json"), "--draft", str(CONFIGS / "qwen2-7b.json"))


@pytest.mark.parametrize(
    ("pair", "memory", "base", "draft"),
    [
        # weights in GiB: a device's eighth of the base; the draft's first and last layer are whole
        # over "layer", their attention halved
        (LLAMA3, 80, 141.11e9 / 8 / 2**30, (16.06e9 / 8 + 2 * 83.9e6 * (1 / 2 - 1 / 8)) / 2**30),
        (QWEN2, 141, 145.41e9 / 8 / 2**30, (15.23e9 / 8 + 2 * 58.7e6 * (1 / 2 - 1 / 8)) / 2**30),
    ],
    ids=["70B + 8B on 8 x 80 GiB", "72B + 7B on 8 x 141 GiB"],
)
def test_info_tells_what_a_pair_takes_from_configurations_alone(
    easyspec, pair, memory, base, draft
):
    mesh = ("--layer", 4, "--tensor", 2, "--max-len", 4096)
    status, out, err = easyspec("info", *pair, *mesh, "--device-memory", memory)
    assert (status, err) == (0, "")
    (line,) = (x for x in out.splitlines() if x.startswith("  bfloat16"))
    numbers = dict(re.findall(r"(\w+ \w+|scratch) ([\d.]+)", line.partition(": ")[2]))
    assert float(numbers["base weights"]) == pytest.approx(base, abs=0.03)
    assert float(numbers["draft weights"]) == pytest.approx(draft, abs=0.03)
    assert float(numbers["base cache"]) == pytest.approx(327680 * 4103 / 8 / 2**30, abs=0.03)
    status, out, err = easyspec("info", *pair, *mesh, "--device-memory", 18)
    assert status == 1
    assert re.search(r"needs 2?1?\d\.\d\d GiB on each device \(base weights 1[67]\.", err)
    assert "but a device has 18.00 GiB free" in err


def test_info_lists_what_devices_exchange(easyspec):
    status, out, _ = easyspec(
        *("info", "base", "--draft", "draft", "--group-size", 2, "--layer", 2, "--tensor", 2),
        *("--num-draft-tokens", 3, "--collectives"),
    )
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    # phase, runs, part, parts, number and kind each, bytes
    assert ["draft", "2", "group", "of", "2", "1", "2", "all-reduce", "128"] in rows
    assert ["draft", "2", "group", "of", "2", "1", "1", "all-reduce", "256"] in rows
    assert ["calibrate", "1", "group", "of", "2", "1", "4", "all-reduce", "512"] in rows
    assert ["verify", "1", "layer", "3", "2", "all-reduce", "512"] in rows


def test_info_refuses_what_is_no_configuration(easyspec, tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    for path, sentence in (
        (tmp_path, "config.json cannot be read"),
        (tmp_path / "list.json", "list.json is not a JSON object"),
        ("nowhere", "nowhere is no model"),
    ):
        status, _, err = easyspec("info", path)
        assert status == 1 and sentence in err
