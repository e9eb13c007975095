"""The chat as a web page: `chat.py --serve`. HTTP by the standard library, one model, one talk.

The model is fed by the thread that calls `serve`; the others carry its events to the browser. What
a browser may do is decided by `_refusal`: a page of another site can neither read nor steer.
"""

import argparse
import contextlib
import ipaddress
import json
import math
import queue
import signal
import socket
import threading
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from errors import UserError, warn
from live_conversation import KEPT_TOKENS
from terminal import one_line, printable

HERE = Path(__file__).resolve().parent
FILES = {
    "/": ("chat_page.html", "text/html; charset=utf-8"),
    "/map_page.css": ("map_page.css", "text/css; charset=utf-8"),
    "/chat_page.css": ("chat_page.css", "text/css; charset=utf-8"),
    "/chat_page.js": ("chat_page.js", "text/javascript; charset=utf-8"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LARGEST_BODY = 1 << 18  # bytes
LONGEST_SILENCE = 30  # seconds until a connection is given up
EVENTS_AHEAD = 64  # of a browser that is slower than the model


class Refused(Exception):
    """A request that is not carried out: a status of 4xx and one line."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Job:
    """One answer on its way: what is to be done, and the events it yields, None at the end."""

    def __init__(self, make_events):
        self._make_events = make_events
        self.stopped = threading.Event()
        self.events = queue.Queue(EVENTS_AHEAD)

    def run(self):
        """In the model's thread."""
        try:
            for event in self._make_events(self.stopped):
                self._put(event)
        except BaseException:
            self.stopped.set()
            raise

    def finish(self):
        """No event comes any more."""
        self._put(None)

    def _put(self, event):
        """Wait for the browser, but not for one that left."""
        while True:
            try:
                return self.events.put(event, timeout=0.2)
            except queue.Full:
                if self.stopped.is_set():
                    with contextlib.suppress(queue.Empty):
                        self.events.get_nowait()


class ChatServer(ThreadingHTTPServer):
    """Listens; the model's thread takes one `Job` after the other from `jobs`."""

    daemon_threads = True

    def __init__(self, host, port, conversation, parsers, about):
        self.conversation, self.parsers, self.about = conversation, parsers, about
        self.named_host = host
        self.jobs = queue.Queue()
        self.job, self._job_lock = None, threading.Lock()
        self.files = {
            path: ((HERE / name).read_bytes(), kind) for path, (name, kind) in FILES.items()
        }
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
        """Whether a Host header names this server: a name of another's choosing does not.

        An address cannot be rebound by whoever owns a domain; a name can.
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
        """Hand a job to the model's thread, if it has none.

        Args:
            make_events: from the event that stops it to the events of the page.
            check: called once nothing else can begin; may raise `Refused`.
        """
        with self._job_lock:
            if self.job is not None:
                raise Refused(409, "an answer is being written: stop it, or wait")
            check()
            self.job = Job(make_events)
            self.jobs.put(self.job)
            return self.job

    def work(self):
        """The model's thread: jobs, one after the other, until Ctrl-C."""
        while True:
            job = self.jobs.get()
            try:
                job.run()
            finally:
                with self._job_lock:
                    self.job = None
                job.finish()

    def state(self):
        """All that a page needs to show the conversation."""
        conversation = self.conversation
        return {
            **self.about,
            "version": conversation.version,
            "isBusy": self.job is not None,
            "settings": conversation.settings,
            "canRetry": conversation.can_retry,
            "canGoOn": conversation.can_go_on,
            "keptTokens": KEPT_TOKENS,
            "tokens": [token.to_json() for token in conversation.kept()],
        }

    def pulls(self, query):
        """Every row of the pulls on the token at a position."""
        number = query.removeprefix("position=")
        if not (number.isascii() and number.isdigit() and len(number) < 16):
            raise Refused(400, "give the position of a token: /pulls?position=0")
        for token in self.conversation.kept():
            if token.position == int(number):
                return {"position": token.position, "rows": token.pull_rows()}
        raise Refused(404, f"the token at position {int(number):,} is not kept")

    def talk(self, request):
        """The job that a request asks for.

        Raises:
            Refused: where it asks for what cannot be done.
        """
        conversation = self.conversation
        action, settings = request.get("action"), self._settings(request.get("settings", {}))
        if action not in ("send", "retry", "more"):
            raise Refused(400, "action must be send, retry or more")
        text = _text(request.get("text", "")) if action == "send" else ""

        def check():
            version = request.get("version", conversation.version)
            if type(version) is not int:
                raise Refused(400, "version must be a whole number")
            if version != conversation.version:
                raise Refused(409, "this conversation went on in another tab")
            if action == "retry" and not conversation.can_retry:
                raise Refused(409, "nothing was answered yet")
            if action == "more" and not conversation.can_go_on:
                raise Refused(409, "write something first")
            conversation.start(settings)

        def make_events(stopped):
            yield {"type": "begin", "version": conversation.version}
            try:
                if action == "send":
                    yield from conversation.reply(text, stopped)
                else:
                    yield from getattr(conversation, action)(stopped)
            except (UserError, RuntimeError, MemoryError) as error:
                # the model's state may be half of a token: nothing can be built on it
                conversation.forget()
                reason = one_line(str(error))[:300] or type(error).__name__
                yield {"type": "failed", "text": f"{reason} (the conversation starts afresh)"}
            yield {
                "type": "end",
                "version": conversation.version,
                "canRetry": conversation.can_retry,
                "canGoOn": conversation.can_go_on,
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

        def make_events(_):
            self.conversation.forget()
            yield {}

        job = self.begin(make_events)
        while job.events.get() is not None:
            pass
        return self.state()

    def _settings(self, given):
        """Settings as the command line would take them; what is not given stays as it is."""
        if not isinstance(given, dict):
            raise Refused(400, "settings must be an object")
        settings = dict(self.conversation.settings)
        for name, value in given.items():
            if name not in settings:
                raise Refused(400, f"no such setting: {printable(name[:40])}")
            if value is None and self.parsers[name][1]:
                settings[name] = None
                continue
            if type(value) not in (int, float):
                raise Refused(400, f"{name} must be a number")
            try:
                settings[name] = self.parsers[name][0](str(value))
            except (ValueError, OverflowError, argparse.ArgumentTypeError) as error:
                raise Refused(400, f"{name}: {one_line(str(error))[:200]}") from None
            if isinstance(settings[name], float) and not math.isfinite(settings[name]):
                raise Refused(400, f"{name} must be a finite number")
        return settings

    def handle_error(self, request, client_address):
        """A browser that left in the middle of a request is nobody's mistake."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "newton-gravity-chat", ""
    timeout = LONGEST_SILENCE
    disable_nagle_algorithm = True

    def do_GET(self):
        self._carry_out(self._get)

    def do_POST(self):
        self._carry_out(self._post)

    def _get(self):
        path, _, query = self.path.partition("?")
        if path in self.server.files:
            return self._send(200, *self.server.files[path])
        if path == "/state":
            return self._send_json(self.server.state())
        if path == "/version":
            return self._send_json({"version": self.server.conversation.version})
        if path == "/pulls":
            return self._send_json(self.server.pulls(query))
        raise Refused(404, "there is no such page")

    def _post(self):
        actions = {"/stop": self.server.stop, "/reset": self.server.reset}
        if self.path not in (*actions, "/talk"):
            raise Refused(404, "there is no such page")
        request = self._request()
        if self.path in actions:
            return self._send_json(actions[self.path]())
        self._stream(self.server.talk(request))

    def _carry_out(self, method):
        try:
            self._refuse_strangers()
            method()
        except Refused as refused:
            self._send_line(refused.status, str(refused))
        except OSError:  # the browser left
            self.close_connection = True
        except Exception as error:
            warn(f"a request failed: {type(error).__name__}: {error}")
            self._send_line(500, f"the server failed: {type(error).__name__}")

    def _refuse_strangers(self):
        """Only this server's own page, at this server's own address, may ask."""
        hosts, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        if len(hosts) != 1 or not self.server.knows(hosts[0]):
            raise Refused(403, "this server is not known by that name")
        if origin is not None and origin.lower() != f"http://{hosts[0].lower()}":
            raise Refused(403, "pages of other sites may not ask")

    def _request(self):
        """The JSON object of a request's body."""
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "send application/json")
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not length:
            raise Refused(411, "say how long it is: Content-Length")
        if not (length.isascii() and length.isdigit()):
            raise Refused(400, "Content-Length must be a whole number")
        if len(length) > 9 or int(length) > LARGEST_BODY:
            raise Refused(413, f"too long: send at most {LARGEST_BODY:,} bytes")
        try:
            request = json.loads(self.rfile.read(int(length)).decode("utf-8"))
        except (ValueError, RecursionError):
            raise Refused(400, "that is no JSON") from None
        if not isinstance(request, dict):
            raise Refused(400, "send a JSON object")
        return request

    def _stream(self, job):
        """The events of a job as lines of JSON, each as it comes; who leaves stops the job."""
        try:
            self._send_head(200, "application/x-ndjson", None)
            while (event := job.events.get()) is not None:
                line = _to_json(event) + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            job.stopped.set()
            raise

    def _send_json(self, data):
        self._send(200, _to_json(data), "application/json")

    def _send_line(self, status, text):
        """A refusal; what the request may still hold is not read."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self._send(status, (text + "\n").encode(), "text/plain; charset=utf-8")

    def _send(self, status, body, kind):
        self._send_head(status, kind, len(body))
        self.wfile.write(body)

    def _send_head(self, status, kind, length):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        for name, value in (
            ("Content-Security-Policy", POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code, message=None, explain=None):
        """What the standard library refuses, as one line too."""
        code = 405 if code == 501 else code
        self._send_line(code, "only GET and POST" if code == 405 else "that is no request")

    def log_message(self, *_):
        """The terminal is for the URL and warnings."""


def serve(conversation, host, port, parsers, about):
    """Serve until Ctrl-C, which raises `KeyboardInterrupt`.

    Args:
        conversation: a `LiveConversation`.
        port: 0 takes any that is free.
        parsers: of each setting, how its text is read, and whether it may be off.
        about: what the page says of the model; plain types.

    Raises:
        UserError: where host and port cannot be had.
    """
    # started in the background of a script it would be deaf to Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        server = ChatServer(host, port, conversation, parsers, about)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port} cannot be had ({reason}): "
            "--port 0 takes any port that is free"
        ) from None
    if not server.is_loopback:
        warn(f"--host {host}: whoever reaches this port can read and use this chat")
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
    """The name or address of a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def _text(text):
    """The text that a user sent, with line ends as the models know them."""
    if not isinstance(text, str):
        raise Refused(400, "text must be a text")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text:
        raise Refused(400, "write something first")
    for character in text:
        if unicodedata.category(character) == "Cc" and character not in "\n\t":
            raise Refused(
                400, f"the text holds a control character, U+{ord(character):04X}: remove it"
            )
    return text


def _to_json(data):
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
