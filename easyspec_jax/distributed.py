"""Several processes, each with devices of its own, as one mesh.

Every process runs the same program on the same inputs; jax sees the devices of all of them. What
comes out of a decoder is the same in every process.
"""

from __future__ import annotations

import hashlib

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
        dead: jax then ends the process. One that ends is noticed at once, as a RuntimeError.

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


def check_agreement(*values: object) -> None:
    """Every process was given the same; values are compared by what they print as.

    Raises:
      ValueError: in every process, naming those that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = hashlib.sha256("\0".join(map(repr, values)).encode()).digest()
    found = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    others = [i for i, row in enumerate(found) if (row != found[0]).any()]
    if others:
        raise ValueError(
            f"process {', '.join(map(str, others))} was started with another prompt, checkpoint or "
            "options than process 0: start all of them alike"
        )
