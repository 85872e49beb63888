"""Notebooks: what they may hold, and that each runs anywhere."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import pathlib
import re
import sys

import nbformat
import pytest

import convert
import easyspec_jax as es

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
NOTEBOOKS = sorted((EXPERIMENTS / "notebooks").glob("*.ipynb"))
FIGURES = {
    "01_acceptance": {"acceptance_self.png", "acceptance_pair.png"},
    "02_why_grouping_works": {"layers_random.png", "layers.jsonl"},
    "03_where_time_goes": {"phases.png", "collectives.png"},
    "04_losslessness": {"losslessness.png", "near_ties.png"},
    "05_your_own_pair": {"your_own_pair.png"},
    "06_plan_and_tune": {"predicted_and_measured.png"},
    "07_gpu_programs": {"gpu_bytes.png", "gpu_launches.png", "gpu_collectives.png"},
}
# In place of a notebook's own parameters: what is too much for programs that are not optimised.
SHALLOW = "\nPROMPTS = PROMPTS[:1]\nimport tiny_pair\ntiny_pair.CONFIG['num_hidden_layers'] = 2"
LESS = {
    "02_why_grouping_works": "GROUP_SIZES, MAX_NEW_TOKENS, NUM_LAYERS = [2], 4, 4",
    # a size is counted unless it is the first: the second of one size compiles no step
    "03_where_time_goes": "GROUP_SIZES, TREE_WIDTHS, NUM_LAYERS = [2, 2], [1], (1, 4)\n"
    "NUM_DRAFT_TOKENS, REPEATS = 2, 1",
    "04_losslessness": "SAMPLES, MAX_NEW_TOKENS, NUM_LAYERS = [16, 64], 4, 1",
    "05_your_own_pair": "GROUP_SIZES, NUM_DRAFT_TOKENS, MAX_NEW_TOKENS = [(2,)], 2, 8" + SHALLOW,
    # test_plan.py measures a device
    "06_plan_and_tune": "SETTINGS, ATTENTION_STEPS, MAX_NEW_TOKENS = [(2, 2)], 1, 8\n"
    "from easyspec_jax.planner import device, measure\n"
    "measure.measure_device = lambda dtype: device.PRESETS['h100']" + SHALLOW,
}
sys.path.insert(0, str(EXPERIMENTS))  # scripts, no package
tiny_pair = importlib.import_module("tiny_pair")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_output_no_library_and_one_cell_of_parameters(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    names = [cell.id for cell in notebook.cells]
    assert names[0] == "question" and notebook.cells[0].cell_type == "markdown"
    assert all(re.fullmatch("[a-z-]+", name) for name in names)
    assert "EASYSPEC_FIGURES" in notebook.cells[0].source
    first, *others = code_cells(notebook)
    assert first.id == "parameters" and not any("environ" in cell.source for cell in others)
    for cell in (first, *others):
        assert cell.outputs == [] and cell.execution_count is None
        tree = ast.walk(ast.parse(cell.source))
        found = [n for n in tree if isinstance(n, ast.ClassDef | ast.FunctionDef)]
        assert all(isinstance(node, ast.FunctionDef) for node in found)
        assert all(node.end_lineno - node.lineno < 12 for node in found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_imports_is_there(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names)
            elif isinstance(node, ast.Import):
                assert all(importlib.util.find_spec(name.name) for name in node.names)


def test_every_notebook_is_known():
    assert [path.stem for path in NOTEBOOKS] == list(FIGURES)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_anywhere(path, tmp_path, monkeypatch):
    """In a folder of its own, without checkpoints, and writes only where it is told to."""
    from nbclient import NotebookClient

    for name in [name for name in os.environ if name.startswith("EASYSPEC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EASYSPEC_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("PYTHONPATH", str(EXPERIMENTS.parent))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    before = {file: file.stat().st_mtime_ns for file in EXPERIMENTS.rglob("*.*")}
    work = tmp_path / "work"
    work.mkdir()
    notebook = nbformat.read(path, as_version=4)
    code_cells(notebook)[0].source += "\n" + LESS.get(path.stem, "")
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(work)}})
    client.execute()
    shown = [out for cell in code_cells(notebook) for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in shown) >= 1
    assert {file.name for file in (tmp_path / "figures").iterdir()} == FIGURES[path.stem]
    assert list(work.iterdir()) == []
    after = {file: file.stat().st_mtime_ns for file in EXPERIMENTS.rglob("*.*")}
    assert {f: t for f, t in after.items() if f.suffix != ".pyc"}.items() <= before.items()


@pytest.mark.slow
def test_the_tiny_pair_converts_and_its_draft_is_right_now_and_then(tmp_path):
    folders = tiny_pair.write_pair(tmp_path)
    paths = [convert.convert(f, tmp_path / f"{f.name}.ckpt", progress=False) for f in folders]
    mesh = es.make_mesh(1, 1)
    base, draft = (es.load_model(path, mesh) for path in paths)
    ids = es.text.Tokenizer(paths[0]).encode("Hello you")
    decoder = es.Decoder(base, es.LayerParallelDrafter(draft), num_draft_tokens=3)
    out = decoder.generate([ids], max_new_tokens=32)
    assert out.tokens == es.Decoder(base).generate([ids], max_new_tokens=32).tokens
    assert 1.2 < out.stats.tokens_per_step < 3.8
