"""The evaluation part of cluster_scale.py: greedy answers of at most 24 tokens to the texts of a file of pairs."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from tunewright.api import Project
from tunewright.data.examples import Message
from tunewright.evaluation.generations import Generator

LIMIT = 24


def answered(project: Project, pairs: Path) -> tuple[float, float, str]:
    """Return the seconds of the first half of the prompts, those of the second half, and the answers' digest."""
    seconds, texts = [], []
    with project.model_workers() as workers:
        generator = Generator.of(project.folder, project.base, project.chat, "none", project.reporter, workers=workers)
        asked = [json.loads(line)["prompt"] for line in pairs.read_text(encoding="utf-8").splitlines()]
        prompts = [generator.prompt([Message("user", text)]) for text in asked]
        for half in (prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]):
            began = time.perf_counter()
            texts += [answer.text for answer in generator.answer("prompts", half, LIMIT)]
            seconds.append(round(time.perf_counter() - began, 1))
    return seconds[0], seconds[1], hashlib.sha256(json.dumps(texts).encode()).hexdigest()
