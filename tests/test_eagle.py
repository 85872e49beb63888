"""EAGLE-3 heads: the published equations in numpy, lossless text, features that are the base's."""

import dataclasses
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import (
    CONFIG,
    GROUPS,
    NEW,
    PROMPTS,
    autoregressive,
    compilations,
    entries,
    fresh_cache,
    joined,
    lowered_loop,
    model,
    started,
    surprise,
)
from eagle_heads import (
    KNOWN,
    TAPS,
    H,
    draft_logits,
    frequent,
    layer_config,
    random_tensors,
    write_head,
    write_published,
)
from safetensors.numpy import save_file
from test_decode import new_tokens
from test_distribution import FILTERED, enumerate_sequences, many_rows

import easyspec_jax as es
from easyspec_jax.json_files import read_object, write_object
from easyspec_jax.memory import device_bytes
from easyspec_jax.quantized import Quantized, dequantise, quantise

slow = pytest.mark.slow
DRAWN = es.Sampling(temperature=0.9)
CODES = es.Quantization("int4", 4, keep_codes=True)
# What a head may have beside the published one: tensors, and fields of config.json.
VARIANTS = {
    "midlayer": ({}, {}),
    "layers.0": ({}, {}),
    "model.layers.0": ({"own": True}, {}),
    "speculators": ({}, {"norm_before_residual": True}),
    "speculators, norms": (
        {"normed": True},
        {"norm_before_residual": False, "norm_before_fc": True, "norm_output": True},
    ),
    "all ids": ({"known": CONFIG.vocab_size}, {}),
    "few ids": ({"known": 6}, {}),
    "embed_residual": ({"residual": True}, {}),
    "the base's head": ({}, {}),
}


def head_folder(folder, variant="midlayer", config=CONFIG, **changes):
    """A head's folder in one of the formats, and its tensors by SafeAILab's names."""
    kinds, fields = VARIANTS[variant]
    if variant == "few ids":
        ids = frequent(autoregressive().generate(PROMPTS, max_new_tokens=NEW).tokens)
        kinds = kinds | {"ids": ids}
    tensors = random_tensors(config, **kinds)
    if variant == "the base's head":
        rows = np.asarray(model((1, 1)).params.lm_head).T
        stored = tensors | {"lm_head.weight": rows[np.arange(KNOWN) + tensors["d2t"]]}
        tensors, stored = stored, {k: x for k, x in tensors.items() if k != "lm_head.weight"}
    else:
        stored = tensors
    about = layer_config(config, kinds.get("known", KNOWN))
    ids = {"eagle_aux_hidden_state_layer_ids": list(TAPS)}
    if variant.startswith("speculators"):
        known = about.pop("draft_vocab_size")
        about = {"speculators_model_type": "eagle3", "transformer_layer_config": about, **ids}
        about |= {"draft_vocab_size": known}
    elif variant == "layers.0":  # counted by their outputs
        about["eagle_config"] = {k: [tap - 1 for tap in v] for k, v in ids.items()}
    else:
        about |= ids
    prefix = "layers.0" if "layers.0" in variant or "speculators" in variant else "midlayer"
    stored = {k.replace("midlayer", prefix): x for k, x in stored.items()}
    if variant == "model.layers.0":
        stored = {k if k in ("d2t", "t2d") else f"model.{k}": x for k, x in stored.items()}
    return write_head(folder, stored, about | fields | changes), tensors, fields


@functools.cache
def drafter(mesh_shape=(1, 1), variant="midlayer", **options):
    with tempfile.TemporaryDirectory() as folder:
        head_folder(pathlib.Path(folder), variant)
        return es.EagleDrafter.load(folder, model(mesh_shape), **options)


@functools.cache
def decoder(mesh_shape=(1, 1), width=1, *, least=None, **options):
    base, drafts = model(mesh_shape), drafter(mesh_shape, **options)
    shape = {"num_draft_tokens": 3, "tree_width": width}
    return es.Decoder(base, drafts, **shape, min_draft_probability=least)


@jax.jit
def _streams(base, tokens, cache):
    step = es.model.make_step(base, cache, tokens.shape[1])
    found = [es.model.embed(base, tokens)]
    for i, kv in enumerate(cache.blocks):
        found.append(es.model.run_blocks(base, found[-1], (kv,), step, first=i)[0])
    return jnp.stack([found[i][0] for i in TAPS], axis=1)


