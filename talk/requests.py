"""The HTTP side of the chat's page, on the standard library: checks requests and sends answers.

Pages of other sites can neither read nor control the chat, not even by DNS rebinding. No request
can name a file, and every refusal is one line of text.
"""

import contextlib
import json
import socket
import unicodedata
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from system.errors import warn
from talk.conversation import NO_TEXT_YET
from talk.events import Token

ROOT = Path(__file__).resolve().parent.parent
# by path, so that no request can name a file of its own
FILES = {
    "/": ("talk/page.html", "text/html; charset=utf-8"),
    "/style.css": ("web/style.css", "text/css; charset=utf-8"),
    "/page.css": ("talk/page.css", "text/css; charset=utf-8"),
    "/shared.js": ("web/shared.js", "text/javascript; charset=utf-8"),
    "/details.js": ("talk/details.js", "text/javascript; charset=utf-8"),
    "/settings.js": ("talk/settings.js", "text/javascript; charset=utf-8"),
    "/text.js": ("talk/text.js", "text/javascript; charset=utf-8"),
    "/page.js": ("talk/page.js", "text/javascript; charset=utf-8"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LARGEST_BODY = 1 << 18  # bytes
MOST_DISCARDED, READ_SIZE = 1 << 24, 1 << 16  # bytes of a refused request
LONGEST_SILENCE = 30  # seconds until an idle connection is closed


def read_files():
    """Contents and type of every file in `FILES`, by path; no other file is ever read."""
    return {path: ((ROOT / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}


class Refused(Exception):
    """A request that is refused, with a 4xx status and a message of one line."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """One connection to a `talk.server.ChatServer`."""

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
            return self._send_json({"version": self.server.version})
        if path == "/pulls":
            return self._send_json(self.server.pulls(query))
        raise Refused(404, "there is no such page")

    def _post(self):
        server = self.server
        actions = {"/stop": server.stop, "/reset": server.reset, "/undo": server.undo}
        if self.path not in (*actions, *server.look.actions, "/talk"):
            raise Refused(404, "there is no such page")
        request = self._request()
        if self.path in server.look.actions:
            return self._send_json(server.ask(server.look.actions[self.path](request)))
        if self.path in actions:
            return self._send_json(actions[self.path]())
        self._stream(self.server.talk(request))

    def _carry_out(self, method):
        try:
            self._check_origin()
            method()
        except Refused as refused:
            self._send_line(refused.status, str(refused))
        except OSError:  # the browser closed the connection
            self.close_connection = True
        except Exception as error:
            warn(f"a request failed: {type(error).__name__}: {error}")
            self._send_line(500, f"the server failed: {type(error).__name__}")

    def _check_origin(self):
        """Raise `Refused` unless the request comes from this server's page, at its own address."""
        hosts, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        if len(hosts) != 1 or not self.server.knows(hosts[0]):
            raise Refused(
                403, "unknown host name: open the page by its address, or start with --host NAME"
            )
        if origin is not None and origin.lower() != f"http://{hosts[0].lower()}":
            raise Refused(403, "requests from pages of other sites are refused")

    def _request(self):
        """The JSON object in the request's body, as a dict.

        Raises:
            Refused: if there is none, or it is too long.
        """
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "send application/json")
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not length:
            raise Refused(411, "Content-Length is missing: send it")
        if not (length.isascii() and length.isdigit()):
            raise Refused(400, "Content-Length must be a whole number")
        # Python refuses to convert thousands of digits, so their number is checked first
        if len(length) > 9 or int(length) > LARGEST_BODY:
            raise Refused(413, f"the request is too long: send at most {LARGEST_BODY:,} bytes")
        try:
            request = json.loads(self.rfile.read(int(length)).decode("utf-8"))
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None
        if not isinstance(request, dict):
            raise Refused(400, "send a JSON object")
        return request

    def _stream(self, job):
        """Send a job's events at once as lines of JSON; if the browser leaves, stop the job."""
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
        """Send a refusal and close the connection.

        The rest of the request is read and discarded first: if a connection is closed while data
        still arrives, the client may lose the answer.
        """
        self.close_connection = True
        with contextlib.suppress(OSError):
            self._send(status, (text + "\n").encode(), "text/plain; charset=utf-8")
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            for _ in range(MOST_DISCARDED // READ_SIZE):
                if not self.connection.recv(READ_SIZE):
                    break

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
        """Send the standard library's own refusals as one line too."""
        code = 405 if code == 501 else code
        self._send_line(
            code, "only GET and POST are allowed" if code == 405 else "this is not an HTTP request"
        )

    def log_message(self, *_):
        """Log nothing: the terminal shows only the URL and warnings."""


def checked_text(text):
    """The text that a user sent, with every line end as a line feed.

    Raises:
        Refused: if it is empty, is not a string, or holds control characters.
    """
    if not isinstance(text, str):
        raise Refused(400, "text must be a string")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text:
        raise Refused(400, NO_TEXT_YET)
    for character in text:
        if unicodedata.category(character) == "Cc" and character not in "\n\t":
            raise Refused(
                400, f"the text has a control character, U+{ord(character):04X}: remove it"
            )
    return text


def _to_json(data):
    """JSON of plain types and of `Token`s, in bytes."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, default=Token.to_json)
    return text.encode()
