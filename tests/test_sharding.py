"""Meshes, layouts, memory budgets; and one checkpoint folder is one model on every mesh."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hf_models import load_all, random_tensors, tiny_config, write_hf_folder
from jax.sharding import PartitionSpec as P

import convert
import easyspec_jax as es
from easyspec_jax import checkpoint, memory
from easyspec_jax.layer_parallel import run_fuzzy
from easyspec_jax.sharding import LAYOUTS, LayoutRules, make_layout

slow = pytest.mark.slow
MESHES = [(1, 1), (1, 8), (8, 1), (4, 2), (2, 4)]
BOTH = ("layer", "tensor")
TOKENS = np.random.default_rng(2).integers(0, 60, (2, 5))


def heads(num_heads, num_kv_heads, family="llama", **overrides):
    """Two layers with heads of 4."""
    sizes = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    return tiny_config(family, num_hidden_layers=2, head_dim=4, **sizes, **overrides)


MODELS = {
    # nothing divides: not the heads, 61 tokens, or 50 mlp columns (by 2 only)
    "9/3": heads(9, 3, intermediate_size=50),
    # kv heads over "tensor", query heads over "layer", on 2 x 4 and 4 x 2
    "16/4 bias": heads(16, 4, "qwen2", vocab_size=64),
    "8/8 tied": heads(8, 8, "qwen3", vocab_size=64, tie_word_embeddings=True),
    "8/1 bias": heads(8, 1, "qwen2", vocab_size=62, intermediate_size=36),
}


def config_of(num_heads, num_kv_heads, **overrides):
    return es.config_from_hf(heads(num_heads, num_kv_heads, **overrides))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> checkpoint folder of one of MODELS."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for i, (name, config) in enumerate(MODELS.items()):
        source = write_hf_folder(root / f"hf{i}", config)
        made[name] = convert.convert(source, root / f"ckpt{i}", progress=False)
    return made


@pytest.fixture(scope="module")
def load(checkpoints):
    """name, mesh shape, group_size -> float64 model."""

    @functools.cache
    def get(name, shape, group_size=1):
        mesh = es.make_mesh(*shape)
        return es.load_model(checkpoints[name], mesh, dtype=jnp.float64, group_size=group_size)

    return get


def plain(name):
    config = es.config_from_hf(MODELS[name])
    return reference.run(config, reference.from_hf(config, random_tensors(MODELS[name])), TOKENS)


# --- meshes ---


def test_mesh_axes_default_to_all_devices_on_tensor():
    assert dict(es.make_mesh().shape) == {"layer": 1, "tensor": 8}
    assert dict(es.make_mesh(layer=4).shape) == {"layer": 4, "tensor": 2}
    assert dict(es.make_mesh(layer=3).shape) == {"layer": 3, "tensor": 2}


def test_mesh_takes_the_first_devices_row_by_row():
    assert es.make_mesh(2, 3).devices.tolist() == [jax.devices()[:3], jax.devices()[3:6]]


@pytest.mark.parametrize(
    "layer, tensor, sentence",
    [
        (0, None, "mesh axes must be at least 1, got layer=0, tensor=None"),
        (1, 0, "mesh axes must be at least 1, got layer=1, tensor=0"),
        (4, 3, "a mesh of layer=4 x tensor=3 needs 12 devices, but there are 8"),
        ("4", None, "mesh axis layer must be a whole number of devices, got '4'"),
        (1, 2.0, "mesh axis tensor must be a whole number of devices, got 2.0"),
        (9, None, "a mesh of layer=9 x tensor=1 needs 9 devices, but there are 8"),
    ],
)
def test_impossible_meshes_are_refused(layer, tensor, sentence):
    with pytest.raises(ValueError, match=sentence):
        es.make_mesh(layer, tensor)


# --- layouts ---

SPLITS = [
    # N, K, mesh, layer_parallel -> axes of the kv heads, of the query heads
    (9, 3, (4, 2), False, (), ()),
    (9, 3, (1, 3), False, ("tensor",), ()),
    (9, 3, (2, 3), False, ("tensor",), ()),
    (9, 3, (3, 2), False, ("layer",), ()),
    (28, 4, (1, 4), False, ("tensor",), ()),
    (28, 4, (2, 2), False, BOTH, ()),
    (28, 4, (4, 2), False, ("tensor",), ()),  # 2 kv heads are left, 7 query heads each: not by 4
    (28, 4, (2, 4), False, ("tensor",), ()),
    (14, 2, (1, 8), False, (), ()),
    (14, 2, (4, 2), False, ("tensor",), ()),
    (14, 2, (2, 4), False, ("layer",), ()),
    (14, 2, (2, 4), True, (), ()),
    (16, 4, (4, 2), False, ("tensor",), ("layer",)),
    (16, 4, (2, 4), False, ("tensor",), ("layer",)),
    (16, 4, (2, 4), True, ("tensor",), ()),
    (8, 8, (4, 2), False, BOTH, ()),
    (8, 8, (4, 2), True, ("tensor",), ()),
    (8, 8, (8, 1), False, ("layer",), ()),
    (8, 8, (8, 1), True, (), ()),
    (8, 1, (4, 2), False, (), BOTH),  # multi-query: the queries are split, the one kv head is not
    (8, 1, (1, 8), False, (), ("tensor",)),
    (8, 1, (4, 2), True, (), ("tensor",)),
    (4, 1, (4, 2), False, (), ("tensor",)),
    (4, 4, (1, 1), False, (), ()),
]


@pytest.mark.parametrize("num_heads, num_kv, shape, layer_parallel, kv, query", SPLITS, ids=str)
def test_heads_are_split_where_they_divide(num_heads, num_kv, shape, layer_parallel, kv, query):
    config, mesh = config_of(num_heads, num_kv), es.make_mesh(*shape)
    layout = make_layout(config, mesh, LAYOUTS["grouped" if layer_parallel else "tensor"])
    assert (layout.kv, layout.query) == (kv, query)
    assert layout.heads == kv + query
    assert layout.group == ("layer" if layer_parallel and shape[0] > 1 else None)
    assert layout.group_devices == (shape[0] if layer_parallel else 1)


@pytest.mark.parametrize(
    "size, shape, axes",
    [
        (64, (4, 2), BOTH),
        (52, (4, 2), ("tensor",)),
        (52, (2, 4), ("tensor",)),
        (51, (3, 2), ("layer",)),
        (61, (4, 2), ()),
        (64, (1, 8), ("tensor",)),
        (64, (8, 1), ("layer",)),
        (64, (1, 1), ()),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["tensor", "grouped"])
def test_mlp_and_vocabulary_go_over_all_devices_that_divide_them(size, shape, axes, name):
    config = config_of(8, 8, intermediate_size=size, vocab_size=size)
    layout = make_layout(config, es.make_mesh(*shape), LAYOUTS[name])
    assert layout.mlp == axes and layout.vocab == axes


def test_specs_name_the_axes_of_each_letter():
    layout = make_layout(
        config_of(16, 4, intermediate_size=64, vocab_size=61),
        es.make_mesh(4, 2),
        LayoutRules(),
    )
    assert layout.spec("DKGH") == P(None, "tensor", "layer")
    assert layout.spec("FD") == P(BOTH)
    assert layout.spec("VD") == P()
    draft = make_layout(config_of(16, 4), es.make_mesh(4, 2), LAYOUTS["grouped"])
    assert draft.spec("LKSH") == P("layer", "tensor")


@pytest.mark.parametrize(
    "rules, sentence",
    [
        ({"heads": ("rows",)}, "heads must be a tuple of the mesh axes .* got .'rows',"),
        ({"mlp": "tensor"}, "mlp must be a tuple of the mesh axes .* got 'tensor'"),
        ({"vocab": ("layer", "layer")}, "vocab must be a tuple of the mesh axes .* none twice"),
        ({"group": "rows"}, 'group must be "layer", "tensor" or None, got \'rows\''),
        ({"group": "layer"}, 'the axis "layer" carries the layers of a group: it cannot split'),
    ],
    ids=str,
)
def test_impossible_rules_are_refused(rules, sentence):
    with pytest.raises(ValueError, match=sentence):
        LayoutRules(**rules)


def test_arrays_are_read_in_as_many_parts_as_there_are_devices():
    layout = make_layout(config_of(8, 8), es.make_mesh(4, 2), LAYOUTS["grouped"])
    assert layout.finest("DKGH", (24, 8, 1, 4)).spec == P(None, ("tensor", "layer"), None, None)
    assert layout.finest("DKGH", (24, 2, 1, 4)).spec == P("layer", "tensor", None, None)
    assert layout.finest("DKH", (9, 4, 3)).spec == P(None, "tensor", None)
    assert layout.finest("D", (24,)).spec == P()  # too small to be worth it
    assert layout.finest("DF", (24, 64)).spec == P(None, BOTH)


def test_one_log_line_says_what_is_replicated(caplog):
    mesh = es.make_mesh(4, 2)
    with caplog.at_level(logging.INFO, logger="easyspec_jax"):
        config = config_of(8, 8, intermediate_size=64, vocab_size=64)
        make_layout(config, mesh, LayoutRules())
        assert not caplog.records
        config = config_of(9, 3, intermediate_size=50, vocab_size=61)
        make_layout(config, mesh, LayoutRules())
        make_layout(config, mesh, LAYOUTS["replicated"])  # as asked: nothing to say
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(
        "replicated, since the mesh {'layer': 4, 'tensor': 2} does not divide it: "
    )
    assert message.endswith(
        "heads over layer/tensor, mlp_dim over layer, vocab_size over layer/tensor"
    )


# --- one model on every mesh ---


# One device has one layout, and the first is replicated on all meshes of eight. Each of the others
# has a mesh that splits it as no other does; the slow tests have them all.
OFTEN = {("9/3", (1, 1)), ("9/3", (4, 2)), ("8/8 tied", (4, 2)), ("8/1 bias", (4, 2))}
OFTEN |= {("16/4 bias", (4, 2)), ("16/4 bias", (2, 4)), ("8/1 bias", (1, 8))}


@pytest.mark.parametrize(
    "name, shape",
    [
        pytest.param(*case, marks=[] if case in OFTEN else [slow])
        for case in itertools.product(MODELS, MESHES)
    ],
    ids=str,
)
def test_one_checkpoint_gives_the_same_logits_and_cache_on_every_mesh(name, shape, load):
    model = load(name, shape)
    got, cache = reference.run_library(model, TOKENS, reference.empty_cache(model, 2, 8))
    want = plain(name)
    np.testing.assert_allclose(got, want.logits, atol=1e-9)
    pairs = zip(want.keys, want.values, strict=True)
    for (k, v), pair in zip(reference.layer_kv(model, cache, 5), pairs, strict=True):
        np.testing.assert_allclose(k, pair[0], atol=1e-9)
        np.testing.assert_allclose(v, pair[1], atol=1e-9)


@pytest.mark.parametrize(
    "name, shape, groups, layout",
    [
        pytest.param("9/3", (4, 2), (2,), None, marks=slow),
        ("16/4 bias", (2, 4), 1, None),  # queries apart from keys and values
        ("8/8 tied", (4, 2), (2,), "grouped"),
        ("8/1 bias", (1, 1), (2,), None),
    ],
    ids=str,
)
def test_a_checkpoint_saved_from_any_mesh_loads_on_any_other(
    name, shape, groups, layout, checkpoints, tmp_path
):
    mesh = es.make_mesh(*shape)
    options = {"group_size": groups, "layout": layout, "dtype": jnp.float32}
    es.save_model(
        es.load_model(checkpoints[name], mesh, **options), tmp_path / "a", checkpoints[name]
    )
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    again, first = load_all(tmp_path / "a", 2), load_all(checkpoints[name], 2)
    metadata = [
        json.loads((f / "easyspec.json").read_text()) for f in (tmp_path / "a", checkpoints[name])
    ]
    assert again.keys() == first.keys() and metadata[0] == metadata[1]
    for key, array in again.items():
        np.testing.assert_array_equal(array, first[key])
    model = es.load_model(tmp_path / "a", es.make_mesh(2, 4), dtype=jnp.float64)
    got, _ = reference.run_library(model, TOKENS, reference.empty_cache(model, 2, 8))
    np.testing.assert_allclose(got, plain(name).logits, atol=1e-9)


def test_saving_refuses_what_would_be_lost_or_wrong(checkpoints, load, tmp_path):
    model = load("9/3", (1, 1))
    with pytest.raises(FileExistsError, match="exists; name a folder that does not"):
        es.save_model(model, tmp_path, checkpoints["9/3"])
    with pytest.raises(ValueError, match="is of another model: its configuration is not this"):
        es.save_model(model, tmp_path / "a", checkpoints["8/8 tied"])
    with pytest.raises(ValueError, match="has another tokenizer than this model"):
        es.save_model(model.replace(tokenizer="b"), tmp_path / "a", checkpoints["9/3"])
    assert not list(tmp_path.iterdir())


def test_random_weights_are_the_same_on_every_mesh_and_in_groups():
    config = es.config_from_hf(dict(MODELS["9/3"], num_hidden_layers=3))
    one = es.random_model(config, es.make_mesh(1, 1), seed=3)
    many = es.random_model(config, es.make_mesh(4, 2), seed=3, group_size=(3,))
    np.testing.assert_array_equal(one.params.lm_head, many.params.lm_head)
    (group,) = many.params.blocks
    for j, block in enumerate(one.params.blocks):
        (attention,), (mlp,) = block.attention, block.mlp
        grouped = jax.tree.map(lambda x, j=j: np.asarray(x)[j], group.attention[0])
        jax.tree.map(np.testing.assert_array_equal, grouped, jax.tree.map(np.asarray, attention))
        jax.tree.map(np.testing.assert_array_equal, group.mlp[j], mlp)
        assert np.asarray(attention.wo).std() > 0.05
    # the fourth device has no layer of its own: zeros
    assert not any(np.asarray(x)[3].any() for x in jax.tree.leaves(group.attention))
    other = es.random_model(config, es.make_mesh(1, 1), seed=4)
    assert np.abs(np.asarray(one.params.lm_head) - np.asarray(other.params.lm_head)).max() > 0.1


def test_a_model_is_float32_on_a_cpu_unless_asked_otherwise(checkpoints):
    mesh = es.make_mesh(1, 1)
    assert es.load_model(checkpoints["9/3"], mesh).dtype == jnp.float32
    assert es.load_model(checkpoints["9/3"], mesh, dtype="bfloat16").dtype == jnp.bfloat16


def test_without_a_mesh_all_devices_are_used(checkpoints):
    model = es.load_model(checkpoints["8/8 tied"])
    assert dict(model.layout.mesh.shape) == {"layer": 1, "tensor": 8}
    assert len(model.params.lm_head.sharding.device_set) == 8


# --- memory ---


@pytest.mark.parametrize("partition", [1, (2,)], ids=["alone", "grouped"])
@pytest.mark.parametrize(
    "name, shape",
    [case for case in itertools.product(["9/3", "8/1 bias"], MESHES) if case in OFTEN],
    ids=str,
)
def test_budgeted_bytes_are_the_bytes_of_the_arrays(name, shape, partition, load):
    model = load(name, shape, partition)
    config, mesh = model.config, model.layout.mesh
    options = {"group_size": model.partition, "dtype": jnp.float64}
    abstract = es.abstract_model(config, mesh, **options).params
    assert jax.tree.structure(abstract) == jax.tree.structure(model.params)
    for planned, real in zip(jax.tree.leaves(abstract), jax.tree.leaves(model.params), strict=True):
        assert (planned.shape, planned.dtype) == (real.shape, real.dtype)
        assert planned.sharding.is_equivalent_to(real.sharding, real.ndim)
    cache = model.abstract_cache(3, 16)
    made = reference.empty_cache(model, 3, 16)
    for tree, plan in ((model.params, abstract), (made, cache)):
        for device in mesh.devices.flat:
            shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
            held = sum(s.data.nbytes for s in shards if s.device == device)
            assert memory.device_bytes(plan) == memory.device_bytes(tree) == held


def test_a_budget_that_does_not_fit_is_refused_with_every_entry(monkeypatch):
    mesh = es.make_mesh(1, 1)
    budget = {"weights": 3 * 2**30, "base cache": 2**29}
    monkeypatch.setattr(memory, "device_memory", lambda mesh: 3 * 2**30)
    with pytest.raises(
        ValueError,
        match=r"needs 3\.50 GiB on each device \(weights 3\.00, base cache 0\.50\), "
        r"but a device has 3\.00 GiB free: use more",
    ):
        memory.check_memory(mesh, budget)
    memory.check_memory(mesh, {"weights": 3 * 2**30})
    monkeypatch.setattr(memory, "device_memory", lambda mesh: None)
    memory.check_memory(mesh, {"weights": 2**60})


def test_a_model_that_does_not_fit_is_refused_before_weights_are_read(
    checkpoints, tmp_path, monkeypatch
):
    folder = tmp_path / "headers only"
    folder.mkdir()
    for file in ("config.json", "easyspec.json"):
        shutil.copy(checkpoints["9/3"] / file, folder)
    for part in ("top", "layers/0000", "layers/0001"):
        (folder / part).mkdir(parents=True)
    mesh = es.make_mesh(1, 1)
    monkeypatch.setattr(memory, "device_memory", lambda mesh: 1000)
    with pytest.raises(ValueError, match=r"needs 0\.00 GiB on each device"):
        es.load_model(folder, mesh)


# --- refusals of load_model ---


def test_a_folder_that_is_no_checkpoint_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"not a converted checkpoint: .*easyspec convert"):
        checkpoint.read_metadata(tmp_path)
    with pytest.raises(ValueError, match=r"is no model: it has neither easyspec.json"):
        es.load_model(tmp_path)


def test_a_checkpoint_of_another_format_is_refused(checkpoints, tmp_path):
    shutil.copy(checkpoints["9/3"] / "config.json", tmp_path)
    (tmp_path / "easyspec.json").write_text('{"format": 0}')
    with pytest.raises(
        ValueError, match="has checkpoint format 0, but this version reads 2: convert"
    ):
        es.load_model(tmp_path)


def damaged(checkpoint, folder, config=None):
    """A copy of a checkpoint, with other entries in its config.json."""
    shutil.copytree(checkpoint, folder)
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(entries | (config or {})))
    return folder


def test_an_incomplete_checkpoint_is_refused(checkpoints, tmp_path):
    lacking = damaged(checkpoints["9/3"], tmp_path / "lacking")
    shutil.rmtree(lacking / "layers" / "0001")
    shorter = damaged(checkpoints["9/3"], tmp_path / "shorter", {"num_hidden_layers": 1})
    for folder, layers, stored in ((lacking, 2, 1), (shorter, 1, 2)):
        sentence = f"config.json has {layers} layers and {stored} are stored; convert"
        with pytest.raises(ValueError, match=sentence):
            es.load_model(folder, es.make_mesh(1, 1))


def test_a_checkpoint_of_other_shapes_is_refused(checkpoints, tmp_path):
    """In a process of its own: a reader that fails leaves unfinished coroutines behind."""
    folder = damaged(checkpoints["9/3"], tmp_path / "other", {"intermediate_size": 8})
    code = "import sys, easyspec_jax as es; es.load_model(sys.argv[1], es.make_mesh(1, 1))"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ValueError: {folder}/layers/0000 is damaged: remove {folder}, then" in done.stderr


@pytest.mark.parametrize(
    "error, seen",
    [
        (
            ValueError("requested shape (8,) is not compatible"),
            "is damaged: remove .*convert",
        ),
        (FileNotFoundError("no manifest"), "is damaged: remove .*convert"),
        (PermissionError("not yours"), "not yours"),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), "out of memory"),
    ],
    ids=repr,
)
def test_damage_is_told_from_the_machines_failures(checkpoints, monkeypatch, error, seen):
    """The reader's failures are stood in for, one of each kind."""
    from orbax.checkpoint import v1 as ocp

    def fail(path, abstract):
        raise error

    monkeypatch.setattr(ocp, "load", fail)
    kind = ValueError if "damaged" in seen else type(error)
    with pytest.raises(kind, match=seen):
        es.load_model(checkpoints["9/3"], es.make_mesh(1, 1))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, float64, got int8"),
        ({"dtype": "float63"}, "dtype must be one of .* got float63"),
        (
            {"layout": "both"},
            'layout must be one of "tensor", "grouped", "replicated", or LayoutRules, got \'both\'',
        ),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"group_size": (1, 5)}, "that sum to the 5 layers of the model"),
    ],
    ids=str,
)
def test_impossible_arrangements_are_refused(options, sentence):
    config = es.config_from_hf(dict(MODELS["9/3"], num_hidden_layers=5))
    with pytest.raises(ValueError, match=sentence):
        es.random_model(config, es.make_mesh(4, 2), **options)


def test_group_size_one_is_laid_out_as_asked(checkpoints, load):
    assert load("8/8 tied", (4, 2)).layout.kv == BOTH
    draft = es.load_model(
        checkpoints["8/8 tied"], es.make_mesh(4, 2), dtype=jnp.float64, layout="grouped"
    )
    assert draft.layout.kv == ("tensor",) and draft.layout.group == "layer"
    assert draft.partition == (1, 1)
    got, _ = reference.run_library(
        draft, TOKENS, reference.empty_cache(draft, 2, 8), run_block=run_fuzzy
    )
    np.testing.assert_allclose(got, plain("8/8 tied").logits, atol=1e-9)
