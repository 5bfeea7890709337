# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure requests per second and latency of `vtlmm serve`, compared with an older version, and the server's memory.

    vtlmm demo --output outputs/demo
    python benchmarks/serving.py --demo outputs/demo --old 0859aa8 --json serving.json

The requests are the held-out questions of the demo, about 5 for each image, greedy, with at most 8 tokens. Both
servers get the same bodies, and both run as separate processes; the older code is never imported here. `--old` is
a commit of this repository, or a folder with a checkout. In each round, both servers are measured one after the other
with each number of clients. The client is a single asyncio process with one connection for each client.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pyarrow.parquet as parquet
from measuring import machine, ratio


ROOT = Path(__file__).parents[1]
# Folders of version 0.1 that are imported as parts of `vtlmm`
OLD_FOLDERS = ("train", "hub", "evaluation", "cli", "demo", "experiments")
START = "import sys; from vtlmm.cli.main import main; sys.exit(main(sys.argv[1:]))"
WARM_UP = 20


def request_bodies(demo: Path, name: str) -> list[bytes]:
    """Return the bodies of requests about the demo's held-out images."""
    bodies = []
    for row in parquet.read_table(demo / "held_out.parquet").to_pylist():
        url = "data:image/png;base64," + base64.b64encode(row["images"][0]["bytes"]).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row["questions"][0]}]
        fields = {"model": name, "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        bodies.append(json.dumps(fields).encode())
    return bodies


# ---- Servers ----


@contextlib.contextmanager
def old_packages(source: str):
    """Yield a folder for `PYTHONPATH` with the code of a commit or checkout of version 0.1."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        checkout = Path(source)
        if not checkout.is_dir():
            checkout = folder / "checkout"
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "add", "--detach", str(checkout), source], check=True, capture_output=True)
            stack.callback(subprocess.run, [*git, "remove", "--force", str(checkout)], check=True)
        packages = folder / "packages"
        (packages / "vtlmm").mkdir(parents=True)
        (packages / "vtlmm" / "__init__.py").touch()  # otherwise an installed `vtlmm` would be imported
        for part in OLD_FOLDERS:
            (packages / "vtlmm" / part).symlink_to(checkout.resolve() / part)
        (packages / "modeling_vtlmm").symlink_to(checkout.resolve() / "modeling_vtlmm")
        yield packages


@contextlib.contextmanager
def running_server(packages: Path, model: Path, threads: int):
    """Yield the process and the port of `vtlmm serve` with the code in `packages`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", START, "serve", str(model), "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=packages)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            if process.poll() is not None:
                raise RuntimeError(f"The server ended with status {process.returncode}.")
            time.sleep(0.5)
        yield process, port
    finally:
        process.terminate()
        process.wait(30)


def resident_mib(process: subprocess.Popen) -> float | None:
    try:
        fields = Path(f"/proc/{process.pid}/statm").read_text().split()
    except OSError:  # not Linux
        return None
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


# ---- Clients ----


