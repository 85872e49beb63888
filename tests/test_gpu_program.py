"""The programs that GPUs would run, compiled without one: launches a layer, bytes against what must
move, conditionals and copies, at the real width and a few layers.

Needs jax's CUDA plugin: pip install -e '.[programs]'. Nothing is run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import pathlib
import re
import struct

import jax
import pytest

import easyspec_jax as es
from easyspec_jax import attend
from easyspec_jax.cache import ONE_ARRAY
from easyspec_jax.program import target
from easyspec_jax.program.report import read_program
from easyspec_jax.sources import read_config

pytestmark = [
    pytest.mark.gpu_program,
    pytest.mark.skipif(not target.is_installed(), reason="needs jax's CUDA plugin"),
]
CONFIGS = pathlib.Path(__file__).parents[1] / "experiments" / "configs"


@dataclasses.dataclass(frozen=True)
class Bound:
    """At most so many launches a layer, and bytes for each that must move."""

    per_layer: float
    ratio: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A pair of few layers, and the bounds of its phases: what holds, to be tightened with it."""

    base: tuple[str, int]  # a configuration, and how many layers of it
    draft: tuple[str, int] | None = None
    mesh: tuple[int, int] = (1, 1)
    num_draft_tokens: int = 5
    phases: dict[str, Bound]


CASES = {
    "8B": Case(base=("llama3-8b", 2), phases={"verify": Bound(13.0, 1.005)}),
    "8B + 1B": Case(
        base=("llama3-8b", 2),
        draft=("llama3.2-1b", 6),
        phases={
            "calibrate": Bound(15.0, 1.05), "draft": Bound(11.0, 1.01), "verify": Bound(15.0, 1.02)
        },
    ),
    # its level stands in the step itself, as a loop of one turn is none
    "8B + 1B, two tokens": Case(
        base=("llama3-8b", 2),
        draft=("llama3.2-1b", 4),
        num_draft_tokens=2,
        phases={
            "calibrate": Bound(15.8, 1.04), "draft": Bound(12.5, 1.01), "verify": Bound(15.0, 1.015)
        },
    ),
    "70B, 1 x 2": Case(base=("llama3-70b", 2), mesh=(1, 2), phases={"verify": Bound(15.5, 1.005)}),
    "70B + 8B, 4 x 2": Case(
        base=("llama3-70b", 2),
        draft=("llama3-8b", 6),
        mesh=(4, 2),
        phases={
            "calibrate": Bound(17.0, 1.09), "draft": Bound(10.2, 1.01), "verify": Bound(16.5, 1.04)
        },
    ),
}  # fmt: skip
# With one kernel of cuDNN for attention; keys and values are two arrays.
CUDNN = {
    "8B": {"verify": Bound(11.5, 1.002)},
    "8B + 1B": {
        "calibrate": Bound(13.0, 1.03), "draft": Bound(10.2, 1.005), "verify": Bound(13.5, 1.015)
    },
    "70B + 8B, 4 x 2": {
        "calibrate": Bound(15.5, 1.06), "draft": Bound(9.4, 1.005), "verify": Bound(15.0, 1.035)
    },
}  # fmt: skip
# Matrices of base and draft as codes, int4 in groups of 128: launches a layer beyond those in
# bfloat16, and bytes. Several rows that devices add up are made one array before, in int4.
Q4_1 = es.Quantization("int4", 32, None, "layers", "layers", "float16", "float16")
QUANTIZED = {
    ("8B", "int8", None): {"verify": Bound(1.0, 1.003)},
    ("8B", "fp8", None): {"verify": Bound(1.0, 1.003)},
    ("8B", "int4", None): {"verify": Bound(0.6, 1.004)},
    ("8B + 1B", "int8", None): {
        "calibrate": Bound(0.1, 1.05), "draft": Bound(0.6, 1.006), "verify": Bound(0.1, 1.03)
    },
    ("8B + 1B", "int4", None): {
        "calibrate": Bound(0.6, 1.04), "draft": Bound(0.8, 1.008), "verify": Bound(0.1, 1.02)
    },
    ("70B, 1 x 2", "int4", None): {"verify": Bound(1.0, 1.006)},
    ("70B + 8B, 4 x 2", "int8", None): {
        "calibrate": Bound(0.1, 1.1), "draft": Bound(1.4, 1.01), "verify": Bound(1.1, 1.06)
    },
    ("70B + 8B, 4 x 2", "int4", None): {
        "calibrate": Bound(2.6, 1.08), "draft": Bound(0.5, 1.01), "verify": Bound(2.1, 1.05)
    },
    # with minima, as GGUF has them
    ("8B", Q4_1, None): {"verify": Bound(0.6, 1.005)},
    ("8B + 1B", Q4_1, None): {
        "calibrate": Bound(0.1, 1.04), "draft": Bound(0.8, 1.008), "verify": Bound(1.0, 1.03)
    },
    # and caches: two updates for scales, a largest magnitude, a conversion
    ("8B + 1B", "int8", "int8"): {
        "calibrate": Bound(4.0, 1.1), "draft": Bound(3.0, 1.02), "verify": Bound(4.0, 1.04)
    },
}  # fmt: skip
COMMIT_LAUNCHES = 10
DRAW_LAUNCHES = 45  # temperature, top-k and top-p over 128256 tokens


