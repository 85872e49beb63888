"""What choosing a depth adds to the programs that GPUs would run.

Needs jax's CUDA plugin: pip install -e '.[programs]'. Nothing is run.
"""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from test_gpu_program import CASES, CONFIGS

import easyspec_jax as es
from easyspec_jax import loop
from easyspec_jax.program import hlo, target
from easyspec_jax.program.report import compile_program, read_program
from easyspec_jax.request import make_inputs
from easyspec_jax.sources import read_config

pytestmark = [
    pytest.mark.gpu_program,
    pytest.mark.skipif(not target.is_installed(), reason="needs jax's CUDA plugin"),
]
CHOICE = 10  # launches of learning and choosing, and of asking whether to catch up


def test_each_depth_is_the_step_of_that_depth_and_a_choice():
    """Beside the pass that catches up, which stands in a loop of its own; nothing is copied."""
    case, mesh = CASES["8B + 1B, two tokens"], target.make_mesh("h200", 1, 1)

    def model(which, **options):
        config = read_config(CONFIGS / f"{which[0]}.json")[0]
        config = dataclasses.replace(config, num_layers=which[1])
        return es.abstract_model(config, mesh, dtype="bfloat16", **options)

    base = model(case.base)
    drafter = es.LayerParallelDrafter(model(case.draft, group_size=4, layout="grouped"))
    auto = es.AutoDepth(most=2, costs=(1, 1.1, 1.2))
    with jax.default_matmul_precision("default"), jax.enable_x64(False):
        decoder = es.Decoder(base, drafter, num_draft_tokens=auto)
        inputs = make_inputs(base.config, np.zeros((1, 1), np.int32), 1)
        request, state = decoder.planned(inputs, 2048)
        lowered = loop.run_loop.lower(base, drafter, request, state)
        module = hlo.parse(compile_program(lowered, decoder, decoder.num_nodes + 1).hlo)
        fixed = [
            read_program(es.Decoder(base, drafter if n else None, num_draft_tokens=n or None))
            for n in range(3)
        ]
    found, launches, catching_up = hlo.whole(module), collections.Counter(), collections.Counter()
    for one in found:
        if one.counts and len(one.loops) > 1:  # of the loop of all, that of a depth
            launches[one.loops[1].name] += one.times
            catching_up[one.loops[1].name] += one.times * (len(one.loops) > 2)
    steps = sorted(n - catching_up[name] for name, n in launches.items())
    assert len(steps) == 3
    for mine, plain in zip(steps, fixed, strict=True):
        assert 0 < mine - plain.step.launches <= CHOICE
    assert not any(one.op.kind == "conditional" for one in found)
    entry = min(x.size for x in jax.tree.leaves(state.draft.blocks))
    copies = [
        shape
        for op in module.ops()
        for kind, shape in hlo.copied(module, op)
        if kind in hlo.MOVES and shape.dtype == "bf16"
    ]
    assert not [shape for shape in copies if shape.elements >= entry]
