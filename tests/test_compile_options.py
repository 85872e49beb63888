"""Options of the compiler as values of a decoder: checked, left out where unknown, and they reach
the compiler.
"""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import pytest
from decoders import NEW, PROMPTS, autoregressive, model, self_drafting
from jax.sharding import AbstractMesh

import easyspec_jax as es
from easyspec_jax import compile_options as options
from easyspec_jax import sharding
from easyspec_jax.sharding import mesh_jit

UNKNOWN = {"xla_of_the_day_after_tomorrow": True}


FEW = {"xla_cpu_experimental_ynn_fusion_type": ""}


def test_the_default_asks_for_another_library_where_a_cpu_multiplies_a_few_rows(monkeypatch):
    mesh = es.make_mesh(1, 1)
    asked = {rows: dict(es.CompileOptions().on(mesh, rows)) for rows in (1, 2, 32, 33)}
    assert asked == {1: {}, 2: FEW, 32: FEW, 33: {}}
    monkeypatch.setattr(options, "has_gpus", lambda mesh: True)
    assert all(es.CompileOptions().on(mesh, rows) == () for rows in (1, 2, 33))


def test_nothing_is_asked_for_on_a_mesh_without_devices():
    abstract = AbstractMesh((1, 1), ("layer", "tensor"))
    assert sharding.platform_of(abstract) is None and not sharding.has_gpus(abstract)
    assert sharding.platform_of(es.make_mesh(1, 1)) == "cpu"
    assert es.CompileOptions("loop").on(abstract, 4) == ()


def test_levels_are_for_gpus_alone(monkeypatch):
    mesh = es.make_mesh(1, 1)
    for level in options.LEVELS[1:]:
        assert es.CompileOptions(level).on(mesh) == ()
    monkeypatch.setattr(options, "has_gpus", lambda mesh: True)
    found = dict(es.CompileOptions("loop").on(mesh))
    assert found["xla_gpu_graph_min_graph_size"] == 1
    assert found["xla_gpu_enable_command_buffer"].split(",")[-1] == "WHILE"
    found = dict(es.CompileOptions("all", {"xla_gpu_graph_min_graph_size": 3}).on(mesh))
    assert found["xla_gpu_graph_min_graph_size"] == 3  # what is named goes before the level's
    assert "COLLECTIVES" in found["xla_gpu_enable_command_buffer"]


def test_what_the_compiler_does_not_know_is_left_out_with_one_line(caplog):
    options._known.cache_clear()
    mesh = es.make_mesh(1, 1)
    with caplog.at_level(logging.WARNING, "easyspec_jax"):
        for _ in range(2):
            assert es.CompileOptions(more=UNKNOWN).on(mesh) == ()
    assert len(caplog.records) == 1
    assert next(iter(UNKNOWN)) in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"graphs": "some"}, "graphs must be one of 'default', 'loop', 'collectives', 'all'"),
        ({"more": ["xla_gpu_graph_min_graph_size"]}, "more must map names of XLA options"),
        ({"more": {"xla_gpu_enable_command_buffer": ["FUSION"]}}, "to texts or numbers"),
        ({"more": {1: 2}}, "more must map names of XLA options"),
    ],
    ids=str,
)
def test_bad_values_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        es.CompileOptions(**values)


def test_a_decoder_wants_options():
    with pytest.raises(ValueError, match="compile_options must be CompileOptions, got"):
        es.Decoder(model((1, 1)), compile_options={})


def test_options_reach_the_compiler_and_change_no_token():
    slow = es.CompileOptions(more={"xla_cpu_enable_fast_min_max": False})
    base, asked = model((1, 1)), []
    plain, other = es.Decoder(base), es.Decoder(base, compile_options=slow)
    jit = jax.jit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding.jax, "jit", lambda f, **how: asked.append(how) or jit(f, **how))
        found = other.generate([[5, 3]], max_new_tokens=8).tokens
    wanted = {"xla_cpu_enable_fast_min_max": False}
    found_options = [how["compiler_options"] for how in asked if "compiler_options" in how]
    assert found_options == [FEW | wanted, wanted]  # prefill of 16 tokens, and the loop
    assert found == plain.generate([[5, 3]], max_new_tokens=8).tokens


def test_a_loop_that_drafts_is_compiled_for_as_many_rows_as_it_verifies(monkeypatch):
    on, using, rows, asked = es.CompileOptions.on, sharding.MeshJit.using, [], []

    def seen_on(self, mesh, n):
        rows.append(n)
        return on(self, mesh, n)

    def seen_using(self, found):
        asked.append((self.__name__, dict(found)))
        return using(self, found)

    monkeypatch.setattr(es.CompileOptions, "on", seen_on)
    monkeypatch.setattr(sharding.MeshJit, "using", seen_using)
    prefill = ("prefill_chunk", FEW)
    decoder = self_drafting(width=2)
    for one, wanted in ((decoder, [prefill, ("run_loop", FEW)]), (autoregressive(), [prefill])):
        one.generate(PROMPTS, max_new_tokens=NEW)
        assert (rows, asked) == ([16, one.num_nodes + 1], wanted)
        del rows[:], asked[:]
    assert (decoder.num_nodes, autoregressive().num_nodes) == (3 * 2, 0)


def test_a_function_is_jitted_once_for_each_choice():
    @mesh_jit()
    def double(cache, x):
        del cache
        return 2 * x

    cache = model((1, 1))
    choice = (("xla_cpu_enable_fast_min_max", False),)
    assert double(cache, jnp.int32(2)) == double.using(choice)(cache, jnp.int32(2)) == 4
    assert double.using(choice) is double.using(choice) and double.num_compiled() == 2
