"""Runs the repository's scripts in processes of their own, without importing PyTorch each time.

A server process (the standard library's forkserver) imports what is slow to import, and nothing of
the repository. Each run is a fork of that server with its own directory, environment, standard
streams and exit code, as from the shell.
"""

import atexit
import contextlib
import functools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import traceback
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

ROOT = Path(__file__).resolve().parent.parent
IMPORTED_AHEAD = [
    "script_runner",
    "torch",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "tokenizers",
    "tiktoken",
    "matplotlib.pyplot",
    "plotly.graph_objects",
]
# one thread per process, because the tests run on all cores; a spinning thread would take a core
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run_script(script, arguments, cwd, stdin="", env=None, timeout=300):
    """Run `script` of the repository.

    Returns:
        A `subprocess.CompletedProcess` with text output.

    Raises:
        subprocess.TimeoutExpired: the run is killed then.
    """
    process = StartedScript(script, arguments, cwd, stdin, env)
    try:
        output, errors = process.communicate(timeout)
    except TimeoutExpired:
        process.kill()
        raise
    return CompletedProcess(process.args, process.returncode, output, errors)


def run_on_ranks(cwd, ranks, script, *arguments):
    """Run a script on several ranks, with torchrun's environment but without torchrun, which would
    import PyTorch in every process; returns what they print. Each must end with 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(ranks):
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(StartedScript(script, arguments, cwd, env=env))
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return "".join(output for output, _ in outputs)


class StartedScript:
    """A script that runs in a process of its own, with the methods of `subprocess.Popen`.

    Args:
        script: its path, absolute or below the repository.
        prepare: called in the new process before the script; it must be picklable.
    """

    def __init__(self, script, arguments, cwd, stdin="", env=None, prepare=None):
        self.args = [str(ROOT / script), *map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name) / name for name in ("stdin", "stdout", "stderr")]
        self._streams[0].write_text(stdin, encoding="utf-8")
        environment = {**os.environ, **ONE_THREAD, **(env or {})}
        self._process = _fork(self.args, str(cwd), environment, self._streams, prepare)
        self.pid = self._process.pid
        atexit.register(self.kill)  # a test that fails leaves nothing running

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """`(stdout, stderr)` of the script, once it has ended."""
        self.wait(timeout)
        atexit.unregister(self.kill)
        return tuple(path.read_text(encoding="utf-8") for path in self._streams[1:])


def python_for_shell_scripts(folder):
    """The environment in which `python` in a shell script is `forked_python.py`.

    Args:
        folder: where its `bin` is made, a `Path`.
    """
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    here = Path(__file__).with_name("forked_python.py")
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -SsE "{here}" "$@"\n')
    python.chmod(0o755)
    path = f"{python.parent}:{os.environ['PATH']}"
    return {"PATH": path, "FORKED_PYTHON": _address()}


@functools.cache
def _address():
    """The socket at which `forked_python.py` asks for a fork."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder.name}/socket")
    listener.listen()

    def answer(connection):
        with connection, connection.makefile("rw") as stream:
            asked = json.loads(stream.readline())
            streams = [f"/proc/{asked['pid']}/fd/{number}" for number in range(3)]
            ignore = functools.partial(_ignore, asked["ignored"])
            fork = _fork(asked["words"], asked["cwd"], asked["environment"], streams, ignore)
            print(fork.pid, file=stream, flush=True)
            fork.join()
            print(fork.exitcode, file=stream, flush=True)

    def listen():
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    return listener.getsockname()


def _ignore(numbers):
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _fork(*args):
    """Start `_script` in a fork of the server."""
    process = _server().Process(target=_script, args=(*args, _compiled().name))
    process.start()
    return process


@functools.cache
def _compiled():
    """A folder for the compiled modules, which the forks share."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return folder


@functools.cache
def _server():
    """The multiprocessing context of the server, which is started here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_AHEAD)
    before = os.environ.copy()
    os.environ.update(ONE_THREAD, PYTHONPATH=str(Path(__file__).parent))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _script(command, cwd, environment, streams, prepare, compiled):
    """In the fork: become the script."""
    sys.dont_write_bytecode, sys.pycache_prefix = False, compiled
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams):
        # a pipe that nobody writes to would be waited for
        reading = os.O_RDONLY | os.O_NONBLOCK
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else reading)
        os.set_blocking(file, True)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = command
    folder = Path(command[0]).resolve().parent
    is_a_copy = (folder / "train_shakespeare.py").exists()
    sys.path[:] = [
        str(folder if is_a_copy else ROOT),
        *(x for x in sys.path if not Path(x or ".").resolve().is_relative_to(ROOT / "tests")),
    ]
    if prepare:
        prepare()
    code = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
