"""A metadata service on loopback, as the clouds' own behave, with faults to order."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Metadata:
    """What the service answers. `documents`: path → text; other paths are 404. `fault`: what goes wrong now."""

    def __init__(self) -> None:
        self.documents: dict[str, str] = {}
        self.fault = ""
        self.tokens: set[str] = set()  # those that are valid now
        self.requests: list[tuple[int, str, str]] = []  # status, method, path
        self.url = ""

    def aws_notice(self, seconds: float = 120) -> int:
        """Announces the end of the instance; returns the Unix second."""
        at = round(time.time() + seconds)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
        self.documents["/latest/meta-data/spot/instance-action"] = json.dumps({"action": "terminate", "time": when})
        return at


@contextmanager
def serve() -> Iterator[Metadata]:
    """Runs one until the block ends."""
    state = Metadata()

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            if self._faulty():
                return
            seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if self.path != "/latest/api/token" or not seconds.isdigit() or not 1 <= int(seconds) <= 21600:
                self._send(400, "")
                return
            token = secrets.token_urlsafe(40) + "=="
            state.tokens.add(token)
            self._send(200, token)

        def do_GET(self) -> None:
            if self._faulty():
                return
            path = self.path
            allowed = True
            if path.startswith("/latest/"):
                allowed = self.headers.get("X-aws-ec2-metadata-token") in state.tokens
            elif path.startswith("/computeMetadata/"):
                allowed = self.headers.get("Metadata-Flavor") == "Google"
            elif path.startswith("/metadata/"):
                allowed = self.headers.get("Metadata") == "true"
            if not allowed:
                self._send(401, "Unauthorized")
            elif path in state.documents:
                self._send(200, state.documents[path])
            else:
                self._send(404, "<html>404 - Not Found</html>")

        def _faulty(self) -> bool:
            fault = state.fault
            if fault == "error":
                self._send(500, "internal error")
            elif fault == "busy":
                self._send(503, "slow down")
            elif fault == "garbage":
                self._send(200, '\x00\xff<html>{"action": ')
            elif fault == "list":
                self._send(200, "[1, 2]")
            elif fault == "redirect":
                self._send(302, "", Location=state.url + "/elsewhere")
            elif fault == "closed":
                self.connection.close()
            elif fault == "endless":  # headers, then a byte now and then
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                while state.fault == "endless":
                    self.wfile.write(b"x")
                    time.sleep(0.2)
            elif fault == "silent":
                while state.fault == "silent":
                    time.sleep(0.1)
            return bool(fault)

        def _send(self, status: int, text: str, **headers: str) -> None:
            state.requests.append((status, self.command, self.path))
            data = text.encode("latin-1")
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:  # clients that gave up
            pass

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.fault = "error"
        server.shutdown()
        server.server_close()


FAULTS = ["error", "busy", "garbage", "list", "redirect", "closed", "endless", "silent"]
