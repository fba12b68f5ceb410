"""Inter-token latency of requests that use no remote source, with and without a source that hangs."""

import json
import statistics
import threading
import time

from .server import Client, Server, body


def intervals(server: Server, cartridge: str, seconds: float) -> list[float]:
    """Milliseconds between tokens of streams, one after the other."""
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        connection = server.connect(60)
        request = body(cartridge, "local", False, stream=True, max_tokens=64, logprobs=None)
        connection.request("POST", "/v1/completions", request, {"Content-Type": "application/json"})
        reply, last = connection.getresponse(), None
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            if "error" in json.loads(line[6:]):
                raise SystemExit(f"a stream failed: {line}")
            now = time.perf_counter()
            if last is not None:
                found.append(1000 * (now - last))
            last = now
        connection.close()
    return found


def hang(server: Server, stop: threading.Event, number: int) -> None:
    """Keeps a fetch from a hanging source waiting."""
    client = Client(server, 5)
    turn = 0
    while not stop.is_set():
        turn += 1
        try:
            client.ask(f"hang/l{number}-{turn % 8}", "huggingface", True, 1.0)
        except TimeoutError:
            pass
        stop.wait(0.05)


def measure(server: Server, cartridge: str, seconds: float, clients: int = 8) -> list[dict]:
    """In turns, so that both see the same machine."""
    results = {False: [], True: []}
    intervals(server, cartridge, 1)
    for turn in range(6):
        hanging = bool(turn % 2)
        stop = threading.Event()
        threads = [threading.Thread(target=hang, args=(server, stop, i)) for i in range(clients * hanging)]
        for thread in threads:
            thread.start()
        results[hanging] += intervals(server, cartridge, seconds / 6)
        stop.set()
        for thread in threads:
            thread.join()
    row = lambda hanging, found: {
        "hanging_clients": clients * hanging, "intervals": len(found),
        "p50_ms": round(statistics.median(found), 3),
        "p99_ms": round(statistics.quantiles(found, n=100)[98], 3)}
    return [row(hanging, found) for hanging, found in results.items()]
