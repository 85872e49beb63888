"""Threads share decoders and sessions: every text is the one that a thread alone would get."""

from __future__ import annotations

import contextlib
import random
import threading

import pytest
from decoders import PROMPTS, autoregressive, joined, self_drafting

import easyspec_jax as es
from easyspec_jax.sharding import MeshJit


def together(*works) -> None:
    """Run all at once; the first error of any is raised."""
    errors = []

    def guarded(work):
        try:
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("mesh_shape", [(1, 1), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_eight_threads_decode_at_once(mesh_shape):
    want = [autoregressive().generate([p], max_new_tokens=9).tokens[0] for p in PROMPTS]
    decoder = self_drafting(mesh_shape)

    def work():
        for prompt, text in zip(PROMPTS, want, strict=True):
            assert decoder.generate([prompt], max_new_tokens=9).tokens == [text]
            assert joined(decoder.stream(prompt, max_new_tokens=9)) == text

    together(*[work] * 8)


@pytest.mark.parametrize("turns", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_two_threads_share_a_session(turns):
    """Whoever opens a turn ends the other's; what a turn says, as far as it gets, is right, and so
    is every turn of one thread alone afterwards.
    """
    decoder, session = self_drafting(), es.Session(128)
    want = {tuple(p): autoregressive().generate([p], max_new_tokens=12).tokens[0] for p in PROMPTS}
    complete, cut = [], []

    def talk(seed, number):
        rng = random.Random(seed)
        for _ in range(number):
            prompt, got = rng.choice(PROMPTS), []
            try:
                for piece in decoder.stream(prompt, max_new_tokens=12, session=session):
                    got += piece
                complete.append(1)
            except RuntimeError as error:
                assert "its session serves a later request" in str(error)
                cut.append(1)
            text = want[tuple(prompt)]
            assert got == text[: len(got)]

    together(lambda: talk(0, turns // 2), lambda: talk(1, turns // 2))
    assert cut and complete
    together(lambda: talk(2, 10))


def test_a_turn_that_is_overtaken_writes_nothing_back(monkeypatch):
    """A second request opens while the first one's step runs."""
    decoder, session = self_drafting(), es.Session(128)
    first = decoder.stream(PROMPTS[0], max_new_tokens=30, session=session)
    got = list(next(first))
    really, opened = es.Session._step, []

    def step(self, engine, request):
        if not opened:
            opened.append(threading.Thread(target=open_another))
            opened[0].start()
            opened[0].join(0.2)  # it waits for this step to end
            assert opened[0].is_alive()
        return really(self, engine, request)

    def open_another():
        opened.append(decoder.stream(PROMPTS[1], max_new_tokens=30, session=session))

    monkeypatch.setattr(es.Session, "_step", step)
    got += next(first)
    opened[0].join()
    with pytest.raises(RuntimeError, match="its session serves a later request"):
        next(first)
    want = autoregressive().generate(PROMPTS[:2], max_new_tokens=30).tokens
    assert got == want[0][: len(got)]
    assert joined(opened[1]) == want[1]


def test_a_step_that_fails_costs_the_session_only_its_caches(monkeypatch):
    decoder, session = self_drafting(), es.Session(128)
    turn = decoder.stream(PROMPTS[0], max_new_tokens=12, session=session)
    next(turn)
    with monkeypatch.context() as broken, contextlib.suppress(KeyboardInterrupt):
        broken.setattr(MeshJit, "__call__", interrupted)
        broken.setattr(MeshJit, "using", lambda self, options: interrupted)
        next(turn)
    assert session.drafter_report == {}
    want = autoregressive().generate([PROMPTS[0]], max_new_tokens=12).tokens[0]
    assert joined(decoder.stream(PROMPTS[0], max_new_tokens=12, session=session)) == want


def interrupted(*args):
    raise KeyboardInterrupt
