"""Codes and scales of a source as a checkpoint has them: moved, never rounded.

A source says of every matrix which form its codes have, or why a checkpoint has none like it. A
checkpoint has one form for the matrices of all layers, and embedding and head in that form or as
floats; where that is not so the whole model becomes floats, and a sentence says why.
"""

from __future__ import annotations

from typing import TypeGuard

import numpy as np

from convert.tensors import Source, check_finite, check_rows, half_range, model_parts, rows_of
from easyspec_jax.checkpoint import TOP_PART
from easyspec_jax.quantized import KINDS, PER_OUTPUT, Form, Quantization, Quantized
from easyspec_jax.weights import EMBED, HEAD, Weight, form_of


def kept(source: Source) -> tuple[Quantization | None, str]:
    """How a checkpoint stores the codes of a source, None where they become floats; and what to say
    of it, "" where the source has none.
    """
    layers: dict[str, Form | str | None] = {}
    top: dict[str, Form | str | None] = {}
    for part, weights in model_parts(source.config):
        for name, weight in weights.items():
            if weight.inputs:
                (top if part == TOP_PART else layers)[name] = source.form(name)
    if {*layers.values(), *top.values()} == {None}:
        return None, ""
    # The one whose form all should have: with minima if any has, which those without can be given.
    first = next((n for n, one in layers.items() if _has_minima(one)), next(iter(layers)))
    form = layers[first]
    odd = next((n for n, one in layers.items() if isinstance(one, str)), None)
    odd = odd or next((n for n, one in layers.items() if not _alike(one, form)), None)
    if odd is not None or not isinstance(form, Form):
        odd = odd or first
        reason = f"{source.label(odd)} {_described(layers[odd])}"
        if not isinstance(layers[odd], str) and odd != first:
            reason += f", {source.label(first)} {_described(form)}"
        return None, f"{source.codes} become floats: {reason}"
    same = {name for name, one in top.items() if _alike(one, form)}
    alike = [one for one in (layers | top).values() if _alike(one, form)]
    how = Quantization(
        form.kind,
        PER_OUTPUT if form.group is None and form.kind == "int4" else form.group,
        embed="layers" if EMBED.hf in same else "float",
        lm_head=None if HEAD.hf not in top else "layers" if HEAD.hf in same else "float",
        scale_dtype=_common({one.scale_dtype for one in alike}),
        minimum_dtype=_common({one.minimum_dtype for one in alike}),
    )
    line = f"{source.codes} stay codes and scales"
    for name, one in top.items():
        if name not in same and one is not None:
            line += f"; {source.label(name)} {_described(one)} and becomes floats"
    return how, line


def _has_minima(one: Form | str | None) -> TypeGuard[Form]:
    return isinstance(one, Form) and one.minimum_dtype is not None


def _common(names: set[str | None]) -> str | None:
    """The type that holds numbers of these: float32 where there are several."""
    return names.pop() if len(names) == 1 else "float32"


def _alike(one: Form | str | None, other: Form | str | None) -> TypeGuard[Form]:
    """Whether codes are of one kind in groups of one size, whatever the type of scales, and can be
    given minima if the other has them: only products with scales of 16 bits are exact.
    """
    if not isinstance(one, Form) or not isinstance(other, Form) or one[:2] != other[:2]:
        return False
    if not _has_minima(other):
        return not _has_minima(one)
    return _has_minima(one) or one.scale_dtype != "float32"


def _described(form: Form | str | None) -> str:
    """What a source says of a matrix, behind its name."""
    if isinstance(form, str):
        return form
    if form is None:
        return "is stored as floats"
    group = "every output" if form.group is None else f"{form.group} inputs"
    shared = "a scale" if form.minimum_dtype is None else "a scale and a minimum"
    return f"is {form.kind} with {shared} for {group}"


def read_codes(source: Source, tensor: str, weight: Weight, how: Quantization) -> Quantized:
    """A matrix as a checkpoint of `kept` codes has it, from a tensor of the source.

    Raises:
      ValueError: a number is not finite, or there are fewer or more rows than outputs.
    """
    config = source.config
    form, found = form_of(weight.name, weight.inputs, config, how), source.form(tensor)
    assert isinstance(form, Form) and isinstance(found, Form)
    shape = weight.shape(config)
    inputs = [weight.dims.index(letter) for letter in weight.inputs]
    sizes = [1 if i in inputs else size for i, size in enumerate(shape)]
    if form.group is not None:
        sizes = [*shape]
        sizes[inputs[-1]] //= form.group
    codes = np.empty(shape, np.dtype(KINDS[form.kind][0]))
    scales = np.empty(sizes, np.dtype(form.scale_dtype))
    minima = None if form.minimum_dtype is None else np.empty(sizes, np.dtype(form.minimum_dtype))
    code_rows, scale_rows = rows_of(codes, weight), rows_of(scales, weight)
    # A group of the source may span heads, and those of a checkpoint do not.
    times = 1 if form.group is None or found.group is None else found.group // form.group
    start = 0
    for rows in source.coded(tensor):
        stop = start + len(rows.codes)
        check_finite(source, tensor, rows.dequantised())
        if stop <= len(code_rows):
            if minima is not None:
                rows = rows if rows.minima is not None else rows.from_zero(form.kind)
                assert rows.minima is not None
                rows_of(minima, weight)[start:stop] = np.repeat(rows.minima, times, axis=1)
                rows = rows._replace(codes=rows.codes.astype(np.int16) - half_range(form.kind))
            code_rows[start:stop] = rows.codes.astype(codes.dtype, copy=False)
            scale_rows[start:stop] = np.repeat(rows.scales, times, axis=1)
        start = stop
    check_rows(source, tensor, start, len(code_rows))
    return Quantized(codes, scales, minima, form.group)
