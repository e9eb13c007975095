"""Runs the repository's scripts in processes of their own, without importing PyTorch each time.

A server process (the standard library's forkserver) imports what is slow to import and nothing of
the repository; each run is a fork of it that has its own directory, environment, standard streams
and exit code, as from the shell.
"""

import contextlib
import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
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
]


def _forkserver():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_AHEAD)
    return context


def run_script(script, arguments, cwd, stdin="", env=None, timeout=300):
    """Run `script` of the repository.

    Returns:
        A `subprocess.CompletedProcess` with text output.

    Raises:
        subprocess.TimeoutExpired: the run is killed then.
    """
    command = [str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        streams[0].write_text(stdin, encoding="utf-8")
        # the server starts with the first process and takes its environment from here
        before = os.environ.copy()
        os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parent))
        try:
            process = _forkserver().Process(
                target=_script, args=(command, str(cwd), environment, streams)
            )
            process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutExpired(command, timeout)
        output, errors = (path.read_text(encoding="utf-8") for path in streams[1:])
    return CompletedProcess(command, process.exitcode, output, errors)


def _script(command, cwd, environment, streams):
    """In the fork: become the script."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = command
    sys.path[:] = [
        str(ROOT),
        *(x for x in sys.path if not Path(x or ".").resolve().is_relative_to(ROOT / "tests")),
    ]
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
