"""Processes for tests that kill one or let two work together, forked from one interpreter that has imported torch.

The imports of a run cost an interpreter 5 CPU seconds, and a fork nothing. Run as a program, this file is the
interpreter that forks: it reads a request a line and answers with a line (JSON). A child leaves by the end of that
program, as any program does, so that what happens when Python ends happens to it too.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PRELOADED = ["robustmoe.cli", "robustmoe.training", "robustmoe.evaluation", "robustmoe.interop"]
PRELOADED += ["torch.distributed.nn.functional", "torch._dynamo"]  # an optimiser's first step imports these
PRELOADED += ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch.export"]  # sharding does
POLL = 0.02
"""Seconds between two looks at a child."""


@functools.cache
def _server() -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)
    atexit.register(server.communicate)  # closes its input, at whose end it leaves, and waits for it
    return server


def _ask(**request: Any) -> Any:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@dataclasses.dataclass
class Child:
    """A forked process; ``output`` is the file with what it wrote to stdout and stderr."""

    pid: int
    output: Path
    code: int | None = None
    store: Any = None  # lives as long as the processes that meet in it

    def poll(self) -> int | None:
        """Returns the exit code (minus the signal's number if one killed it), or None while the process runs."""
        if self.code is None:
            self.code = _ask(poll=self.pid)
        return self.code

    def wait(self, timeout: float = 180) -> int:
        """Returns the exit code; a process that has not ended after ``timeout`` seconds is killed."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(POLL)
        assert self.code is not None
        return self.code


def fork(function: str, *arguments: Any, output: Path, environment: dict[str, str] | None = None) -> Child:
    """Starts a process that calls ``function`` ("module:name"), whose result is its exit code (None: 0), on
    ``arguments``, which JSON can hold.
    """
    request = {"function": function, "arguments": arguments, "output": str(output), "environment": environment or {}}
    return Child(_ask(**request), output)


def fork_pair(function: str, *arguments: Any, output: Path, processes: int = 2) -> list[Child]:
    """Starts two processes on the CPU, or as many as said, told what torchrun tells its workers; their outputs end in
    .0, .1 and so on.
    """
    import torch.distributed as dist

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    told = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # nobody opens a store; both join this one
        "CUDA_VISIBLE_DEVICES": "",
    }
    children = []
    for rank in map(str, range(processes)):
        own = {**told, "RANK": rank, "LOCAL_RANK": rank}
        child = fork(function, *arguments, output=output.with_name(f"{output.name}.{rank}"), environment=own)
        child.store = store
        children.append(child)
    return children


def _serve() -> Any:
    import torch

    for name in PRELOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.freeze()  # a child's collector would copy every page it looks at
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return _child(**request)
        print(json.dumps(answer), flush=True)
    return None


def _child(function: str, arguments: list[Any], output: str, environment: dict[str, str]) -> Any:
    os.environ.update(environment)
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, written), (2, written)):
        os.dup2(target, stream)
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)(*arguments)


if __name__ == "__main__":
    sys.exit(_serve())


def gloo_threads() -> list[str]:
    """Names of this process's threads that work for gloo (Linux; elsewhere none is seen)."""
    tasks = Path("/proc/self/task")
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.is_dir() else []
    return [name for name in names if "gloo" in name]
