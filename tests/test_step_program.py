"""What is read from a compiled step: launches, bytes, phases, parts, thunks; and the floor, which
follows from shapes. GPU programs themselves are in `test_gpu_program.py`.
"""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import pytest

import easyspec_jax as es
from easyspec_jax.memory import device_bytes
from easyspec_jax.planner.device import PRESETS
from easyspec_jax.program import hlo, thunks
from easyspec_jax.program.floor import pass_floor, prefill_floor, step_floors
from easyspec_jax.program.phases import MATRICES, PARTS, by_phase, place
from easyspec_jax.program.report import participants, read_program
from easyspec_jax.program.target import TARGETS, make_mesh
from easyspec_jax.weights import ARRANGED

CONFIG = es.ModelConfig(
    vocab_size=64, embed_dim=32, mlp_dim=48, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=8,
    max_len=256,
)  # fmt: skip
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
# One step: a product with a weight, whose entries of a cache are updated and then read in part;
# a conditional that copies the cache in the branch that is not taken, an exchange, a library call.
HLO = """\
HloModule jit_run_loop

%update (p: bf16[2,64,8], n: bf16[2,1,8], i: s32[]) -> bf16[2,64,8] {
  %p = bf16[2,64,8]{2,1,0} parameter(0)
  %n = bf16[2,1,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dus = bf16[2,64,8]{2,1,0} dynamic-update-slice(%p, %n, %zero, %i, %zero)
}

%inner (q: bf16[2,64,8]) -> bf16[64,8] {
  %q = bf16[2,64,8]{2,1,0} parameter(0)
  %cut = bf16[1,64,8]{2,1,0} slice(%q), slice={[0:1], [0:64], [0:8]}
  ROOT %flat = bf16[64,8]{1,0} bitcast(%cut)
}

%scores (c: bf16[2,64,8], x: bf16[1,8]) -> f32[1,64] {
  %c = bf16[2,64,8]{2,1,0} parameter(0)
  %x = bf16[1,8]{1,0} parameter(1)
  %keys = bf16[64,8]{1,0} fusion(%c), kind=kCustom, calls=%inner
  ROOT %dot = f32[1,64]{1,0} dot(%x, %keys), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%run (r: (bf16[2,64,8], bf16[1,8])) -> bf16[1,8] {
  %r = (bf16[2,64,8]{2,1,0}, bf16[1,8]{1,0}) parameter(0)
  %rc = bf16[2,64,8]{2,1,0} get-tuple-element(%r), index=0
  %rx = bf16[1,8]{1,0} get-tuple-element(%r), index=1
  %s = f32[1,64]{1,0} fusion(%rc, %rx), kind=kCustom, calls=%scores
  ROOT %back = bf16[1,8]{1,0} convert(%s)
}

%skip (k: (bf16[2,64,8], bf16[1,8])) -> bf16[1,8] {
  %k = (bf16[2,64,8]{2,1,0}, bf16[1,8]{1,0}) parameter(0)
  %kc = bf16[2,64,8]{2,1,0} get-tuple-element(%k), index=0
  ROOT %kept = bf16[2,64,8]{2,1,0} copy(%kc)
}

%level (l: (s32[], bf16[1,8], bf16[8,8])) -> (s32[], bf16[1,8], bf16[8,8]) {
  %l = (s32[], bf16[1,8]{1,0}, bf16[8,8]{1,0}) parameter(0)
  %lx = bf16[1,8]{1,0} get-tuple-element(%l), index=1
  %lw = bf16[8,8]{1,0} get-tuple-element(%l), index=2
  %again = bf16[1,8]{1,0} dot(%lx, %lw), metadata={op_name="jit(run_loop)/while/body/draft/while/body/block_1/dot_general"}
  %lt = pred[] custom-call(%again), custom_call_target="pick"
  ROOT %lo = (s32[], bf16[1,8]{1,0}, bf16[8,8]{1,0}) tuple(%lt, %again, %lw)
}

%body (state: (bf16[1,8], bf16[8,8], bf16[2,64,8])) -> (bf16[1,8], bf16[8,8], bf16[2,64,8]) {
  %state = (bf16[1,8]{1,0}, bf16[8,8]{1,0}, bf16[2,64,8]{2,1,0}) parameter(0)
  %h = bf16[1,8]{1,0} get-tuple-element(%state), index=0
  %w = bf16[8,8]{1,0} get-tuple-element(%state), index=1
  %kv = bf16[2,64,8]{2,1,0} get-tuple-element(%state), index=2
  %qkv = (bf16[1,8]{1,0}, s8[4096]{0}) custom-call(%h, %w), custom_call_target="__cublas$gemm", metadata={op_name="jit(run_loop)/while/body/calibrate/block_0/dot_general"}
  %y = bf16[1,8]{1,0} get-tuple-element(%qkv), index=0
  %two = bf16[2,1,8]{2,1,0} broadcast(%y), dimensions={2}
  %at = s32[] constant(3)
  %new = bf16[2,64,8]{2,1,0} fusion(%kv, %two, %at), kind=kLoop, calls=%update, metadata={op_name="jit(run_loop)/while/body/calibrate/block_0/dynamic_update_slice"}
  %given = (bf16[2,64,8]{2,1,0}, bf16[1,8]{1,0}) tuple(%new, %y)
  %mine = pred[] constant(true)
  %turn = bf16[1,8]{1,0} conditional(%mine, %given, %given), true_computation=%run, false_computation=%skip, metadata={op_name="jit(run_loop)/while/body/calibrate/block_0/cond"}
  %sum = bf16[1,8]{1,0} all-reduce-start(%turn), replica_groups={{0,1},{2,3}}, to_apply=%add, metadata={op_name="jit(run_loop)/while/body/calibrate/block_0/psum"}, backend_config={"kernel_strategy":"KERNEL_STRATEGY_TRITON_ONE_SHOT"}
  %summed = bf16[1,8]{1,0} all-reduce-done(%sum)
  %first = f32[64]{0} dot(%summed, %w), metadata={op_name="jit(run_loop)/while/body/draft/dot_general"}
  %zero.1 = s32[] constant(0)
  %start = (s32[], bf16[1,8]{1,0}, bf16[8,8]{1,0}) tuple(%zero.1, %summed, %w)
  %levels = (s32[], bf16[1,8]{1,0}, bf16[8,8]{1,0}) while(%start), condition=%c, body=%level, metadata={op_name="jit(run_loop)/while/body/draft/while"}, backend_config={"known_trip_count":{"n":"4"}}
  %last = bf16[1,8]{1,0} get-tuple-element(%levels), index=1
  ROOT %out = (bf16[1,8]{1,0}, bf16[8,8]{1,0}, bf16[2,64,8]{2,1,0}) tuple(%last, %w, %new)
}

ENTRY %main (a: bf16[1,8], b: bf16[8,8], d: bf16[2,64,8]) -> bf16[1,8] {
  %a = bf16[1,8]{1,0} parameter(0), metadata={op_name="state.x"}
  %b = bf16[8,8]{1,0} parameter(1), metadata={op_name="base.params.blocks[0].attention[0].wqkv"}
  %d = bf16[2,64,8]{2,1,0} parameter(2), metadata={op_name="state.cache.blocks[0][0].k"}
  %init = (bf16[1,8]{1,0}, bf16[8,8]{1,0}, bf16[2,64,8]{2,1,0}) tuple(%a, %b, %d)
  %loop = (bf16[1,8]{1,0}, bf16[8,8]{1,0}, bf16[2,64,8]{2,1,0}) while(%init), condition=%c, body=%body, metadata={op_name="jit(run_loop)/while"}
  ROOT %end = bf16[1,8]{1,0} get-tuple-element(%loop), index=0
}
"""  # noqa: E501
KEYS, ROW, WEIGHT = 2 * 64 * 8 * 2, 8 * 2, 8 * 8 * 2


