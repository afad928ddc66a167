"""A scripted fortnight of a shadow that is worse by a known amount, with a reviewer who errs and a look each evening.

    python benchmarks/shadow_fortnight.py [--project build/demo] [--users 12] [--inputs 120] [--error 0.05]

The project is a demo (`tunewright demo build/demo`); a copy is served. Its adapter is live, and the adapter's earliest
checkpoint is in the shadow. Before the fortnight, both answer every input of the traffic, drawn from the dev and test
rows, so that the true difference is known: the share of right answers (exact match), candidate minus live.

Users are drawn for 14 days: they ask on their first day, and some return. Their requests go through the server, in
waves of four. Only the clock is scripted: the server, the review and the status take the time from it. Every evening
the reviewer judges the open pairs: they see the request and two answers, and compare them with the reference. With the
probability `--error` they give another verdict, drawn from the other three. So two truths are printed: that of all the
traffic, and that of the units in the sequence. The wrong verdicts alone move the sequence's mean from the second one.

Prints a table, and writes benchmarks/results/shadow_fortnight.json.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import torch
from load_shown import machine
from rich.console import Console
from rich.table import Table

from tunewright.adapters.foreign import ImportOptions
from tunewright.adapters.lineage import system_prompt
from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.api import Project
from tunewright.config.project import ProjectFolder
from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.evidence.shadow import COUNTED_S, ShadowStatus
from tunewright.render.terminal import rendered
from tunewright.serving.options import DeployOptions, ServeOptions
from tunewright.serving.shadow_plan import plan_blocks
from tunewright.serving.shadow_review import SIDES, ShadowVerdict
from tunewright.serving.tenants import State
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.shadow_reviews import ShadowPair

RESULTS = Path(__file__).with_name("results") / "shadow_fortnight.json"
DAYS, DAY = 14, 86_400.0
START = datetime(2027, 1, 4, tzinfo=UTC).timestamp()
ALIAS, TENANT = "legal", "acme"
ADAPTERS = ("live", "candidate")
RETURNS = 0.08
"""The probability with which a user asks on a later day."""
REPEATS = 0.3
"""The probability that a request repeats an earlier input of its user."""
WAVE = 4
"""Requests in parallel; a server runs as many shadow requests, and skips further ones."""
PATIENCE_S = 120.0
VERDICTS = [side for side in SIDES if side != "skip"]

Answers = Mapping[str, Mapping[str, str]]
"""The answers of each adapter by input."""


class Clock:
    """The scripted time."""

    now = START

    def __call__(self) -> float:
        """Return seconds since 1970."""
        return self.now


@dataclass(frozen=True)
class Ask:
    """A request of the fortnight."""

    time: float
    user: str
    input: str


@dataclass(frozen=True)
class Evening:
    """A look at the end of a day; all counts are of the whole time so far."""

    day: int
    requests: int
    differing: int
    labels: int
    units: int
    truth: float
    """The mean difference of these units by the references, from the answers that their users were given."""
    value: float
    low: float
    high: float
    outcome: str


@dataclass(frozen=True)
class Truth:
    """The share of right answers of the traffic, measured before it."""

    live: float
    candidate: float
    by_request: float
    """Candidate minus live, over all requests."""
    by_unit: float
    """Over all users, each by the mean of their first day; the last ones are not in the sequence yet."""


@dataclass(frozen=True)
class Fortnight:
    """The result."""

    evenings: list[Evening]
    truth: Truth
    users: int
    inputs: int
    as_measured: float
    """The share of the traffic's answers, of both adapters, that equal the ones before it."""
    wrong_verdicts: int
    status: ShadowStatus

    @property
    def decided(self) -> Evening | None:
        """The first evening with an outcome."""
        return next((evening for evening in self.evenings if evening.outcome != "can't tell"), None)


