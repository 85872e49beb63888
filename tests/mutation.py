"""Break a function on purpose, to see that a test notices."""

import inspect
import textwrap


def mutate(monkeypatch, module, name, old, new):
    """Replace `module.name` by itself with `old` in its source as `new`; `old` must be there."""
    source = textwrap.dedent(inspect.getsource(getattr(module, name)))
    assert source.count(old) == 1, f"{name} no longer says {old!r} once: adapt the mutation"
    scope = dict(vars(module))
    exec("from __future__ import annotations\n" + source.replace(old, new), scope)
    monkeypatch.setattr(module, name, scope[name])