def streams(base, text):
    """The base's residual stream before layers, [T, taps, D], layer by layer."""
    tokens = np.pad(np.asarray(text, np.int32), (0, 64 - len(text)))[None]
    return np.asarray(_streams(base, tokens, fresh_cache(base, 1, 64)))[: len(text)]


@es.sharding.mesh_jit()
def _proposed(drafter, request, state):
    recent = es.loop.window(state.tokens, state.absorbed, request.num_draft_tokens + 1)
    num = state.length - state.absorbed
    cache, key = state.cache.rollback(state.length - 1), jax.random.key(0)
    return drafter.propose(state.draft, request, cache, recent, state.absorbed, num, key)[0]


def paths(proposal):
    """Tokens from the root to each node that has children, [] for the root itself."""
    tokens, parents = (np.asarray(x)[0].tolist() for x in (proposal.tokens, proposal.parents))
    found = [[]]
    for token, parent in zip(tokens, parents, strict=True):
        found.append([*found[parent + 1], token])
    return found[: np.asarray(proposal.probs).shape[1]]


def check_q(run, tensors, fields):
    """q behind the root and every node that is gone on from is softmax of the equations' logits."""
    base, state = model((1, 1)), run.state
    text = np.asarray(state.tokens)[0, : int(state.length[0])].tolist()
    proposal = _proposed(run.decoder.drafter, run.request, state)
    table = tensors.get("embed_tokens.weight", np.asarray(base.params.embed))
    how = {k: v for k, v in fields.items() if k != "norm_before_fc"}
    features = streams(base, text)[:-1]
    for path, q in zip(paths(proposal), np.asarray(proposal.probs)[0], strict=True):
        logits = draft_logits(tensors, table, text, path, features, **how)[-1] / 0.9
        p = np.exp(logits - logits.max())
        np.testing.assert_allclose(q, p / p.sum(), atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "width", "mesh_shape"),
    [
        ("midlayer", 1, (1, 1)),
        pytest.param("midlayer", 2, (4, 2), marks=slow),
        *(pytest.param(variant, 1, (1, 1), marks=slow) for variant in list(VARIANTS)[1:]),
    ],
)
def test_drafts_are_what_the_equations_say(tmp_path, variant, width, mesh_shape):
    _, tensors, fields = head_folder(tmp_path, variant)
    decoding = decoder(mesh_shape, width, variant=variant)
    run = started(decoding, [PROMPTS[0]], NEW, DRAWN)
    check_q(run, tensors, fields)
    for _ in range(2 * (variant == "midlayer")):  # a step of any is the same program
        run.step()
        check_q(run, tensors, fields)


@pytest.mark.parametrize(
    ("mesh_shape", "options"),
    [
        ((1, 1), {"width": 2, "least": 0.1}),
        pytest.param((1, 1), {}, marks=slow),
        pytest.param((4, 2), {"width": 2, "least": 0.1, "variant": "model.layers.0"}, marks=slow),
        pytest.param((8, 1), {"layout": "replicated", "quantization": CODES}, marks=slow),
    ],
)
def test_greedy_text_is_autoregressions(mesh_shape, options):
    options = {"variant": "few ids"} | options
    out = decoder(mesh_shape, **options).generate(PROMPTS, max_new_tokens=NEW)
    assert out.tokens == autoregressive().generate(PROMPTS, max_new_tokens=NEW).tokens
    assert 0 < out.stats.nodes_accepted < out.stats.nodes_drafted  # or nothing was tested


def test_cache_and_features_are_a_fresh_prefills():
    """Those that were drafted with are forgotten, and a finished row's stay."""
    run = started(decoder((1, 1), 2, least=0.1, variant="few ids"), PROMPTS)
    for _ in range(4):
        run.step()
    run.finish_row(1)
    kept = run.state
    length, absorbed = (np.asarray(x).copy() for x in (kept.length, kept.absorbed))
    row = [x.copy() for x in head_entries(kept, 1)]
    for _ in range(3):
        run.step()
    ends = {0: np.asarray(run.state.length)[0], 1: length[1]}
    starts = {0: np.asarray(run.state.absorbed)[0], 1: absorbed[1]}
    for b in ends:
        text = np.asarray(run.state.tokens)[b, : ends[b]].tolist()
        fresh = started(run.decoder, [text, *PROMPTS[1:]])
        *ours, known = head_entries(run.state, b)
        *theirs, true = head_entries(fresh.state, 0)
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x[:, : starts[b]], y[:, : starts[b]], atol=1e-12)
        np.testing.assert_allclose(known[: ends[b]], true[: ends[b]], atol=1e-12)
    np.testing.assert_array_equal(head_entries(run.state, 1)[-1], row[-1])


