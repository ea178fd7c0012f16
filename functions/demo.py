"""`make demo`: the four sample functions, from packing their models to answers over HTTP, each answer checked.

Exits with 0 when every answer is right, with 1 and the reason otherwise. The answers of `classify` and `embed` are
compared with the original torch models, run here; nothing else in this process takes part in answering.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests
import trunkline
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from trunkline.errors import TrunklineError

from functions.embed.texts import token_ids
from sidecar.admin_client import AdminClient
from sidecar.local import LocalStack

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".trunkline"
NAMES = ("classify", "embed", "similar", "route")
# Every file that can change a bundle.
SOURCES = (
    "sidecar/*.py",
    "functions/sources.py",
    "functions/questions.txt",
    "functions/embed/*.*",
    "functions/route/intents.txt",
)
# Largest accepted difference to the original model, of a probability and of a component of a unit vector.
TOLERANCE = 1e-4
WARM_UP_CALLS = 3
TIMED_CALLS = 30

PICTURES = {
    "coffee.png": ("espresso",),
    "chelsea.png": ("tabby", "tiger cat", "Egyptian cat"),
    "camera.png": ("tripod",),
    "rocket.jpg": ("missile", "projectile"),
}
TEXTS = ["A man is playing the guitar.", "Somebody plays an instrument on stage.", "Interest rates rose again in May."]
QUERY = "I can't log in because I don't remember my passphrase"
CANDIDATES = [
    "Where can I see what shipping costs?",
    "How to set a new password",
    "The colour of the shoes does not suit me",
    "My card was charged twice",
]
MESSAGES = {
    "Someone logged into my profile, please change my password": "account",
    "I need the invoice for last month's purchase": "billing",
    "When will the package be delivered to my house?": "delivery",
    "These trousers do not fit, I want to send them back": "returns",
    "The app shows an error message and closes": "technical",
}

# Where the output is no terminal, rich would break lines at 80 characters.
console = Console(width=None if sys.stdout.isatty() else 110)


class WrongAnswer(Exception):
    """A function answered something else than it should."""


@dataclass(frozen=True)
class Shown:
    """One row of the table: what a function answered, and the median time of a call."""

    answer: str
    median_ms: float


def headline(text: str) -> None:
    console.print(text, style="bold", highlight=False)


def say(text: str) -> None:
    """Print a line as it is, however wide the terminal."""
    console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)


def require(condition: bool, message: str) -> None:
    """Raise WrongAnswer unless ``condition`` holds."""
    if not condition:
        raise WrongAnswer(message)


# --- packing ----------------------------------------------------------------------------------------------------------


def bundles() -> Path:
    """Return the folder with the four bundles, made when what they are made from has changed."""
    import torch

    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    folder = STATE / "bundles" / digest.hexdigest()[:16]
    if not (folder / "packed.txt").is_file():
        shutil.rmtree(folder.parent, ignore_errors=True)
        lines = _pack(folder)
        (folder / "packed.txt").write_text("".join(f"{line}\n" for line in lines))
    for line in (folder / "packed.txt").read_text().splitlines():
        say(line)
    return folder


def _pack(folder: Path) -> list[str]:
    from sidecar.packing import pack

    lines = []
    columns = TextColumn("  {task.fields[name]:9}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console) as progress:
        for name in NAMES:
            task = progress.add_task("loading", name=name, total=1.0)

            def advance(step: str, fraction: float, task: Any = task) -> None:
                progress.update(task, description=step, completed=fraction)

            lines += pack(f"functions.sources:{name}", folder / name, name=name, progress=advance).lines()
    return lines


# --- what is right ----------------------------------------------------------------------------------------------------


def original_probabilities() -> dict[str, dict[str, float]]:
    """Return the probability of each label for each picture, by the original EfficientNet-Lite0 in torch."""
    import torch

    from functions.classify.handler import LABELS
    from functions.classify.picture import square
    from functions.sources import efficientnet

    network = efficientnet()
    found = {}
    for name in PICTURES:
        pixels = torch.tensor(square(picture(name))).permute(2, 0, 1)[None]
        with torch.inference_mode():
            probabilities = network((pixels.float() - 127) / 128).softmax(1)[0]
        found[name] = dict(zip(LABELS, probabilities.tolist(), strict=True))
    return found


def original_vectors() -> list[list[float]]:
    """Return the vectors of TEXTS by the original MiniLM in torch, one text at a time, so without padding."""
    from functions.sources import minilm, vectors

    trunk = minilm()
    return [vectors(trunk, [text])[0].tolist() for text in TEXTS]


def picture(name: str) -> bytes:
    """Return a picture that the package scikit-image ships."""
    from functions.sources import package_folder

    return (package_folder("skimage") / "data" / name).read_bytes()


# --- calling ----------------------------------------------------------------------------------------------------------


class Caller:
    """Calls functions over HTTP, as any client would."""

    def __init__(self, url: str, session: requests.Session) -> None:
        self._url = url
        self._session = session
        # No proxy between this machine and itself.
        session.trust_env = False

    def post(self, name: str, body: bytes | dict[str, object], status: int = 200) -> Any:
        """POST bytes or JSON to a function; return the JSON of its answer. Raises WrongAnswer for another status."""
        kind = "application/json" if isinstance(body, dict) else "application/octet-stream"
        sent = json.dumps(body).encode() if isinstance(body, dict) else body
        url = f"{self._url}/function/{name}"
        answer = self._session.post(url, data=sent, headers={"Content-Type": kind}, timeout=60)
        require(answer.status_code == status, f"{name} answered {answer.status_code}, not {status}: {answer.text[:300]}")
        return answer.json()

    def median_ms(self, name: str, body: bytes | dict[str, object]) -> float:
        """Return the median time of a call, in milliseconds."""
        times_ns = []
        for _ in range(WARM_UP_CALLS + TIMED_CALLS):
            started_ns = time.perf_counter_ns()
            self.post(name, body)
            times_ns.append(time.perf_counter_ns() - started_ns)
        return statistics.median(times_ns[WARM_UP_CALLS:]) / 1e6


def show_classify(call: Caller, expected: dict[str, dict[str, float]]) -> Shown:
    """Check the label of every picture and its five probabilities."""
    answers, worst = [], 0.0
    for name, right in PICTURES.items():
        labels = call.post("classify", picture(name))["labels"]
        require(len(labels) == 5, f"classify gave {len(labels)} labels for {name}, not 5")
        best = labels[0]["label"].split(",")[0]
        require(best in right, f"classify says {best!r} to {name}, not {' or '.join(right)}")
        worst = max(worst, *(abs(entry["probability"] - expected[name][entry["label"]]) for entry in labels))
        answers.append(f"{name.partition('.')[0]}: {best} {labels[0]['probability']:.0%}")
    require(worst <= TOLERANCE, f"classify differs from the original model by {worst:.2g}, more than {TOLERANCE:.0e}")
    say(f"classify equals the original torch model within {worst:.1e} (accepted: {TOLERANCE:.0e})")
    return Shown("\n".join(answers), call.median_ms("classify", picture("coffee.png")))


def show_embed(call: Caller, expected: list[list[float]]) -> Shown:
    """Check length, sense and equality with the original of three vectors."""
    rows = call.post("embed", {"texts": TEXTS})["vectors"]
    require([len(row) for row in rows] == [384] * len(TEXTS), "embed gave vectors of another shape")
    worst = max(abs(a - b) for row, right in zip(rows, expected, strict=True) for a, b in zip(row, right, strict=True))
    require(worst <= TOLERANCE, f"embed differs from the original model by {worst:.2g}, more than {TOLERANCE:.0e}")
    say(f"embed equals the original torch model within {worst:.1e} (accepted: {TOLERANCE:.0e})")
    lengths = [math.sqrt(sum(x * x for x in row)) for row in rows]
    require(all(abs(length - 1) < 1e-5 for length in lengths), f"embed gave vectors of lengths {lengths}, not 1")
    near, far = (sum(a * b for a, b in zip(rows[0], row, strict=True)) for row in rows[1:])
    require(near > far, f"embed finds guitar and interest rates alike: {near:.2f} and {far:.2f}")
    return Shown(f"guitar, instrument: {near:.2f}\nguitar, interest rates: {far:.2f}", call.median_ms("embed", b"one text"))


def show_similar(call: Caller) -> Shown:
    """Check which text asks the same as the query."""
    body: dict[str, object] = {"query": QUERY, "texts": CANDIDATES}
    ranked = call.post("similar", body)["ranked"]
    require(sorted(entry["index"] for entry in ranked) == [0, 1, 2, 3], "similar lost some of the texts")
    best = ranked[0]
    require(best["index"] == 1, f"similar finds {best['text']!r} nearest to {QUERY!r}, not {CANDIDATES[1]!r}")
    return Shown(f"{best['text']!r} {best['score']:.2f}\nnext: {ranked[1]['score']:.2f}", call.median_ms("similar", body))


def show_route(call: Caller) -> Shown:
    """Check the desk of every message."""
    answers = []
    for text, desk in MESSAGES.items():
        reply = call.post("route", text.encode())
        require(reply["intent"] == desk, f"route sends {text!r} to {reply['intent']}, not to {desk}")
        require(abs(sum(reply["intents"].values()) - 1) < 1e-5, "the confidences of route do not sum to 1")
        answers.append(f"{desk} {reply['confidence']:.0%}")
    return Shown("\n".join(answers), call.median_ms("route", b"Where is my parcel?"))


def check_refusals(call: Caller) -> None:
    """Check that the caller's faults come back as such."""
    for name, body in (("classify", b"no picture"), ("embed", b""), ("similar", b"{"), ("route", b"word " * 300)):
        error = call.post(name, body, status=400)["error"]
        require(error["code"] == "invalid_input", f"{name} refused a bad body with {error['code']}, not invalid_input")
        say(f"{name}: {error['code']}: {error['message']}")