def main() -> None:
    """Run the fortnight on a copy of the project."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path("build/demo"))
    parser.add_argument("--users", type=int, default=12, help="new users a day, on average")
    parser.add_argument("--inputs", type=int, default=120, help="held-out rows that users draw from")
    parser.add_argument("--error", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    before, began = machine(torch.get_num_threads()), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(options.project, f"{name}/demo", ignore=shutil.ignore_patterns("serving")))
        project = scripted(folder)
        rows = [member for split in ("dev", "test") for member in project.data.version().domain_of(split)]
        rng = np.random.default_rng(options.seed)
        drawn = [rows[place].example for place in rng.permutation(len(rows))[: options.inputs]]
        references = {example.input_text: example.output for example in drawn}
        asks = draw_traffic(list(references), options.users, rng)
        with served(project) as server:
            answers = server.measured(list(references))
            found = fortnight(server, references, answers, asks, options.error, rng)
        show(project, found, options.error)
    settings = {name: getattr(options, name) for name in ("users", "inputs", "error", "seed")}
    seconds = round(time.perf_counter() - began)
    result = {name: value for name, value in asdict(found).items() if name != "status"}
    write_json(RESULTS, {"machine": before, "settings": settings, "seconds": seconds, **result})


def scripted(root: Path) -> Project:
    """Open a project that records requests and lives by the scripted clock."""
    config = ProjectFolder(root).config
    config = config.model_copy(update={"gateway": config.gateway.model_copy(update={"record": True})})
    project = Project(ProjectFolder(root, config), LogReporter())
    project.clock = Clock()
    return project


def draw_traffic(inputs: Sequence[str], users: int, rng: np.random.Generator) -> list[Ask]:
    """Draw the requests of a fortnight in the order of time; ``users`` are the mean of the new ones a day."""
    asks = []
    for first in range(DAYS):
        for number in range(rng.poisson(users)):
            before: list[str] = []
            returns = [day for day in range(first + 1, DAYS) if rng.random() < RETURNS]
            for day in (first, *returns):
                at = (day + rng.uniform(0.33, 0.8)) * DAY
                for turn in range(rng.geometric(0.5)):
                    repeats = before and rng.random() < REPEATS
                    before.append(str(rng.choice(before if repeats else inputs)))
                    asks.append(Ask(START + at + 60 * turn, f"user-{first}-{number}", before[-1]))
    return sorted(asks, key=lambda ask: ask.time)


@dataclass(frozen=True)
class Served:
    """A running server with a live adapter, another in its shadow, and both by themselves for a second tenant."""

    project: Project
    state: State
    client: httpx.Client
    keys: Mapping[str, str]
    """The key of each tenant."""
    max_tokens: int

    def answer(self, tenant: str, alias: str, question: str, user: str | None = None) -> str:
        """Return an alias's answer."""
        messages = [{"role": "user", "content": question}]
        body = {"model": alias, "messages": messages, "max_tokens": self.max_tokens, "user": user}
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        reply = self.client.post("/v1/chat/completions", json=body, headers=headers)
        return str(reply.raise_for_status().json()["choices"][0]["message"]["content"])

    def measured(self, inputs: Sequence[str]) -> Answers:
        """Return the answers of both adapters to each input, by a tenant that is not recorded."""
        with ThreadPoolExecutor(8) as threads:
            return {
                name: dict(zip(inputs, threads.map(partial(self.answer, "measuring", name), inputs), strict=True))
                for name in ADAPTERS
            }

    def send(self, wave: Sequence[Ask], total: int) -> None:
        """Send requests together, and wait until the shadow has answered all requests so far, and all are recorded."""
        with ThreadPoolExecutor(WAVE) as threads:
            list(threads.map(lambda ask: self.answer(TENANT, ALIAS, ask.input, ask.user), wave))
        end = time.monotonic() + PATIENCE_S
        while True:
            (recording,) = self.state.records.list(TENANT)
            if len(self.state.usage.shadow_lines(ALIAS)) == recording.records + recording.dropped == total:
                return
            assert time.monotonic() < end, "a request has no answer in the shadow, or no record"
            time.sleep(0.01)