@functools.cache
def program(name, attention="xla", quantization=None, kv_dtype=None):
    case = CASES[name]
    mesh = target.make_mesh("h200", *case.mesh)

    def model(which, **options):
        config, layers = read_config(CONFIGS / f"{which[0]}.json")[0], which[1]
        config = dataclasses.replace(config, num_layers=layers)
        options |= {"dtype": "bfloat16", "attention": attention}
        options |= {"quantization": quantization, "kv_dtype": kv_dtype}
        return es.abstract_model(config, mesh, **options)

    base, drafter = model(case.base), None
    if case.draft is not None:
        drafter = es.LayerParallelDrafter(model(case.draft, group_size=4, layout="grouped"))
    # As users have it, not as other tests do: products of bfloat16 are others then.
    with jax.default_matmul_precision("default"), jax.enable_x64(False):
        return read_program(es.Decoder(base, drafter, num_draft_tokens=case.num_draft_tokens))


def together(params):
    """One worker takes all that is asked of the programs of one name: it compiles them once."""
    params = [one if isinstance(one, tuple) else (one,) for one in params]
    return [pytest.param(*one, marks=pytest.mark.xdist_group(one[0])) for one in params]


PHASES = together((name, phase) for name, case in CASES.items() for phase in case.phases)


@pytest.mark.parametrize(("name", "phase"), PHASES)
def test_a_layer_is_few_launches(name, phase):
    found = program(name).phases[phase]
    apart = 0 if ONE_ARRAY else 1  # two updates of a cache
    assert found.layers and found.per_layer <= CASES[name].phases[phase].per_layer + apart


@pytest.mark.parametrize(("name", "phase"), PHASES)
def test_little_moves_beside_weights_and_caches(name, phase):
    found = program(name).phases[phase]
    assert 1 <= found.ratio <= CASES[name].phases[phase].ratio


@pytest.mark.parametrize("name", together(CUDNN))
def test_attention_as_one_kernel_is_less_of_both(name):
    found = program(name, "cudnn")
    for phase, bound in CUDNN[name].items():
        one, layers = found.phases[phase], found.phases[phase].layers
        assert one.per_layer <= bound.per_layer and 1 <= one.ratio <= bound.ratio
        assert one.parts["attention"].launches <= layers
        assert not {"scores", "softmax", "values", "cache copy"} & set(one.parts)
    assert found.total("conditionals") == found.total("copies") == 0
    assert found.graphs.host_syncs == 1


@pytest.mark.parametrize(("name", "kind", "kv"), together(QUANTIZED), ids=str)
def test_codes_are_read_once_and_never_become_floats_in_memory(name, kind, kv):
    attention = "cudnn" if kv is None else "xla"
    found, floats = (program(name, attention, *how) for how in ((kind, kv), (None, None)))
    for phase, bound in QUANTIZED[name, kind, kv].items():
        one = found.phases[phase]
        more = one.per_layer - floats.phases[phase].per_layer
        assert more <= bound.per_layer and 1 <= one.ratio <= bound.ratio
    assert found.total("conditionals") == found.total("copies") == 0
    if kv is None:
        weights = {key: n for key, n in found.budget.items() if key.endswith("weights")}
        bounds = {"int8": (0.49, 0.51), "fp8": (0.49, 0.51), "int4": (0.25, 0.43)}
        least, most = bounds[es.Quantization.of(kind).kind]
        shares = [n / floats.budget[key] for key, n in weights.items()]
        assert all(least < share < most for share in shares)


