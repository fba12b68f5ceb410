"""Measures what a start costs and how soon the first token comes; appends CSV rows.

    python scripts/measure_serve.py --binary target/release/cartouche \
        --model /tmp/llama-1b --csv benches/results/serve.csv

1. Demo model: seconds from process start to `/health/ready`, and resident memory then.
2. Demo model: time to first token of a cartridge request and of the same question with the document in
   the prompt, in turns, through HTTP streaming.
3. The model of --model (see make_random_model.py): load time against reading its files, with the page
   cache warm and, where the system lets us drop it, cold; against writing once to as much fresh memory as
   the f32 weights take, which no loader can avoid; and peak memory against the f32 weights.
"""

import argparse
import csv
import http.client
import json
import mmap
import os
import pathlib
import platform
import re
import statistics
import subprocess
import time

RUNS = 5
LOAD_RUNS = 3
ROOT = pathlib.Path(__file__).resolve().parents[1]


class Server:
    """A server process on a free port."""

    def __init__(self, binary: str, *options: str):
        self.started = time.perf_counter()
        command = [binary, "serve", "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if found := re.match(r"Cartouche .* on http://([^:]+):(\d+)$", line.strip()):
                self.host, self.port = found[1], int(found[2])
            if found := re.search(r"ready in ([0-9.]+) s", line):
                self.own_seconds = float(found[1])
                break
        while self.get("/health/ready") != 200:
            time.sleep(0.001)
        self.ready_seconds = time.perf_counter() - self.started

    def get(self, path: str) -> int:
        connection = http.client.HTTPConnection(self.host, self.port)
        connection.request("GET", path)
        return connection.getresponse().status

    def memory_mib(self, field: str) -> float:
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024

    def first_token_ms(self, body: dict) -> float:
        connection = http.client.HTTPConnection(self.host, self.port)
        payload = json.dumps({**body, "stream": True, "max_tokens": 4, "temperature": 0})
        start = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", payload)
        reply = connection.getresponse()
        while line := reply.readline():
            if line.startswith(b"data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                if delta.get("content"):
                    elapsed = (time.perf_counter() - start) * 1e3
                    reply.read()
                    return elapsed
        raise RuntimeError("no token came")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def demo(binary: str) -> dict:
    """Median ready time and memory over fresh starts, then first-token times on one server."""
    ready, resident = [], []
    for _ in range(RUNS):
        server = Server(binary)
        ready.append(server.ready_seconds)
        resident.append(server.memory_mib("VmRSS"))
        server.stop()
    folder = ROOT / "assets/demo/documents/harbour-log"
    document = (folder / "document.txt").read_text().rstrip()
    questions = json.loads((folder / "questions.json").read_text())["questions"]
    server = Server(binary)
    cartridge_ms, long_ms = [], []
    for question in questions[:20]:
        user = {"role": "user", "content": question["question"]}
        cartridges = [{"id": "harbour-log", "source": "local"}]
        cartridge_ms.append(server.first_token_ms({"messages": [user], "cartridges": cartridges}))
        system = {"role": "system", "content": document}
        long_ms.append(server.first_token_ms({"messages": [system, user]}))
    after = server.memory_mib("VmRSS")
    server.stop()
    return {
        "demo_ready_s": statistics.median(ready),
        "demo_resident_at_ready_mib": statistics.median(resident),
        "demo_resident_after_requests_mib": after,
        "demo_ttft_cartridge_ms": statistics.median(cartridge_ms),
        "demo_ttft_long_prompt_ms": statistics.median(long_ms),
    }


def drop_page_cache() -> bool:
    try:
        os.sync()
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    except OSError:
        return False


def read_seconds(files: list) -> float:
    start = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def touch_seconds(size: int) -> float:
    """Seconds to get `size` bytes of memory from the system, by writing one byte to every page."""
    with mmap.mmap(-1, size) as memory:
        start = time.perf_counter()
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1
        return time.perf_counter() - start


def load(binary: str, model: str, kv_mib: int) -> dict:
    """Load time against reading the files, in turns, and the peak memory of a load."""
    files = [str(f) for f in pathlib.Path(model).glob("*.safetensors")]
    options = ["--model", model, "--kv-cache-mib", str(kv_mib)]
    result = {}
    for state in ("warm", "cold"):
        reads, loads = [], []
        for _ in range(LOAD_RUNS):
            if state == "cold" and not drop_page_cache():
                break
            reads.append(read_seconds(files))
            if state == "cold":
                drop_page_cache()
            server = Server(binary, *options)
            loads.append(server.own_seconds)
            peak = server.memory_mib("VmHWM")
            server.stop()
        if not loads:
            continue
        ratios = [loading / reading for loading, reading in zip(loads, reads)]
        result[f"{state}_read_s"] = statistics.median(reads)
        result[f"{state}_load_s"] = statistics.median(loads)
        result[f"{state}_load_over_read"] = statistics.median(ratios)
    # The KV cache becomes resident as it fills: at this point only the weights should be there.
    weights = sum(os.path.getsize(f) for f in files) * 2 / 2**20
    touch = statistics.median(touch_seconds(int(weights) << 20) for _ in range(3))
    result["touch_f32_memory_s"] = touch
    result["warm_load_over_touch"] = result["warm_load_s"] / touch
    result["f32_weights_mib"] = weights
    result["peak_mib"] = peak
    result["peak_over_weights"] = peak / weights
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", default="target/release/cartouche")
    parser.add_argument("--model", help="folder made by make_random_model.py")
    parser.add_argument("--csv", type=pathlib.Path)
    args = parser.parse_args()
    figures = demo(args.binary)
    if args.model:
        figures |= load(args.binary, args.model, kv_mib=512)
    processor = platform.processor() or platform.machine()
    if found := re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text()):
        processor = found[1]
    hardware = f"{os.cpu_count()} cores, {processor}"
    for name, value in figures.items():
        print(f"{name:<36} {value:.3f}")
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        new = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["date", "hardware", "figure", "value"])
            for name, value in figures.items():
                writer.writerow([time.strftime("%Y-%m-%d"), hardware, name, f"{value:.4g}"])


if __name__ == "__main__":
    main()
