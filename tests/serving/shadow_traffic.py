"""Recorded traffic of a shadow, of which the test knows which answers are right."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from states import DIGESTS, SHIP, reservation

from making.command_line import tiny_project
from tunewright import open as open_project
from tunewright.api import Project
from tunewright.evaluation.human_eval.session import Side
from tunewright.serving.shadow_review import ShadowVerdict
from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import RequestUsage
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.records import NewRecord, unit_of
from tunewright.serving.tenants.releases import Candidate

DAY = 86_400.0
ALIAS = "courts"
EVE = "eve.planted-7731"
USED = RequestUsage(3, 4, 0.0, 0.1, 0.2, "stop")


@dataclass
class Traffic:
    """Recorded requests of a shadow, of which the test knows which answer is right."""

    project: Project
    state: State
    shadow: int
    """The release's id."""
    clock: list[float]
    right: dict[str, str] = field(default_factory=dict)
    """The right answer by the response's id, of requests whose answers differ."""
    count: int = 0

    def ask(self, user: str | None, live: str, shadow: str | None, right: str = "", *, recorded: bool = True) -> str:
        """Answer a request twice; the live answer is returned."""
        self.count += 1
        response_id = f"chatcmpl-{self.count:05}"
        caller = self.state.keys.caller(self.key)
        release = self.state.releases.history(ALIAS)[-1]
        asked = replace(reservation(caller, release), response_id=response_id, end_user=user)
        number = self.state.quota.reserve(asked, "g")
        self.state.quota.settle(number, USED)
        if recorded:
            keys = KeyFile(self.project.folder.record_key).keys(caller.tenant)
            text = f"{EVE} asks {self.count}" if user == EVE else f"case {self.count}"
            unit, kind, subject = unit_of(keys, user, [], response_id)
            request = {"messages": [{"role": "user", "content": text}]}
            body = keys.encrypt({"path": "/v1/chat/completions", "request": request, "answers": []}, number)
            self.state.records.write([NewRecord(number, unit, kind, subject, 1.0, body)], {})
        self.state.quota.record_shadow(number, self.shadow, live, shadow, None if shadow else "the engine died")
        if shadow is not None and live != shadow:
            self.right[response_id] = right
        return response_id

    key: str = ""

    def judge(self, reviewer: str, wrong: float = 0.0, most: int | None = None, seed: int = 0) -> int:
        """Judge the open pairs as a reviewer who errs with this probability; return how many."""
        draw, review = random.Random(seed), self.project.shadow.review(ALIAS, reviewer=reviewer)
        marks = []
        for key in review.open_keys(most):
            pair = review.item(key)
            better: Side = "A" if pair.a == self.right[key] else "B"
            side = ("B" if better == "A" else "A") if draw.random() < wrong else better
            marks.append(review.mark(ShadowVerdict, key, verdict=side))
        review.record(marks)
        return len(marks)


def recorded_traffic(tmp_path: Path, tiny_base_folder: Path) -> Traffic:
    """Return an alias with an adapter in its shadow, in a project that records its tenant's requests."""
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    project = open_project(folder)
    clock = [time.time() - 20 * DAY]
    state = State(f"sqlite:///{folder}/serving/state.sqlite", "ann", lambda: clock[0])
    state.tenants.add("acme", [ALIAS])
    key, _ = state.keys.create("acme")
    state.records.start("acme", "DPA-17", 30, 1.0, KeyFile(project.folder.record_key))
    state.releases.deploy(ALIAS, "courts-1", DIGESTS["a"], SHIP)
    shadow = state.releases.start_candidate(ALIAS, Candidate("courts-2", DIGESTS["b"], None), SHIP)
    return Traffic(project, state, shadow.id, clock, key=key)


def fill(traffic: Traffic, users: int, worse: float, better: float, seed: int = 1) -> dict[str, list[float]]:
    """Draw users with one to four requests on a day; return the true differences by user."""
    draw, truth = random.Random(seed), defaultdict[str, list[float]](list)
    for user in range(users):
        traffic.clock[0] += DAY / users
        for _ in range(draw.randint(1, 4)):
            chance, name = draw.random(), f"user-{user}"
            if chance < worse + better:
                right = "live" if chance < worse else "new"
                traffic.ask(name, "live", "new", right)
                truth[name].append(-1.0 if right == "live" else 1.0)
            else:
                traffic.ask(name, "same", "same")
                truth[name].append(0.0)
    return truth