def test_all_layers_share_a_bias():
    """Made of the mask once a pass: bfloat16, of each token and entry."""
    config = dataclasses.replace(read_config(CONFIGS / "llama3-8b.json")[0], num_layers=3)
    mesh, texts = target.make_mesh("a100"), {}
    base = es.abstract_model(config, mesh, attention="cudnn")
    decoder = es.Decoder(base, es.PromptLookupDrafter(), num_draft_tokens=4)
    with jax.default_matmul_precision("default"), jax.enable_x64(False):
        read_program(decoder, batch=3, texts=texts)
    calls = re.findall(r'custom-call\((.*)\), custom_call_target="__cudnn.fmha', texts["hlo"])
    assert len(calls) == config.num_layers
    (bias,) = {call.split(", ")[3] for call in calls}
    heads = 3 * config.num_kv_heads
    assert re.search(rf"{re.escape(bias)} = bf16\[{heads},1,5,2048\]", texts["hlo"])


@pytest.mark.parametrize("name", together(CASES))
def test_no_conditional_and_no_copy_of_a_cache(name):
    assert program(name).total("conditionals") == program(name).total("copies") == 0


@pytest.mark.parametrize("name", together(CASES))
def test_a_step_is_launched_as_graphs(name):
    found = program(name)
    assert found.graphs.host_syncs == 1  # whether there is another step
    assert found.graphs.inside > found.graphs.launched_outside
    # the runtime launches what the program says, but for what it copies by itself
    launched = found.graphs.inside + found.graphs.launched_outside
    assert launched == pytest.approx(found.step.launches, rel=0.1)


@pytest.mark.parametrize("name", together(CASES))
def test_the_end_of_a_step_is_few_launches(name):
    assert program(name).phases["commit"].traffic.launches <= COMMIT_LAUNCHES


@pytest.mark.parametrize(
    ("name", "attention"),
    together([*((c, "xla") for c in CASES), *((c, "cudnn") for c in CUDNN)]),
)
def test_memory_is_within_the_budget(name, attention):
    found = program(name, attention)
    needed = found.memory["arguments"] + found.memory["temporaries"]
    assert needed <= 1.01 * sum(found.budget.values())


def test_parts_read_the_weights_that_they_are_named_after():
    d, f, v, heads = 4096, 14336, 128256, (32 + 2 * 8) * 128
    want = {"qkv": 2 * d * heads, "out": 2 * d * d, "gate, up": 4 * d * f, "down": 2 * d * f}
    found = program("8B").phases["verify"].parts
    for name, weights in (want | {"head": d * v}).items():
        assert found[name].read == pytest.approx(2 * weights, rel=0.01)
    updated = 2 * 2 * 8 * 128 * 2  # keys and values of two layers
    assert found["cache update"].written == updated
    entries = 2 * 2 * 8 * 2048 * 128 * 2
    assert found["scores"].read + found["values"].read == pytest.approx(entries, rel=0.1)
    assert found["sampling"].launches <= 2 and found["rest"].launches <= 6


def test_all_reduces_are_kernels_of_their_own():
    exchanges = [one for p in program("70B + 8B, 4 x 2").phases.values() for one in p.exchanges]
    sums = [one for one in exchanges if one.kind == "all-reduce"]
    assert sums
    if jax.__version_info__ < (0, 11):  # later programs do not say which kernel sums
        assert {one.kernel for one in sums} == {"TRITON_ONE_SHOT"}
    assert {one.devices for one in sums} == {2, 8}


def test_a_draw_is_few_launches_and_sorts_nothing():
    config = dataclasses.replace(read_config(CONFIGS / "llama3-8b.json")[0], num_layers=1)
    base = es.abstract_model(config, target.make_mesh("h200"), dtype="bfloat16")
    texts: dict[str, str] = {}
    sampling = es.Sampling(temperature=0.8, top_k=50, top_p=0.9)
    with jax.default_matmul_precision("default"), jax.enable_x64(False):
        found = read_program(es.Decoder(base), sampling=sampling, texts=texts)
    assert found.phases["verify"].parts["sampling"].launches <= DRAW_LAUNCHES
    assert not re.search(r" (sort|topk)\(", texts["hlo"])


