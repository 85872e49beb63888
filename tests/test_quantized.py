"""Matrices of codes: rounded as a plain reference rounds them, multiplied as if they were floats,
on any mesh and in either order, and the same from disk.
"""

from __future__ import annotations

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from decoders import CONFIG, GROUPS, PROMPTS, model, started
from hf_models import run, tiny_config, write_hf_folder
from test_decode import SHORT, cache_errors
from test_gguf import write_gguf

import easyspec_jax as es
from easyspec_jax import checkpoint, quantized, sharding, sources, weights
from easyspec_jax.cache import LayerKV
from easyspec_jax.cli import drafting
from easyspec_jax.memory import device_bytes
from easyspec_jax.quantized import Form, Quantized, dequantise, product, quantise

LARGEST = {"int8": 127, "int4": 7, "fp8": 448}


def kept(kind, group_size=None):
    return es.Quantization(kind, group_size, keep_codes=True)


def reference(w, kind, group):
    """Codes and scales of a matrix [in, out], one group of one output after another."""
    codes, scales = np.empty(w.shape), np.empty((len(w) // group, w.shape[1]))
    for g in range(len(scales)):
        for o in range(w.shape[1]):
            part = w[g * group : (g + 1) * group, o]
            scale = np.abs(part).max() / LARGEST[kind]
            if group < len(w):
                scale = np.float64(ml_dtypes.bfloat16(scale))
            found = part / (scale or 1)
            if kind == "fp8":
                found = found.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
            codes[g * group : (g + 1) * group, o] = found if kind == "fp8" else np.rint(found)
            scales[g, o] = scale
    return codes.clip(-LARGEST[kind], LARGEST[kind]), scales


def test_minima_reach_from_the_least_weight_to_the_largest():
    """Against a reference that takes one group of one output after another; and where all weights
    of a group are the same.
    """
    w = np.random.default_rng(0).standard_normal((24, 5)) + 0.3
    w[8:16, 3] = 0.25
    for kind, group in (("int4", 8), ("int8", None)):
        form = Form(kind, group, "float32", "float16")
        found = quantise(jnp.asarray(w), (0,), form)
        steps = 2 * LARGEST[kind] + 1
        for start in range(0, 24, group or 24):
            own = slice(start, start + (group or 24))
            least = w[own].min(0).astype(np.float16)
            scale = ((w[own].max(0) - w[own].min(0)) / steps).astype(np.float32)
            at = start // (group or 24)
            np.testing.assert_array_equal(found.minima[at], least)
            np.testing.assert_allclose(found.scales[at], scale, rtol=1e-7)
            counted = np.rint((w[own] - least) / np.where(scale > 0, scale, 1)).clip(0, steps)
            np.testing.assert_array_equal(found.codes[own].astype(int), counted - LARGEST[kind] - 1)
            want = np.float32(counted * scale) + least.astype(np.float32)
            np.testing.assert_allclose(dequantise(found)[own], want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "kind, group", [("int8", None), ("int8", 4), ("int4", 8), ("int4", 24), ("fp8", None)]
)
def test_codes_and_scales_are_those_of_the_reference(kind, group):
    w = np.random.default_rng(0).standard_normal((24, 5))
    w[:, 3] = 0
    found = quantise(jnp.asarray(w), (0,), Form(kind, group))
    codes, scales = reference(w, kind, group or 24)
    if group == 24:
        scales = scales.astype(ml_dtypes.bfloat16)  # a group is one, however large
        codes = np.rint(w / np.where(scales > 0, scales, 1).astype(np.float64)).clip(-7, 7)
    np.testing.assert_array_equal(found.codes.astype(np.float64), codes)
    # compilers multiply by an inverse
    np.testing.assert_allclose(found.scales.astype(np.float64), scales.astype(float), rtol=1e-15)
    np.testing.assert_array_equal(dequantise(found)[:, 3], 0)
    spread = np.repeat(scales.astype(np.float64), 24 // len(scales), axis=0)
    half = 0.5 if kind != "fp8" else np.maximum(np.abs(codes) / 16, 2.0**-10)
    clipped = LARGEST[kind] * 2.0**-8 if group else 0  # by a scale that was rounded down
    assert (abs(np.asarray(dequantise(found)) - w) <= spread * (half + clipped) * 1.0001).all()


@pytest.mark.parametrize("outputs_first", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        Form("int8", None),
        Form("int4", 8),
        Form("fp8", None),
        Form("int4", 8, "float16", "float32"),
        Form("int8", None, "float16", "float32"),
    ],
    ids=str,
)
def test_a_product_is_that_with_the_floats(outputs_first, form):
    """Of one row, of few, of two texts, and of so many that the matrix is dequantised first."""
    draw = np.random.default_rng(1).standard_normal
    w = quantise(jnp.asarray(draw((24, 2, 5))), (0,), form)
    floats = np.asarray(dequantise(w), np.float64).reshape(24, 10)
    if outputs_first:
        turned = jax.tree.map(lambda a: a.transpose(1, 2, 0), w)
    for rows in ((1, 1), (1, 6), (2, 3), (1, quantized.FEW_ROWS + 1)):
        x = jnp.asarray(draw((*rows, 24)))
        found = product(
            x, turned if outputs_first else w, outputs_first=outputs_first, explicit_gemv=True
        )
        np.testing.assert_allclose(found, x @ floats, rtol=0, atol=1e-12)


@pytest.fixture
def pretend(monkeypatch):
    """Whether the devices of meshes pass for GPUs, where outputs come first."""
    return lambda gpus: monkeypatch.setattr(sharding, "has_gpus", lambda mesh: gpus)


WIDE = es.ModelConfig(**{**vars(CONFIG), "qkv_bias": True, "qk_norm": True, "num_layers": 2})
TIED = es.ModelConfig(**{**vars(WIDE), "tie_embeddings": True, "vocab_size": 64})


# 32 columns of an MLP on 8 devices: groups of 8 lie on two, on GPUs behind padding. On 2 x 4
# devices share a kv head.
@pytest.mark.parametrize(
    "gpus, shape, config, kind, group, top",
    [
        (True, (1, 1), TIED, "int4", None, "layers"),
        (True, (1, 8), WIDE, "int4", 8, "layers"),
        (True, (2, 4), TIED, "int8", None, "minima"),
        pytest.param(False, (8, 1), TIED, "int4", 4, "minima", marks=pytest.mark.slow),
        pytest.param(True, (2, 4), WIDE, "int8", 4, "layers", marks=pytest.mark.slow),
        pytest.param(True, (8, 1), TIED, "fp8", 8, "float", marks=pytest.mark.slow),
    ],
)
def test_a_model_of_codes_says_what_its_rounded_floats_say(
    pretend, gpus, shape, config, kind, group, top
):
    pretend(gpus)
    mesh, minima = es.make_mesh(*shape), "float32" if top == "minima" else None
    top = "layers" if minima else top
    codes, floats = (
        es.random_model(
            config,
            mesh,
            dtype="float64",
            quantization=es.Quantization(kind, group, keep, top, top, None, minima),
        )
        for keep in (True, False)
    )
    assert codes.quantization is not None and floats.quantization is None
    assert codes.dtype == floats.dtype == jnp.float64
    for text in ([[5, 3, 8, 1, 9]], [[7]]):
        np.testing.assert_allclose(es.logits(codes, text), es.logits(floats, text), atol=1e-12)
    assert 2.5 * device_bytes(codes.params.blocks) < device_bytes(floats.params.blocks)


def decoder_of(mesh_shape, kind, group, *, draft_only=False, minima=None, **options):
    how = dataclasses.replace(kept(kind, group), minimum_dtype=minima)
    codes = {"quantization": how}
    base = model(mesh_shape, **{} if draft_only else codes)
    draft = model(mesh_shape, group_size=GROUPS, layout="grouped", seed=3, **codes)
    return es.Decoder(base, es.LayerParallelDrafter(draft), **options)


@pytest.mark.slow  # below over caches of codes as well
@pytest.mark.parametrize(
    "gpus, shape, kind, group, options",
    [
        (True, (1, 1), "int4", 8, {"num_draft_tokens": 3}),
        # minima in either order are above, bases of codes on a mesh below
        (True, (4, 2), "int8", 8, {"draft_only": True, "minima": "float16", "tree_width": 2}),
    ],
)
def test_speculation_says_what_the_same_base_says_alone(pretend, gpus, shape, kind, group, options):
    pretend(gpus)
    model.cache_clear()  # models of the other order
    decoder = decoder_of(shape, kind, group, **options)
    found = decoder.generate(PROMPTS, max_new_tokens=16)
    assert found.tokens == es.Decoder(decoder.base).generate(PROMPTS, max_new_tokens=16).tokens
    model.cache_clear()


def layers(m):
    return [x for block in m.params.blocks for x in weights.separate_block(block, m.layout)]


@pytest.mark.parametrize("kind, group", [("int8", None), ("int4", 8)])
def test_a_loaded_model_is_rounded_to_the_same_codes(kind, group):
    want = model((1, 1), quantization=kept(kind, group))
    found = es.quantize_model(model((1, 1)), kept(kind, group))
    jax.tree.map(np.testing.assert_array_equal, found, want)
    on_a_mesh = model((4, 2), group_size=GROUPS, layout="grouped", quantization=kept(kind, group))
    jax.tree.map(np.testing.assert_array_equal, layers(on_a_mesh), layers(want))
    with pytest.raises(ValueError, match="matrices are codes already"):
        es.quantize_model(found, "int8")
    halves = 2 if kind == "int4" else 1
    codes = want.params.blocks[0].mlp[0].w_down.codes
    assert device_bytes(codes) * halves == codes.size


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("hf"), tiny_config("llama"))


STORED = [("int4", 8), pytest.param(("fp8", None), marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=STORED, ids=str)
def stored(request, source, tmp_path_factory):
    """How a checkpoint stores its matrices, and where it lies."""
    kind, group = request.param
    folder = tmp_path_factory.mktemp(kind) / "out"
    return kept(kind, group), run(source, folder, quantization=es.Quantization(kind, group))


def test_a_checkpoint_of_codes_comes_back_from_any_mesh(stored, tmp_path, monkeypatch):
    how, folder = stored
    model = es.load_model(folder, es.make_mesh(4, 2), group_size=(1, 2), quantization=how)
    digests = checkpoint.read_metadata(folder)[1]
    es.save_model(model, tmp_path / "again", like=folder)
    assert checkpoint.read_metadata(tmp_path / "again")[1] == digests  # of every part's bytes
    monkeypatch.setattr(sharding, "has_gpus", lambda mesh: True)
    other = es.load_model(folder, es.make_mesh(1, 8), dtype="float32")
    assert other.quantization.kind == how.kind
    es.save_model(other, tmp_path / "third", like=folder)
    assert checkpoint.read_metadata(tmp_path / "third")[1] == digests


def test_floats_that_are_rounded_at_load_are_the_same_codes(stored, source, tmp_path):
    how, folder = stored
    floats = run(source, tmp_path / "floats", dtype="float32")
    at_load = es.load_model(floats, es.make_mesh(1, 1), quantization=how)
    from_disk = es.load_model(folder, es.make_mesh(1, 1), quantization=how)
    jax.tree.map(np.testing.assert_array_equal, at_load.params, from_disk.params)


def test_cpus_keep_floats_and_one_line_says_so(stored, caplog):
    how, folder = stored
    with caplog.at_level(logging.WARNING, "easyspec_jax"):
        floats = es.load_model(folder, es.make_mesh(1, 1))
    assert [r.getMessage() for r in caplog.records] == [
        f"{how.kind} weights are rounded and kept as floats: CPUs multiply those"
    ]
    assert floats.quantization is None
    codes = es.load_model(folder, es.make_mesh(1, 1), quantization=how)
    assert isinstance(codes.params.lm_head, Quantized)
    text = [[5, 3, 8, 1, 9]]
    np.testing.assert_allclose(es.logits(floats, text), es.logits(codes, text), atol=1e-5)


def test_other_codes_than_those_stored_are_refused(stored):
    how, folder = stored
    other = "int4" if how.kind != "int4" else "int8"
    with pytest.raises(ValueError, match="convert the source again"):
        es.load_model(folder, quantization=other)
    with pytest.raises(ValueError, match="convert the source again"):
        es.load_model(folder, quantization=es.Quantization(how.kind, 16))


def test_damage_is_found(stored, tmp_path):
    _, folder = stored
    file = folder / checkpoint.METADATA_FILE
    text = file.read_text()
    try:
        kept_on = {"kind": "int8", "keep_codes": True}
        wrongs = ({"kind": "int5"}, {"kind": "int8", "more": 1}, "int8", 8, kept_on)
        for wrong in (*wrongs, {"kind": "int8", "group_size": 3}):
            file.write_text(json.dumps(json.loads(text) | {"quantization": wrong}))
            with pytest.raises(ValueError, match=r"easyspec.json is damaged"):
                es.load_model(folder)
        metadata = json.loads(text)
        del metadata["quantization"]
        for number in (checkpoint.FORMAT, checkpoint.WITH_CODES):
            file.write_text(json.dumps(metadata | {"format": number}))
            with pytest.raises(ValueError, match="is damaged: remove"):
                es.load_model(folder)
    finally:
        file.write_text(text)


def test_metadata_without_the_later_fields_is_read():
    for text in ({"kind": "int8", "group_size": None}, {"kind": "int4", "group_size": 8}):
        found = checkpoint.stored_quantization({"quantization": text})
        assert found == es.Quantization(**text)
        assert es.Quantization(**found.stored) == found


def test_refusals(source, tmp_path):
    with pytest.raises(ValueError, match='lm_head must be "layers" or "float", got \'int4\''):
        es.Quantization("int4", lm_head="int4")
    with pytest.raises(ValueError, match=r"minimum_dtype must be .*, got 'int8'"):
        es.Quantization("int4", minimum_dtype="int8")
    with pytest.raises(ValueError, match="fp8 has no minimum_dtype"):
        es.Quantization("fp8", minimum_dtype="float32")
    with pytest.raises(ValueError, match="got 'float64'"):
        es.Quantization("int4", scale_dtype="float64")
    with pytest.raises(ValueError, match='must be "int8" or "int4" or "fp8", got \'int3\''):
        es.load_model(source, quantization="int3")
    for size in (0, 1.5, True):
        with pytest.raises(ValueError, match="group_size must be a whole number of inputs above 0"):
            es.Quantization("int4", size)
    with pytest.raises(ValueError, match="group_size 12 does not divide the 32 inputs"):
        run(source, tmp_path / "out", quantization=es.Quantization("int4", 12))
    with pytest.raises(ValueError, match="group_size 12 does not divide the 32 inputs"):
        es.load_model(source, quantization=es.Quantization("int4", 12))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("in_one", [True, False])
def test_a_cache_of_codes_is_written_and_kept_like_any_other(in_one):
    """Against plain arrays that are rounded entry by entry."""
    letters = ("EKSH", "KS1", "KS1") if in_one else ("KHS", "KSH", "KS1", "KS1")
    heads, rows, entries, width = 2, 3, 12, 4
    sizes = {"E": 2, "K": heads * rows, "S": entries, "H": width, "1": 1}
    kinds = [jnp.float64 if one.endswith("1") else jnp.int8 for one in letters]
    shapes = [tuple(sizes[letter] for letter in one) for one in letters]
    arrays = tuple(jnp.zeros(s, k) for s, k in zip(shapes, kinds, strict=True))
    kv = LayerKV(arrays, letters=letters)
    draw = np.random.default_rng(3).standard_normal
    k, v = (jnp.asarray(draw((heads * rows, 5, width))) for _ in range(2))
    start = jnp.asarray([0, 3, 7], jnp.int32)
    kv = kv.write(k, v, start).keep(start, jnp.asarray([[2, 4], [0, 3], [1, 1]], jnp.int32))
    for found, x in ((kv.k, k), (kv.v, v)):
        scale = np.abs(np.asarray(x)).max(-1, keepdims=True) / 127
        want = np.zeros((heads * rows, entries, width))
        for at in range(heads * rows):
            b = at % rows
            own = (np.rint(x / scale) * scale)[at]
            want[at, start[b] : start[b] + 5] = own
            want[at, start[b] : start[b] + 2] = own[np.asarray([[2, 4], [0, 3], [1, 1]])[b]]
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "gpus, shape, kind, options",
    [
        (True, (1, 1), "int8", {"num_draft_tokens": 3}),
        pytest.param(False, (2, 4), "fp8", {"tree_width": 2}, marks=pytest.mark.slow),
    ],
)
def test_speculation_over_caches_of_codes_is_lossless(pretend, gpus, shape, kind, options):
    pretend(gpus)
    model.cache_clear()
    base = model(shape, kv_dtype=kind)
    draft = model(shape, group_size=GROUPS, layout="grouped", kv_dtype=kind)
    decoder = es.Decoder(base, es.LayerParallelDrafter(draft), **options)
    found = decoder.generate(PROMPTS, max_new_tokens=16)
    assert found.tokens == es.Decoder(base).generate(PROMPTS, max_new_tokens=16).tokens
    assert found.stats.tokens_per_step > 1.5  # a copy of the base, in groups
    caches = decoder.base.abstract_cache(1, 64)
    assert {x.dtype for x in jax.tree.leaves(caches.blocks)} == {
        jnp.dtype(quantized.KINDS[kind][0]), jnp.dtype("float64")
    }  # fmt: skip
    assert 2 * device_bytes(caches) < device_bytes(model(shape).abstract_cache(1, 64))
    model.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("gpus, shape, width", [(False, (4, 2), 4), (True, (1, 1), 1)])
def test_caches_of_codes_are_those_of_a_fresh_prefill(pretend, gpus, shape, width):
    """As test_decode.py has it of floats: rolled back, kept and calibrated; and donated."""
    pretend(gpus)
    model.cache_clear()
    codes = {"kv_dtype": "int8", "quantization": kept("int8")}
    draft = model(shape, group_size=GROUPS, layout="grouped", **codes)
    decoder = es.Decoder(
        model(shape, **codes), es.LayerParallelDrafter(draft), num_draft_tokens=3, tree_width=width
    )
    run = started(decoder, SHORT)
    for _ in range(3):
        before = jax.tree.leaves((run.state.cache.blocks, run.state.draft.blocks))
        run.step()
        assert all(x.is_deleted() for x in before)
    assert np.asarray(run.state.counters.accepted)[:, 1:].any()
    assert max(cache_errors(run)) < 1e-9
    model.cache_clear()


@pytest.mark.parametrize("gpus", [pytest.param(False, marks=pytest.mark.slow), True])
def test_attention_over_codes_finds_much_the_same(pretend, gpus):
    pretend(gpus)
    mesh = es.make_mesh(1, 1)
    text = [[5, 3, 8, 1, 9, 33, 2], [7, 7, 2, 4, 6, 1, 0]]
    exact, fine, coarse = (
        es.logits(es.random_model(WIDE, mesh, dtype="float64", kv_dtype=kind), text)
        for kind in (None, "int8", "fp8")
    )
    size = np.abs(exact).max()
    assert 0 < np.abs(fine - exact).max() < 0.02 * size < 20 * np.abs(coarse - exact).max()
    assert np.abs(coarse - exact).max() < 0.2 * size
    with pytest.raises(ValueError, match='kv_dtype must be "int8" or "fp8", got \'int4\''):
        es.random_model(WIDE, mesh, kv_dtype="int4")


def test_scales_are_of_the_models_own_type(stored, tmp_path):
    """A model in another type than its checkpoint is saved as what is read again."""
    how, folder = stored
    model = es.load_model(folder, es.make_mesh(1, 1), dtype="float64", quantization=how)
    es.save_model(model, tmp_path / "wide", like=folder)
    again = es.load_model(tmp_path / "wide", es.make_mesh(1, 1), dtype="float64", quantization=how)
    jax.tree.map(np.testing.assert_array_equal, again, model)


def test_commands_refuse_other_codes_before_anything_is_loaded(stored, source, easyspec):
    how, folder = stored
    other = "int4" if how.kind != "int4" else "int8"
    pair = ("--base", source, "--draft", folder, "--draft-quantization", other)
    for command in (("info", folder, "--quantization", other), ("plan", *pair, "--device", "h200")):
        status, _, error = easyspec(*command)
        assert status == 1 and error.count("\n") == 1
        assert f"{folder} holds codes, {how.kind}" in error and "convert the source" in error
    about, mesh = checkpoint.read_metadata(folder), es.make_mesh(1, 1)
    with pytest.raises(ValueError, match="convert the source again"):  # of generate and program
        drafting.planned_model(str(folder), *about, mesh, quantization=other)
    status, _, error = easyspec("info", source, "--draft-quantization", "int8")
    assert status == 1 and "--draft-quantization needs --draft" in error
    with pytest.raises(ValueError, match="choose one of the two"):
        run(source, folder.parent / "none", quantization="int8", dequantize=True)


def test_what_a_conversion_would_keep_is_known_before_it(tmp_path, monkeypatch):
    """A source of codes is planned as such, and refused as others, without being converted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "m.gguf", tiny_config("llama", intermediate_size=64), kind="Q8_0")
    _, about = sources.read_config(file)
    assert checkpoint.stored_quantization(about).kind == "int8"
    with pytest.raises(ValueError, match="holds codes, int8 in groups of 32 inputs"):
        es.load_model(file, quantization="int4")
    assert not (tmp_path / "cache").exists()