def head_entries(state, b):
    """Of one row: keys and values of the head, [K, S, H] each, and features, [S + 1, D]."""
    rows = len(state.length)
    kv = [x[b::rows] for x in entries(state.draft.cache)]
    return [*kv, np.asarray(state.draft.known)[b]]


@slow
def test_sampled_sequences_follow_the_base(tmp_path):
    tiny = es.ModelConfig(
        vocab_size=6, embed_dim=8, mlp_dim=12, num_layers=3, num_heads=2, num_kv_heads=1,
        head_dim=4, max_len=32,
    )  # fmt: skip
    base = es.random_model(tiny, es.make_mesh(1, 1), dtype="float32", seed=1)
    drafts = es.EagleDrafter.load(write_published(tmp_path, tiny, [0, 2, 3, 5]), base)
    decoding = es.Decoder(base, drafts, num_draft_tokens=2, tree_width=3)
    out = many_rows(decoding, FILTERED)
    assert surprise(map(tuple, out.tokens), enumerate_sequences(base, (3, 1), FILTERED)) < 5
    assert out.stats.nodes_accepted


@slow
def test_requests_compile_once_and_the_state_is_donated():
    decoding = decoder(variant="few ids")
    decoding.generate(PROMPTS, max_new_tokens=NEW)
    compiled = compilations()
    decoding.generate([[5] * 12, [4], [9, 9]], max_new_tokens=NEW - 3)
    assert compilations() == compiled
    run = started(decoding, PROMPTS)
    state = run.state
    run.finish()
    assert all(x.is_deleted() for x in jax.tree.leaves(state.draft))


@slow
def test_it_drafts_for_a_middle_with_the_middles_features():
    """A base that agrees with the middle accepts whole buffers: the middle must catch up."""
    base = model((1, 1))
    drafts = es.PolybasicDrafter(base, drafter(), mu=3)
    assert drafts.taps == ()
    decoding = es.Decoder(base, drafts, num_draft_tokens=6)
    run = started(decoding, PROMPTS)
    for _ in range(3):
        run.step()
    stage = jax.device_get(run.state.draft.stage)
    for b, text in enumerate(np.asarray(stage.tokens)):
        end = int(stage.length[b])
        fresh = started(decoder(), [text[:end].tolist()])
        known = np.asarray(stage.draft.known)[b, :end]
        true = np.asarray(fresh.state.draft.known)[0, :end]
        np.testing.assert_allclose(known, true, atol=1e-12)
    for _ in range(NEW):
        run.step()
    want = autoregressive().generate(PROMPTS, max_new_tokens=NEW).tokens
    assert new_tokens(run) == want
    assert decoding.drafter.report(run.state.draft)["middle_catch_up_passes"] > 0


def test_its_memory_counts_the_head_and_not_the_bases_embedding():
    budget = decoder().memory(2, 8, max_new_tokens=NEW)
    head = drafter().head
    own = jax.tree.leaves(head.replace(embedding=None))
    assert budget["draft weights"] == sum(x.nbytes for x in own)
    assert budget["draft cache"] > 0


@pytest.mark.parametrize("how", [None, CODES])
def test_it_is_planned_from_shapes(tmp_path, how):
    base = es.abstract_model(CONFIG, es.make_mesh(4, 2), dtype="float64")
    drafts = es.EagleDrafter.load(head_folder(tmp_path)[0], base, quantization=how)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)  # noqa: E731
    assert shapes(drafts.head) == shapes(drafter((4, 2), quantization=how).head)
    decoding = es.Decoder(base, drafts, num_draft_tokens=3)
    assert decoding.memory() == decoder((4, 2), quantization=how).memory()


def is_codes(x):
    return isinstance(x, Quantized)


def as_floats(x):
    return np.asarray(dequantise(x) if is_codes(x) else x)


