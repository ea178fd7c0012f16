"""Sections ``neighbours`` and ``deadlines`` of `benchmarks.tenancy`: what tenants can take from each other, what is in time."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from trunkline.client import Model
from trunkline.connection import Connection
from trunkline.errors import DeadlineExceeded, DeadlineUnreachable, QueueFull, TrunklineError
from trunkline.pool import Pool

from benchmarks.harness import Sidecar
from benchmarks.models import resnet
from benchmarks.report import summary
from benchmarks.siblings import Family
from benchmarks.tenancy_bench import TenancyBench, closed_loop

TOKENS = {"victim": "victim-of-the-benchmark", "flood": "flood-of-the-benchmark"}
DOMAIN = "shared"
# How much of the device the quiet neighbour wants by itself, and how many connections the loud one has.
QUIET_SHARE = 0.3
LOUD = {True: 16, False: 100}
OVERSUBSCRIBED = 5
MODELS = {True: 4, False: 12}


def _quota_file(bench: TenancyBench) -> str:
    path = bench.folder / "quotas.toml"
    path.write_text(
        "".join(
            f'[tenants.{name}]\ntokens = ["sha256:{hashlib.sha256(token.encode()).hexdigest()}"]\nmodels = ["*"]\n'
            f'domain = "{DOMAIN}"\n'
            for name, token in TOKENS.items()
        )
    )
    path.chmod(0o600)
    return str(path)


def _asking(sidecar: Sidecar, name: str, array: np.ndarray, tenant: str | None) -> tuple[Pool, Callable[[], object]]:
    token = TOKENS[tenant].encode() if tenant else b""
    pool = Pool(lambda path, **options: Connection(str(sidecar.socket), **{**options, "token": token}))
    model = Model(name, pool)
    return pool, lambda: model(array)


def _paced(ask: Callable[[], object], per_second: float, seconds: float, seed: int) -> list[float]:
    """Ask at random times, at most one request at a time; return how long each took, in milliseconds."""
    chance, found = random.Random(seed), []
    ends_at = time.perf_counter() + seconds
    while time.perf_counter() < ends_at:
        time.sleep(chance.expovariate(per_second))
        started = time.perf_counter()
        ask()
        found.append((time.perf_counter() - started) * 1000)
    return found


def _closed(ask: Callable[[], object], seconds: float) -> float:
    """Ask again and again; return answers per second."""
    count, elapsed_s = closed_loop([ask], seconds)
    return count / elapsed_s


def neighbours(bench: TenancyBench) -> None:
    """A tenant that wants a little beside one that wants all it can get, with tenants told apart and without."""
    seconds = 0.6 if bench.report.quick else 20.0
    figures, raw = bench.report.figures, bench.report.raw.setdefault("neighbours", {})
    family = bench.families["conv0"]
    other = Family(resnet(bench.scale.width, bench.scale.units), family.example, bench.seed + 40)
    array = family.example.numpy()
    told_apart = bench.sidecar("told-apart", bench.threads, TRUNKLINE_QUOTA_FILE=_quota_file(bench))
    as_one = bench.sidecar("as-one", bench.threads)
    bench.push({"quiet": family, "loud": other}, {told_apart: DOMAIN, as_one: ""})
    for variant, sidecar in (("told_apart", told_apart), ("as_one", as_one)):
        tenants = ("victim", "flood") if sidecar is told_apart else (None, None)
        victim_pool, victim = _asking(sidecar, "quiet", array, tenants[0])
        victim()
        rate = _closed(victim, seconds / 4)
        alone = _paced(victim, QUIET_SHARE * rate, seconds, bench.seed)
        stopped = threading.Event()
        loud = [_asking(sidecar, "loud", array + number, tenants[1]) for number in range(LOUD[bench.report.quick])]

        def flood(ask: Callable[[], object], stopped: threading.Event = stopped) -> None:
            while not stopped.is_set():
                try:
                    ask()
                except QueueFull as error:
                    time.sleep(float(error.details.get("retry_after_s", 0.05)))

        with ThreadPoolExecutor(len(loud)) as threads:
            futures = [threads.submit(flood, ask) for _, ask in loud]
            time.sleep(0.5 if bench.report.quick else 1)
            beside = _paced(victim, QUIET_SHARE * rate, seconds, bench.seed)
            beside_rate = _closed(victim, seconds)
            stopped.set()
            for future in futures:
                future.result()
        for pool in (victim_pool, *(pool for pool, _ in loud)):
            pool.close()
        raw[variant] = {
            "alone_ms": summary(alone),
            "beside_ms": summary(beside),
            "alone_per_s": rate,
            "beside_per_s": beside_rate,
            "queues": sidecar.admin.get("queues"),
        }
        figures[f"neighbour_p99_ratio_{variant}"] = summary(beside)["p99"] / summary(alone)["p99"]
        figures[f"neighbour_median_ratio_{variant}"] = summary(beside)["median"] / summary(alone)["median"]
        # Of two tenants of one weight, each has a right to half.
        figures[f"neighbour_goodput_of_fair_share_{variant}"] = beside_rate / (rate / 2)
    for sidecar in (told_apart, as_one):
        bench.end(sidecar)


def deadlines(bench: TenancyBench) -> None:
    """More models than there is memory for, asked more than can be answered, each call with a deadline."""
    quick = bench.report.quick
    figures, raw = bench.report.figures, bench.report.raw.setdefault("deadlines", {})
    image = torch.zeros(1, 3, bench.scale.side, bench.scale.side)
    names = [f"model{number}" for number in range(MODELS[quick])]
    families = {name: Family(resnet(bench.scale.width, 1), image, bench.seed + 50 + number) for number, name in enumerate(names)}
    model_bytes = sum(parameter.nbytes for parameter in families[names[0]].base.parameters())
    budget_bytes = max(int(len(names) * model_bytes / OVERSUBSCRIBED), int(1.5 * model_bytes))
    sidecar = bench.sidecar("deadlines", bench.threads, TRUNKLINE_MEMORY_BUDGET_BYTES=str(budget_bytes))
    bench.push(families, {sidecar: ""})
    array = image.numpy()
    pools = {name: Pool(lambda path, **options: Connection(str(sidecar.socket), **options)) for name in names}
    # What one client gets, of all models in turn: about what can be answered.
    started = time.perf_counter()
    turns = 3 * len(names)
    for number in range(turns):
        Model(names[number % len(names)], pools[names[number % len(names)]])(array)
    one_s = (time.perf_counter() - started) / turns
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()

    def client(number: int, seconds: float) -> None:
        chance = random.Random(1000 * bench.seed + number)
        ends_at = time.perf_counter() + seconds
        while time.perf_counter() < ends_at:
            # The first models are asked most.
            name = names[min(int(chance.expovariate(0.4)), len(names) - 1)]
            deadline_s = one_s * chance.uniform(2, 20)
            asked = time.perf_counter()
            try:
                Model(name, pools[name]).call({"x": array}, deadline_s=deadline_s)
                outcome = "in_time" if time.perf_counter() - asked <= deadline_s else "late"
            except DeadlineUnreachable as error:
                outcome = "refused"
                time.sleep(min(1.0, float(error.details["retry_after_s"])))
            except DeadlineExceeded:
                outcome = "late"
            except TrunklineError as error:
                outcome = error.code
            with lock:
                outcomes[outcome] += 1

    for seconds in (0.5, 2) if quick else (20, 60):  # the first time warms up
        outcomes.clear()
        with ThreadPoolExecutor(8) as threads:
            for future in [threads.submit(client, number, seconds) for number in range(8)]:
                future.result()
    found = sidecar.admin.get("queues")
    status = sidecar.admin.get("status")
    raw |= {"outcomes": dict(outcomes), "forecast": found["forecast"], "one_client_s": one_s, "requests": status["requests"]}
    admitted = outcomes["in_time"] + outcomes["late"]
    figures["deadlines_in_time_of_admitted"] = outcomes["in_time"] / max(1, admitted)
    figures["deadlines_refused_share"] = outcomes["refused"] / max(1, sum(outcomes.values()))
    forecast: Mapping[str, float] = found["forecast"]
    figures["deadlines_predicted_over_actual_p99"] = forecast["predicted_p99_s"] / max(1e-9, forecast["actual_p99_s"])
    for pool in pools.values():
        pool.close()
    bench.end(sidecar)
