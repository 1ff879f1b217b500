"""A `python` that starts in milliseconds: programs run in forks of this process, which has imported torch already.

A new interpreter spends some five seconds on imports. For programs that others start (torchrun, submitit, joblib, make,
the further ranks of a run), `warm_python` gives the path of an executable that takes the arguments of `python`, hands
them to a server with its variables, its folder and its open files, passes signals on, and ends as the program does. The
program sees what a new interpreter would see: nothing of the test that runs, and no other open file.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import functools
import json
import logging
import multiprocessing.process
import os
import random
import runpy
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
import warnings
from multiprocessing import resource_tracker, spawn, util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from hydra.core.global_hydra import GlobalHydra

TESTS = Path(__file__).resolve().parents[1]
#: descriptors from here on hold those of a program until those of this process are closed
HIGH = 700
OPTIONS_WITH_VALUE = ("-W", "-X")
#: programs that get a new interpreter: they import little, and others know them by a process number, which forks change
LIGHT = (["-m", "submitit.local._local"],)

CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
if sys.argv[1:3] in {light!r}:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
files = sorted(int(name) for name in os.listdir("/proc/self/fd"))
files = [n for n in files if n != server.fileno() and os.path.exists(f"/proc/self/fd/{{n}}")]
passed = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, passed)
asked = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "files": files, "blocked": [int(n) for n in blocked]}}
asked["variables"] = {{k.decode("latin-1"): v.decode("latin-1") for k, v in os.environb.items()}}
words = json.dumps(asked).encode()
server.sendmsg([len(words).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
passed = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
server.sendall(words)
answers = server.makefile("rb")
program = int(answers.readline())
for number in passed:
    signal.signal(number, lambda number, _: os.kill(program, number))
signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
status = int(answers.readline() or -signal.SIGKILL)
if status < 0:
    if -status in passed:
        signal.signal(-status, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [-status])
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@functools.cache
def warm_python() -> str:
    """Return the path of the executable; its server lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="warm"))
    path, python = folder / "socket", folder / "python"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    alive, kept = os.pipe()  # the other end closes with this process
    if os.fork() == 0:
        try:
            os.setsid()
            os.close(kept)
            _serve(listener, alive, str(python))
            shutil.rmtree(folder)
        finally:
            os._exit(0)
    listener.close()
    os.close(alive)
    python.write_text(CLIENT.format(python=sys.executable, path=str(path), light=LIGHT))
    python.chmod(0o755)
    return str(python)


def _serve(listener: socket.socket, alive: int, python: str) -> None:
    """Start a program for each connection, and report how it ended; end a program whose client is gone."""
    programs: dict[int, socket.socket] = {}
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        clients = {client.fileno(): program for program, client in programs.items()}
        ready, _, _ = select.select([listener, alive, wake, *clients], [], [])
        if alive in ready:
            for program in programs:
                os.kill(program, signal.SIGKILL)
            return
        if wake in ready:
            os.read(wake, 1000)
        for file in set(ready) & clients.keys():
            os.kill(clients[file], signal.SIGKILL)  # its client is gone: clients send nothing after the request
        while programs:
            program, status = os.waitpid(-1, os.WNOHANG)
            if program == 0:
                break
            client = programs.pop(program)
            with contextlib.suppress(BrokenPipeError), client:
                client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        if listener in ready:
            client, _ = listener.accept()
            length, files = _received(client)
            asked = json.loads(client.makefile("rb").read(length))
            program = os.fork()
            if program == 0:
                _become(asked, files, python)
            for file in files:
                os.close(file)
            client.sendall(b"%d\n" % program)
            programs[program] = client


def _received(client: socket.socket) -> tuple[int, list[int]]:
    """Return the length of a client's request, and its open files."""
    data, ancillary, _, _ = client.recvmsg(8, socket.CMSG_SPACE(4 * 250))
    files = array.array("i")
    for _, _, content in ancillary:
        files.frombytes(content[: len(content) - len(content) % files.itemsize])
    return int.from_bytes(data, "big"), list(files)


def _become(asked: dict[str, Any], files: list[int], python: str) -> None:
    """Turn this fork into the program, which ends with it."""
    status = 1
    try:
        _forget_the_parent(dict(zip(asked["files"], files, strict=True)))
        os.environb.clear()
        os.environb.update({k.encode("latin-1"): v.encode("latin-1") for k, v in asked["variables"].items()})
        os.chdir(asked["folder"])
        signal.pthread_sigmask(signal.SIG_SETMASK, asked["blocked"])
        sys.executable = python
        spawn.set_executable(python)
        try:
            _execute(asked["arguments"])
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if not isinstance(end.code, int | None):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        util._exit_function()  # type: ignore[attr-defined]
        sys.stdout.flush()
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(status)


def _forget_the_parent(files: dict[int, int]) -> None:
    """Leave only these files open, by number, and only the state that a new interpreter has after its imports."""
    os.setpgid(0, 0)  # its client has the terminal's signals
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for place, file in enumerate(files.values()):
        os.dup2(file, HIGH + place)
    os.closerange(0, HIGH)
    for place, number in enumerate(files):
        os.dup2(HIGH + place, number, inheritable=True)
        os.close(HIGH + place)
    sys.stdin = sys.__stdin__ = open(0)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
    atexit._clear()
    util._finalizer_registry.clear()  # type: ignore[attr-defined]
    multiprocessing.process._children.clear()  # type: ignore[attr-defined]
    tracker = resource_tracker._resource_tracker  # type: ignore[attr-defined]
    tracker._fd = tracker._pid = None
    logging.getLogger().handlers.clear()
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    GlobalHydra.instance().clear()
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__dict__", {}).get("__file__") or "").startswith(f"{TESTS}{os.sep}"):
            del sys.modules[name]
    random.seed()
    np.random.seed()
    torch.manual_seed(67280421310721)  # as after the import


def _execute(arguments: list[str]) -> None:
    """Do what `python` does with these arguments."""
    words = list(arguments)
    while words and words[0].startswith("-") and words[0] not in ("-c", "-m"):
        del words[: 2 if words[0] in OPTIONS_WITH_VALUE else 1]
    kind, rest = (words[0], words[1:]) if words[0] in ("-c", "-m") else ("", words)
    first = "" if kind == "-c" else os.getcwd() if kind == "-m" else str(Path(rest[0]).resolve().parent)
    own = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    installed = [path for path in sys.path if Path(path).is_relative_to(sys.prefix)]
    library = [path for path in sys.path if Path(path).is_relative_to(sys.base_prefix) and path not in installed]
    sys.path[:] = [first, *own, *library, *installed, str(TESTS.parent)]
    sys.argv[:] = [kind or rest[0], *rest[1:]]
    if kind == "-c":
        module = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(module))
    elif kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(rest[0], run_name="__main__")
