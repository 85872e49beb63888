"""What the pages say is so: examples run, commands parse, links and paths lead somewhere."""

import functools
import importlib.util
import pathlib
import re
import shlex
import sys

import pytest
from decoders import NEW, PROMPTS, autoregressive, joined, model

import easyspec_jax as es
from easyspec_jax.cli.main import make_parser

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("easyspec_jax", "convert", "experiments", ".github")
PAGES = [ROOT / "README.md", *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))]
PAGES = {str(page.relative_to(ROOT)): page for page in sorted(PAGES)}
CONTRIBUTING = ".github/CONTRIBUTING.md"
HISTORY = (".github/CHANGELOG.md", "experiments/README.md")  # name what was there once, too
COMMANDS = {"generate", "chat", "convert", "info", "plan", "program", "tune", "demo"}
COMMANDS |= {"train-head"}


@functools.cache
def read(page):
    return PAGES[page].read_text(encoding="utf-8")


def blocks(page):
    """The Python examples of a page."""
    return re.findall(r"^```python\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE)


def commands(page):
    """The arguments of every command of ours on a line of its own: (program, [argument, ..])."""
    shown = r"^    .*\.venv/bin/(easyspec|python -m convert) (.+)$"
    return [(m[1], shlex.split(m[2])) for m in re.finditer(shown, read(page), re.MULTILINE)]


def anchors(page):
    """What a link may name behind its #: headings as they are addressed."""
    headings = re.findall(r"^#+ (.*)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_first_page_is_one_page():
    text = read("README.md")
    assert text.count("\n") <= 150
    for command in ("-e . && .venv/bin/easyspec demo", "-e '.[test]' && .venv/bin/pytest"):
        line = f"\n    python3 -m venv .venv && .venv/bin/pip install {command}\n"
        assert text.count(line) == 1  # .ci/run takes them from here


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(str(found.relative_to(ROOT))), target
    if page in HISTORY:
        return
    for path in re.findall(r"(?<![\w/.])((?:tests|experiments)/[\w/.-]+\.\w+)", read(page)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_are_understood(page):
    for program, arguments in commands(page):
        arguments = arguments if program == "easyspec" else ["convert", *arguments]
        assert make_parser().parse_args(arguments).command == arguments[0]


def test_every_command_is_shown():
    assert {a[0] for page in PAGES for name, a in commands(page) if name == "easyspec"} == COMMANDS


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p) and p != CONTRIBUTING])
def test_examples_run(page, checkpoints, tmp_path, monkeypatch, capsys):
    """The blocks of a page one after another, as a reader would run them, on tiny checkpoints."""
    (tmp_path / "ckpt").symlink_to(checkpoints)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    assert capsys.readouterr().out.strip()
    assert isinstance(names["base"], es.Model)
    if "out" in names:
        assert names["out"].tokens[0] and names["out"].stats.tokens_per_step >= 1


def test_a_drafter_written_from_the_page_drafts_losslessly(tmp_path, monkeypatch):
    (code,) = blocks(CONTRIBUTING)
    (tmp_path / "repeat.py").write_text(code)
    spec = importlib.util.spec_from_file_location("repeat_drafter", tmp_path / "repeat.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "repeat_drafter", module)
    spec.loader.exec_module(module)
    decoder = es.Decoder(model((1, 1)), module.RepeatDrafter(), num_draft_tokens=4)
    prompts = [*PROMPTS, [5, 6, 7] * 4]
    out = decoder.generate(prompts, max_new_tokens=NEW)
    expected = autoregressive().generate(prompts, max_new_tokens=NEW).tokens
    assert out.tokens == expected
    assert out.stats.nodes_accepted > 0  # or nothing was tested
    assert joined(decoder.stream(prompts[0], max_new_tokens=NEW)) == expected[0]
    with pytest.raises(ValueError, match="tree_width must be 1"):
        es.Decoder(model((1, 1)), module.RepeatDrafter(), tree_width=2)


@pytest.mark.parametrize("room", ["easyspec_jax", "easyspec_jax/planner", "easyspec_jax/tuner"])
def test_a_room_lists_its_files(room):
    listed = re.findall(r"^    (\w+\.py|\w+/)  +\S", read(f"{room}/README.md"), re.MULTILINE)
    there = {p.name for p in (ROOT / room).glob("*.py")} - {"__init__.py"}
    there |= {f"{p.parent.name}/" for p in (ROOT / room).glob("*/__init__.py")}
    assert sorted(listed) == sorted(there)


def test_tools_are_pinned_alike():
    pins = [
        sorted(set(re.findall(r'"((?:ruff|pyright)==[\d.]+)"', (ROOT / name).read_text())))
        for name in ("pyproject.toml", ".pre-commit-config.yaml")
    ]
    assert pins[0] == pins[1] and len(pins[0]) == 2
