"""Training of heads: the forward pass against drafting as it goes, resuming, and the folder."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import easyspec_jax as es
from easyspec_jax.cli import train_head
from easyspec_jax.config import RopeScaling
from easyspec_jax.drafters.eagle_folder import describe
from easyspec_jax.training import train as training
from easyspec_jax.training.answers import check_prompts, loop_start, read_answers, write_answers
from easyspec_jax.training.features import FeatureSource, base_digest
from easyspec_jax.training.folder import head_config
from easyspec_jax.training.head import EMBED_RESIDUAL, run_head, start_head
from easyspec_jax.training.heldout import chains, walk
from easyspec_jax.training.packing import Answer, pack, texts_of
from easyspec_jax.training.train import Options, train

CONFIG = es.ModelConfig(
    vocab_size=31,
    embed_dim=16,
    mlp_dim=24,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_len=64,
)
TAPS = (1, 2, 3)
OPTIONS = Options(
    taps=TAPS,
    num_epochs=8,
    num_rows=2,
    row_length=40,
    learning_rate=0.05,
    held_out=3,
    checkpoint_minutes=0,
)


@functools.cache
def base(mesh_shape=(1, 1)):
    """A random base whose layers say little: its next token follows from the last one, mostly."""
    model = es.random_model(CONFIG, es.make_mesh(*mesh_shape), dtype="float64", seed=3)

    def hushed(block):
        attention = tuple(w.replace(wo=0.1 * w.wo) for w in block.attention)
        mlp = tuple(w.replace(w_down=0.1 * w.w_down) for w in block.mlp)
        return block.replace(attention=attention, mlp=mlp)

    blocks = tuple(map(hushed, model.params.blocks))
    return model.replace(params=model.params.replace(blocks=blocks))


@functools.cache
def answers(count=24):
    """The base's own, greedy and not, to prompts of several lengths."""
    draw = np.random.default_rng(0)
    found = []
    for temperature in (0.0, 1.0):
        prompts = [draw.integers(3, 31, 2 + i % 5).tolist() for i in range(count // 2)]
        said = es.Decoder(base()).generate(
            prompts, max_new_tokens=12, sampling=es.Sampling(temperature=temperature)
        )
        found += [Answer(p, a, temperature) for p, a in zip(prompts, said.tokens, strict=True)]
    return found


def random_head(embed_residual=True):
    """A head in float64 in which no part is zero or one."""
    draw = np.random.default_rng(1)
    sizes = np.ones((len(TAPS), CONFIG.embed_dim), np.float32)
    head = start_head(base(), sizes, embed_residual=embed_residual)
    return {name: x + 0.3 * draw.standard_normal(x.shape) for name, x in head.items()}


def norm(x, weight):
    return x / np.sqrt(np.mean(x * x) + CONFIG.norm_eps) * weight


def turn(x, position):
    """Rotary embedding of heads [n, H] at a position."""
    half = x.shape[-1] // 2
    angle = position * CONFIG.rope_theta ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


class Chain:
    """Drafting with a head, pair by pair, as equations say it; entries are kept like a cache."""

    def __init__(self, head):
        self.head, self.entries = head, []

    def pair(self, embedding, g, position):
        """The head's state behind one more pair."""
        head, h = self.head, CONFIG.head_dim
        e = norm(embedding, head["midlayer.input_layernorm.weight"])
        x = np.concatenate((e, norm(g, head["midlayer.hidden_norm.weight"])))
        q, k, v = (
            (x @ head[f"midlayer.self_attn.{name}_proj.weight"]).reshape(-1, h) for name in "qkv"
        )
        self.entries.append((turn(k, position), v))
        found = []
        for n, one in enumerate(turn(q, position)):
            group = n // CONFIG.num_groups
            scores = np.array([one @ keys[group] for keys, _ in self.entries]) / np.sqrt(h)
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            each = zip(shares, self.entries, strict=True)
            found.append(sum(s * values[group] for s, (_, values) in each))
        x = g + np.concatenate(found) @ head["midlayer.self_attn.o_proj.weight"]
        if EMBED_RESIDUAL in head:
            x = x + e @ head[EMBED_RESIDUAL]
        row = norm(x, head["midlayer.post_attention_layernorm.weight"])
        gate = row @ head["midlayer.mlp.gate_proj.weight"]
        up = row @ head["midlayer.mlp.up_proj.weight"]
        return x + (gate / (1 + np.exp(-gate)) * up) @ head["midlayer.mlp.down_proj.weight"]


@pytest.mark.parametrize("embed_residual", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_depth_sees_what_drafting_would_show_it(embed_residual):
    said = [Answer([3, 4, 5], [6, 7, 8, 9], 0.0), Answer([5], [4, 3, 9], 0.0)]
    texts = texts_of(said, [[0, 1], []], (16, 12))
    draw = np.random.default_rng(2)
    embedding = draw.standard_normal((2, 16, CONFIG.embed_dim))
    taps = draw.standard_normal((2, 16, len(TAPS) * CONFIG.embed_dim))
    head = random_head(embed_residual)
    run = jax.jit(functools.partial(run_head, num_depths=3), static_argnames="config")
    states = jax.device_get(run(head, CONFIG, texts, embedding, taps))
    checked = 0
    for a in np.flatnonzero(texts.since[0] >= 0):
        root, left = texts.query[0, a], np.sum(texts.since[0, a:] >= 0)
        first = root - texts.position[0, root]  # place of the sequence's first token
        chain = Chain(head)
        for place in range(first + 1, root + 1):  # all features that the base has by then
            g = taps[0, place - 1] @ head["fc.weight"]
            state = chain.pair(embedding[0, place], g, place - first)
        for depth in range(min(3, left)):
            if texts.since[0, a + depth] != texts.since[0, a] + depth:
                break
            if depth:
                place = root + depth
                state = chain.pair(embedding[0, place], state, place - first)
            np.testing.assert_allclose(states[depth][0, a + depth], state, rtol=1e-9, atol=1e-9)
            checked += 1
    assert checked == 4 + 3 + 2 + 2 + 1  # queries of both answers at depths 0, 1, 2


@pytest.mark.slow
def test_packed_texts_have_the_features_of_each_alone(tmp_path):
    """And those that were kept in a file are the same bits."""
    said = answers()[:5]
    rows = pack(said, 40, 32)
    assert sorted(i for row in rows for i in row) == list(range(5)) and len(rows) < 5
    source = FeatureSource(base(), said, TAPS, (40, 32), 2, tmp_path / "kept")
    for row in rows:
        texts, found = source([row])
        again = FeatureSource(base(), said, TAPS, (40, 32), 2, tmp_path / "kept")([row])[1]
        jax.tree.map(np.testing.assert_array_equal, again, found)
        for segment, index in enumerate(row):
            one = said[index]
            mine = (texts.since[0] >= 0) & (
                texts.segment[0, texts.query[0]] == segment
            )  # its queries
            logits = np.asarray(es.logits(base(), [one.tokens]))[0]
            asked = logits[one.first : one.first + one.num_queries]
            np.testing.assert_array_equal(found.greedy[0, mine], asked.argmax(-1))


def run_training(folder, mesh_shape=(1, 1), **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    return train(base(mesh_shape), answers(), folder, options, disable=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "head"
    return folder, run_training(folder)


def test_loss_falls_and_unseen_answers_are_drafted(trained):
    _, record = trained
    curve, held = record["curve"], record["held_out"]
    assert all(a > b for a, b in zip(curve[0]["loss"], curve[-1]["loss"], strict=True)), curve
    assert min(held["right"]) > 5 / CONFIG.vocab_size, held


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_one_that_was_not(trained, tmp_path, monkeypatch):
    whole, record = trained
    steps = []

    def killed(*args, **kwargs):
        steps.append(1)
        if len(steps) == 16:  # some behind the checkpoint, which is of step 10
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    step = training.train_step
    monkeypatch.setattr(training, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "head")
    assert not (tmp_path / "head" / "model.safetensors").exists()
    again = run_training(tmp_path / "head")
    assert len(steps) == 16 + record["steps"] - 10
    assert again["curve"] == record["curve"]
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "head", whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_a_folder_is_one_that_the_drafter_reads(trained):
    folder, record = trained
    tensors = load_file(folder / "model.safetensors")
    ids = np.arange(len(tensors["d2t"])) + tensors["d2t"]
    assert tensors["t2d"].nonzero()[0].tolist() == ids.tolist()
    assert tensors["fc.weight"].shape == (16, 48)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (16, 32)
    drafter = es.EagleDrafter.load(folder, base())
    assert drafter.taps == TAPS
    greedy = [one for one in answers() if one.temperature == 0][: OPTIONS.held_out]
    decoder = es.Decoder(base(), drafter, num_draft_tokens=OPTIONS.num_depths)
    out = decoder.generate([one.prompt for one in greedy], max_new_tokens=12)
    assert out.tokens == [one.answer for one in greedy]
    # The first token of an answer has no draft to follow from in training's count of steps.
    assert abs(out.stats.tokens_per_step - record["held_out"]["tokens_per_step"]) < 0.3


@pytest.mark.slow
def test_any_mesh_trains_the_same(trained, tmp_path):
    """Rounding apart, which a pass over more devices has of its own: the first points agree."""
    again = run_training(tmp_path / "head", (1, 2), keep_features=False)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(
            again["curve"][0][name], trained[1]["curve"][0][name], rtol=0.02, atol=0.02
        )
    assert base_digest(base((1, 2))) == base_digest(base())


def test_another_training_is_not_continued(trained, tmp_path):
    folder, _ = trained
    shutil.copytree(folder, tmp_path / "head")
    with pytest.raises(ValueError, match="another training"):
        run_training(tmp_path / "head", learning_rate=0.02)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"taps": (2, 2)}, "taps must rise within 1 .. 3"),
        ({"taps": (1, 4)}, "taps must rise within 1 .. 3"),
        ({"row_length": 65}, "2 .. 64 tokens"),
        ({"held_out": 13}, "13 greedy answers are to be held out, but there are 12"),
        ({"row_length": 5}, "no answer is left to learn"),
        ({"learning_rate": 0.0}, "learning rate must be above 0"),
        ({"num_depths": 0}, "num_depths must be at least 1"),
        ({"seed": -1}, "seed must be a whole number of 32 bits, got -1"),
    ],
)
def test_what_cannot_be_trained_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_training(tmp_path, **change)
    assert not list(tmp_path.iterdir())


def test_bases_and_meshes_and_disks_that_cannot_be_trained_with(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="2 rows a step cannot be split over 4 devices"):
        OPTIONS.check(CONFIG, es.make_mesh(2, 2))
    with pytest.raises(ValueError, match="load it with group_size=1"):
        train(base().replace(partition=(2, 2)), answers(), tmp_path / "head", OPTIONS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    with pytest.raises(ValueError, match=r"has 0\.0 GB: .*--no-features"):
        run_training(tmp_path / "head")
    assert not list(tmp_path.iterdir())


def test_any_matrix_tells_bases_apart():
    block, *others = base().params.blocks
    mlp = block.mlp[0].replace(w_down=block.mlp[0].w_down.at[-1, -1].mul(1.01))
    blocks = (block.replace(mlp=(mlp, *block.mlp[1:])), *others)
    another = base().replace(params=base().params.replace(blocks=blocks))
    narrow = base().replace(params=jax.tree.map(lambda x: x.astype("float32"), base().params))
    coded = base().replace(quantization=es.Quantization("int8"))
    assert len({base_digest(one) for one in (base(), another, narrow, coded)}) == 4


def test_answers_of_another_base_are_not_continued(tmp_path):
    (tmp_path / "base.json").write_text('{"weights": "aa", "dtype": null}')
    (tmp_path / ".base.json.0").write_text("{")  # of a writer that was killed
    train_head._check_folder(tmp_path)
    train_head._check_base(tmp_path, {"weights": "aa", "dtype": None})
    with pytest.raises(ValueError, match="answers of another base"):
        train_head._check_base(tmp_path, {"weights": "bb", "dtype": None})


@pytest.mark.parametrize("kind", ["llama3", "linear"])
def test_rotary_scaling_is_read_as_it_was_written(kind):
    scaling = RopeScaling(kind=kind, factor=2.0)
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    about = describe(head_config(config, TAPS, 9, "float32"), base().replace(config=config))
    assert about.config.rope_scaling == scaling and about.taps == TAPS


def test_too_few_prompts_are_refused_before_they_are_answered():
    prompts = [[3, 4], [5, 6], [7, 8], [9]]  # the last two are not answered greedily
    ask = functools.partial(check_prompts, prompts, temperature=1.0, batch=2)
    ask([], held_out=2)
    with pytest.raises(ValueError, match="3 greedy answers are to be held out, but there are 2"):
        ask([], held_out=3)
    ask([Answer([7, 8], [1], 0.0)], held_out=3)
    with pytest.raises(ValueError, match="no answer is left to learn"):
        ask([], held_out=4, temperature=0.0)


def test_chains_and_steps_by_hand():
    since = np.array([0, 1, 2, 3, 0, 1, -1])
    right = np.array([[1, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1]], bool)
    accepted = chains(right, since)
    assert accepted.tolist() == [2, 0, 2, 1, 2, 1, 0]
    # Three tokens, then one; and both of the second.
    assert walk(accepted, since) == (6, 3)


def test_circles_are_found():
    assert loop_start([5, 6, 7, 8]) is None
    assert loop_start([9, 8, *[1, 2, 3] * 4]) == 2
    assert loop_start([9, 8, *[1] * 7]) is None
    assert loop_start([9, 8, *[1] * 8]) == 2


@pytest.mark.slow
def test_answers_go_on_where_they_ended(tmp_path):
    prompts = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12]]
    decoder, file = es.Decoder(base()), tmp_path / "answers.jsonl"
    options = {"temperature": 1.0, "max_new_tokens": 6, "batch": 2, "eos_ids": ()}
    assert list(write_answers(file, decoder, prompts, **options)) == [2, 4]
    whole = file.read_text()
    assert [a.temperature for a in read_answers(file, CONFIG)] == [0, 0, 1, 1]
    file.write_text(whole[: whole.index("\n") + 20])
    list(write_answers(file, decoder, prompts, **options))
    assert file.read_text() == whole


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": [1], "answer": []}', "line 1: 'answer' must list token ids below 31"),
        ('{"prompt": [31], "answer": [1]}', "'prompt' must list token ids below 31"),
        ('{"prompt": [1], "answer": [1]}', "'temperature' must be a number"),
        ("[1]", "line 1 is not a JSON object"),
    ],
)
def test_answers_that_are_none(line, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_answers(tmp_path / "a.jsonl", CONFIG)
    (tmp_path / "a.jsonl").write_text(line)
    assert read_answers(tmp_path / "a.jsonl", CONFIG, is_own=True) == []
    with pytest.raises(ValueError, match=message):
        read_answers(tmp_path / "a.jsonl", CONFIG)


def test_a_last_answer_needs_no_newline(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": [1], "answer": [2], "temperature": 0}')
    assert read_answers(tmp_path / "a.jsonl", CONFIG) == [Answer([1], [2], 0.0)]


@pytest.mark.slow
def test_the_command_trains_on_any_cpu_what_it_began_on_another(easyspec, monkeypatch, tmp_path):
    class Loaded(Exception):
        pass

    def load(*args, dtype, **options):
        raise Loaded(dtype)

    monkeypatch.setattr(train_head.es, "load_model", load)
    (tmp_path / "prompts.txt").write_text("\n".join(f"say {i} times hello" for i in range(10, 22)))
    argv = ("train-head", "--base", "base", "--out", tmp_path / "head", "--row-length", 64)
    argv += ("--taps", "1,2", "--held-out", 4, "--rows", 8, "--max-new-tokens", 20)
    for more, dtype in (((), "float32"), (("--dtype", "bfloat16"), "bfloat16")):
        with pytest.raises(Loaded, match=dtype):
            easyspec(*argv, "--prompts", tmp_path / "prompts.txt", *more)


@pytest.mark.slow
def test_the_command(easyspec, checkpoints, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"say {i} times hello" for i in range(10, 22)))
    argv = ("train-head", "--base", "base", "--out", tmp_path / "head", "--quiet")
    argv += ("--taps", "1,2", "--held-out", 4, "--rows", 8, "--batch", 4, "--max-new-tokens", 20)
    status, out, err = easyspec(*argv, "--prompts", prompts, "--row-length", 64)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["num_draft_tokens"] == 3
    drafter = es.EagleDrafter.load(tmp_path / "head", es.load_model(checkpoints / "base"))
    assert drafter.taps == (1, 2)
    status, _, err = easyspec(*argv, "--prompts", prompts)
    assert status == 1 and "holds a trained head" in err
    (tmp_path / "head" / "training.json").unlink()
    status, _, err = easyspec(*argv, "--prompts", prompts, "--dtype", "bfloat16")
    assert status == 1 and "has answers of another base" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        ((), "give either --prompts or --answers"),
        (("--prompts", "nowhere.txt", "--row-length", 200), "nowhere.txt"),
        (("--answers", "nowhere.jsonl"), "rows must have 2 .. 256 tokens"),
        (("--answers", "nowhere.jsonl", "--row-length", 99), "nowhere.jsonl"),
        (("--answers", "nowhere.jsonl", "--taps", "2,1"), "taps must rise"),
        (("--answers", "nowhere.jsonl", "--out", "base"), "name a folder for the head alone"),
        (
            ("--answers", "nowhere.jsonl", "--row-length", 99, "--rows", 3),
            "3 rows a step cannot be",
        ),
        (("--prompts", "base/config.json", "--row-length", 99, "--max-new-tokens", 9), "held out"),
    ],
)
def test_the_command_refuses(easyspec, options, message, tmp_path):
    out = ("--out", tmp_path / "head", "--taps", "1,2")
    status, _, err = easyspec("train-head", "--base", "base", *out, *options)
    assert status == 1 and message in err and err.count("\n") == 1
    assert not (tmp_path / "head").exists()
