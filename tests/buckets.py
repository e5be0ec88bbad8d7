"""A local S3 server, and a proxy before it that fails as servers and networks do."""

import http.client
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["500", "503", "400", "403", "slow", "cut off", "hung up"]

_SERVE = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
input()
"""


@contextmanager
def s3_server(bucket: str) -> Iterator[int]:
    """A server with one bucket, in another process; its port."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/{bucket}", method="PUT")).close()
        yield port
    finally:
        process.communicate("\n", timeout=30)


class FlakyProxy:
    """Forwards to the server, but for the requests that `fault` says fail, and how.

    `fault` is given the number of the request, from 0, its method and its path; `served` counts what was done.
    """

    def __init__(self, server_port: int, fault: Callable[[int, str, str], Fault | None], slow_seconds: float) -> None:
        self.served: dict[Fault | None, int] = {}
        self._count, self._lock = 0, threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one_request(self) -> None:
                super().handle_one_request()
                self.close_connection = True

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with proxy._lock:
                    kind = fault(proxy._count, self.command, self.path)
                    proxy._count += 1
                    proxy.served[kind] = proxy.served.get(kind, 0) + 1
                if kind == "slow":
                    time.sleep(slow_seconds)
                if kind in ("slow", "hung up"):
                    return
                if kind is not None and kind.isdigit():
                    text = b"<Error><Code>AccessDenied</Code></Error>"
                    self.send_response(int(kind))
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)
                    return
                server = http.client.HTTPConnection("127.0.0.1", server_port)
                server.request(self.command, self.path, body, dict(self.headers))
                reply = server.getresponse()
                content = reply.read()
                server.close()
                self.send_response(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if kind == "cut off" else content)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815 - the names that http.server asks for

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """End it; from then on its port refuses connections."""
        self._server.shutdown()
        self._server.server_close()
