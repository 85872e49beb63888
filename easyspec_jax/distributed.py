"""Several processes, each with devices of its own, as one mesh.

Every process runs the same program on the same inputs; jax sees the devices of all of them. What
comes out of a decoder is the same in every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import jax
import numpy as np

from easyspec_jax.config import is_integer

HEARTBEAT = 100  # seconds of silence after which jax ends the process, unless told otherwise


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = HEARTBEAT,
) -> None:
    """This process is one of several; before anything touches a device.

    Args:
      coordinator: "host:port" of process 0, on which it will listen. None, with the next two: as
        the cluster says (Slurm, Open MPI, Kubernetes, ...).
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      timeout: seconds to wait for the others to come, and after which one that is silent counts as
        dead: jax then ends this process. One that dies while decoding is noticed at once, as a
        RuntimeError; earlier, while models are loaded, jax ends this process.

    Raises:
      ValueError: an address, a number or an id that cannot be.
      RuntimeError: the others did not come in time, or jax has already used a device.
    """
    given = (coordinator, num_processes, process_id)
    if None in given and given != (None, None, None):
        raise ValueError(
            "coordinator, num_processes and process_id go together: give all or none of them"
        )
    if coordinator is not None:
        _check(coordinator, num_processes, process_id)
    if not is_integer(timeout) or timeout < 1:
        raise ValueError(f"timeout must be a whole number of seconds above 0, got {timeout!r}")
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,
    )


def _check(coordinator, num_processes, process_id) -> None:
    host, _, port = str(coordinator).rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f'the coordinator must be "host:port" of process 0, got {coordinator!r}')
    if not is_integer(num_processes) or num_processes < 1:
        raise ValueError(f"num_processes must be a whole number above 0, got {num_processes!r}")
    if not is_integer(process_id) or not 0 <= process_id < num_processes:
        raise ValueError(f"process_id must be in 0 .. {num_processes - 1}, got {process_id!r}")


def check_agreement(values: Sequence[object], error: Exception | None = None) -> None:
    """Every process was given the same values, compared by what they print as, and none has failed.

    Args:
      values: of this process.
      error: why this process cannot go on; raised here, when the others know.

    Raises:
      ValueError: in every process, naming those that differ from process 0, or that failed.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    from jax.experimental import multihost_utils

    digest = hashlib.sha256("\0".join(map(repr, values)).encode()).digest()
    mine = np.frombuffer(bytes([error is not None]) + digest, np.uint8)
    found = multihost_utils.process_allgather(mine)
    if error is not None:
        raise error
    failed = np.flatnonzero(found[:, 0])
    if failed.size:
        raise ValueError(f"process {_listed(failed)} could not start: its own message says why")
    others = np.flatnonzero((found != found[0]).any(axis=1))
    if others.size:
        raise ValueError(
            f"process {_listed(others)} was started with another prompt, checkpoint or options "
            "than process 0: start all of them alike"
        )


def _listed(indices: np.ndarray) -> str:
    return ", ".join(str(i) for i in indices)


def is_lost_peer(error: Exception) -> bool:
    """Whether an error tells of another process that has ended or cannot be reached."""
    words = ("gloo", "nccl", "peer", "connect", "unavailable", "deadline", "barrier", "heartbeat")
    return any(word in str(error).lower() for word in words)