async def post(reader, writer, body: bytes) -> str:
    """Send one request and return the text of its answer."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    header = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(header.split(b"content-length:")[1].split(b"\r\n")[0])
    content = await reader.readexactly(length)
    if b" 200 " not in header.split(b"\r\n")[0]:
        raise RuntimeError(f"{header.decode()}{content.decode()}")
    return json.loads(content)["choices"][0]["message"]["content"]


async def send_all(port: int, bodies: list[bytes], num_clients: int) -> tuple[list[float], list[str]]:
    """Send the bodies with several clients. Return the latencies in seconds and the answers of each body."""
    remaining = iter(range(len(bodies)))
    seconds, answers = [0.0] * len(bodies), [""] * len(bodies)

    async def client():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for i in remaining:
            started = time.perf_counter()
            answers[i] = await post(reader, writer, bodies[i])
            seconds[i] = time.perf_counter() - started
        writer.close()

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return seconds, answers


def measure(port: int, bodies: list[bytes], num_clients: int) -> tuple[dict, list[str]]:
    """Return requests per second, and the median and the 95th percentile of the latency in milliseconds."""
    started = time.perf_counter()
    seconds, answers = asyncio.run(send_all(port, bodies, num_clients))
    rate = len(bodies) / (time.perf_counter() - started)
    p95 = statistics.quantiles(seconds, n=20)[-1]
    return {"requests_per_s": rate, "p50_ms": statistics.median(seconds) * 1e3, "p95_ms": p95 * 1e3}, answers


def compare(servers: dict[str, int], bodies: list[bytes], clients: list[int], num_requests: int, rounds: int) -> dict:
    """Measure all servers in each round. Return the values of each server and number of clients."""
    results: dict = {name: {number: [] for number in clients} for name in servers}
    for port in servers.values():
        measure(port, bodies[:WARM_UP], 4)
    for round_number in range(rounds):
        for number in clients:
            first = round_number * num_requests % len(bodies)
            chosen = (bodies[first:] + bodies)[:num_requests]
            texts = {}
            for name, port in servers.items():
                values, texts[name] = measure(port, chosen, number)
                results[name][number].append(values)
                print(f"{name:3} {number:3} clients: " + ", ".join(f"{k} {v:.1f}" for k, v in values.items()))
            different = sum(len(set(answers)) > 1 for answers in zip(*texts.values(), strict=True))
            if different:
                print(f"    {different} of {len(chosen)} answers differ")
    return results


def table(results: dict) -> str:
    """Return a Markdown table with medians over the rounds, and with the ratios within a round."""
    lines = ["| clients | server | requests/s | p50 ms | p95 ms |", "|---|---|---|---|---|"]
    for number in results["new"]:
        for name, values in results.items():
            medians = [
                statistics.median(each[key] for each in values[number])
                for key in ("requests_per_s", "p50_ms", "p95_ms")
            ]
            lines.append(f"| {number} | {name} | " + " | ".join(f"{value:.1f}" for value in medians) + " |")
        if "old" in results:
            ratios = [
                ratio([each[key] for each in results["new"][number]], [each[key] for each in results["old"][number]])
                for key in ("requests_per_s", "p50_ms", "p95_ms")
            ]
            cells = [f"{each['median']:.2f} ({each['min']:.2f}–{each['max']:.2f})" for each in ratios]
            lines.append(f"| {number} | new / old | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory(process: subprocess.Popen, port: int, bodies: list[bytes], num_requests: int) -> dict:
    """Return the memory of a server after 100 and after `num_requests` requests."""
    sizes = {}
    for first, last in ((0, 100), (100, num_requests)):
        chosen = [bodies[i % len(bodies)] for i in range(first, last)]
        measure(port, chosen, 16)
        sizes[f"mib_after_{last}"] = resident_mib(process)
    print(sizes)
    return sizes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("outputs/demo"), help="folder that `vtlmm demo` wrote")
    parser.add_argument("--old", help="commit or checkout of version 0.1")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--requests", type=int, default=300, help="requests of each server, round and number of clients"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory-requests", type=int, default=0, help="also measure the memory after this many requests"
    )
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of the servers")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    model = (arguments.demo / "model").resolve()
    bodies = request_bodies(arguments.demo, str(model))
    report = {"machine": machine("cpu"), "requests": arguments.requests}
    with contextlib.ExitStack() as stack:
        process, port = stack.enter_context(running_server(ROOT, model, arguments.threads))
        servers = {"new": port}
        if arguments.old:
            packages = stack.enter_context(old_packages(arguments.old))
            _, servers["old"] = stack.enter_context(running_server(packages, model, arguments.threads))
        results = compare(servers, bodies, arguments.clients, arguments.requests, arguments.rounds)
        report |= {"results": results, "load_after": os.getloadavg()[0]}
        print("\n" + table(results))
    if arguments.memory_requests:
        with running_server(ROOT, model, arguments.threads) as (process, port):
            report["memory"] = memory(process, port, bodies, arguments.memory_requests)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
