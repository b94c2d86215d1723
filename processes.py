"""What lets any command be one of several ranks, be killed at any moment, and go on: nothing of the method.

Ranks of torchrun, worker processes, locks, files that are whole or not there, and errors that end in one line.
"""
import ctypes
import errno
import fcntl
import math
import multiprocessing
import os
import signal
import socket
import sys
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

# ------------------------------------------------------------------------------ ranks, devices

def start_ranks():
    """Join torchrun's process group if there is one: NCCL on GPUs, gloo on CPUs. Returns this rank's device."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"{local + 1} processes on a machine with {torch.cuda.device_count()} GPU(s); lower "
                             f"--nproc_per_node")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ and not dist.is_initialized():
        # the others wait while rank 0 looks at millions of files
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    return device


def ranks():
    """(rank, number of ranks); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    """Wait for the other ranks, if any."""
    if dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------- files that are whole, or not there

def write_whole(path, save):
    """save(temporary path), then rename it: `path` is always whole. Raises OSError that names the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")  # what a killed run leaves, the next one overwrites
    try:
        save(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # soundfile's and torch.save's are RuntimeErrors
        part.unlink(missing_ok=True)
        said = (str(error) or type(error).__name__).splitlines()[0]
        reason = getattr(error, "strerror", None) or f"{said}; is the disk full?"
        raise OSError(f"{path}: can't be written ({reason}); the same command goes on from here") from None


def new_array(path, dtype, shape):
    """An array of zeros in a file, its room on the disk taken. Raises OSError that names the path.

    Memory that is mapped to a full disk ends the process at the first write to it, without a word.
    """
    def save(part):
        try:
            np.lib.format.open_memmap(part, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):
                with open(part, "rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(part))
        except OSError as error:
            need = math.prod(shape) * np.dtype(dtype).itemsize / 1e9
            raise OSError(error.errno, f"{error.strerror}; it needs {need:.2g} GB") from None

    Path(path).unlink(missing_ok=True)  # makes room; who has mapped an earlier one keeps it
    write_whole(path, save)


def open_array(path):
    """The array in a file, not read into memory; None where there is none, for a flipped bit can do anything."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError, TokenError):
        return None


def is_array(path, dtype, shape):
    """Whether there is such an array."""
    array = open_array(path)
    return array is not None and array.dtype == dtype and array.shape == shape


class Claim:
    """Holds a file that no other process can hold, until `close` or the process's end, however it ends.

    Raises ValueError, with the holder's identity, where another process has it; with `wait` it waits instead.
    """

    def __init__(self, path, wait=False):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.file = self.path.open("a+", errors="backslashreplace")
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                self.file.seek(0)
                holder = f"{path} is held by {self.file.read().strip() or 'another process'}"
                if not wait:
                    raise ValueError(f"{holder}; wait for it, or choose another folder") from None
                print(f"{holder}; waiting", file=sys.stderr, flush=True)
                fcntl.lockf(self.file, fcntl.LOCK_EX)
            except OSError:
                return  # a file system without locks
            with suppress(FileNotFoundError):  # and not a file that its holder has just removed
                if os.path.samestat(os.stat(path), os.fstat(self.file.fileno())):
                    break
            self.file.close()
        self.file.truncate(0)
        print(Path(sys.argv[0]).name, *sys.argv[1:], f"(process {os.getpid()} on {socket.gethostname()}, since "
              f"{datetime.now().isoformat(' ', 'seconds')})", file=self.file, flush=True)

    def close(self):
        self.path.unlink(missing_ok=True)
        self.file.close()


def stamp(path):
    """Size and time of a file, (0, 0) where there is none."""
    try:
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    except OSError:
        return 0, 0


# --------------------------------------------------------------------------- many processes

def worker_starts(worker):
    """A worker process leaves Ctrl-C to its parent, does not inherit its handler of SIGTERM, and ends when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = lambda *error: None  # a thread that hands over tensors; errors in items travel to the parent
    if sys.platform == "linux":  # at once: the next run may already write the same files
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def in_processes(function, items, workers):
    """Iterate over function(item) in the order of items, computed by `workers` processes (0: by this one).

    A DataLoader that makes no batches hands single items to collate_fn, in workers that end when their parent does.
    """
    return DataLoader(items, batch_size=None, num_workers=workers, collate_fn=function, worker_init_fn=worker_starts)


def run(script):
    """Run a script's main; a stop and what a user can mend end in one line, not in a traceback, under torchrun too."""
    rank, name = int(os.environ.get("RANK", "0")), Path(sys.argv[0]).name
    if "RANK" not in os.environ:  # torchrun has its own way to end its processes
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        script()
    except KeyboardInterrupt:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():  # before they find nobody to send to, and say so
            worker.kill()
        print(f"\n{name}: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, FloatingPointError, MemoryError, RuntimeError) as error:
        if rank > 0 and isinstance(error, FileNotFoundError):
            sys.exit(1)  # what is missing is missing for all: rank 0 says so
        message = (str(error).strip() or type(error).__name__).splitlines()[-1]  # of a worker's, without its traceback
        if isinstance(error, torch.OutOfMemoryError):
            message = f"{str(error).splitlines()[0]} Take less at a time: --micro-batch, --rows, --batch"
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message += "; make room, then the same command goes on from here"
        elif isinstance(error, RuntimeError):
            if not any(word in str(error) for word in ("gloo", "NCCL", "DataLoader worker (pid")):
                raise
            message = f"another process of this run ended ({message}); the same command goes on from here"
        message = f"{name}{f' (rank {rank})' if rank else ''}: {message}"
        if dist.is_initialized():  # the others wait for this rank: it must not wait for them
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(message)
    if dist.is_initialized():
        dist.destroy_process_group()
