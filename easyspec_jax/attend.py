"""What queries find in a cache: by XLA's kernels, or by one of cuDNN's where a device has it.

Letters as in `model`; a mask is bool[B, T, S], True where token t of row b may look at entry s.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from easyspec_jax.cache import LayerKV
from easyspec_jax.config import ModelConfig
from easyspec_jax.quantized import wide_type
from easyspec_jax.sharding import has_gpus

logger = logging.getLogger("easyspec_jax")

ATTENTION = ("auto", "cudnn", "xla")  # "auto": cuDNN's where the device shows that it has one
# Tokens and rows that a device is asked for: a token, a step's, a piece of a prompt; a batch.
_ASKED = ((1, 1), (6, 1), (256, 1), (6, 3))
_ENTRIES, _BEFORE = 2048, 3  # of each row's cache; those that all tokens see
_CLOSE = 0.05  # of values between -1 and 1; those that no token may see are a hundred


def attend(q: jax.Array, kv: LayerKV, mask: jax.Array) -> jax.Array:
    """What queries [K * B, T * G, H] find in a cache, the same shape: by XLA's kernels."""
    batch, t = mask.shape[:2]
    (keys, key_scales), (values, value_scales) = kv.keys, kv.values
    order = "hs" if kv.letters[0] == "KHS" else "sh"
    wide = wide_type(q.dtype)
    scores = jnp.einsum(f"xmh,x{order}->xms", q, keys.astype(q.dtype), preferred_element_type=wide)
    if key_scales is not None:
        scores = scores * key_scales[:, None]
    by_token = scores.reshape(-1, batch, t, q.shape[1] // t, scores.shape[-1]) * q.shape[-1] ** -0.5
    least = jnp.finfo(scores.dtype).min
    by_token = jnp.where(mask[None, :, :, None, :], by_token, least)
    weights = jax.nn.softmax(by_token, axis=-1).reshape(scores.shape)
    if value_scales is not None:
        weights = weights * value_scales[:, None]
    return jnp.einsum("xms,xsh->xmh", weights.astype(q.dtype), values.astype(q.dtype))


def attend_cudnn(q: jax.Array, kv: LayerKV, mask: jax.Array) -> jax.Array:
    """The same by one kernel, whose scores are never written. Every kv head of a row is an entry of
    its batch, so that it reads the cache as it lies.

    Raises:
      ValueError: the library is not there.
    """
    entries, rows, h = q.shape
    batch, t = mask.shape[:2]
    mask = mask[:, None]  # made a bias once for all layers
    if batch > 1:
        mask = jnp.tile(mask, (entries // batch, 1, 1, 1))
    by_token = q.reshape(entries, t, rows // t, h)
    k, v = kv.k[:, :, None], kv.v[:, :, None]
    try:
        found = jax.nn.dot_product_attention(by_token, k, v, mask=mask, implementation="cudnn")
    except NotImplementedError:  # it is there, but not for this device
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f'attention="cudnn" needs cuDNN (nvidia-cudnn-cu12): {reason}') from error
    return found.reshape(q.shape)


def attention_on(
    mesh: Mesh | AbstractMesh, wanted: str, config: ModelConfig, dtype: Any, codes: str | None
) -> str:
    """Whose kernels a model of this type attends with on `mesh`: "cudnn" or "xla".

    Args:
      wanted: one of ATTENTION. "cudnn" is "xla" where cuDNN has nothing for such a model; "auto"
        also where the device, asked once, has no plan or finds something else.
      codes: kind of codes that caches hold; cuDNN reads none.

    Raises:
      ValueError: `wanted` is none of them; or "auto" failed on a mesh of several processes, which
        have to run one program.
    """
    if wanted not in ATTENTION:
        *names, last = (f'"{name}"' for name in ATTENTION)
        raise ValueError(f"attention must be {', '.join(names)} or {last}, got {wanted!r}")
    if wanted == "xla" or codes is not None:
        return "xla"
    if not _has_one(mesh, config.head_dim, dtype):
        if wanted == "cudnn":
            logger.info(
                "attention by XLA: cuDNN's needs an NVIDIA GPU since A100, bfloat16 or float16, "
                "and heads of 8, 16, .. 128 numbers"
            )
        return "xla"
    if wanted == "cudnn":
        return wanted
    assert isinstance(mesh, Mesh)  # those that are abstract have no devices
    asked = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    problem = why_not_cudnn(asked, config.num_groups, config.head_dim, jnp.dtype(dtype).name)
    if problem is None:
        return "cudnn"
    if mesh.is_multi_process:
        raise ValueError(f'{problem}; attention="xla" does without, in all processes')
    logger.warning("attention by XLA: %s", problem)
    return "xla"


@functools.cache
def why_not_cudnn(device: Any, groups: int, head_dim: int, dtype: str) -> str | None:
    """What keeps cuDNN's attention from a device, in a sentence; None: nothing. A device is asked
    by attending, once a process for each kind of model. One that programs are only compiled for
    (`program.target`) cannot be: there it is enough that the library is installed.

    Args:
      groups: G, query heads of a kv head.
    """
    cases = [_case(*asked, groups, head_dim, dtype) for asked in _ASKED]
    try:
        where = jax.sharding.SingleDeviceSharding(device)
        with jax.ensure_compile_time_eval():  # whatever is traced around it
            # Of a function of its own: what was compiled of one that is kept is not asked again.
            lowered = jax.jit(lambda cases: _furthest(cases), in_shardings=where).lower(cases)
            if device.client.runtime_type == "compile_only_runtime":
                return None
            furthest = float(lowered.compile()(jax.device_put(cases, device)))
    except (ValueError, RuntimeError) as error:
        if "RESOURCE_EXHAUSTED" in str(error):  # which says nothing of cuDNN
            raise
        return f"cuDNN has no attention here ({str(error).partition(chr(10))[0]})"
    if furthest <= _CLOSE:
        return None
    return f"cuDNN's attention is {furthest:.3g} away from XLA's"


def _case(t: int, batch: int, groups: int, head_dim: int, dtype: str) -> tuple[np.ndarray, ...]:
    """Queries, keys, values and mask of two kv heads, where a chain of so many tokens stands behind
    few entries: any that is missed or seen too many is noticed.
    """
    draw = np.random.default_rng(t).uniform
    shapes = (2 * batch, t * groups, head_dim), *[(2 * batch, _ENTRIES, head_dim)] * 2
    q, k, v = (draw(-1, 1, shape) for shape in shapes)
    seen = np.arange(_ENTRIES) <= np.arange(_BEFORE, _BEFORE + t)[:, None]
    v[:, _BEFORE + t :] = 100
    mask = np.broadcast_to(seen, (batch, *seen.shape))
    return *(x.astype(jnp.dtype(dtype)) for x in (q, k, v)), mask


def _furthest(cases: list[tuple[jax.Array, ...]]) -> jax.Array:
    """The largest difference of the two ways to attend; NaN where there is one."""

    def furthest(q, k, v, mask):
        kv = LayerKV((k, v), letters=("KSH", "KSH"))
        found = attend(q, kv, mask) - attend_cudnn(q, kv, mask)
        return jnp.max(jnp.abs(found.astype(jnp.float32)))

    return jnp.max(jnp.stack([furthest(*case) for case in cases]))


def _has_one(mesh: Mesh | AbstractMesh, head_dim: int, dtype: Any) -> bool:
    """Whether cuDNN is said to attend for such a model on these devices."""
    first = mesh.devices.flat[0] if isinstance(mesh, Mesh) and has_gpus(mesh) else None
    # A word in place of a number is that of an AMD device.
    major = str(getattr(first, "compute_capability", "")).partition(".")[0]
    new_enough = major.isdecimal() and int(major) >= 8
    return new_enough and jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
