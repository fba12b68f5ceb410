"""A server of the program on a free port, and questions to it."""

import http.client
import json
import re
import time

from . import process

START_LIMIT = 60.0  # seconds
ANSWER_LIMIT = 60.0


class Server:
    def __init__(self, check, device: str, limit: float):
        command = [check.binaries.program(), "serve", "--device", device, "--port", "0"]
        command += ["--cartridge-dir", check.temporary / "no-cartridges"]
        self.log_path = check.temporary / f"serve-{device.replace(':', '')}.log"
        self.log = open(self.log_path, "w+", encoding="utf-8", errors="replace")
        self.process = process.start(command, check.env, stdout=self.log, stderr=self.log)
        try:
            self.port = self.wait_for_port(time.monotonic() + min(START_LIMIT, limit))
        except Exception:
            self.stop()
            raise

    def wait_for_port(self, until: float) -> int:
        while time.monotonic() < until:
            found = re.search(r" on http://127\.0\.0\.1:(\d+)", self.output())
            if found:
                self.port = int(found[1])
                if self.get("/health/ready") == 200:
                    return self.port
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.process.returncode}")
            time.sleep(0.05)
        raise TimeoutError("the server was not ready in time")

    def output(self) -> str:
        return self.log_path.read_text(errors="replace")

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_LIMIT)

    def get(self, path: str) -> int:
        try:
            connection = self.connection()
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return 0

    def chat(self, body: dict) -> dict:
        """A whole reply: its text, and per token its id, log-probability and the likeliest as {id: logprob}."""
        reply = self.post(body)
        with reply:
            parsed = json.loads(reply.read())
        choice = parsed["choices"][0]
        tokens = (choice.get("logprobs") or {}).get("content") or []
        return {
            "text": choice["message"]["content"],
            "usage": parsed["usage"],
            "tokens": [(t["id"], t["logprob"], {o["id"]: o["logprob"] for o in t["top_logprobs"]}) for t in tokens],
        }

    def streamed(self, body: dict) -> tuple[str, bool]:
        """The text of a stream, and whether it ended as it should."""
        text, finished, done = "", False, False
        with self.post({**body, "stream": True}) as reply:
            for line in reply:
                if line.startswith(b"data: [DONE]"):
                    done = True
                elif line.startswith(b"data: "):
                    for choice in json.loads(line[6:]).get("choices", []):
                        text += choice["delta"].get("content") or ""
                        finished |= choice.get("finish_reason") is not None
        return text, finished and done

    def post(self, body: dict) -> http.client.HTTPResponse:
        connection = self.connection()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise RuntimeError(f"status {reply.status}: {reply.read()[:300].decode(errors='replace')}")
        return reply

    def stop(self) -> None:
        process.stop(self.process)
        self.log.close()
