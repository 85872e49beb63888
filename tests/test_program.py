"""What travels between devices in one step: which collectives, how many, of how many bytes."""

from __future__ import annotations

import collections
import math

import jax
import pytest
from decoders import started

import easyspec_jax as es
from easyspec_jax.program.collectives import collectives, read_collectives
from easyspec_jax.request import make_inputs

GAMMA, WIDTH, FLOAT = 3, 2, 4
GROUPS = (1, 4, 2, 1)  # on 4 devices a whole slot and a padded one
DRAFT = es.ModelConfig(
    vocab_size=64, embed_dim=64, mlp_dim=256, num_layers=8, num_heads=8, num_kv_heads=8,
    head_dim=16, max_len=96,
)  # fmt: skip
BASE = es.ModelConfig(**{**vars(DRAFT), "embed_dim": 128, "mlp_dim": 512, "num_layers": 3})
LAYER = es.LayoutRules(heads=("tensor",), group="layer")
NARROW = es.LayoutRules(heads=("tensor",), group="layer", mlp=("tensor",), vocab=())


def pair(shape, layout, **options):
    mesh = es.make_mesh(*shape)
    draft = es.abstract_model(DRAFT, mesh, group_size=GROUPS, layout=layout)
    drafter = es.LayerParallelDrafter(draft)
    return es.Decoder(es.abstract_model(BASE, mesh), drafter, num_draft_tokens=GAMMA, **options)


def by_block(found, phase):
    """Of one phase: part -> Counter of (kind, bytes)."""
    parts = collections.defaultdict(collections.Counter)
    for one in found:
        if one.phase == phase:
            parts[one.part][one.kind, one.bytes] += 1
    return dict(parts)


def sums(number, tokens, dim=DRAFT.embed_dim, layers=1):
    """That many all-reduces of a residual stream (of several layers at once)."""
    return collections.Counter({("all-reduce", FLOAT * tokens * dim * layers): number})


def winners(tokens, width=0):
    """Of each of 8 devices the likeliest token (id and score), or `width` and a sum of all."""
    numbers = 2 * width + 1 if width else 2
    return collections.Counter({("all-reduce", FLOAT * 8 * tokens * numbers): 1})


def check_verification(found):
    want = {f"block_{i}": sums(2, 1 + GAMMA * WIDTH, BASE.embed_dim) for i in range(3)}
    want |= {"embed": sums(1, 1 + GAMMA * WIDTH, BASE.embed_dim)}
    want |= {"logits": winners(1 + GAMMA * WIDTH)}
    assert by_block(found, "verify") == want


def check_nothing_large_moves(decoder, found):
    """Neither weights nor entries of a cache, which a device holds for all tokens."""
    weights = jax.tree.leaves((decoder.base.params.blocks, decoder.drafter.draft.params.blocks))
    smallest = min(
        math.prod(x.sharding.shard_shape(x.shape)) * FLOAT
        for x in weights
        if len([n for n in x.sharding.shard_shape(x.shape) if n > 1]) > 1
    )
    assert max(one.bytes for one in found if one.part != "logits") < smallest
    _, state = decoder.planned(make_inputs(BASE, [[1]], 4096))
    caches = jax.tree.leaves((state.cache, state.draft))
    entries = [x for x in caches if x.ndim > 1]
    held = min(math.prod(x.sharding.shard_shape(x.shape)) for x in entries)
    assert max(one.bytes for one in found if one.part != "logits") < FLOAT * held
    assert {one.phase for one in found} <= {"calibrate", "draft", "verify"}


def test_a_group_costs_one_collective_for_its_attentions_and_one_for_each_mlp():
    decoder = pair((4, 2), LAYER, tree_width=WIDTH)
    found = collectives(decoder)
    check_verification(found)
    check_nothing_large_moves(decoder, found)
    window, alone = GAMMA + 1, 2
    exact = by_block(found, "calibrate")
    assert [exact[f"block_{i}"] for i in range(4)] == [
        sums(alone, window), sums(8, window), sums(4, window), sums(alone, window)
    ]  # fmt: skip
    assert exact["embed"] == sums(1, window) and exact["logits"] == winners(1, WIDTH)
    fuzzy = by_block(found, "draft")
    together = [sums(1, WIDTH, layers=4) + sums(size, WIDTH) for size in (4, 2)]
    assert [fuzzy[f"block_{i}"] for i in range(4)] == [
        sums(alone, WIDTH), *together, sums(alone, WIDTH)
    ]  # fmt: skip
    assert fuzzy["embed"] == sums(1, WIDTH) and fuzzy["logits"] == winners(WIDTH, WIDTH)


