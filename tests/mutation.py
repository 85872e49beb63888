"""Break a function on purpose, to see that a test notices."""

import inspect
import textwrap

from easyspec_jax import tree


def mutate(monkeypatch, module, name, old, new):
    """Replace `module.name` by itself with `old` in its source as `new`; `old` must be there."""
    source = textwrap.dedent(inspect.getsource(getattr(module, name)))
    assert source.count(old) == 1, f"{name} no longer says {old!r} once: adapt the mutation"
    scope = dict(vars(module))
    exec("from __future__ import annotations\n" + source.replace(old, new), scope)
    monkeypatch.setattr(module, name, scope[name])


# Wrong ways to accept nodes of a tree: {(kind of nodes, what is wrong): (function, old, new)}.
BROKEN_RULES = {
    ("chosen", "no renormalisation"): ("_pass_chosen", "u * jnp.maximum(1.0 - removed, 0.0)", "u"),
    ("chosen", "too easily"): ("_pass_chosen", "< p_x", "< 1.3 * p_x"),
    ("chosen", "nothing removed"): ("_without_children", "set(0.0, mode", "add(0.0, mode"),
    ("drawn", "too easily"): ("_reject_children", "jnp.minimum(left_x", "jnp.minimum(1.3 * left_x"),
    ("drawn", "no renormalisation"): ("_reject_children", "share_x, tiny", "share_x * q_sum, tiny"),
    ("drawn", "q keeps its token"): ("_reject_children", "there[..., None] & (ids == x)", "False"),
    ("drawn", "no residual"): ("_reject_children", "rest / total[..., None], left)", "left, left)"),
}  # fmt: skip


def repeat_siblings(monkeypatch):
    """The second child of every node has the token of the first."""
    largest = tree.largest

    def repeating(x, k):
        top, index = largest(x, k)
        return top, index.at[..., 1].set(index[..., 0])

    monkeypatch.setattr(tree, "largest", repeating)