@contextmanager
def served(project: Project, max_tokens: int = 32) -> Iterator[Served]:
    """Release both adapters of a `scripted` project, whose trained adapter has a checkpoint, and serve them."""
    (live,) = (adapter for adapter in list_adapters(project.folder.adapters) if adapter.checkpoints)
    names = {"live": live.name, "candidate": early_checkpoint(project, live).name}
    how, shadow = (DeployOptions(because="a benchmark", untested="a benchmark", shadow=on) for on in (False, True))
    project.deploy(ALIAS, names["live"], how)
    project.deploy(ALIAS, names["candidate"], shadow)
    for alias, name in names.items():
        project.deploy(alias, name, how)
    with project.state() as state:
        for tenant, aliases in ((TENANT, [ALIAS]), ("measuring", list(names))):
            state.tenants.add(tenant, aliases)
        state.records.start(TENANT, "DPA-17", 30, 1.0, KeyFile(project.folder.record_key))
        keys = {tenant: state.keys.create(tenant).secret for tenant in (TENANT, "measuring")}
        service = project.serve(options=ServeOptions(port=0))
        with service.running() as url, httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
            yield Served(project, state, client, keys, max_tokens)


def early_checkpoint(project: Project, live: Adapter) -> Adapter:
    """Return the first checkpoint as an adapter of its own, with the system prompt of the trained one."""
    step, folder = next(iter(live.checkpoints.items()))
    prompt = system_prompt(live, project.folder.dataset).text
    name = f"{project.folder.config.name}-{step}"
    return project.adapters.import_(folder, ImportOptions(base_matches=True, name=name, system_prompt=prompt)).adapter


def fortnight(
    server: Served,
    references: Mapping[str, str],
    answers: Answers,
    asks: Sequence[Ask],
    error: float,
    rng: np.random.Generator,
) -> Fortnight:
    """Send the traffic to a server with a shadow, and review it each evening.

    Args:
        server: of `served`.
        references: the right answer to each input.
        answers: what the adapters answered before the fortnight.
        asks: requests in the order of time.
        error: the probability of a wrong verdict.
        rng: draws the wrong verdicts.
    """
    project, clock = server.project, server.project.clock
    assert isinstance(clock, Clock)
    evenings, sent, wrong = list[Evening](), 0, 0
    right: dict[str, str] = {}
    for day in range(1, DAYS + 1):
        evening = START + day * DAY
        today = [ask for ask in asks if evening - DAY <= ask.time < evening]
        for place in range(0, len(today), WAVE):
            wave = today[place : place + WAVE]
            clock.now = wave[0].time
            sent += len(wave)
            server.send(wave, sent)
        clock.now = evening
        judged, mistakes = judge(project, references, error, rng)
        right, wrong = right | judged, wrong + mistakes
        status = project.shadow.status(ALIAS)
        evenings.append(evening_of(day, len(right), status, truth_of_settled(server.state, status, right)))
    given = Counter((line.answer, line.shadow_answer) for line in server.state.usage.shadow_lines(ALIAS))
    expected: Counter[tuple[str, str | None]] = Counter(
        (answers["live"][ask.input], answers["candidate"][ask.input]) for ask in asks
    )
    return Fortnight(
        evenings=evenings,
        truth=truth_of(asks, references, answers),
        users=len({ask.user for ask in asks}),
        inputs=len(references),
        as_measured=(given & expected).total() / len(asks),
        wrong_verdicts=wrong,
        status=status,
    )


def is_right(text: str, reference: str) -> bool:
    """Return whether an answer is the reference, apart from spaces around it."""
    return text.strip() == reference.strip()


def judge(
    project: Project, references: Mapping[str, str], error: float, rng: np.random.Generator
) -> tuple[dict[str, str], int]:
    """Judge the open pairs without knowing the adapters; return their right answers and the count of wrong verdicts."""
    review, wrong = project.shadow.review(ALIAS, reviewer="script"), 0
    marks, expected = [], dict[str, str]()
    for key in review.open_keys():
        pair = review.item(key)
        expected[key] = references[pair.input]
        right = is_right(pair.a, expected[key]), is_right(pair.b, expected[key])
        verdict = {(True, False): "A", (False, True): "B", (True, True): "both", (False, False): "neither"}[right]
        if rng.random() < error:
            verdict, wrong = rng.choice([side for side in VERDICTS if side != verdict]), wrong + 1
        marks.append(review.mark(ShadowVerdict, key, verdict=verdict))
    review.record(marks)
    return expected, wrong


