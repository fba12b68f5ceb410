"""Hundreds of cartridges cycle through a small budget of a real server, while files are replaced, some by corrupt
ones, reloads are forced, and sources fail or hang.

    scripts/stress_registry.py --binary target/release/cartouche --out benches/results
    scripts/stress_registry.py --binary target/debug/cartouche --seconds 10 --cartridges 40 --budget-mib 64
    scripts/stress_registry.py --binary target/release/cartouche --latency 30

Every cartridge holds random numbers, so that a fixed prompt has an answer (tokens and log-probabilities) of its
own with each. A calm server is asked for all of them first, one after the other. Under stress, each reply must
name a generation that was in place when it was asked for, and give exactly that one's answer. Ends with 1 if one
does not, if a request gets nothing within its deadline, or if memory goes over its budget.

--latency measures how far apart tokens come for other requests while a source hangs, against when it does not.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import threading
import time

from . import cartridges, clients, latency, report
from .hub import Hub
from .server import Client, Server
from .world import World

# Over what the server takes by itself and the budget: cartridges on their way in (four, read and laid out), what
# the allocator keeps, and replies.
RSS_SLACK_MIB = 256


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/cartouche")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--cartridges", type=int, default=500)
    parser.add_argument("--mib", type=float, default=8, help="of one cartridge, in the file and in memory")
    parser.add_argument("--budget-mib", type=int, default=512)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--remote-clients", type=int, default=8)
    parser.add_argument("--deadline", type=float, default=60, help="seconds until a request counts as stuck")
    parser.add_argument("--folder", type=pathlib.Path, help="for the cartridges [default: a temporary one]")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the report [default: it is only printed]")
    parser.add_argument("--latency", type=float, metavar="SECONDS", help="measure inter-token latency instead")
    return parser.parse_args()


def calm_answers(server: Server, world: World, versions: list[tuple[str, int]]) -> list[str]:
    """The answer of each content, asked for one after the other. What is not as it should be."""
    client, failures = Client(server, 60), []
    for name, seed in versions:
        generation = world.put(name, seed)
        status, used, answer = client.ask(name, force=True)
        if (status, used) != (200, generation):
            failures.append(f"calm server, {name}: {status} {used} {answer} instead of {generation}")
        world.answers[generation] = answer
    different = len(set(world.answers.values()))
    if different < len(world.answers):
        failures.append(f"{len(world.answers)} contents have only {different} different answers")
    return failures


def sample(server: Server, tally: clients.Tally, started: float) -> dict:
    metrics = server.metrics()
    return {"seconds": round(time.monotonic() - started, 1), "rss_mib": round(server.rss_mib(), 1),
            "cartridge_mib": round(metrics["cartouche_cartridge_bytes"] / 2**20, 1),
            "resident": int(metrics["cartouche_cartridges_resident"]),
            "loads": int(metrics["cartouche_cartridge_loads_total"]),
            "evictions": int(metrics["cartouche_cartridge_evictions_total"]),
            "right": tally.counts["right"] + tally.counts["right after a forced reload"]}


def stress(args, server: Server, world: World, hub: Hub) -> int:
    names = [f"c{i:04}" for i in range(args.cartridges)]
    # Every tenth name gets other contents under way.
    changing = {name: [i, 100_000 + i, 200_000 + i] for i, name in enumerate(names) if i % 10 == 0}
    contents = [(name, seed) for name in changing for seed in changing[name][1:]]
    contents += [(name, i) for i, name in enumerate(names)]
    print(f"asking a calm server for {len(contents)} answers", flush=True)
    failures = calm_answers(server, world, contents)
    for repository in range(4):
        seed = hub.seed_of(f"r{repository}")
        world.put("of-the-hub", seed)
        generation = world.versions["of-the-hub"][-1].generation
        world.answers[generation] = Client(server, 60).ask("of-the-hub", force=True)[2]
    del world.versions["of-the-hub"]
    base = server.rss_mib() - server.metrics()["cartouche_cartridge_bytes"] / 2**20

    tally, stop, started = clients.Tally(), threading.Event(), time.monotonic()
    threads = [clients.LocalClient(i, server, world, tally, stop, args.deadline) for i in range(args.clients)]
    threads += [clients.RemoteClient(i, server, world, tally, stop, args.deadline)
                for i in range(args.remote_clients)]
    threads.append(clients.Changer(world, changing, tally, stop, 0.25))
    for thread in threads:
        thread.start()
    samples = []
    while time.monotonic() < started + args.seconds and server.process.poll() is None:
        samples.append(sample(server, tally, started))
        print(json.dumps(samples[-1]), flush=True)
        time.sleep(min(2, args.seconds / 5))
    stop.set()
    for thread in threads:
        thread.join(args.deadline)
    if any(thread.is_alive() for thread in threads):
        failures.append("clients did not end")
    counts = tally.counts
    failures += [f"{counts[what]} {what}" for what in (clients.WRONG, clients.STUCK, clients.BROKEN) if counts[what]]
    most = lambda field: max(s[field] for s in samples)
    if most("cartridge_mib") > args.budget_mib:
        failures.append(f"{most('cartridge_mib')} MiB of cartridges, the budget is {args.budget_mib}")
    allowed = base + args.budget_mib + RSS_SLACK_MIB
    if most("rss_mib") > allowed:
        failures.append(f"{most('rss_mib')} MiB resident, {allowed:.0f} are allowed")
    if counts["right"] == 0:
        failures.append("no answer was right")
    facts = {
        "command": " ".join(["scripts/stress_registry.py", *sys.argv[1:]]),
        "cartridges": f"{args.cartridges} of {args.mib} MiB, {len(contents)} contents",
        "budget": f"{args.budget_mib} MiB", "seconds": round(time.monotonic() - started, 1),
        "clients": f"{args.clients} local, {args.remote_clients} of a failing source",
        "loads": samples[-1]["loads"], "evictions": samples[-1]["evictions"],
        "most bytes of cartridges (MiB)": most("cartridge_mib"),
        "most resident memory (MiB)": f"{most('rss_mib')} of {allowed:.0f} allowed",
        "requests that reached the stand-in hub": hub.requests}
    for failure in failures + tally.complaints:
        print("FAILED", failure, file=sys.stderr)
    print(json.dumps({**facts, **counts}, indent=1))
    if args.out:
        print(report.write(args.out, dict(facts), tally, samples, failures))
    return 1 if failures else 0


def main() -> int:
    args = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        home = args.folder or pathlib.Path(temporary)
        folder = home / "cartridges"
        folder.mkdir(parents=True, exist_ok=True)
        hub = Hub(cartridges.tokens_of(args.mib))
        world = World(folder, args.mib)
        server = Server(args.binary, folder, args.budget_mib, hub.url(), home / "server.log")
        try:
            if args.latency:
                world.put("c0", 0)
                rows = latency.measure(server, "c0", args.latency)
                print("\n".join(json.dumps(row) for row in rows))
                return 0
            return stress(args, server, world, hub)
        finally:
            hub.stopped.set()
            code = server.stop()
            if code not in (0, -15):
                print(f"the server ended with {code}; its errors:", file=sys.stderr)
                print((home / "server.log").read_text()[-2000:], file=sys.stderr)
