"""The server under test, and requests to it."""

import http.client
import json
import os
import pathlib
import re
import subprocess
import threading
import time

PROMPT = [5, 17, 301, 42, 99, 7]
MAX_TOKENS = 6


class Server:
    """A server process on a free port. What it prints is kept in `log`."""

    def __init__(self, binary: str, folder: pathlib.Path, budget_mib: int, hub_url: str, log: pathlib.Path):
        command = [binary, "serve", "--model", "demo", "--port", "0", "--device", "cpu",
                   "--cartridge-dir", str(folder), "--cartridge-budget-mib", str(budget_mib),
                   "--kv-cache-mib", "64"]
        home = folder.parent / "hub-home"
        environment = os.environ | {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "RUST_LOG": "error",
                                    "XDG_CACHE_HOME": str(home)}
        self.log = open(log, "w")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True,
                                        env=environment)
        for line in self.process.stdout:
            if found := re.match(r"Cartouche .* on http://([^:]+):(\d+)$", line.strip()):
                self.host, self.port = found[1], int(found[2])
                break
        else:
            raise SystemExit(f"the server did not start:\n{log.read_text()}")
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        while self.get("/health/ready")[0] != 200:
            time.sleep(0.01)

    def connect(self, timeout: float) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def get(self, path: str) -> tuple[int, str]:
        connection = self.connect(30)
        connection.request("GET", path)
        reply = connection.getresponse()
        body = reply.read().decode()
        connection.close()
        return reply.status, body

    def metrics(self) -> dict[str, float]:
        lines = re.findall(r"^(cartouche_cartridge\w*) ([0-9.e+]+)$", self.get("/metrics")[1], re.M)
        return {name: float(value) for name, value in lines}

    def rss_mib(self) -> float:
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(60)
        self.log.close()
        return code


def body(cartridge: str, source: str, force: bool, **fields) -> bytes:
    request = {"model": "demo", "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, "logprobs": 1,
               "ignore_eos": True,
               "cartridges": [{"id": cartridge, "source": source, "force_redownload": force}]}
    return json.dumps({**request, **fields}).encode()


class Client:
    """One connection. Replies are (status, generation, answer), where a refusal's answer is its code."""

    def __init__(self, server: Server, deadline: float):
        self.server, self.deadline = server, deadline
        self.connection = server.connect(deadline)

    def ask(self, cartridge: str, source: str = "local", force: bool = False, deadline: float | None = None):
        self.connection.timeout = deadline or self.deadline
        if self.connection.sock:
            self.connection.sock.settimeout(self.connection.timeout)
        try:
            self.connection.request("POST", "/v1/completions", body(cartridge, source, force),
                                    {"Content-Type": "application/json"})
            reply = self.connection.getresponse()
            text = reply.read()
        except (OSError, http.client.HTTPException):
            self.connection.close()
            self.connection = self.server.connect(self.deadline)
            raise
        parsed = json.loads(text)
        if reply.status != 200:
            return reply.status, None, parsed.get("error", {}).get("code")
        generation = (reply.headers["x-cartouche-cartridges"] or "@").rsplit("@", 1)[1]
        choice = parsed["choices"][0]
        answer = (tuple(choice["logprobs"]["tokens"]), tuple(choice["logprobs"]["token_logprobs"]))
        return reply.status, generation, answer
