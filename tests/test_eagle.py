"""EAGLE-3 heads: the published equations in numpy, lossless text, features that are the base's."""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import CONFIG, NEW, PROMPTS, autoregressive, fresh_cache, model, started
from eagle_heads import draft_logits, layer_config, random_tensors, write_head

import easyspec_jax as es

slow = pytest.mark.slow
TAPS = (2, 1, 3)


@functools.cache
def drafter(mesh_shape=(1, 1), *, known=40, seed=0, candidates="sampled", **kinds):
    base = model(mesh_shape)
    config = layer_config(CONFIG, known, eagle_aux_hidden_state_layer_ids=list(TAPS))
    with tempfile.TemporaryDirectory() as folder:
        tensors = random_tensors(CONFIG, known, seed=seed, **kinds)
        write_head(pathlib.Path(folder), tensors, config)
        return es.EagleDrafter.load(folder, base, candidates=candidates)


@functools.cache
def decoder(mesh_shape=(1, 1), gamma=3, width=1, **options):
    more = {k: options.pop(k) for k in ("min_draft_probability",) if k in options}
    base = model(mesh_shape)
    drafts = drafter(mesh_shape, **options)
    return es.Decoder(base, drafts, num_draft_tokens=gamma, tree_width=width, **more)


def streams(base, tokens, taps=TAPS):
    """The base's residual stream before layers, [T, taps, D], of one text; layer by layer."""
    tokens = jnp.asarray([tokens], jnp.int32)
    cache = fresh_cache(base, 1, tokens.shape[1])
    step = es.model.make_step(base, cache, tokens.shape[1])
    found = [es.model.embed(base, tokens)]
    for i, kv in enumerate(cache.blocks):
        found.append(es.model.run_blocks(base, found[-1], (kv,), step, first=i)[0])
    return np.stack([np.asarray(found[i])[0] for i in taps], axis=1)


def test_a_chain_is_what_the_equations_say():
    """Greedy levels, each given the tokens that were drafted before it."""
    run = started(decoder(gamma=4), [PROMPTS[0]])
    tensors = random_tensors(CONFIG, 40)
    base = model((1, 1))
    table = np.asarray(base.params.embed)
    for _ in range(3):
        text = np.asarray(run.state.tokens)[0, : int(run.state.length[0])]
        proposal = proposed(run)
        drafted = np.asarray(proposal.tokens)[0].tolist()
        logits = draft_logits(tensors, table, text, drafted, streams(base, text)[:-1])
        assert logits.argmax(axis=-1)[:-1].tolist() == drafted
        run.step()


def proposed(run):
    """What the drafter proposes in a run's state, and its own state then."""
    return _proposed(run.decoder.drafter, run.request, run.state)


@es.sharding.mesh_jit()
def _proposed(drafter, request, state):
    recent = es.loop.window(state.tokens, state.absorbed, request.num_draft_tokens + 1)
    num = state.length - state.absorbed
    cache, key = state.cache.rollback(state.length - 1), jax.random.key(0)
    return drafter.propose(state.draft, request, cache, recent, state.absorbed, num, key)[0]


def test_greedy_text_is_autoregressions():
    out = decoder().generate(PROMPTS, max_new_tokens=NEW)
    assert out.tokens == autoregressive().generate(PROMPTS, max_new_tokens=NEW).tokens
    assert out.stats.nodes_drafted