@pytest.mark.parametrize(
    ("gpus", "how"),
    [
        (False, es.Quantization("int8")),
        (True, es.Quantization("int8", lm_head="float")),
        (True, es.Quantization("int4", 2, minimum_dtype="float16")),
    ],
)
def test_its_matrices_may_be_codes(tmp_path, monkeypatch, gpus, how):
    """GPUs keep them, CPUs floats: those of a head whose matrices were rounded before."""
    monkeypatch.setattr(es.sharding, "has_gpus", lambda mesh: gpus)
    base = es.random_model(CONFIG, es.make_mesh(1, 1), dtype="float64")
    folder, tensors, _ = head_folder(tmp_path / "plain", "embed_residual")
    before = dict(tensors)
    for name, x in tensors.items():
        in_head, top = "o_proj" in name, "lm_head" * name.startswith("lm_head")
        size = H if in_head else x.shape[-1]
        form = how.form(size, in_head=in_head, top=top) if x.ndim > 1 else None
        if form is not None:
            before[name] = as_floats(quantise(jnp.asarray(x), (1,), form))
    rounded = write_head(tmp_path / "rounded", before, read_object(folder / "config.json"))
    want = es.EagleDrafter.load(rounded, base).head
    found = es.EagleDrafter.load(folder, base, quantization=how).head
    leaves = jax.tree.leaves(found, is_leaf=is_codes)
    assert any(map(is_codes, leaves)) == gpus
    for mine, theirs in zip(leaves, jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(as_floats(mine), theirs, rtol=1e-12)
    with pytest.raises(ValueError, match="group_size 7 does not divide the 24 inputs"):
        es.EagleDrafter.load(folder, base, quantization=es.Quantization("int4", 7))


def test_codes_are_rounded_from_what_is_stored(tmp_path):
    """Not from that in the model's own, coarser type."""
    codes = es.Quantization("int8", keep_codes=True)
    base = es.random_model(CONFIG, es.make_mesh(1, 1), dtype="bfloat16")
    folder, tensors, _ = head_folder(tmp_path)
    head = es.EagleDrafter.load(folder, base, quantization=codes).head
    assert head.model.dtype == jnp.bfloat16
    for found, name in ((head.fc, "fc"), (head.model.params.lm_head, "lm_head")):
        w = jnp.asarray(tensors[f"{name}.weight"])
        want = quantise(w, (1,), codes.form(w.shape[1]))
        np.testing.assert_array_equal(found.codes, want.codes.T)


def test_what_is_read_must_fit_beside_the_head(tmp_path, monkeypatch):
    """Codes are a fraction of it."""
    base, folder = model((1, 1)), head_folder(tmp_path)[0]
    size = device_bytes(es.EagleDrafter.load(folder, base, quantization=CODES).head.fc)
    monkeypatch.setattr(es.memory, "device_memory", lambda mesh: 20 * size)
    with pytest.raises(ValueError, match=r"needs .* \(head weights .*, reading .*free"):
        es.EagleDrafter.load(folder, base, quantization=CODES)


def test_the_rows_of_a_base_of_codes_are_rounded_once(tmp_path):
    codes = es.Quantization("int8", keep_codes=True)
    base = es.random_model(CONFIG, es.make_mesh(1, 1), dtype="float64", quantization=codes)
    folder, tensors, _ = head_folder(tmp_path, "the base's head")
    ids = np.arange(KNOWN) + tensors["d2t"]
    for how in (None, codes):
        head = es.EagleDrafter.load(folder, base, quantization=how).head.model.params.lm_head
        rows = as_floats(base.params.lm_head)[:, ids]
        np.testing.assert_allclose(as_floats(head), rows, rtol=1e-12)


def test_it_may_lie_in_shards(tmp_path):
    folder, tensors, _ = head_folder(tmp_path)
    whole, names = es.EagleDrafter.load(folder, model((1, 1))), sorted(tensors)
    (folder / "model.safetensors").unlink()
    placed = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{i}.safetensors")
        placed |= dict.fromkeys(part, f"part-{i}.safetensors")
    write_object(folder / "model.safetensors.index.json", {"weight_map": placed})
    found = es.EagleDrafter.load(folder, model((1, 1)))
    jax.tree.map(np.testing.assert_array_equal, found.head, whole.head)


@slow
def test_a_session_goes_on():
    decoding = decoder((1, 1), 2, least=0.1, variant="few ids")
    session = es.Session(max_len=60)
    text = PROMPTS[0]
    for new in ([], [4, 9], [33]):
        text = [*text, *new]
        got = joined(decoding.stream(text, max_new_tokens=9, session=session))
        assert got == autoregressive().generate([text], max_new_tokens=9).tokens[0]
        text += got


def test_what_is_no_head_of_this_base_is_refused_in_a_sentence(tmp_path):
    base = model((1, 1))
    load = lambda: es.EagleDrafter.load(tmp_path, base)  # noqa: E731
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load()
    tensors, config = random_tensors(CONFIG), layer_config(CONFIG)

    def refused(match, fields=None, /, **changes):
        write_head(tmp_path, {k: x for k, x in (tensors | changes).items() if x is not None},
                   config | (fields or {}))  # fmt: skip
        with pytest.raises(ValueError, match=match):
            load()

    key = "eagle_aux_hidden_state_layer_ids"
    refused("trained for a width of 99, this base has 24", {"target_hidden_size": 99})
    refused("trained for a vocabulary of 99, this base has 61", {"vocab_size": 99})
    refused(r"taps layers \[1, 2, 9\] of its base, but this one has 3", {key: [1, 2, 9]})
    refused(r"fc.weight is \[24, 72\] instead of \[24, 48\]", {key: [1, 2]})
    refused("one layer, this one 2", {"num_hidden_layers": 2})
    refused("hidden_act='gelu'", {"hidden_act": "gelu"})
    refused("of kind 'eagle'", {"speculators_model_type": "eagle"})
    refused("eagle_config is no object", {"eagle_config": [1]})
    refused("layer_config is no object", {"speculators_model_type": "eagle3"})
    refused("norms every tap by itself", {"fc_norm": True})
    refused("last hidden state alone", {"eagle_config": {"use_aux_hidden_state": False}})
    refused("it lacks fc.weight", **{"fc.weight": None})
    refused("holds lm_head.bias, which is no part", **{"lm_head.bias": np.zeros(3)})
    refused("lacks d2t", d2t=None)
    refused("names id 61, outside", d2t=np.full(KNOWN, CONFIG.vocab_size - KNOWN + 1))
    refused("names an id twice", d2t=-np.arange(KNOWN))
    refused("of type float64, no whole numbers", d2t=np.zeros(KNOWN))
    refused("not finite", **{"norm.weight": np.full(CONFIG.embed_dim, np.nan)})
    refused("no floats", **{"norm.weight": np.zeros(CONFIG.embed_dim, np.int32)})
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle, and pickles are never"):
        load()
    with pytest.raises(ValueError, match="is no folder"):
        es.EagleDrafter.load(tmp_path / "nowhere", base)
    with pytest.raises(ValueError, match="a head is needed"):
        es.EagleDrafter(base)


def test_what_cannot_be_paired_is_refused_in_a_sentence():
    drafts = drafter()
    other = model((1, 1), config=dataclasses.replace(CONFIG, vocab_size=64))
    with pytest.raises(ValueError, match="width 24 and 61 ids, but this one has 24 and 64"):
        es.Decoder(other, drafts)
    with pytest.raises(ValueError, match="knows 40 ids: tree_width must be no more, got 41"):
        es.Decoder(model((1, 1)), drafts, tree_width=41)
    with pytest.raises(ValueError, match="different meshes"):
        es.Decoder(model((1, 8)), drafts)
    far = es.EagleDrafter(drafts.head.replace(taps=(1, 2, 4)))
    with pytest.raises(ValueError, match=r"before layer 4, .* has 3 layers: taps are .* 0 \.\. 3"):
        es.Decoder(model((1, 1)), far)
    with pytest.raises(ValueError, match=r"inner drafter, with .*before layer 4"):
        es.Decoder(model((1, 1)), es.PolybasicDrafter(model((1, 1)), far, mu=2), num_draft_tokens=4)
    with pytest.raises(ValueError, match="candidates must be one of"):
        es.EagleDrafter(drafts.head, candidates="all")


def test_without_taps_nothing_is_tapped():
    inputs = es.request.make_inputs(CONFIG, [[1, 2]], 4)
    draft = es.LayerParallelDrafter(model((1, 1), group_size=GROUPS))
    for drafts, tapped in ((drafter(), True), (draft, False)):
        decoding = es.Decoder(model((1, 1)), drafts, num_draft_tokens=3)
        text = lowered_loop(decoding, inputs)[0].as_text()
        assert (f"tensor<1x4x{len(TAPS)}x{CONFIG.embed_dim}xf64>" in text) == tapped
