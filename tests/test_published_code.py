"""The rule of the published code: its exact sums are what it draws, and only ours keeps p."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import model, surprise
from test_distribution import PAIR, TINY, many_rows

import easyspec_jax as es
from easyspec_jax import verify
from easyspec_jax.sampling import make_filters

HOT = es.Sampling(temperature=0.8)


@pytest.fixture
def script(monkeypatch):
    """experiments/published_code.py."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "experiments")
    return importlib.import_module("published_code")


def test_only_our_rule_keeps_p_on_a_small_vocabulary(script):
    """One tree of the likeliest candidates, 3 wide and 2 deep, of six ids."""
    draw = np.random.default_rng(0)
    p, q = (draw.dirichlet(np.ones(6), (1, n)).astype(np.float32) for n in (7, 4))
    first = np.argsort(-q[0, 0])[:3]
    reached = q[0, 0, first][:, None] * q[0, 1:]
    second = np.argsort(-reached, axis=None)[:3]
    proposal = es.Proposal(
        tokens=jnp.asarray(np.concatenate((first, second % 6)), jnp.int32)[None],
        parents=jnp.asarray([-1, -1, -1, *second // 6], jnp.int32)[None],
        valid=jnp.ones((1, 6), bool),
        probs=jnp.asarray(q),
        depth=2,
    )
    filters, scores = make_filters(es.Sampling(temperature=1.0)), jnp.log(p)

    def drawn(rule, proposal):
        """First tokens of 4096 steps."""

        def token(key):
            verdict = rule(scores, proposal, filters, key)
            child = proposal.tokens[0, verdict.path[0, 0]]
            return jnp.where(verdict.num_accepted[0] > 0, child, verdict.next_token[0])

        keys = jax.random.split(jax.random.key(3), 4096)
        return np.asarray(jax.jit(jax.vmap(token))(keys)).tolist()

    base, found = p[0, 0], np.asarray(script.first_token(jnp.asarray(p), proposal))[0]
    assert np.abs(found - base).sum() / 2 > 0.1
    assert surprise(drawn(script.accept_as_published, proposal), dict(enumerate(found))) < 5
    ours = drawn(verify.accept_path, proposal.replace(probs=None))
    assert surprise(ours, dict(enumerate(base))) < 5


@pytest.mark.slow
def test_what_is_summed_is_what_is_decoded(script):
    base = model((1, 1), config=TINY, seed=1, dtype="float32")
    draft = model((1, 1), config=TINY, seed=2, group_size=PAIR, dtype="float32")
    drafter = script.PublishedDrafter(draft, temperature=0.8)
    decoder = es.Decoder(base, drafter, num_draft_tokens=2, tree_width=3)
    found, p = script.two_tokens(decoder, [3, 1], 0.8)
    np.testing.assert_allclose([found.sum(), p.sum()], 1, atol=1e-5)
    assert np.abs(found - p).sum() / 2 > 0.1
    with script.as_published():
        drawn = np.array(many_rows(decoder, HOT).tokens)[:, :2]
    for table, fits in ((found, True), (p, False)):
        cells = {pair: table[pair] for pair in np.ndindex(p.shape)}
        assert (surprise(map(tuple, drawn.tolist()), cells) < 5) == fits
