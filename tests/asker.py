"""Sends HTTP requests to the chat's server."""

import http.client
import json
import time

ENDLESS = {"max_new_tokens": 10**9}


class Asker:
    """Sends HTTP requests to a `chat.py --serve`."""

    def __init__(self, port):
        self.port = port

    def ask(self, method, path, body=None, headers=()):
        """Returns the response, still unread, and its connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body), {"Content-Type": "application/json", **dict(headers)}
        connection.request(method, path, body, dict(headers))
        return connection.getresponse(), connection

    def get(self, path):
        response, connection = self.ask("GET", path)
        assert response.status == 200
        data = json.loads(response.read())
        connection.close()
        return data

    def post(self, path, body):
        """The status, and the answer: a list of objects if it is a stream, else its text."""
        response, connection = self.ask("POST", path, body)
        text = response.read().decode()
        connection.close()
        is_json = response.headers["Content-Type"] == "application/x-ndjson"
        return response.status, [json.loads(x) for x in text.splitlines()] if is_json else text

    def json(self, path, body):
        """The answer to a POST that succeeds."""
        status, text = self.post(path, body)
        assert status == 200, text
        return json.loads(text)

    def talk(self, action, text="", **settings):
        status, events = self.post("/talk", {"action": action, "text": text, "settings": settings})
        assert status == 200 and events[-1]["type"] == "end", events
        return events

    def begin_endless(self):
        """Begin an answer that goes on until it is stopped, and read some of it."""
        body = {"action": "send", "text": "go\n", "settings": ENDLESS}
        response, connection = self.ask("POST", "/talk", body)
        for _ in range(20):
            assert response.readline()
        return response, connection

    def wait_until_idle(self):
        deadline = time.monotonic() + 30
        while self.get("/state")["isBusy"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
