"""A checkpoint whose bytes changed is refused, whatever changed them; loading says so by part."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import run, tiny_config, write_hf_folder

import easyspec_jax as es
from easyspec_jax import checkpoint

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("integrity")
    source = write_hf_folder(root / "hf", tiny_config("llama"), dtype=jnp.bfloat16)
    return run(source, root / "whole")


@pytest.fixture
def copy(whole, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(whole, tmp_path / "copy"))


def load(folder, shape=(1, 1), **options) -> es.Model:
    return es.load_model(folder, es.make_mesh(*shape), **options)


def array_files(folder) -> list[pathlib.Path]:
    """Files that hold the numbers of parts."""
    return sorted(p for p in folder.rglob("d/*") if p.is_file())


def flip(file: pathlib.Path, at: float, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 1 << bit
    file.write_bytes(data)


@pytest.mark.parametrize("at", [0.5, *(pytest.param(at, marks=slow) for at in (0.2, 0.9))])
def test_a_flipped_bit_never_becomes_another_weight(whole, copy, at):
    want = jax.tree.map(np.asarray, load(whole).params)
    for file in array_files(copy)[::2]:
        before = file.read_bytes()
        flip(file, at, bit=3)
        try:
            got = load(copy).params
        except ValueError as error:
            assert f"is damaged: remove {copy}" in str(error)
        else:  # a byte that nothing reads
            jax.tree.map(np.testing.assert_array_equal, got, want)
        file.write_bytes(before)


def test_parts_that_changed_places_are_refused(copy):
    one, two = (copy / checkpoint.layer_name(i) for i in (0, 2))
    one.rename(copy / "aside")
    two.rename(one)
    (copy / "aside").rename(two)
    with pytest.raises(
        ValueError, match=r"layers/0000 is damaged: remove .*, then convert the mod"
    ):
        load(copy)


@pytest.mark.parametrize(
    "shape, size", [((2, 2), 2), *(pytest.param(s, 1, marks=slow) for s in ((1, 1), (8, 1)))]
)
def test_every_mesh_verifies(whole, tmp_path, shape, size):
    """One number of a weight that the mesh divides, written anew by the library itself."""
    load(whole, shape, group_size=size)
    copy = shutil.copytree(whole, tmp_path / "copy")
    name, kept = checkpoint.layer_name(1), json.loads((copy / "easyspec.json").read_text())
    spec = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    layer = {
        weight.name: jax.ShapeDtypeStruct(
            weight.shape(load(whole).config), jnp.bfloat16, sharding=spec
        )
        for weight in es.weights.present(es.weights.LAYER_WEIGHTS, load(whole).config).values()
    }
    arrays = checkpoint.read_part(copy, name, layer)
    shutil.rmtree(copy / name)
    last = tuple(n - 1 for n in arrays["w_up"].shape)
    arrays["w_up"] = arrays["w_up"].at[last].multiply(1.01)
    assert checkpoint.save_part(copy, name, arrays) != kept["parts"][name]
    with pytest.raises(ValueError, match="layers/0001 is damaged"):
        load(copy, shape, group_size=size)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "00000000"},
        {"weights": None},
        {"parts": None},
        {"parts": {"top": "00000000"}},
        {"dtype": "int8"},
        {"tokenizer": 3},
    ],
    ids=str,
)
def test_metadata_that_changed_is_refused(copy, change):
    file = copy / "easyspec.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"easyspec.json is damaged: remove .*"):
        load(copy)


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16", "float64"])
def test_a_digest_is_of_what_is_stored_whatever_it_is_loaded_as(whole, dtype):
    assert load(whole, dtype=dtype).dtype == jnp.dtype(dtype or "float32")


def test_a_digest_tells_numbers_and_their_places(rng=np.random.default_rng(0)):  # noqa: B008
    x = rng.standard_normal((64, 48)).astype(jnp.bfloat16)
    of = lambda **arrays: int(checkpoint.digest(arrays))  # noqa: E731
    known = of(a=x, b=x[0])
    assert known == of(b=x[0], a=x)
    swapped = x.copy()
    swapped[[3, 35]] = swapped[[35, 3]]
    bit = x.view(np.uint16).copy()
    bit[9, 9] ^= 1
    others = {of(a=swapped, b=x[0]), of(a=bit.view(jnp.bfloat16), b=x[0]), of(a=x, c=x[0]), of(a=x)}
    assert len(others | {known}) == 5


def test_rows_that_are_folded_are_told_apart():
    """Arrays of a million numbers and more take another way."""
    x = np.arange(2**20, dtype=np.float32).reshape(1024, 1024)
    swapped, bits = x.copy(), x.view(np.uint32).copy()
    swapped[[8, 9]] = swapped[[9, 8]]
    bits[17, 5] ^= 1 << 31
    seen = {int(checkpoint.digest({"a": a})) for a in (x, swapped, bits.view(np.float32), x + 1)}
    assert len(seen) == 4
    bits[18, 5] ^= 1 << 31
    assert int(checkpoint.digest({"a": bits.view(np.float32)})) not in seen


def test_what_the_machine_does_not_give_is_no_damage(copy, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    def fail(path, abstract):
        raise ValueError("PERMISSION_DENIED: Error opening file [os_error_code='13']")

    monkeypatch.setattr(ocp, "load", fail)
    with pytest.raises(OSError, match=r"layers/0000 cannot be read: PERMISSION_DENIED"):
        load(copy)


def test_a_damaged_file_makes_no_noise(copy, caplog):
    for file in array_files(copy):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        load(copy)
    assert caplog.text == ""
