"""Matrices of bfloat16 under activations of float32: the products, where they are chosen, and that
everything built on them stays what it is.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import CONFIG, NEW, PROMPTS, all_logits
from eagle_heads import layer_config, random_tensors, write_head
from hf_models import tiny_config, write_hf_folder

import convert
import easyspec_jax as es
from easyspec_jax import bfloat16, loop
from easyspec_jax.checkpoint import read_metadata
from easyspec_jax.cli import drafting
from easyspec_jax.cli.main import make_parser
from easyspec_jax.memory import device_bytes
from easyspec_jax.program import report
from easyspec_jax.quantized import product


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Whether embeddings are tied -> a checkpoint of bfloat16."""
    root = tmp_path_factory.mktemp("bfloat16")

    @functools.cache
    def get(tied):
        more = {"vocab_size": 90, "eos_token_id": 0, "tie_word_embeddings": tied}
        folder = root / f"hf-{tied}"
        write_hf_folder(folder, tiny_config("qwen3", num_hidden_layers=3, **more))
        return convert.convert(folder, root / f"{tied}", dtype="bfloat16", progress=False)

    return get


@pytest.fixture(scope="module")
def stored(checkpoint):
    return checkpoint(True)


@pytest.mark.parametrize("size", [1e-25, 1.0, 3e4, 1e30])
def test_three_parts_are_all_of_a_float32(size):
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32) * np.float32(size)
    parts = jax.jit(bfloat16._parts)(x)
    assert parts.dtype == jnp.bfloat16 and parts.shape == (3 * 40, 8)
    whole = np.asarray(parts, np.float64).reshape(3, 40, 8).sum(axis=0)
    np.testing.assert_array_equal(whole, x.astype(np.float64))


def test_a_product_is_as_near_to_float64_as_one_of_float32(monkeypatch):
    draw = np.random.default_rng(1)
    x = draw.normal(size=(2, 5, 1536)).astype(np.float32)
    w = jnp.asarray(draw.normal(size=(64, 1536)), jnp.bfloat16)
    exact = np.einsum("bti,oi->bto", x.astype(np.float64), np.asarray(w, np.float64))

    def furthest(product, w=w):
        found = jax.jit(lambda x, w: product(x, w, outputs_first=True))(x, w)
        assert found.dtype == jnp.float32 and found.shape == (2, 5, 64)
        return np.abs(np.asarray(found) - exact).max()

    wide = furthest(product, w.astype(jnp.float32))
    assert 0 < furthest(product) <= 1.5 * wide < 1e-4
    monkeypatch.setattr(bfloat16, "PARTS", 2)

    def of_two(x, w, outputs_first):
        found = bfloat16._product(bfloat16._parts(x.reshape(-1, 1536)), w)
        return found.reshape(2, 2, 5, 64).sum(axis=0)

    assert furthest(of_two) > 3 * wide  # what the test would see


