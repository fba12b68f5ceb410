"""A stand-in for the Hugging Face hub that misbehaves by the owner of a repository: `hang/...` never answers,
`error/...` answers with 500, `corrupt/...` delivers other bytes than its digest says, `good/...` delivers."""

import hashlib
import http.server
import json
import re
import threading

from . import cartridges


class Hub(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, tokens: int):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens = tokens
        self.stopped = threading.Event()
        self.requests = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that hangs up is what this server is for."""

    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @staticmethod
    def seed_of(name: str) -> int:
        return 1_000_000 + int(re.sub(r"\D", "", name) or 0)

    def file(self, owner: str, name: str) -> bytes:
        file = cartridges.make(self.seed_of(name), self.tokens)[1]
        return cartridges.corrupt(file, self.seed_of(name)) if owner == "corrupt" else file


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.requests += 1
        api = re.fullmatch(r"/api/models/([\w-]+)/([\w-]+)(/revision/[\w-]+)?", self.path.split("?")[0])
        raw = re.fullmatch(r"/([\w-]+)/([\w-]+)/resolve/[\w-]+/(.+)", self.path.split("?")[0])
        owner, name = (api or raw).group(1, 2) if api or raw else ("missing", "")
        if owner == "hang":
            self.server.stopped.wait()
            self.close_connection = True
            return
        if owner == "error":
            return self.answer(500, b"{}")
        if owner not in ("good", "corrupt"):
            return self.answer(404, b"{}")
        commit = hashlib.sha1(name.encode()).hexdigest()
        if api:
            body = {"id": f"{owner}/{name}", "sha": commit, "siblings": [{"rfilename": "cartridge.safetensors"}]}
            return self.answer(200, json.dumps(body).encode())
        if raw.group(3) != "cartridge.safetensors":
            return self.answer(404, b"")
        file = self.server.file(owner, name)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(file).hexdigest()}"',
                   "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.answer(200, file, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(file) - 1), len(file) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(file)}"
        return self.answer(206, file[first:last + 1], headers)

    def answer(self, status: int, body: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            try:
                self.wfile.write(body)
            except OSError:
                self.close_connection = True