def truth_of(asks: Sequence[Ask], references: Mapping[str, str], answers: Answers) -> Truth:
    """Return the truth of the traffic, from the answers before it."""
    right = {
        name: np.array([is_right(answers[name][ask.input], references[ask.input]) for ask in asks], dtype=float)
        for name in ADAPTERS
    }
    difference = right["candidate"] - right["live"]
    first: dict[str, float] = {}
    units: dict[str, list[float]] = {}
    for ask, value in zip(asks, difference, strict=True):
        if ask.time - first.setdefault(ask.user, ask.time) < COUNTED_S:
            units.setdefault(ask.user, []).append(value)
    by_unit = float(np.mean([np.mean(values) for values in units.values()]))
    return Truth(float(right["live"].mean()), float(right["candidate"].mean()), float(difference.mean()), by_unit)


def truth_of_settled(state: State, status: ShadowStatus, expected: Mapping[str, str]) -> float:
    """Return the true mean difference of the units in the sequence, by the right answers to their differing pairs."""
    lines = {line.request: line for line in state.usage.shadow_lines(ALIAS)}
    trial = state.shadow_reviews.trial(ALIAS, status.margin, status.most_units)
    units: dict[str | None, list[ShadowPair]] = {}
    for pair in state.shadow_reviews.pairs(trial)[0]:
        units.setdefault(pair.unit, []).append(pair)
    values = []
    for settled in state.shadow_reviews.settled(trial):
        pairs = units[settled.unit]
        counted = [pair for pair in pairs if pair.started - pairs[0].started < COUNTED_S]
        differing = [(lines[pair.number], expected[pair.id]) for pair in counted if pair.differs]
        gains = [is_right(line.shadow_answer or "", text) - is_right(line.answer, text) for line, text in differing]
        values.append(sum(gains) / len(counted))
    return float(np.mean(values)) if values else 0.0


def evening_of(day: int, labels: int, status: ShadowStatus, truth: float) -> Evening:
    """Return a day's look."""
    head = day, status.pairs, status.differing, labels
    if status.finding is None:
        return Evening(*head, 0, truth, 0.0, -1.0, 1.0, "can't tell")
    found = status.finding
    return Evening(*head, found.units, truth, found.value, found.low, found.high, found.outcome)


def show(project: Project, found: Fortnight, error: float) -> None:
    """Print the sequence next to the truth."""
    console, table = Console(width=110), Table("day", "requests", "differing", "labels", "units")
    for title in ("truth", "difference", "95% bounds", "outcome"):
        table.add_column(title)
    for each in found.evenings:
        counts = (f"{count:,}" for count in (each.day, each.requests, each.differing, each.labels, each.units))
        ends = f"{points(each.low)} to {points(each.high)}"
        table.add_row(*counts, points(each.truth), points(each.value), ends, each.outcome)
    console.print(table)
    truth = found.truth
    console.print(
        f"Truth: {truth.live:.1%} right live, {truth.candidate:.1%} in the shadow; {points(truth.by_request)} points "
        f"by request, {points(truth.by_unit)} by user. {found.users} users, {found.inputs} inputs; "
        f"{found.wrong_verdicts} wrong verdicts; {found.as_measured:.1%} of the pairs were answered as before."
    )
    # Of the three other verdicts on a pair of which one answer is right, one is 2 away and two are 1 away.
    last = found.evenings[-1]
    console.print(
        f"Truth of the {last.units} units in the sequence: {points(last.truth)}. The wrong verdicts moved it by "
        f"{points(last.value - last.truth)}; on average, an error of {error:.0%} moves it by "
        f"{points(-4 / 3 * error * last.truth)}."
    )
    if (decided := found.decided) is not None:
        at = found.status.reached.get(decided.outcome)
        console.print(f"{decided.outcome} on day {decided.day} with {decided.labels} labels, from unit {at} on.")
    else:
        console.print("Can't tell after the fortnight. `tunewright shadow plan`:")
        console.print(*rendered(*plan_blocks(project.shadow.plan(ALIAS))))


def points(share: float) -> str:
    """Return a share as points with a sign."""
    return f"{100 * share:+.1f}"


if __name__ == "__main__":
    main()