@pytest.mark.parametrize(("width", "launches"), [(1, 21), (4, 111)])
def test_drawn_nodes_are_accepted_in_few_launches(width, launches):
    """Beside one draw: chains without a loop, of a tree five launches a node."""
    config = dataclasses.replace(read_config(CONFIGS / "llama3-8b.json")[0], num_layers=1)
    mesh = target.make_mesh("h200")
    base = es.abstract_model(config, mesh, dtype="bfloat16")
    drafter = es.LayerParallelDrafter(es.abstract_model(config, mesh, dtype="bfloat16"))
    decoder = es.Decoder(base, drafter, num_draft_tokens=5, tree_width=width)
    texts: dict[str, str] = {}
    sampling = es.Sampling(temperature=0.8, top_k=50, top_p=0.9)
    with jax.default_matmul_precision("default"), jax.enable_x64(False):
        found = read_program(decoder, sampling=sampling, texts=texts)
    parts = found.phases["verify"].parts
    assert parts["sampling"].launches + parts["rest"].launches <= DRAW_LAUNCHES + launches
    assert found.total("conditionals") == 0
    assert not re.search(r" sort\(.*/verify/", texts["hlo"])


def read_shallow(make_drafter, **options):
    """The program of four layers of 8B and what drafts for them."""
    config = dataclasses.replace(read_config(CONFIGS / "llama3-8b.json")[0], num_layers=4)
    base = es.abstract_model(config, target.make_mesh("h200"), dtype="bfloat16")
    with jax.default_matmul_precision("default"), jax.enable_x64(False):
        return read_program(es.Decoder(base, make_drafter(base), **options))


def test_an_early_exit_copies_no_cache_and_asks_only_whether_to_draw():
    found = read_shallow(lambda base: es.EarlyExitDrafter(base, exits=(1, 2, 3)))
    assert found.total("copies") == 0 == found.graphs.conditionals
    conditionals = {name: p.conditionals for name, p in found.phases.items() if p.conditionals}
    assert conditionals == {"draft": 1}  # inside of a graph: the head behind the last token
    assert found.phases["verify"].per_layer <= 13
    # of two exits behind the first, in each of four levels, and in verification; three windows
    assert found.graphs.host_syncs <= 1 + 5 + 4 * 2 * 2 + 2 * 2 + 2 + 2


def test_a_chain_of_models_copies_no_cache():
    def make(base):
        config = dataclasses.replace(read_config(CONFIGS / "llama3.2-1b.json")[0], num_layers=3)
        draft = es.abstract_model(config, base.layout.mesh, dtype="bfloat16", group_size=3)
        return es.PolybasicDrafter(base, es.LayerParallelDrafter(draft))

    found = read_shallow(make)
    assert found.total("copies") == found.total("conditionals") == 0
    assert found.phases["verify"].per_layer <= (15 if ONE_ARRAY else 16)
    assert found.graphs.host_syncs == 1 + 3 * 2  # two kinds of catching up, and the buffer's loop


def head_of_shapes(folder, c, num_ids):
    """An EAGLE-3 head for a base of this configuration, its file a hole but for its header."""
    d, heads, kv = c.embed_dim, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = {
        "fc.weight": (d, 3 * d), "norm.weight": (d,), "lm_head.weight": (num_ids, d),
        **{f"midlayer.{n}.weight": (d,) for n in
           ("input_layernorm", "hidden_norm", "post_attention_layernorm")},
        **{f"midlayer.self_attn.{n}_proj.weight": (rows, 2 * d) for n, rows in
           (("q", heads), ("k", kv), ("v", kv))},
        "midlayer.self_attn.o_proj.weight": (d, heads),
        "midlayer.mlp.gate_proj.weight": (c.mlp_dim, d),
        "midlayer.mlp.up_proj.weight": (c.mlp_dim, d),
        "midlayer.mlp.down_proj.weight": (d, c.mlp_dim),
    }  # fmt: skip
    about, end = {}, 0
    for name, shape in (*shapes.items(), ("d2t", (num_ids,))):
        size = math.prod(shape) * (8 if name == "d2t" else 2)
        kind = "I64" if name == "d2t" else "BF16"
        about[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(about).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    config = json.loads((CONFIGS / "llama3-8b.json").read_text())
    config |= {"num_hidden_layers": 1, "draft_vocab_size": num_ids}
    config["eagle_aux_hidden_state_layer_ids"] = [1, 2, 3]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("kind", "most"), [(None, 1.03), ("int8", 1.05)])
