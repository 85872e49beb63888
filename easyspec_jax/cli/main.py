"""The command line: `easyspec generate | chat | convert | info | plan | program | tune |
train-head | demo`.

Each command is a module with its arguments and what it does. Only here does the package set jax
options, in `configure`, and turn errors into sentences and exit statuses.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import jax

import easyspec_jax as es
from easyspec_jax.cli import chat, convert, demo, generate, info, plan, program, train_head, tune
from easyspec_jax.cli.options import MAX_DEVICES, flag
from easyspec_jax.distributed import is_lost_peer
from easyspec_jax.program import target
from easyspec_jax.sources import cache_root

COMMANDS = {
    "generate": generate, "chat": chat, "convert": convert, "info": info, "plan": plan,
    "program": program, "tune": tune, "train-head": train_head, "demo": demo,
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """The arguments of all commands; `command` names the one that was given."""
    parser = argparse.ArgumentParser(
        prog="easyspec", description="Lossless speculative decoding with a layer-parallel draft."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(name, help=command.HELP, description=command.HELP)
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its status: 1 after an error of one sentence, 130 interrupted."""
    args = argparse.Namespace()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            _check_streams()
            make_parser().parse_args(argv, args)
            configure(args)
            status = COMMANDS[args.command].run(args)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return _leave(args, 130)
        except BrokenPipeError:  # the reader has gone, and so must the interpreter's last flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _leave(args, 1)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            _flush(sys.stdout)
            print(f"error: {_sentence(args, error)}", file=sys.stderr)
            return _leave(args, 1)


def _check_streams() -> None:
    """Refuse to run without standard output; bytes of standard input that are not UTF-8 are for the
    tokenizer to refuse, as those of an argument are.
    """
    if sys.stdout is None:
        raise ValueError("standard output is closed")
    if sys.stderr is None:  # bars and reports go nowhere
        sys.stderr = open(os.devnull, "w")
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "surrogateescape":
        sys.stdin.reconfigure(errors="surrogateescape")


def configure(args: argparse.Namespace) -> None:
    """Set the jax options that the arguments ask for; before anything else touches a device."""
    # Only its templates are used: that it finds no PyTorch is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    devices = getattr(args, "cpu_devices", None)
    if args.command in ("info", "program"):  # shapes only: as many devices as the mesh wants
        devices = args.layer * (args.tensor or 1)
        if devices > MAX_DEVICES:
            raise ValueError(f"--layer times --tensor must be at most {MAX_DEVICES}, got {devices}")
    if args.command == "convert":  # needs no accelerator, and must not reserve the memory of one
        jax.config.update("jax_platforms", "cpu")
    if args.command == "plan" and not args.measure:  # shapes only, no mesh at all
        devices = 1
    if args.command == "program":
        devices = None
        if args.device != target.HERE:  # compiled for, not run on
            devices = 1
            os.environ.setdefault(target.SETTING, "1")
    if devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    if getattr(args, "dtype", None) == "float32":  # else GPUs compute its products in TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    settings: Any = jax.config  # has its options as attributes only when it runs
    if getattr(args, "compile_cache", False) and settings.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compile"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _join_processes(args)


def _join_processes(args: argparse.Namespace) -> None:
    """Become one of several processes where the arguments say so; only process 0 prints."""
    if not _is_distributed(args):
        for name in ("num_processes", "process_id", "timeout"):
            if getattr(args, name, None) is not None:
                raise ValueError(f"{flag(name)} needs --coordinator")
        return
    # Libraries chat on the first file descriptor, which is for the answer alone.
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    where = None if args.coordinator == "auto" else args.coordinator
    wait = {} if args.timeout is None else {"timeout": args.timeout}
    es.initialize_distributed(where, args.num_processes, args.process_id, **wait)
    if jax.process_index() > 0:
        sys.stdout, args.stats = open(os.devnull, "w"), False


def _is_distributed(args: argparse.Namespace) -> bool:
    return getattr(args, "coordinator", None) is not None


def _sentence(args: argparse.Namespace, error: Exception) -> str:
    """What to say of an error: of one from the devices the first line, as jax appends pages."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if _is_distributed(args) and not isinstance(error, ValueError) and is_lost_peer(error):
        return f"another process has ended or cannot be reached ({reason})"
    return reason if isinstance(error, RuntimeError) else str(error)


def _leave(args: argparse.Namespace, status: int) -> int:
    """The status; one of several processes ends here, lest it wait for others that wait for it."""
    if _is_distributed(args):
        _flush(sys.stdout)
        _flush(sys.stderr)
        os._exit(status)
    return status


def _flush(stream: Any) -> None:
    if stream is not None:  # closed by whoever started this
        stream.flush()
