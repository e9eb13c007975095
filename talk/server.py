"""The chat as a web page, `chat.py --serve`: one model, one conversation, one answer at a time.

The thread that calls `serve` runs the model; other threads send its events to the browser
(talk/requests.py).
"""

import argparse
import contextlib
import ipaddress
import math
import queue
import signal
import socket
import threading
from http.server import ThreadingHTTPServer

from system.errors import UserError, warn
from system.safe_text import one_line, printable
from talk.conversation import NO_ANSWER_YET, NO_TEXT_YET, NOTHING_TO_UNDO
from talk.requests import Handler, Refused, checked_text, read_files
from talk.settings import OPTIONAL_SETTINGS, SETTINGS

KEPT_TOKENS = 2000  # the page shows the newest, however long the conversation is
EVENTS_AHEAD = 64  # kept for a browser that is slower than the model


class Job:
    """One answer that is being made; its `events` come through a queue, None at the end."""

    def __init__(self, make_events):
        self._make_events = make_events
        self.stopped = threading.Event()
        self.events = queue.Queue(EVENTS_AHEAD)

    def run(self):
        """Make the events; only the model's thread may call this."""
        try:
            for event in self._make_events(self.stopped):
                self._put(event)
        except BaseException:
            self.stopped.set()
            raise

    def finish(self):
        """Mark the end of the events with None."""
        self._put(None)

    def _put(self, event):
        """Wait until the browser takes an event; once it has left, drop the oldest instead."""
        while True:
            try:
                return self.events.put(event, timeout=0.2)
            except queue.Full:
                if self.stopped.is_set():
                    with contextlib.suppress(queue.Empty):
                        self.events.get_nowait()


