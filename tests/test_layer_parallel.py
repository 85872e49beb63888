"""Groups of layers, exact and at once, equal the reference on every mesh; and what travels."""

from __future__ import annotations

import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hf_models import random_tensors, tiny_config, write_hf_folder

import convert
import easyspec_jax as es
from easyspec_jax.layer_parallel import (
    draft_runner,
    run_exact,
    run_fuzzy,
    run_indirect,
    run_whole_layers,
)
from easyspec_jax.program.collectives import Collective, read_collectives

slow = pytest.mark.slow
MESHES = [(1, 1), (4, 2), (2, 4)]
TOKENS = np.random.default_rng(3).integers(0, 61, (2, 7))
PREFIX, REST = TOKENS[:, :4], TOKENS[:, 4:]
MODELS = {
    "llama": tiny_config(
        "llama", num_hidden_layers=6, num_attention_heads=8, head_dim=4, vocab_size=64
    ),
    # one kv head: over "tensor" its queries are split, so keys and values are projected apart
    "qwen2": tiny_config(
        "qwen2",
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=1,
        intermediate_size=50,
        tie_word_embeddings=True,
    ),
    "qwen3": tiny_config("qwen3", num_hidden_layers=6),
}
# Of the 6 layers; on 8, 4 and (the first group) 2 devices padded, on 2 and 1 several on a device.
GROUPS = (1, 3, 2)
CASES = [
    *(("llama", shape, GROUPS) for shape in MESHES),
    ("qwen2", (4, 2), (1, 5)),  # two slots, three layers of padding
    # as published: 1, 4, 1; every device alike
    ("qwen3", (4, 2), 4, es.LayoutRules(heads=("layer",), mlp=(), vocab=(), group="tensor")),
]
OTHER_CASES = [
    ("llama", (1, 8), GROUPS),
    ("llama", (8, 1), GROUPS),
    ("qwen2", (2, 4), (5, 1)),  # three slots, no exact layer first
    ("qwen3", (4, 2), 4),
    ("qwen3", (2, 2), (6,)),
    ("qwen3", (4, 2), 4, "tensor"),  # layers of a group on the same devices
]


