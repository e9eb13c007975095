"""Stands in for `python` in the shell scripts that tests run, without importing PyTorch each time.

A script of the repository runs as a fork of the server in `script_runner.py`, with the streams,
directory and environment of this process, which passes signals on and ends as the fork ends.
Anything else goes to the real Python.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def main(words):
    if not words or not words[0].endswith(".py"):
        os.execv(sys.executable, [sys.executable, *words])
    caught = [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
    request = {
        **{"words": words, "cwd": os.getcwd(), "environment": dict(os.environ)},
        **{"pid": os.getpid(), "ignored": [n for n in PASSED_ON if n not in caught]},
    }
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["FORKED_PYTHON"])
        answers = connection.makefile("rw")
        print(json.dumps(request), file=answers, flush=True)
        fork = int(answers.readline())
        for number in caught:
            signal.signal(number, lambda number, frame: os.kill(fork, number))
        code = int(answers.readline())
    if code < 0:  # a signal ended it
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