@pytest.mark.slow  # the test above counts groups of 4 and 2
def test_the_number_is_that_of_the_formula():
    """L (1 + 1 / group_size) for the layers in groups, against 2 L of tensor parallelism."""
    mesh, group_size = es.make_mesh(4, 2), 3
    draft = es.abstract_model(DRAFT, mesh, group_size=group_size, layout=LAYER)
    decoder = es.Decoder(
        es.abstract_model(BASE, mesh), es.LayerParallelDrafter(draft), num_draft_tokens=2
    )
    found = collectives(decoder)
    inner = [f"block_{i}" for i in range(1, len(draft.partition) - 1)]
    counts = collections.Counter(one.part for one in found if one.phase == "draft")
    assert sum(counts[part] for part in inner) == 6 * (1 + 1 / group_size)
    assert sum(one.part in inner for one in found if one.phase == "calibrate") == 2 * 6


@pytest.mark.slow
def test_a_replicated_draft_exchanges_nothing():
    found = collectives(pair((4, 2), "replicated", tree_width=WIDTH))
    check_verification(found)
    assert {one.phase for one in found} == {"verify"}
    early = pair((4, 2), "replicated", tree_width=WIDTH, min_draft_probability=0.5)
    assert collectives(early) == found and early.min_draft_probability == 0.5


@pytest.mark.slow
def test_a_tensor_parallel_draft_sums_twice_a_layer():
    found = collectives(pair((4, 2), "tensor", tree_width=WIDTH))
    assert by_block(found, "calibrate")["block_1"] == sums(8, GAMMA + 1)
    # at once all the same: the layers of a group still share one collective for their attentions
    assert by_block(found, "draft")["block_1"] == sums(1, WIDTH, layers=4) + sums(4, WIDTH)


@pytest.mark.slow
def test_mlps_and_vocabulary_are_split_as_asked():
    found = collectives(pair((4, 2), NARROW, tree_width=WIDTH))
    assert by_block(found, "draft")["block_1"] == sums(1, WIDTH, layers=4) + sums(4, WIDTH)
    assert not {"embed", "logits"} & set(by_block(found, "draft"))


def test_collectives_are_read_from_a_program():
    hlo = """
ENTRY %main () -> f32[2] {
  %a = f32[2,3]{1,0} all-reduce(%x), op_name="jit(f)/while/body/verify/block_7/psum"
  %b = (bf16[4]{0}, s32[2]{0}) all-gather-start(%y), op_name="jit(f)/draft/logits/all_gather"
  %c = pred[] all-reduce(%z)
  %d = f32[2]{0} add(%a, %b), op_name="all-reduce"
}
"""
    found = [(one.phase, one.part, one.kind, one.bytes) for one in read_collectives(hlo)]
    assert found == [
        ("verify", "block_7", "all-reduce", 24),
        ("calibrate", "logits", "all-gather", 16),
        ("", "", "all-reduce", 1),
    ]


def test_planning_compiles_the_program_that_runs():
    """The shapes that the table is made from are those of a real request."""
    mesh = es.make_mesh(2, 1)
    base = es.random_model(BASE, mesh, dtype="float32")
    decoder = es.Decoder(base)
    run = started(decoder, [[1, 2]], 9)
    planned = decoder.planned(make_inputs(BASE, [[1, 2]], 9))
    assert jax.tree.structure(planned) == jax.tree.structure((run.request, run.state))
    for want, got in zip(*map(jax.tree.leaves, (planned, (run.request, run.state))), strict=True):
        assert (want.shape, want.dtype) == (got.shape, got.dtype)
        assert want.sharding.is_equivalent_to(got.sharding, got.ndim)