def launched():
    return {one.op.name: one for one in hlo.step(hlo.parse(HLO))}


def test_bytes_are_those_that_a_launch_touches():
    found = launched()
    moved = {name: (one.read, one.written) for name, one in found.items()}
    assert moved["qkv"] == (ROW + WEIGHT, ROW)  # a library's workspace is no result
    assert moved["new"] == (2 * ROW + 4, 2 * ROW)  # an update in place
    assert moved["s"] == (KEYS // 2 + ROW, 4 * 64)  # a slice, in a fusion of the fusion
    assert moved["sum"] == (ROW, ROW) and "summed" not in found
    assert moved["turn"] == moved["levels"] == (0, 0)  # control flow
    assert (found["again"].times, found["qkv"].times) == (4, 1)
    assert sum(one.times for one in found.values() if one.counts) == 7 + 2 * 4


def test_a_fusion_reads_what_its_result_is_made_of():
    text = """\
%kept (k: f32[8,6,12], s: f32[6], c: bf16[6,64,4], i: s32[]) -> bf16[6,64,4] {
  %k = f32[8,6,12]{2,1,0} parameter(0)
  %s = f32[6]{0} parameter(1)
  %c = bf16[6,64,4]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  %zero = f32[] constant(0)
  %sum = f32[6,12]{1,0} reduce(%k, %zero), dimensions={0}, to_apply=%add
  %wide = f32[6,12]{1,0} broadcast(%s), dimensions={0}
  %scaled = f32[6,12]{1,0} multiply(%sum, %wide)
  %half = f32[6,4]{1,0} slice(%scaled), slice={[0:6], [0:4]}
  %row = bf16[6,1,4]{2,1,0} convert(%half)
  %first = s32[] constant(0)
  ROOT %dus = bf16[6,64,4]{2,1,0} dynamic-update-slice(%c, %row, %first, %i, %first)
}

ENTRY %main (a: f32[8,6,12], b: f32[6], d: bf16[6,64,4], n: s32[]) -> bf16[6,64,4] {
  %a = f32[8,6,12]{2,1,0} parameter(0)
  %b = f32[6]{0} parameter(1)
  %d = bf16[6,64,4]{2,1,0} parameter(2)
  %n = s32[] parameter(3)
  ROOT %new = bf16[6,64,4]{2,1,0} fusion(%a, %b, %d, %n), kind=kLoop, calls=%kept
}
"""
    pieces = 8 * 6 * 4 * 4  # a third of them
    assert moved_by(text) == (pieces + 6 * 4 + 4, 6 * 4 * 2)
    whole = text.replace("slice(%scaled), slice={[0:6], [0:4]}", "dot(%scaled)")
    assert moved_by(whole) == (3 * pieces + 6 * 4 + 4, 6 * 4 * 2)


@pytest.mark.parametrize(
    "inner, read",
    [("negate(%q)", 10 * 4), ("reduce-window(%q)", 1000 * 4), ("concatenate(%q)", 1000 * 4)],
)
def test_a_fusion_of_a_fusion_reads_what_is_asked_of_it(inner, read):
    assert moved_by(f"""\
%inner (q: f32[1000]) -> f32[1000] {{
  %q = f32[1000]{{0}} parameter(0)
  ROOT %r = f32[1000]{{0}} {inner}
}}

%outer (p: f32[1000]) -> f32[10] {{
  %p = f32[1000]{{0}} parameter(0)
  %f = f32[1000]{{0}} fusion(%p), kind=kLoop, calls=%inner
  ROOT %cut = f32[10]{{0}} slice(%f), slice={{[0:10]}}
}}

ENTRY %main (a: f32[1000]) -> f32[10] {{
  %a = f32[1000]{{0}} parameter(0)
  ROOT %new = f32[10]{{0}} fusion(%a), kind=kLoop, calls=%outer
}}
""") == (read, 40)


@pytest.mark.parametrize("root, read", [("bitcast", 40), ("negate", 4000 + 40)])
def test_an_update_is_in_place_where_it_is_the_result(root, read):
    assert moved_by(f"""\
%updated (c: f32[1000], u: f32[10], i: s32[]) -> f32[1000] {{
  %c = f32[1000]{{0}} parameter(0)
  %u = f32[10]{{0}} parameter(1)
  %i = s32[] parameter(2)
  %dus = f32[1000]{{0}} dynamic-update-slice(%c, %u, %i)
  ROOT %r = f32[1000]{{0}} {root}(%dus)
}}

ENTRY %main (a: f32[1000], b: f32[10], n: s32[]) -> f32[1000] {{
  %a = f32[1000]{{0}} parameter(0)
  %b = f32[10]{{0}} parameter(1)
  %n = s32[] parameter(2)
  ROOT %new = f32[1000]{{0}} fusion(%a, %b, %n), kind=kLoop, calls=%updated
}}
""") == (read + 4, 40 if root == "bitcast" else 4000)


def moved_by(text):
    """What the one launch of a program reads and writes."""
    (one,) = (one for one in hlo.whole(hlo.parse(text)) if one.counts)
    return one.read, one.written


def test_launches_know_the_arguments_that_they_read():
    found = launched()
    weight, cache = "base.params.blocks[0].attention[0].wqkv", "state.cache.blocks[0][0].k"
    assert found["qkv"].arguments == ("state.x", weight)
    assert found["new"].arguments == (cache,)
    assert found["s"].arguments == (cache,)  # through the update, a tuple and a branch
    assert weight in found["again"].arguments  # into an inner loop
    assert found["two"].producers == ("qkv",)


def test_what_the_largest_branch_does_counts_and_copies_of_any_are_seen():
    module = hlo.parse(HLO)
    found = launched()
    assert found["s"].counts and not found["kept"].counts
    copies = [kind for kind, _ in hlo.copied(module, found["kept"].op)]
    assert copies == ["copy"]


def test_phases_are_scopes_and_a_draft_s_first_level_is_calibration_s():
    found = by_phase(list(launched().values()), 4)
    names = {phase: [one.op.name for one in some] for phase, some in found.items()}
    assert names["draft"] == ["again", "lt"]
    assert {"qkv", "new", "s", "sum", "first"} <= set(names["calibrate"])
    assert set(names) == {"calibrate", "draft"}
    assert place("jit(f)/while/body/draft/while/body/logits/all_gather") == ("draft", "logits")
    assert place("jit(f)/while/body/draft/while") == ("calibrate", "")
    assert place("jit(f)/while/body/verify/block_12/add") == ("verify", "block_12")
    assert place("state.step") == ("", "")


def test_every_matrix_names_the_part_that_reads_it():
    names = {name for name, letters in ARRANGED.items() if len(letters) > 1 and name[0] != "b"}
    assert names <= MATRICES.keys() and set(MATRICES.values()) <= {*PARTS}


def test_a_loop_over_levels_of_unknown_length_counts_them_all():
    unknown = HLO.replace('{"known_trip_count":{"n":"4"}}', "{}")
    found = by_phase(hlo.step(hlo.parse(unknown)), 4)
    assert [one.times for one in found["draft"]] == [4, 4]


THUNKS = """\
001: kCopy  [source       | next=002 (1)] kCopy
003: kWhile [source       | sink        ]
condition:
    004: kCustomKernel [source | sink] wrapped_not grid: [1, 1, 1]
  body:
    005: kAllReduce     [prev=004 (1) | next=000 (1)] kAllReduce
    000: kCommandBuffer [prev=005 (1) | next=019 (1)]
        006: kCustomKernel [source       | sink         ] fusion_1 grid: [1, 1, 1]
        007: kCopy         [source       | sink         ] kCopy
    026: kAsyncStart    [prev=000 (1) | next=030 (4)] stream=communication_stream[0], async_id=26
        025: kAllReduce [source | sink] kAllReduce
    029: kAsyncDone     [source       | sink        ] async_id=26
    048: kConditional   [prev=030 (1) | next=049 (1)]
      false_branch:
        033: kCopy         [source       | next=034 (1)] kCopy
        000: kCommandBuffer [source | sink]
            034: kCustomKernel [source | sink] fusion_2 grid: [1, 1, 1]
            035: kCustomKernel [source | sink] fusion_3 grid: [1, 1, 1]
      true_branch:
        045: kCopy         [source | sink] kCopy
    094: kWhile         [prev=000 (1) | next=000 (1)]
condition:
      body:
        000: kCommandBuffer [source | sink]
            096: kCopy         [source       | next=097 (1)] kCopy
        097: kCustomKernel [source | sink] fusion_4 grid: [1, 1, 1]
    098: kCustomKernel [source | sink] fusion_5 grid: [1, 1, 1]
"""


def test_graphs_and_what_stands_outside_of_them_are_counted_per_step():
    found = thunks.count(thunks.parse(THUNKS), [(4, False)])
    assert found.graphs == 1 + 1 + 4 and found.inside == 2 + 2 + 4
    # the loop's own condition, the inner loop's fourth kernels, one at the end
    assert found.outside == {"CustomKernel": 1 + 4 + 1, "AllReduce": 2, "Copy": 1}
    assert (found.conditionals, found.host_syncs) == (1, 2)
    assert found.launched_outside == 9
    unknown = thunks.count(thunks.parse(THUNKS))
    assert unknown.host_syncs == 2 + 2  # the inner loop asks before its one turn and behind it


def test_a_loop_without_a_condition_of_its_own_keeps_its_body():
    """The compiler then writes both labels on a line; and a loop of no turns is asked once."""
    text = THUNKS.replace("condition:\n      body:", "condition:\n        No thunks.      body:")
    assert text != THUNKS
    sequence = thunks.parse(text)
    (inner,) = (one for top in sequence for one in top.all() if one.kind == "While")
    assert inner.parts["body"] and not inner.parts["condition"]
    found = thunks.count(sequence, [(0, True)])
    assert (found.graphs, found.host_syncs) == (1 + 1, 2 + 1)


def test_a_loop_in_a_graph_launches_nothing():
    whole = "000: kCommandBuffer [source | sink]\n" + "\n".join(
        f"    {line}" if line[:1].isdigit() or line[:1] == " " else line
        for line in THUNKS.splitlines()
    )
    found = thunks.count(thunks.parse(whole))
    assert (found.graphs, found.outside, found.host_syncs) == (0, {}, 0) and found.inside > 5
    with pytest.raises(ValueError, match="no loop"):
        thunks.count(thunks.parse("001: kCopy [source | sink] kCopy"))


def test_a_pass_streams_all_weights_but_the_embedding_and_all_entries_once():
    mesh = es.make_mesh(1, 1)
    model = es.abstract_model(CONFIG, mesh, dtype="bfloat16")
    cache = model.abstract_cache(1, 128)
    found = pass_floor(model, cache, 3)
    assert found.weights == device_bytes(model.params) - 2 * (64 - 3) * 32
    assert found.cache_read == 2 * 6 * 2 * 128 * 8 * 2
    assert found.cache_written == found.cache_read * 3 / 128
    assert found.bytes == round(found.weights + found.cache_read * (1 + 3 / 128))
    tied = es.abstract_model(TIED, mesh, dtype="bfloat16")
    assert pass_floor(tied, cache, 3) == found  # the head once, rows of it


def test_every_turn_of_an_exact_pass_counts():
    mesh = es.make_mesh(2, 2)
    options = {"group_size": (1, 4, 1), "dtype": "bfloat16", "layout": "grouped"}
    model = es.abstract_model(CONFIG, mesh, **options)
    cache = model.abstract_cache(1, 128)
    exact, fuzzy = (pass_floor(model, cache, 1, exact=exact) for exact in (True, False))
    layer = 2 * (32 + 32 * (2 + 1 + 1) * 8 + 2 * 8 * 32)  # of attention, half the heads
    assert exact.weights - fuzzy.weights == 2 * layer  # four turns in two slots
    assert (exact.cache_read, fuzzy.cache_read) == (6 * 4096, 4 * 4096)


def test_a_prompt_needs_no_logits_and_no_last_mlp():
    mesh = es.make_mesh(1, 1)
    model = es.abstract_model(CONFIG, mesh, dtype="bfloat16")
    found = prefill_floor(es.Decoder(model), 1, 128, 16)
    with_logits = pass_floor(model, model.abstract_cache(1, 128), 16)
    last = model.params.blocks[-1]
    unused = (last.mlp, last.attention[0].wo, model.params.final_norm, model.params.lm_head)
    assert with_logits.weights - found.weights == device_bytes(unused)
    assert with_logits.cache_read - found.cache_read == 4096 * 2


def pair(mesh, **options):
    base = es.abstract_model(CONFIG, mesh)
    draft = es.abstract_model(TIED, mesh, group_size=4)
    return es.Decoder(base, es.LayerParallelDrafter(draft), **options)


@pytest.mark.parametrize("width", [1, 2])
def test_a_step_s_floor_has_a_pass_of_each_phase(width):
    decoder = pair(es.make_mesh(1, 1), num_draft_tokens=3, tree_width=width)
    found = step_floors(decoder, 2, 128)
    base, draft = decoder.base, decoder.drafter.draft
    assert found == {
        "calibrate": pass_floor(draft, draft.abstract_cache(2, 128), 4),
        "draft": pass_floor(draft, draft.abstract_cache(2, 128), width, exact=False),
        "verify": pass_floor(base, base.abstract_cache(2, 128), 3 * width + 1),
    }
    alone = step_floors(es.Decoder(base), 1, 128)
    assert list(alone) == ["verify"]


@pytest.mark.slow
def test_a_program_for_the_cpu_is_read_as_well():
    """Phases, their runs, floors, an estimate from constants; CPUs have no graphs."""
    decoder = pair(es.make_mesh(2, 2), num_draft_tokens=4)
    texts = {}
    found = read_program(decoder, PRESETS["h200"], max_len=64, prefill=(16,), texts=texts)
    assert found.entries == 64 and found.graphs is None
    assert {name: p.runs for name, p in found.phases.items() if name != "rest"} == {
        "calibrate": 1, "draft": 3, "verify": 1, "commit": 1
    }  # fmt: skip
    assert found.phases["draft"].collectives == 1 + 3 + 1 + 4 + 1 + 1
    assert found.phases["draft"].layers == 6 and found.phases["commit"].layers == 0
    assert found.floor == sum(p.runs * p.floor for p in found.phases.values() if p.floor)
    for phase in found.phases.values():
        assert sum(part.launches for part in phase.parts.values()) == phase.traffic.launches
        assert phase.floor is None or phase.ratio > 0.9
    assert found.estimate["step"] > found.estimate["limit"] > 0
    assert found.memory["arguments"] > sum(found.budget.values()) - found.budget["scratch"]
    assert found.prefill[16].traffic.launches > 0 and found.prefill[16].exchanges
    json.dumps(found.as_dict())
    assert hlo.parse(texts["hlo"]).entry and texts["thunks"] == ""


def test_traffic_of_a_jitted_product_is_its_operands_and_its_result():
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 256), (256, 512)))
    text = jax.jit(lambda x, w: x @ w).lower(x, w).compile().as_text()
    (one,) = (one for one in hlo.whole(hlo.parse(text)) if one.counts)
    assert (one.read, one.written) == (4 * (4 * 256 + 256 * 512), 4 * 4 * 512)


