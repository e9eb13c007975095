"""Reads lines from a terminal, with editing, history and completion, or from a pipe."""

import contextlib
import os
import sys
from pathlib import Path

from system.errors import warn
from system.safe_text import BROKEN
from system.terminal import is_capable, styled

HISTORY_LINES = 1000


def history_path():
    """The file of the history, in the XDG state directory.

    Raises:
        RuntimeError: if the home directory is unknown.
    """
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        state = Path.home() / ".local" / "state"
    return state / "newton-gravity" / "chat_history"


def without_broken_bytes(text):
    """The text with U+FFFD for every byte that is not UTF-8, and a warning if there is one."""
    text, count = BROKEN.subn("\ufffd", text)
    if count:
        warn(f"{count} byte{'s are' if count > 1 else ' is'} not UTF-8: read as \ufffd")
    return text


class LineInput:
    """Standard input, line by line.

    Args:
        prompt: shown at a terminal, but not written to a pipe.
        complete: a function that takes the text before the cursor and returns the words that
            can complete its last word.
    """

    def __init__(self, prompt, complete):
        self.is_interactive = all(s and s.isatty() for s in (sys.stdin, sys.stdout))
        self._prompt = prompt if self.is_interactive else ""
        self._complete = complete
        self._readline = self._history = None
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")
        if self.is_interactive and is_capable():
            with contextlib.suppress(ImportError):
                import readline

                self._readline = readline
                self._set_up_readline()

    def read(self):
        """The next line, without its end.

        Raises:
            EOFError: after the last line.
        """
        if self._readline is None:
            print(self._prompt, end="", flush=True)
            line = "" if sys.stdin is None else sys.stdin.readline()
            if not line:
                raise EOFError
            return without_broken_bytes(line.removesuffix("\n"))
        known = self._readline.get_current_history_length()
        line = input(self._styled_prompt())
        if self._readline.get_current_history_length() > known:
            self._keep_line()
        return without_broken_bytes(line)

    def _styled_prompt(self):
        """The prompt with its colour codes marked: readline must not count them as columns."""
        begin, _, end = styled("|", "bold").partition("|")
        return f"\x01{begin}\x02{self._prompt}\x01{end}\x02" if begin else self._prompt

    def _set_up_readline(self):
        readline = self._readline
        readline.set_completer_delims(" ")
        readline.set_completer(self._completion)
        is_libedit = "libedit" in (readline.__doc__ or "")
        if is_libedit:
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            # a pasted text is one input: its line ends do not send it, its bytes are not keys
            readline.parse_and_bind("set enable-bracketed-paste on")
        with contextlib.suppress(OSError, RuntimeError):
            path = history_path()
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._history = path
            readline.set_history_length(HISTORY_LINES)
            readline.read_history_file(path)

    def _keep_line(self):
        """Append the line at once: this session may be killed, and others write to the file too."""
        if self._history is None:
            return
        with contextlib.suppress(OSError):
            if hasattr(self._readline, "append_history_file"):
                self._readline.append_history_file(1, self._history)
            else:
                self._readline.write_history_file(self._history)

    def _completion(self, _, number):
        line = self._readline.get_line_buffer()[: self._readline.get_endidx()]
        found = self._complete(line)
        return found[number] if number < len(found) else None
