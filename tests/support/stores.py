# SPDX-License-Identifier: Apache-2.0
"""Object stores on loopback: emulators of GCS and S3 behind a proxy that fails requests."""

import contextlib
import http.client
import http.server
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

BUCKET = "bucket"
KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
ENDPOINTS = {"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL"}
PACKAGES = {"gs": "gcp_storage_emulator", "s3": "moto"}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def emulator(scheme, log):
    """An empty store with BUCKET -> its port."""
    port, scripts = str(free_port()), pathlib.Path(sys.executable).parent
    command = {
        "gs": ["gcp-storage-emulator", "start", "--host=127.0.0.1", f"--port={port}", "--in-memory"]
        + [f"--default-bucket={BUCKET}"],
        "s3": ["moto_server", "-H127.0.0.1", f"-p{port}"],
    }[scheme]
    with open(log, "w") as said:
        program = [sys.executable, str(scripts / command[0]), *command[1:]]
        process = subprocess.Popen(program, stdout=said, stderr=said)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", int(port)), timeout=1).close()
                break
            assert process.poll() is None, pathlib.Path(log).read_text()
            time.sleep(0.1)
        if scheme == "s3":
            connection = http.client.HTTPConnection("127.0.0.1", int(port))
            sign = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"
            connection.request("PUT", f"/{BUCKET}", headers={"Authorization": sign})
            assert connection.getresponse().status == 200
        yield int(port)
    finally:
        process.kill()
        process.wait()


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests to a store, and fails every `every`-th one (0: none), in turn by each of
    FAULTS. The emulator of GCS ignores the condition ifGenerationMatch=0, which is added here, and
    takes the last byte of an upload in parts if it is 13, which is passed on as one part."""

    daemon_threads = True
    FAULTS = ("503 at once", "done, but the answer is lost", "2 s late")

    def __init__(self, store):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store, self.every, self.answer = store, 0, 0  # answer: the status of all requests
        self.requests, self.faults = itertools.count(1), itertools.cycle(self.FAULTS)
        self.condition, self.failed = threading.Lock(), 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that was killed."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _forward(self, method, path, body, headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.store, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def _answer(self):
        body = self._body()
        if "uploadType=multipart" not in self.path:
            return self._forward(self.command, self.path, body, self.headers)
        _, facts, data = body.split(b"\n\n", 2)
        name = json.loads(facts[: facts.rindex(b"\n--")])["name"]
        key = urllib.parse.quote(name, safe="")
        path = self.path.partition("?")[0] + f"?uploadType=media&name={key}"
        with self.server.condition:
            if "ifGenerationMatch=0" in self.path:
                there, _, _ = self._forward("GET", f"/storage/v1/b/{BUCKET}/o/{key}", b"", {})
                if there == 200:
                    return 412, [], b"{}"
            data = data[: data.rindex(b"\n--")]
            if not data:
                return self._forward(self.command, self.path, body, self.headers)
            return self._forward("POST", path, data, {})

    def _handle(self):
        fault = ""
        if self.server.every and next(self.server.requests) % self.server.every == 0:
            fault, self.server.failed = next(self.server.faults), self.server.failed + 1
        if fault.startswith("2 s"):
            time.sleep(2)
        if fault.startswith("503") or self.server.answer:
            self._body()
            status, headers, data = self.server.answer or 503, [], b"{}"
        else:
            status, headers, data = self._answer()
        if fault.startswith("done"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        if self.command == "HEAD":
            length = dict((k.lower(), v) for k, v in headers).get("content-length", "0")
            self.send_header("Content-Length", length)
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _handle


@contextlib.contextmanager
def store(scheme, folder):
    """A store behind a proxy -> (proxy, environment variables of its clients)."""
    with emulator(scheme, os.path.join(folder, f"{scheme}.log")) as port, Proxy(port) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        cache = os.path.join(folder, f"{scheme}-cache")
        try:
            yield proxy, {ENDPOINTS[scheme]: proxy.url, "XDG_CACHE_HOME": cache, **KEYS}
        finally:
            proxy.shutdown()