@pytest.mark.parametrize(
    ("written", "devices"),
    [
        ("{{0,1},{2,3}}", 2),
        ("{{0,1,2,3}}", 4),
        ("{}", 8),
        ("[2,2]<=[4]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['layer'=4,'tensor'=2] {'layer'}", 4),
        ("mesh['layer'=4,'tensor'=2] {'layer','tensor'}", 8),
    ],
)
def test_devices_of_a_collective_are_read_as_every_version_writes_them(written, devices):
    rest = f"f32[2]{{0}} %x), channel_id=1, replica_groups={written}, use_global_device_ids=true"
    assert participants(rest, 8) == devices


def test_programs_are_compiled_for_the_rows_of_their_passes(monkeypatch):
    """The loop for what a step verifies, a piece of a prompt for its tokens."""
    asked = []
    names = ("argument", "temp", "output", "alias")
    sizes = types.SimpleNamespace(**{f"{name}_size_in_bytes": 0 for name in names})
    compiled = types.SimpleNamespace(as_text=lambda: HLO, memory_analysis=lambda: sizes)

    def compile_with(lowered, compiler_options):
        asked.append(compiler_options["rows"])
        return compiled

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_with)
    monkeypatch.setattr(es.CompileOptions, "on", lambda self, mesh, rows: (("rows", rows),))
    decoder = pair(es.make_mesh(1, 1), num_draft_tokens=3, tree_width=2)
    read_program(decoder, max_len=64, prefill=(16,))
    assert asked == [1 + 3 * 2, 16]