# --- measuring --------------------------------------------------------------------------------------------------------


def pss_bytes(pids: list[int]) -> int:
    """Return the resident memory of processes, each page divided by the number of processes that map it."""
    total_kb = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total_kb += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total_kb * 1024


def transport(pids: list[int]) -> str:
    """Return how a function's processes reach the sidecar, by what they have mapped; no process may hold torch."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    require("libtorch" not in maps, "a function has loaded torch")
    return "unix socket,\nshared memory" if "/memfd:" in maps else "unix socket"


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def print_table(shown: dict[str, Shown], pids: dict[str, list[int]]) -> None:
    """Print answers, times and memory."""
    table = Table(show_lines=True)
    for title in ("process", "answer", "p50 over HTTP", "transport", "resident (PSS)"):
        table.add_column(title, justify="right" if title[0] in "pr" and title != "process" else "left")
    for name, row in shown.items():
        cells = row.answer, f"{row.median_ms:.1f} ms", transport(pids[name]), megabytes(pss_bytes(pids[name]))
        table.add_row(name, *cells)
    for name in ("sidecar", "gateway"):
        table.add_row(name, "", "", "", megabytes(pss_bytes(pids[name])))
    console.print(table)


def print_sharing(status: dict[str, Any]) -> None:
    """Print what sharing saves, and check that the trunk of three models is there once."""
    memory = status["memory"]
    models = {entry["name"]: entry for entry in status["models"]}
    trunk_bytes = models["embed"]["bytes"]
    headline(
        f"{megabytes(memory['saved_bytes'])} saved by sharing: models of {megabytes(memory['logical_bytes'])} take "
        f"{megabytes(memory['resident_bytes'])} in the sidecar"
    )
    say(f"embed, similar and route stand on one copy of their trunk of {megabytes(trunk_bytes)}")
    # Packed weights take a little more or less than those they stand in for.
    require(
        memory["saved_bytes"] > 0.98 * 2 * models["embed"]["shared_bytes"] > trunk_bytes,
        f"three models on one trunk of {trunk_bytes} bytes save {memory['saved_bytes']} bytes only",
    )


def await_trials(admin: AdminClient, patience_s: float = 120) -> None:
    """Wait until the sidecar has tried the models out; before that, they may change their form between two requests."""
    deadline = time.monotonic() + patience_s
    while waiting := [name for name in NAMES if not admin.get(f"models/{name}")["tried"]]:
        require(time.monotonic() < deadline, f"{', '.join(waiting)} were not tried within {patience_s:.0f} s")
        time.sleep(0.1)


def show_together(admin: AdminClient) -> None:
    """Ask three models about one text at once, and one after the other, from this process: no function is in between."""
    names = ("embed", "similar", "route")
    ids = np.array(token_ids([QUERY], 256))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    together, alone = trunkline.models(*names), {name: trunkline.model(name) for name in names}
    times_ms: dict[str, list[float]] = {"together": [], "alone": []}
    for number in range(WARM_UP_CALLS + TIMED_CALLS):
        started = time.perf_counter()
        answers = together.call(inputs)
        between = time.perf_counter()
        singles = {name: model.call(inputs) for name, model in alone.items()}
        if number >= WARM_UP_CALLS:
            times_ms["together"].append((between - started) * 1e3)
            times_ms["alone"].append((time.perf_counter() - between) * 1e3)
        for name in names:
            require(np.array_equal(answers[name], singles[name]), f"{name} answers otherwise when asked with the others")
    before = admin.get("status")["sharing"]
    together.call(inputs)
    after = admin.get("status")["sharing"]
    ran, served = (after[count] - before[count] for count in ("stages", "stage_requests"))
    blocks = [block for block in admin.get("graph")["blocks"] if set(block["models"]) & set(names)]
    trunk = [block for block in blocks if set(block["models"]) >= set(names)]
    require(len(trunk) > 1, "embed, similar and route have no trunk in common")
    # Of each block of the trunk, one run instead of three.
    require(served - ran >= 2 * len(trunk), f"{served} stages of three models took {ran} runs, the trunk has {len(trunk)} blocks")
    fast, slow = (statistics.median(times_ms[how]) for how in ("together", "alone"))
    say(
        f"asked together about one text, they run the {len(trunk)} blocks of their trunk once, {ran} stages instead of {served}: "
        f"{fast:.1f} ms instead of {slow:.1f} ms one after the other, bit for bit the same answers"
    )


# --- the demo ---------------------------------------------------------------------------------------------------------


def run(stack_file: Path, write: Callable[[str], None]) -> None:
    """Run the demo; ``write`` gets what the processes say. Raises WrongAnswer and TrunklineError."""
    headline("Packing the models")
    folder = bundles()
    probabilities, vectors = original_probabilities(), original_vectors()
    headline("Starting sidecar, functions and gateway; the first time, this installs what the functions need")
    with LocalStack(stack_file, write=write) as stack, requests.Session() as session:
        headline("Pushing the bundles")
        with contextlib.closing(AdminClient(stack.admin)) as admin:
            push(admin, folder)
        stack.wait_ready()
        say("waiting until the sidecar has tried out how each model runs best")
        with contextlib.closing(AdminClient(stack.admin)) as admin:
            await_trials(admin)
        headline("Asking")
        call = Caller(stack.url, session)
        shown = {
            "classify": show_classify(call, probabilities),
            "embed": show_embed(call, vectors),
            "similar": show_similar(call),
            "route": show_route(call),
        }
        headline("Asking wrongly")
        check_refusals(call)
        # An idle sidecar gives back what its last runs left in the allocator.
        time.sleep(2)
        print_table(shown, stack.pids())
        with contextlib.closing(AdminClient(stack.admin)) as admin:
            print_sharing(admin.get("status"))
            os.environ["TRUNKLINE_SOCKET"] = str(stack.socket)
            show_together(admin)
        headline("Stopping")


def push(client: AdminClient, folder: Path) -> None:
    """Send the bundles; what the store kept from an earlier run is not sent again."""
    columns = TextColumn("  {task.fields[name]:9}"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=console) as progress:
        for name in NAMES:
            task = progress.add_task("", name=name, total=None)

            def advance(done: int, total: int, task: Any = task) -> None:
                progress.update(task, completed=done, total=total)

            pushed = client.push(folder / name, advance)
            progress.console.print(
                f"  {name}: sent {pushed.sent_count} of {pushed.blob_count} blobs, {megabytes(pushed.sent_bytes)} of "
                f"{megabytes(pushed.blob_bytes)}",
                highlight=False,
            )


def main() -> int:
    """Return the exit code."""
    STATE.mkdir(exist_ok=True)
    log_path = STATE / "demo.log"
    with log_path.open("w", buffering=1) as log:
        try:
            run(ROOT / "stack.yml", lambda line: print(line, file=log))
        except KeyboardInterrupt:
            return 130
        except (WrongAnswer, TrunklineError, ModuleNotFoundError, requests.RequestException) as error:
            console.print(f"[bold red]The demo failed:[/] {type(error).__name__}", highlight=False)
            console.print(f"{error}\nWhat the processes said is in {log_path.relative_to(ROOT)}", markup=False)
            return 1
    console.print("[bold green]All answers are right.[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