def test_a_level_of_a_head_is_few_launches_and_little_beside_its_weights(tmp_path, kind, most):
    """As published for 8B: 32,000 ids."""

    def make(base):
        folder = head_of_shapes(tmp_path, base.config, 32_000)
        return es.EagleDrafter.load(folder, base, quantization=kind)

    found = read_shallow(make, num_draft_tokens=5)
    assert found.total("copies") == found.total("conditionals") == 0
    calibrate, level = found.phases["calibrate"], found.phases["draft"]
    assert calibrate.ratio < most and level.ratio < 1.01 and level.runs == 4
    assert calibrate.traffic.launches <= 31 and level.traffic.launches <= 25


def test_a_dot_in_place_of_a_multiply_and_sum_is_another_program():
    config = dataclasses.replace(read_config(CONFIGS / "llama3-8b.json")[0], num_layers=2)
    base = es.abstract_model(config, target.make_mesh("h200"), dtype="bfloat16", attention="xla")
    base = base.replace(layout=dataclasses.replace(base.layout, explicit_gemv=False))
    with jax.default_matmul_precision("default"), jax.enable_x64(False):
        found = read_program(es.Decoder(base)).phases["verify"]
    assert found.per_layer >= program("8B").phases["verify"].per_layer + 2


def test_no_logits_travel():
    """Of the greedy choice only a few numbers of each device."""
    exchanges = [one for p in program("70B + 8B, 4 x 2").phases.values() for one in p.exchanges]
    assert max(one.bytes for one in exchanges) <= 4 * 6 * 8192 * 2  # a group's attentions
    assert {one.kind for one in exchanges} == {"all-reduce"}


def shallow(folder):
    config = json.loads((CONFIGS / "llama3-8b.json").read_text()) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_command_prints_the_program_and_writes_its_texts(easyspec, tmp_path):
    shallow(tmp_path)
    files = ("--hlo", tmp_path / "hlo", "--thunks", tmp_path / "thunks")
    status, out, err = easyspec(
        "program", tmp_path, "--device", "h100", "--dtype", "bfloat16", *files
    )
    assert (status, err) == (0, "")
    assert "NVIDIA H100, layer 1 x tensor 1" in out and "no clock was read" in out
    assert "1 CUDA graphs a step" in out and "limit" in out
    assert (tmp_path / "hlo").read_text().startswith("HloModule jit_run_loop")
    assert "kCommandBuffer" in (tmp_path / "thunks").read_text()
    assert all(device.platform == "cpu" for device in jax.devices())


@pytest.mark.parametrize("given, launches", [((), 2), (("--attention", "xla"), 8)], ids=str)
def test_cudnn_attends_unless_the_command_says_otherwise(easyspec, tmp_path, given, launches):
    shallow(tmp_path)
    status, out, err = easyspec("program", tmp_path, *given, "--parts")
    assert (status, err) == (0, "")
    assert ("by one kernel of cuDNN" in out) == (not given)
    parts = re.findall(r"^(?:attention|scores|softmax|values) +(\d+) ", out, re.MULTILINE)
    assert sum(map(int, parts)) == launches


def test_without_cudnn_the_compiler_makes_xlas_kernels(monkeypatch, caplog):
    def missing(*args, **options):
        raise RuntimeError("cuDNN is not detected.\nLook elsewhere.")

    config = read_config(CONFIGS / "llama3-8b.json")[0]
    attend.why_not_cudnn.cache_clear()
    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    with caplog.at_level(logging.INFO, "easyspec_jax"):
        model = es.abstract_model(config, target.make_mesh("h200"))
    attend.why_not_cudnn.cache_clear()
    assert model.layout.attention == "xla"
    assert '(attention="cudnn" needs cuDNN (nvidia-cudnn-cu12): cuDNN is not' in caplog.text


def test_options_of_the_compiler_change_the_program(easyspec, tmp_path):
    shallow(tmp_path)
    status, out, err = easyspec("program", tmp_path, "--graphs", "loop")
    assert (status, err) == (0, "")
    assert "0 CUDA graphs a step" in out and "waits for the device 0 times" in out
    status, out, err = easyspec("program", tmp_path, "--compile-option", "xla_gpu_nothing=1")
    assert status == 1 and "no such option, or not of that value: xla_gpu_nothing" in err