@pytest.mark.slow
def test_the_command_reads_the_program_of_this_machine(easyspec, tmp_path):
    mesh = ("--device", "here", "--layer", 2, "--tensor", 2)
    options = ("--draft", "draft", "--num-draft-tokens", 3, "--max-len", 32)
    status, out, err = easyspec(
        "program", "base", *mesh, *options, "--parts", "--hlo", tmp_path / "hlo"
    )
    assert (status, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in reversed(out.splitlines()) if line}
    assert rows["phase"][:3] == ["phase", "runs", "launches"]
    assert rows["draft"][1] == "2" and rows["step"][1] == "1" and rows["qkv"]
    assert (tmp_path / "hlo").read_text().startswith("HloModule")
    status, out, err = easyspec("program", "base", *mesh, *options, "--json")
    document = json.loads(out)
    assert status == 0 and document["options"]["num_draft_tokens"] == 3
    assert document["phases"]["draft"]["runs"] == 2 and document["step"]["launches"] > 0


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--tree-width", 2), "--tree-width needs --draft"),
        (("--draft", "foreign"), "different tokenizers"),
        (("--max-len", 1), "--max-len must be in 2 .. 256"),
        (("--max-len", 2), "caches must hold at least 3 tokens here"),
    ],
)
def test_the_command_refuses_in_one_sentence(easyspec, argv, sentence):
    status, out, err = easyspec("program", "base", "--device", "here", *argv)
    assert (status, out) == (1, "") and sentence in err and err.count("\n") == 1


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match=f"unknown device 'tpu': use {', '.join(TARGETS)}, here"):
        make_mesh("tpu")
