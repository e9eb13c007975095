"""Changed requests to the chat's server, which runs in threads of this process.

As in exchanged_models.py, a refusal is raised as `UserError`, here for a status of 4xx.
"""

import contextlib
import http.client
import io
import json
import socket
import threading
import time

from hypothesis import strategies as st

from coords import live
from engine.checkpoint import load_model
from mutations import changed_bytes, changed_values
from small_models import make_checkpoint
from system.errors import UserError
from talk.conversation import Conversation
from talk.look import Look
from talk.server import KEPT_TOKENS, ChatServer
from talk.settings import SETTINGS

DRAWN = {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
DRAWN |= {"max_new_tokens": 4, "seed": 5, "stop": ["zz"]}
CHANGES = (
    {"kind": "mass", "token": 1, "factor": 2.0},
    {"kind": "move", "token": 3, "toward": 1, "share": 0.5},
    {"kind": "cut", "layer": 1, "head": None, "token": 3, "source": 2},
    {"kind": "off", "layer": 2, "head": 1},
)
REQUESTS = (
    ("/talk", {"action": "send", "text": "the king\n", "settings": DRAWN}),
    ("/talk", {"action": "retry", "settings": DRAWN}),
    ("/talk", {"action": "more", "settings": {}, "version": 1}),
    ("/look", {"text": "the king", "conversation": False}),
    ("/look/what-if", {"tokens": [1, 2, 3, 4], "at": 3, "changes": [*CHANGES]}),
    ("/look/branch", {"tokens": [1, 2, 3, 4], "at": 2, "id": 5}),
    *((path, {}) for path in ("/undo", "/reset", "/stop")),
)
ENOUGH = 1 << 14  # bytes of an answer, which may be endless


def chat_requests():
    """`(cases, read, close)`: POST requests, their bytes or the JSON in them changed."""
    make_checkpoint("x.pt")
    model, tokens, checkpoint = load_model("x.pt")
    start = dict.fromkeys(SETTINGS) | {"temperature": 1.0, "max_new_tokens": 4, "seed": 5}
    conversation = Conversation(model, tokens, start, KEPT_TOKENS)
    server = ChatServer(
        "127.0.0.1", 0, conversation, "", Look(conversation, checkpoint, "x.pt", live)
    )
    for function in (server.serve_forever, server.work):
        threading.Thread(target=function, daemon=True).start()
    port = server.server_address[1]

    def request(path, body):
        head = f"POST {path} HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json"
        return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    def answer(data):
        found = b""
        with (
            socket.create_connection(("127.0.0.1", port), timeout=60) as connection,
            contextlib.suppress(ConnectionError),  # it may be closed before it has all
        ):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                found += part
                if len(found) > ENOUGH:
                    server.stop()
        return found

    def idle():
        server.stop()
        while server.job is not None:
            time.sleep(0.001)

    def read(data):
        server.reset()
        given = answer(data)
        idle()
        assert json.loads(get_state())["isBusy"] is False
        if not given.startswith(b"HTTP/1.1 "):  # of HTTP/0.9, which has neither status nor head
            assert given in (b"", b"this is not an HTTP request\n")
            raise UserError("the connection was closed")
        found = parsed(given)
        body = found.read().decode()
        if found.status != 200:
            assert found.status in range(400, 500) or found.status == 505  # HTTP/9.9
            assert body.count("\n") == 1 and body.endswith("\n")
            raise UserError(body.removesuffix("\n"))
        for line in body.splitlines():
            event = json.loads(line, parse_constant=int)  # int("NaN") is an error
            assert "the model failed" not in event.get("text", "")

    def get_state():
        return parsed(
            answer(f"GET /state HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode())
        ).read()

    for path, body in (REQUESTS[0], *REQUESTS[3:6]):
        read(request(path, json.dumps(body).encode()))
    valid = [request(path, json.dumps(body).encode()) for path, body in REQUESTS]
    return (
        st.one_of(
            *(
                changed_values(body).map(lambda x, path=path: request(path, json.dumps(x).encode()))
                for path, body in REQUESTS[:6]
                for _ in range(3)
            ),
            st.sampled_from(valid).flatmap(lambda data: changed_bytes(data, valid)),
        ),
        read,
        server.shutdown,
    )


def parsed(data):
    """The `http.client.HTTPResponse` in these bytes."""

    class Socket:
        def makefile(self, mode):
            return io.BytesIO(data)

    response = http.client.HTTPResponse(Socket(), method="POST")
    response.begin()
    return response