@pytest.fixture(scope="module")
def load(tmp_path_factory, digests_of_host):
    """name, mesh shape, group_size[, layout] -> float64 model, by default in a draft's layout."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def checkpoint(name):
        source = write_hf_folder(root / name / "hf", MODELS[name])
        return convert.convert(source, root / name / "ckpt", progress=False)

    @functools.cache
    def get(name, shape, group_size, layout="grouped"):
        return es.load_model(
            checkpoint(name),
            es.make_mesh(*shape),
            group_size=group_size,
            dtype=jnp.float64,
            layout=layout,
        )

    return get


@functools.cache
def weights(name):
    config = es.config_from_hf(MODELS[name])
    return config, reference.from_hf(config, random_tensors(MODELS[name]))


@functools.cache
def plain(name, partition=None, parallel="attention"):
    """Both passes of the reference: the prefix exactly, the rest of TOKENS in groups."""
    prefix = reference.run(*weights(name), PREFIX)
    return prefix, reference.run(
        *weights(name), REST, partition=partition, parallel=parallel, past=prefix
    )


@functools.cache
def prefilled(model_of, case):
    """A model and its logits and cache after an exact pass over the prefix."""
    model = model_of(*case)
    cache = reference.empty_cache(model, 2, 12, fill=30.0)  # scratch must never be read
    return model, *reference.run_library(model, PREFIX, cache, run_block=run_exact)


def check_cache(model, cache, want, atol=1e-9):
    pairs = zip(want.keys, want.values, strict=True)
    for (k, v), (want_k, want_v) in zip(
        reference.layer_kv(model, cache, want.keys[0].shape[1]), pairs, strict=True
    ):
        np.testing.assert_allclose(k, want_k, atol=atol)
        np.testing.assert_allclose(v, want_v, atol=atol)


# --- which layers make a group ---


@pytest.mark.parametrize(
    "num_layers, group_size, partition",
    [
        (30, 4, (1, 4, 4, 4, 4, 4, 4, 4, 1)),
        (30, 3, (1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 1, 1)),
        (30, 5, (1, 5, 5, 5, 5, 5, 3, 1)),
        (22, 4, (1, 4, 4, 4, 4, 4, 1)),
        (6, 4, (1, 4, 1)),
        (6, 3, (1, 3, 1, 1)),
        (6, 9, (1, 4, 1)),
        (6, 1, (1, 1, 1, 1, 1, 1)),
        (3, 4, (1, 1, 1)),
        (2, 4, (1, 1)),
        (1, 4, (1,)),
        (30, (1, 1, 2, 3, 4, 5, 6, 7, 1), (1, 1, 2, 3, 4, 5, 6, 7, 1)),
        (3, [3], (3,)),
    ],
    ids=str,
)
def test_partitions_by_hand(num_layers, group_size, partition):
    assert es.make_partition(num_layers, group_size) == partition


def test_partitions_keep_the_first_and_the_last_layer_alone():
    for num_layers in range(1, 41):
        for group_size in range(1, 12):
            partition = es.make_partition(num_layers, group_size)
            assert sum(partition) == num_layers
            assert partition[0] == partition[-1] == 1
            assert set(partition[1:-2]) <= {group_size} and max(partition) <= group_size


@pytest.mark.parametrize(
    "group_size, sentence",
    [
        (0, "group_size must be at least 1, got 0"),
        (-2, "group_size must be at least 1, got -2"),
        ((1, 4), r"sum to the 6 layers of the model, got \(1, 4\), which sums to 5"),
        ((1, 4, 2), "sums to 7"),
        ((1, 0, 4, 1), "sizes of at least 1"),
        ((7, -1), "sizes of at least 1"),
        ((), "sums to 0"),
        (4.0, "a whole number or a partition of whole numbers, got 4.0"),
        (True, "a whole number or a partition of whole numbers, got True"),
        ((1.7, 4, 1), "a whole number or a partition of whole numbers"),
        ("4", "a whole number or a partition of whole numbers, got '4'"),
    ],
    ids=str,
)
def test_impossible_partitions_are_refused(group_size, sentence):
    with pytest.raises(ValueError, match=sentence):
        es.make_partition(6, group_size)


def test_ways_to_run_in_parallel_go_by_name():
    assert draft_runner("attention") is run_fuzzy
    assert draft_runner("indirect") is run_indirect
    assert draft_runner("layer") is run_whole_layers
    sentence = "parallel must be one of 'attention', 'indirect', 'layer', got 'layers'"
    with pytest.raises(ValueError, match=sentence):
        draft_runner("layers")


# --- equal to the reference ---


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=slow) for case in OTHER_CASES)], ids=str
)
def test_an_exact_pass_is_the_ordinary_model_whatever_the_grouping(case, load):
    model, scores, cache = prefilled(load, case)
    want, _ = plain(case[0])
    np.testing.assert_allclose(scores, want.logits, atol=1e-9)
    check_cache(model, cache, want)


@pytest.mark.parametrize(
    ("case", "parallel"),
    [
        *((case, "attention") for case in CASES),
        *((case, "layer") for case in CASES[:2]),
        # several slots and padding; and layers of a group on the same devices
        *((case, "indirect") for case in (CASES[0], CASES[3])),
        *(pytest.param(case, "attention", marks=slow) for case in OTHER_CASES),
        pytest.param(OTHER_CASES[2], "indirect", marks=slow),
    ],
    ids=str,
)
def test_a_parallel_pass_behind_an_exact_one_equals_the_reference(case, parallel, load):
    model, _, cache = prefilled(load, case)
    got, cache = reference.run_library(model, REST, cache, run_block=draft_runner(parallel))
    _, want = plain(case[0], model.partition, parallel)
    np.testing.assert_allclose(got, want.logits, atol=1e-9)
    np.testing.assert_array_equal(cache.length, [7, 7])
    check_cache(model, cache, want)


def test_the_ways_to_run_a_group_differ():
    # else the comparisons above could not tell them apart
    ways = [(), (GROUPS,), (GROUPS, "indirect"), (GROUPS, "layer")]
    found = [plain("llama", *how)[1].logits for how in ways]
    for a, b in itertools.combinations(found, 2):
        assert np.abs(a - b).max() > 0.1


@pytest.mark.parametrize("runner", [run_fuzzy, run_indirect, run_whole_layers])
def test_groups_of_one_layer_are_the_ordinary_model(runner, load):
    model = load("qwen3", (4, 2), 1)
    cache = reference.empty_cache(model, 2, 12)
    got, cache = reference.run_library(model, PREFIX, cache, run_block=runner)
    want, _ = plain("qwen3")
    np.testing.assert_allclose(got, want.logits, atol=1e-9)
    check_cache(model, cache, want)


def test_an_exact_pass_repairs_what_a_parallel_one_left(load):
    # calibration: the same positions again, exactly
    model, _, cache = prefilled(load, ("llama", (4, 2), GROUPS))
    _, cache = reference.run_library(model, REST, cache, run_block=run_fuzzy)
    cache = cache.rollback(jnp.asarray([4, 4], jnp.int32))
    got, cache = reference.run_library(model, REST, cache, run_block=run_exact)
    want = plain("llama")[1]
    np.testing.assert_allclose(got, want.logits, atol=1e-9)
    check_cache(model, cache, want)


def test_rows_of_different_lengths_run_in_groups(load):
    # Row 1 counts two tokens less of the prefix and is a step behind from then on.
    model, _, _ = prefilled(load, ("llama", (4, 2), GROUPS))
    cache = reference.empty_cache(model, 2, 12, fill=30.0)
    _, cache = reference.run_library(
        model, PREFIX, cache, num=np.array([4, 2]), run_block=run_exact
    )
    late = np.stack((TOKENS[0, 4:7], TOKENS[1, 2:5]))
    got, cache = reference.run_library(model, late, cache, run_block=run_fuzzy)
    np.testing.assert_array_equal(cache.length, [7, 5])
    want = plain("llama", GROUPS)[1].logits
    np.testing.assert_allclose(got[0], want[0], atol=1e-9)
    past = reference.run(*weights("llama"), TOKENS[1:, :2])
    want = reference.run(*weights("llama"), TOKENS[1:, 2:5], partition=GROUPS, past=past).logits
    np.testing.assert_allclose(got[1], want[0], atol=1e-9)


# --- where the layers of a group are ---


@pytest.mark.parametrize("shape", [(4, 2), (2, 4)], ids=str)
def test_each_device_holds_its_own_layers_of_a_group(shape, load):
    n = shape[0]
    model, _, cache = prefilled(load, ("llama", shape, GROUPS))
    layers, first = weights("llama")[1].layers, 0
    for size, block, slots in zip(GROUPS, model.params.blocks, cache.blocks, strict=True):
        if size > 1:
            assert len(block.attention) == len(slots) == math.ceil(size / n)
            for s, slot in enumerate(block.attention):
                assert slot.wo.shape[0] == n
                for shard in slot.wo.addressable_shards:
                    row = int(np.argwhere(model.layout.mesh.devices == shard.device)[0, 0])
                    j = s * n + row
                    heads = shard.index[1:]
                    want = layers[first + j]["wo"][heads] if j < size else 0.0
                    assert shard.index[0] == slice(row, row + 1)
                    np.testing.assert_array_equal(shard.data[0], want)
            assert all(kv.arrays[0].sharding.spec[0] == "layer" for kv in slots)
        first += size


# --- what travels ---


def collectives(model, tokens, runner) -> list[Collective]:
    """Every collective of a compiled pass."""
    cache = reference.empty_cache(model, tokens.shape[0], 12)
    return read_collectives(reference.compiled_text(model, tokens, cache, run_block=runner))


def smallest_weight(model) -> int:
    """Bytes of the smallest matrix that a device holds of one layer."""

    def held(x, stacked):
        return math.prod(x.sharding.shard_shape(x.shape)[stacked:])

    sizes = []
    for size, block in zip(model.partition, model.params.blocks, strict=True):
        stacked = int(size > 1 and model.layout.group_devices > 1)
        sizes += [held(x, stacked) for slot in block.attention for x in (slot.wqkv, slot.wo)]
        sizes += [held(x, 0) for mlp in block.mlp for x in (mlp.w_gate_up, mlp.w_down)]
    return 8 * min(sizes)


@pytest.mark.parametrize("runner", [run_exact, run_fuzzy, run_indirect, run_whole_layers])
def test_only_activations_travel(runner, load):
    model = load("llama", (2, 4), GROUPS)  # two layers of a group on each device
    found = collectives(model, TOKENS[:1, :1], runner)
    kinds = [one.kind for one in found]
    assert set(kinds) == {"all-reduce", "all-gather"}
    assert kinds.count("all-gather") == 1  # of the logits
    per_group = {
        run_exact: lambda size: 2 * size,
        run_fuzzy: lambda size: 1 + size,  # all attentions at once, then every MLP
        run_indirect: lambda size: 2,  # all attentions, then all MLPs
        run_whole_layers: lambda size: 2,
    }[runner]
    embedding = 1
    assert kinds.count("all-reduce") == embedding + sum(map(per_group, GROUPS))
    assert max(one.bytes for one in found) < smallest_weight(model)


def test_a_layer_alone_sums_attention_over_tensor_only(load):
    # whole heads on every device leave nothing to sum: group_size 1 pays for its MLPs only
    model = load("qwen3", (8, 1), 1)
    kinds = [one.kind for one in collectives(model, TOKENS[:1, :1], run_fuzzy)]
    mlps, logits_and_embedding = 6, 0  # 61 tokens do not divide: every device has them all
    assert kinds == ["all-reduce"] * (mlps + logits_and_embedding)


def test_one_device_needs_no_collective(load):
    model = load("llama", (1, 1), GROUPS)
    assert collectives(model, TOKENS[:1, :1], run_fuzzy) == []