def test_rows_of_a_table_are_its_own_numbers():
    table = jnp.asarray(np.random.default_rng(2).normal(size=(7, 5)), jnp.bfloat16)
    special = table.at[3, :3].set(jnp.asarray([jnp.inf, -0.0, 1e-40], jnp.bfloat16))
    found = bfloat16.widened(lambda x, i: x[i], special, jnp.asarray([3, 6]))
    expected = np.asarray(special, np.float32)[[3, 6]]
    np.testing.assert_array_equal(np.asarray(found).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_same_weights_in_float32(checkpoint, tied):
    stored = checkpoint(tied)
    mesh, tokens = es.make_mesh(1, 1), np.asarray(PROMPTS[0])[None]
    kept = es.load_model(stored, mesh, matrix_dtype="bfloat16")
    plain = es.load_model(stored, mesh, dtype="float32")
    expected = all_logits(plain, tokens)
    np.testing.assert_allclose(all_logits(kept, tokens), expected, atol=2e-5)
    assert np.abs(expected).max() > 1
    layer, same = kept.params.blocks[0], plain.params.blocks[0]
    assert layer.mlp[0].w_down.dtype == kept.params.lm_head.dtype == jnp.bfloat16
    assert layer.mlp[0].norm.dtype == layer.attention[0].q_norm.dtype == kept.dtype == jnp.float32
    assert 2 * device_bytes(layer.mlp[0].w_down) == device_bytes(same.mlp[0].w_down)
    shapes = [jax.tree.leaves(m.abstract_cache(1, 8)) for m in (kept, plain)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "shape", [(1, 1), *(pytest.param(n, marks=pytest.mark.slow) for n in ((2, 2), (1, 8)))]
)
def test_speculation_says_what_the_base_alone_says_in_float32(stored, tmp_path, shape):
    """A pair in groups, a tree and a head, over matrices of bfloat16."""
    plain = es.load_model(stored, es.make_mesh(1, 1), dtype="float32")
    prompts = PROMPTS[:2]
    expected = es.Decoder(plain).generate(prompts, max_new_tokens=NEW).tokens
    mesh = es.make_mesh(*shape)
    base = es.load_model(stored, mesh, matrix_dtype="bfloat16")
    draft = es.load_model(stored, mesh, group_size=(1, 2), matrix_dtype="bfloat16")
    drafter = es.LayerParallelDrafter(draft)
    arms = [es.Decoder(base, drafter, num_draft_tokens=2, tree_width=2)]
    if shape == (2, 2):
        tensors, about = random_tensors(base.config), layer_config(base.config)
        folder = write_head(tmp_path, tensors, about | {"torch_dtype": "float32"})
        head = es.EagleDrafter.load(folder, base)
        assert head.head.fc.dtype == jnp.bfloat16 and head.head.fc.shape[0] == base.config.embed_dim
        arms.append(es.Decoder(base, es.FallbackDrafter(es.PromptLookupDrafter(), head)))
    found = [decoder.generate(prompts, max_new_tokens=NEW) for decoder in arms]
    assert [one.tokens for one in found] == [expected] * len(arms)
    assert found[0].stats.tokens_per_step > 1.5


@pytest.mark.parametrize("own", [True, False])
def test_heads_follow_their_base_unless_they_are_told(stored, tmp_path, own):
    """To the last bit what they are beside a base of float32, and rounded where they follow."""
    mesh = es.make_mesh(1, 1)
    base = es.load_model(stored, mesh, matrix_dtype="bfloat16")
    plain = es.load_model(stored, mesh, dtype="float32")
    tensors = random_tensors(base.config, own=own)
    if not own:
        del tensors["lm_head.weight"]  # rows of the base's own
    about = layer_config(base.config) | {"torch_dtype": "float32"}
    load = functools.partial(es.EagleDrafter.load, write_head(tmp_path, tensors, about))
    expected, kept = load(plain).head, load(base).head
    codes = es.Quantization("int8", keep_codes=True)
    for how in ({"dtype": "float32"}, {"quantization": codes}):
        pair = (load(m, **how).head.model for m in (base, plain))
        jax.tree.map(np.testing.assert_array_equal, *(model.params for model in pair))
    assert kept.model.layout.bf16_matrices and kept.model.dtype == jnp.float32
    for found, wide in (
        (kept.fc, expected.fc),
        (kept.model.params.lm_head, expected.model.params.lm_head),
        (kept.model.params.blocks[0].mlp[0].w_down, expected.model.params.blocks[0].mlp[0].w_down),
    ):
        np.testing.assert_array_equal(found, wide.T.astype(jnp.bfloat16))
    if own:
        table, wide = (x.embedding.params.embed for x in (kept, expected))
        np.testing.assert_array_equal(table, wide.astype(jnp.bfloat16))


def test_commands_plan_what_is_loaded_and_one_library_multiplies(stored, monkeypatch):
    monkeypatch.setattr(bfloat16, "fast_products", lambda: True)
    mesh = es.make_mesh(1, 1)

    def planned(path, **options):
        return drafting.planned_model(path, *read_metadata(path), mesh, **options)

    def decoder(*argv):
        models = ("--base", str(stored), "--draft", str(stored))
        args = make_parser().parse_args(["generate", *models, *argv, "hi"])
        drafting.check_options(args)
        drafting.check_drafter(args, None)
        return drafting.make_decoder(args, planned)

    loaded, pair = es.load_model(stored, mesh), decoder()
    assert pair.base.layout == loaded.layout and loaded.layout.bf16_matrices
    assert device_bytes(pair.base.params) == device_bytes(loaded.params)
    assert pair.drafter.draft.layout.bf16_matrices
    for options in (("--quantization", "int8"), ("--dtype", "float32")):
        models = decoder(*options).base, decoder(*options).drafter.draft
        assert not any(model.layout.bf16_matrices for model in models)


def test_no_table_is_widened_and_the_library_is_the_one_for_bfloat16(stored):
    """XLA:CPU takes no bfloat16, and made a float32 of the whole table in every step."""
    base = es.load_model(stored, es.make_mesh(1, 1), matrix_dtype="bfloat16")
    decoder = es.Decoder(base, es.PromptLookupDrafter(), num_draft_tokens=3)
    assert decoder.options(4) == () and dict(es.CompileOptions().on(base.layout.mesh, 4))
    inputs = es.request.make_inputs(base.config, PROMPTS[:1], max_new_tokens=8)
    request, state = decoder.planned(inputs)
    text = loop.run_loop.lower(base, decoder.drafter, request, state).compile().as_text()
    assert "bf16[90," in text
    assert not re.search(r"f32\[90,\d+\]\S* convert\(", text)
    # Nor made numbers of in front of the loop, whose state would carry it.
    carried = [line for line in text.splitlines() if re.search(r" while\(", line)]
    assert carried and not any("u16[90," in line for line in carried)


def test_a_program_that_is_read_is_compiled_as_the_engine_compiles_it(stored):
    class Asked(Exception):
        pass

    class Lowered:
        def compile(self, compiler_options):
            self.asked = set(compiler_options)
            raise Asked

    def asked(**options):
        base = es.load_model(stored, es.make_mesh(1, 1), **options)
        decoder = es.Decoder(base, es.PromptLookupDrafter(), num_draft_tokens=3)
        lowered = Lowered()
        with pytest.raises(Asked):
            report.compile_program(lowered, decoder, 4)
        return lowered.asked

    eigen = {name for name, _ in es.CompileOptions().on(es.make_mesh(1, 1), 4)}
    assert eigen and asked(dtype="float32") - asked(matrix_dtype="bfloat16") == eigen


def test_matrices_are_kept_where_that_is_what_is_stored_and_quick(stored, monkeypatch):
    mesh = es.make_mesh(1, 1)

    def kept(**options):
        return es.load_model(stored, mesh, **options).layout.bf16_matrices

    monkeypatch.setattr(bfloat16, "fast_products", lambda: True)
    assert kept() and kept(matrix_dtype="bfloat16") and not kept(matrix_dtype="float32")
    # Asked for as float32, or rounded to codes and no further.
    assert not kept(dtype="float32") and not kept(quantization="int8") and not kept(dtype="float64")
    half, wide = jnp.bfloat16, jnp.float32
    assert bfloat16.matrix_type(mesh, None, wide, half) == half
    assert bfloat16.matrix_type(mesh, None, wide, jnp.float16) == wide
    assert bfloat16.matrix_type(mesh, None, wide) == wide
    assert bfloat16.matrix_type(mesh, None, half, half) == half
    assert bfloat16.matrix_type(mesh.abstract_mesh, None, wide, half) == wide
    monkeypatch.setattr(bfloat16, "platform_of", lambda mesh: "gpu")
    assert bfloat16.matrix_type(mesh, None, wide, half) == wide
    monkeypatch.undo()
    monkeypatch.setattr(bfloat16, "fast_products", lambda: False)
    assert not kept() and kept(matrix_dtype="bfloat16")


def test_a_cpu_is_quick_if_it_says_so_and_the_compiler_knows(tmp_path, monkeypatch):
    said, ask = tmp_path / "cpuinfo", bfloat16.fast_products.__wrapped__
    assert not ask(said)
    said.write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_tile\n")
    assert not ask(said)
    said.write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n")
    monkeypatch.setattr(jax.stages.Compiled, "as_text", lambda self: "= f32[6] fusion(%x)")
    assert not ask(said)
    monkeypatch.setattr(jax.stages.Compiled, "as_text", lambda self: "%ynn_fusion = f32[6]")
    assert ask(said)


def test_a_model_is_written_and_rounded_as_the_floats_it_stands_for(stored, tmp_path):
    mesh = es.make_mesh(1, 1)
    base = es.load_model(stored, es.make_mesh(1, 2), matrix_dtype="bfloat16")
    es.save_model(base, tmp_path / "saved", stored)
    again = es.load_model(tmp_path / "saved", mesh)
    plain = es.load_model(stored, mesh, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again.params, plain.params)
    how = es.Quantization("int8", keep_codes=True)
    codes = es.quantize_model(es.load_model(stored, mesh, matrix_dtype="bfloat16"), how)
    expected = es.quantize_model(plain, how)
    assert codes.layout == expected.layout
    jax.tree.map(np.testing.assert_array_equal, codes.params, expected.params)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"matrix_dtype": "bfloat16", "dtype": "float16"}, "for models of float32 on CPUs, not of"),
        ({"matrix_dtype": "float32", "dtype": "bfloat16"}, "must be bfloat16, got 'float32'"),
        ({"matrix_dtype": "float32", "dtype": "float16"}, "must be float16, got 'float32'"),
        ({"matrix_dtype": "int8"}, "matrix_dtype must be bfloat16 or float32, got 'int8'"),
        ({"matrix_dtype": "no type"}, "matrix_dtype must be bfloat16 or float32, got 'no type'"),
        ({"matrix_dtype": "bfloat16", "quantization": "int8"}, "these are rounded to codes"),
    ],
    ids=str,
)
def test_bad_types_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        es.abstract_model(CONFIG, es.make_mesh(1, 1), **options)