class ChatServer(ThreadingHTTPServer):
    """Answers browsers; the model's thread takes one `Job` after the other from `jobs`."""

    daemon_threads = True

    def __init__(self, host, port, conversation, introduction, look):
        self.conversation, self.introduction, self.look = conversation, introduction, look
        self.files = read_files() | look.files()
        self.version = 1  # counts the changes, so that a tab notices those of another
        self.named_host = host
        self.jobs = queue.Queue()
        self.job, self._job_lock = None, threading.Lock()
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self.address_family = family
        super().__init__((host, port), Handler)
        self.is_loopback = _is_loopback(self.server_address[0])

    @property
    def url(self):
        host, port = self.server_address[:2]
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def knows(self, host):
        """Whether a Host header names this server.

        Any address will do, but of names only our own: the owner of a domain can point its name
        at this computer (DNS rebinding), but cannot change what an address means.
        """
        name = _host_name(host)
        names = {"localhost", self.named_host.lower()}
        if not self.is_loopback:
            names.add(socket.gethostname().lower())
        if name in names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return _is_loopback(name) or not self.is_loopback

    def begin(self, make_events, check=lambda: None):
        """Hand a job to the model's thread, if it is idle.

        Args:
            make_events: takes the event that stops it and yields the page's events.
            check: called when no other job can begin any more; may raise `Refused`.

        Raises:
            Refused: if another answer is being written.
        """
        with self._job_lock:
            if self.job is not None:
                raise Refused(409, "an answer is being written: wait, or stop it")
            check()
            self.job = Job(make_events)
            self.jobs.put(self.job)
            return self.job

    def work(self):
        """Run the jobs one after the other until Ctrl-C; the caller becomes the model's thread."""
        while True:
            try:
                # without a timeout, a Ctrl-C just before the wait begins would not end it
                job = self.jobs.get(timeout=1)
            except queue.Empty:
                continue
            try:
                job.run()
            finally:
                with self._job_lock:
                    self.job = None
                job.finish()

    def state(self):
        """A dict with everything that a page needs to show the conversation."""
        conversation = self.conversation
        config = conversation.stream.model.config
        return {
            "introduction": self.introduction,
            "suggestions": self.look.suggestions,
            "law": getattr(config, "law", None),
            "numLayers": config.num_layers,
            "numHeads": config.num_heads,
            "version": self.version,
            "isBusy": self.job is not None,
            "settings": conversation.settings,
            **self._abilities(),
            "keptTokens": conversation.kept_tokens,
            "tokens": conversation.kept(),
        }

    def pulls(self, query):
        """A dict: `rows`, all rows of the pulls on the token at a `position`, and `quiet`, the
        background's share in each, None without a background.

        Raises:
            Refused: if there is no such position, or its token is no longer kept.
        """
        number = query.removeprefix("position=")
        if not (number.isascii() and number.isdigit() and len(number) < 16):
            raise Refused(400, "give the position of a token: /pulls?position=0")
        for token in self.conversation.kept():
            if token.position == int(number):
                rows, quiet = token.pull_rows(), token.quiet_rows()
                return {"position": token.position, "rows": rows, "quiet": quiet}
        raise Refused(404, f"the token at position {int(number):,} is not kept")

    def talk(self, request):
        """Begin the job that a request asks for.

        Raises:
            Refused: if the request is malformed or cannot be carried out now.
        """
        conversation = self.conversation
        action, settings = request.get("action"), self._settings(request.get("settings", {}))
        if action not in ("send", "retry", "more"):
            raise Refused(400, "action must be send, retry or more")
        text = checked_text(request.get("text", "")) if action == "send" else ""

        def check():
            version = request.get("version", self.version)
            if type(version) is not int:
                raise Refused(400, "version must be a whole number")
            if version != self.version:
                raise Refused(409, "the conversation was continued in another tab")
            if action == "retry" and not conversation.can_retry:
                raise Refused(409, NO_ANSWER_YET)
            if action == "more" and not conversation.can_go_on:
                raise Refused(409, NO_TEXT_YET)
            self._change(settings)

        def make_events(stopped):
            yield {"type": "begin", "version": self.version}
            try:
                if action == "send":
                    yield from conversation.reply(text, stopped)
                else:
                    yield from getattr(conversation, action)(stopped)
            except Exception as error:
                # the model may have stopped in the middle of a token: its state is of no use
                self._restart()
                reason = one_line(str(error))[:300]
                if not isinstance(error, UserError):
                    reason = f"the model failed, {type(error).__name__}: {reason}"
                yield {"type": "failed", "text": f"{reason} (a new conversation starts)"}
            yield {
                "type": "end",
                "version": self.version,
                **self._abilities(),
            }

        return self.begin(make_events, check)

    def stop(self):
        """Stop the answer that is being written, if there is one."""
        job = self.job
        if job is not None:
            job.stopped.set()
        return {"wasBusy": job is not None}

    def reset(self):
        """Forget the conversation."""
        return self._do(self._restart)

    def undo(self):
        """Bring back the answer before the last retry.

        Raises:
            Refused: if there is none.
        """

        def check():
            if not self.conversation.can_undo:
                raise Refused(409, NOTHING_TO_UNDO)

        def change():
            self.conversation.undo()
            self.version += 1

        return self._do(change, check)

    def _do(self, change, check=lambda: None):
        """Change the conversation; returns the state afterwards."""

        def make_events(_):
            change()
            yield {}  # no page reads it

        # only the model's thread may touch the model, so it does the work, and we wait for it
        job = self.begin(make_events, check)
        while job.events.get() is not None:
            pass
        return self.state()

    def ask(self, question):
        """The answer of a function that needs the model.

        Raises:
            Refused: if it raises a `UserError`, or an answer is being written.
        """

        def make_events(_):
            try:
                yield question()
            except Exception as error:  # for the thread that waits: the model's goes on
                yield error

        job = self.begin(make_events)
        answer = job.events.get()
        while job.events.get() is not None:
            pass
        if isinstance(answer, UserError):
            raise Refused(400, one_line(str(answer))[:300])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _abilities(self):
        """What the page's buttons can do now."""
        conversation = self.conversation
        return {
            "canRetry": conversation.can_retry,
            "canUndo": conversation.can_undo,
            "canGoOn": conversation.can_go_on,
        }

    def _change(self, settings):
        """Use new settings; a different seed restarts the random numbers."""
        has_new_seed = settings["seed"] != self.conversation.settings["seed"]
        self.conversation.settings.update(settings)
        if has_new_seed:
            self.conversation.reseed()
        self.version += 1

    def _restart(self):
        """Start a new conversation; with a seed, the same text gets the same answer again."""
        self.conversation.forget()
        self.conversation.reseed()
        self.version += 1

    def _settings(self, given):
        """The current settings with those given, which are checked as on the command line.

        Raises:
            Refused: if one of them is unknown or out of range.
        """
        if not isinstance(given, dict):
            raise Refused(400, "settings must be an object")
        settings = dict(self.conversation.settings)
        for name, value in given.items():
            if name not in settings:
                raise Refused(400, f"no such setting: {printable(name[:40])}")
            if value is None and name in OPTIONAL_SETTINGS:
                settings[name] = None
                continue
            if name == "stop":
                if type(value) is not list or not all(type(text) is str for text in value):
                    raise Refused(400, "stop must be a list of texts")
            elif type(value) not in (int, float):
                raise Refused(400, f"{name} must be a number")
            try:
                read = SETTINGS[name]
                settings[name] = [*map(read, value)] if name == "stop" else read(str(value))
            except (ValueError, OverflowError, argparse.ArgumentTypeError) as error:
                raise Refused(400, f"{name}: {one_line(str(error))[:200]}") from None
            if isinstance(settings[name], float) and not math.isfinite(settings[name]):
                raise Refused(400, f"{name} must be a finite number")
        return settings

    def handle_error(self, request, client_address):
        """Print nothing: it is no error if a browser leaves in the middle of a request."""


def serve(conversation, host, port, introduction, look):
    """Serve until Ctrl-C, which raises `KeyboardInterrupt`.

    Args:
        conversation: a `Conversation` that keeps tokens.
        port: 0 takes any free port.
        introduction: a line about the model.
        look: a `talk.look.Look`.

    Raises:
        UserError: if it cannot listen at this host and port.
    """
    # a script starts its background jobs with Ctrl-C ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        server = ChatServer(host, port, conversation, introduction, look)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port} cannot be used ({reason}): --port 0 takes any free port"
        ) from None
    if not server.is_loopback:
        warn(f"--host {host}: anyone who can reach this port can read and use this chat")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"chat at {server.url} (Ctrl-C stops it)", flush=True)
    try:
        server.work()
    finally:
        server.shutdown()
        server.server_close()


def _is_loopback(address):
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _host_name(host):
    """The name or address in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
