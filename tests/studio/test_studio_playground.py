"""The playground: evaluation's own answers, streamed, cancelled and added to the dataset."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import httpx
import pytest

import tunewright as library
from making.browser import AXE, EXECUTABLE, axe_faults, chromium, faults, show, signed_in, wait_for
from making.command_line import tiny_project, trained_project
from making.studio_client import PASSWORD, wait_until
from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.core.text import visible
from tunewright.evaluation.arms import TUNED, ZERO_SHOT, plan_of
from tunewright.evaluation.verbs import open_arm_runner
from tunewright.serving.gateway.server import serving
from tunewright.serving.playground import Playground
from tunewright.studio import Studio


@dataclass
class Player:
    """A signed-in browser on a studio whose base is loaded."""

    client: httpx.Client
    studio: Studio
    project: Path

    @property
    def playground(self) -> Playground:
        """The base that is in memory."""
        made = self.studio._cache.playing.playground
        assert made is not None
        return made

    def url(self, path: str) -> str:
        """Return a page's address."""
        return str(self.client.base_url.join(path))

    def get(self, path: str) -> str:
        """Return a page's text."""
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return unescape(answer.text)

    def send(self, page: str, action: str, /, **fields: str) -> httpx.Response:
        """Send a form with the page's token."""
        token = re.search('name="form_token" value="([^"]*)"', self.client.get(page).text)
        assert token is not None
        return self.client.post(action, data={"form_token": token[1], **fields})

    def ask(self, question: str, *models: str, limit: str = "") -> str:
        """Ask, and return the path of the question's page."""
        chosen = {f"model {model}": "on" for model in models}
        answer = self.send("/playground", "/playground", question=question, limit=limit, **chosen)
        assert answer.status_code == 200, answer.text
        assert 'data-events="' in answer.text
        return answer.url.path

    def answered(self, question: str, *models: str, limit: str = "") -> str:
        """Ask, wait without JavaScript, and return the page with the answers."""
        return self.get(f"{self.ask(question, *models, limit=limit)}/answers")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with an adapter and a best prompting arm."""
    folder = tmp_path_factory.mktemp("playground") / "project"
    trained_project(folder, tiny_base_folder, ("num_fewshot: [1, 2]", "num_fewshot: [2]"))
    library.open(folder).prompting()
    return folder


@pytest.fixture(scope="module")
def player(trained: Path) -> Iterator[Player]:
    with _playing(trained) as player:
        yield player


@pytest.fixture
def endless(tmp_path: Path, tiny_base_folder: Path) -> Iterator[Player]:
    """A studio on a base that never ends its answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder, max_position_embeddings=8192)
    with torch.no_grad():
        # One dimension of the hidden states is the same for all tokens, so that the head's weights for it are a bias.
        model.model.embed_tokens.weight[:, 0] = 64
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = -10
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with _playing(tiny_project(tmp_path / "project", tmp_path / "base")) as player:
        yield player


@contextmanager
def _playing(project: Path) -> Iterator[Player]:
    studio = Studio(project, "ada", password=PASSWORD)
    with (
        serving(studio.app()) as url,
        httpx.Client(base_url=url, follow_redirects=True, timeout=60) as client,
    ):
        client.post("/sign-in", data={"secret": PASSWORD})
        player = Player(client, studio, project)
        assert "Load the base" in player.get("/playground")
        assert player.send("/playground", "/playground/load").status_code == 200
        wait_until(lambda: "Loading" not in player.get("/playground"))
        yield player
        assert "not in memory any more" in player.send("/playground", "/playground/unload").text


def _adapter(project: Path) -> Adapter:
    (adapter,) = list_adapters(project / "adapters")
    return adapter


def _columns(page: str) -> dict[str, str]:
    """The page's sections by model."""
    models = {"The base, zero-shot": "base", "The best prompting arm": "prompting"}
    sections = re.findall(r"<section[^>]*>\s*<h2[^>]*>([^<]*)</h2>(.*?)</section>", page, re.DOTALL)
    return {models.get(heading, heading): column for heading, column in sections}


def _text(column: str) -> str:
    # Browsers ignore the line end at the beginning.
    found = re.search(r'aria-label="Answer"[^>]*>\n(.*?)</pre>', column, re.DOTALL)
    assert found is not None, column
    return found[1]


def test_answers_are_those_of_the_evaluation(player: Player) -> None:
    project, adapter = library.open(player.project), _adapter(player.project)
    member = project.data.version().examples("dev")[0]
    tuned, base = open_arm_runner(project, adapter), open_arm_runner(project)
    advice = project.prompting().advice
    best = next(plan_of(arm) for arm in advice.arms if arm.name == advice.best)
    expected = {
        "base": base.answers(ZERO_SHOT, [member], "dev")[0],
        "prompting": base.answers(best, [member], "dev")[0],
        adapter.name: tuned.answers(TUNED, [member], "dev", adapter)[0],
    }
    page = player.answered(member.example.input_text, "base", "prompting", adapter.name)
    columns = _columns(page)
    assert list(columns) == list(expected)
    for name, answer in expected.items():
        assert _text(columns[name]) == visible(answer.text), name
        assert f"{len(answer.prompt):,} prompt tokens" in columns[name]
    assert f"Digest <code>{adapter.digest[:12]}" in columns[adapter.name]
    assert best.name in columns["prompting"]


def test_answers_are_streamed_and_kept(player: Player) -> None:
    adapter = _adapter(player.project)
    path = player.ask("teal navy olive 2", "base", adapter.name, limit="40")
    pieces: dict[int, str] = {0: "", 1: ""}
    with player.client.stream("GET", f"{path}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = list(answer.iter_lines())
    assert "event: finished" in lines
    for line in lines:
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            pieces[event["model"]] += event["text"]
    columns = _columns(player.get(path))
    assert [_text(columns[name]) for name in ("base", adapter.name)] == [pieces[0], pieces[1]]
    again = player.get(f"/playground?again={path.rpartition('/')[2]}")
    assert ">\nteal navy olive 2</textarea>" in again and 'value="40"' in again
    assert re.findall(r'name="model ([^"]*)" checked', again) == ["base", adapter.name]
    asked = {"question": "and then", "after": path.rpartition("/")[2], "limit": "5", "temperature": "0"}
    second = player.send(path, "/playground", **asked)
    turn = player.studio._cache.playing.question(second.url.path.rpartition("/")[2])
    ((asked_first, said_first),) = turn.earlier("base")
    assert (asked_first, visible(said_first)) == ("teal navy olive 2", _text(columns["base"]))
    shown = _columns(player.get(f"{second.url.path}/answers"))
    first = player.playground._prepare("and then", "base", turn.version, 5, turn.earlier("base"))
    assert f"{len(first.request.prompt_ids):,} prompt tokens" in shown["base"]
    assert visible(said_first) in shown["base"]
    hot = player.send("/playground", "/playground", question="x", temperature="9", **{"model base": "on"})
    assert hot.status_code == 400 and 'id="wrong-temperature"' in hot.text
    wrong = player.send("/playground", "/playground", question="kept", limit="many")
    assert wrong.status_code == 400 and ">\nkept</textarea>" in wrong.text and 'id="wrong-limit"' in wrong.text
    assert player.client.get(f"{path}/events").text == "event: finished\ndata:\n\n", "nothing is computed again"


def test_browser_that_leaves_ends_the_computation(endless: Player) -> None:
    player = endless
    path = player.ask("amber violet ochre 3", "base", limit="8000")
    with player.client.stream("GET", f"{path}/events") as answer:
        lines = answer.iter_lines()  # the connection closes with it
        assert next(lines).startswith("data: ")
        assert player.playground.in_flight == 1
        # Other pages do not wait for the answer.
        assert "Playground" in player.get("/playground")
        assert player.playground.in_flight == 1
    wait_until(lambda: player.playground.in_flight == 0)
    assert 'data-events="' in player.get(path), "the answer is not complete"


def test_answer_becomes_a_row_with_its_origin(player: Player) -> None:
    before = library.open(player.project).data.version().digest
    page = player.answered("olive coral teal 77", "base", limit="4")
    path = re.search(r'<a href="(/playground/\w+)/row\?model=base">', page)
    assert path is not None
    editor = player.get(f"{path[1]}/row?model=base")
    assert "olive coral teal 77" in editor
    checked = player.send(
        f"{path[1]}/row?model=base", f"{path[1]}/row", model="base", question="olive coral teal 77", answer="olive"
    )
    assert checked.status_code == 200 and checked.url.path == "/data/check", checked.text
    assert library.open(player.project).data.version().digest == before, "it is not added yet"
    file = checked.url.params["file"]
    version = re.search('name="version" value="([^"]*)"', checked.text)
    assert version is not None
    added = player.send(str(checked.url), "/data/add", file=file, version=version[1], message="from the playground")
    assert added.status_code == 200, added.text
    project = library.open(player.project)
    member = project.data.show(f"{file}:1")
    assert (member.example.input_text, member.example.output) == ("olive coral teal 77", "olive")
    assert project.data.blame(f"{file}:1").version.message == "from the playground"
    origin = project.data.metadata(member.key)["origin"]
    assert origin == {"from": "playground", "answered_by": "base", "adapter": None, "edited": True, "by": "ada"}


def test_base_that_cannot_be_loaded_is_reported(tmp_path: Path) -> None:
    (tmp_path / "tunewright.yaml").write_text("name: tiny\nbase_model: ./nowhere\n")
    with (
        serving(Studio(tmp_path, "ada", password=PASSWORD).app()) as url,
        httpx.Client(base_url=url, follow_redirects=True, timeout=60) as client,
    ):
        client.post("/sign-in", data={"secret": PASSWORD})
        page = client.get("/playground").text
        token = re.search('name="form_token" value="([^"]*)"', page)
        assert token is not None
        early = client.post("/playground", data={"form_token": token[1], "question": "x", "model base": "on"})
        assert early.status_code == 400 and "not loaded" in early.text
        client.post("/playground/load", data={"form_token": token[1]})
        wait_until(lambda: "Loading" not in client.get("/playground").text)
        assert 'role="alert"' in client.get("/playground").text and "nowhere" in client.get("/playground").text
        assert client.get("/playground/0123456789abcdef/answers").status_code == 400


@pytest.mark.slow
@pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")
def test_answers_appear_in_a_browser_by_keys_alone(player: Player) -> None:
    adapter = _adapter(player.project)
    with chromium() as browser:
        page = signed_in(browser, player.url("/sign-in"), PASSWORD)
        show(page, "/playground", width=360)
        page.focus("#question")
        page.keyboard.press("x")
        page.fill("#limit", "1500")
        with page.expect_navigation():
            page.keyboard.press("Control+Enter")
        wait_for(page.locator("#answer-0")).not_to_be_empty()
        # The best prompting arm is refused if an earlier test has added a row.
        wait_for(page.get_by_role("region", name=adapter.name).get_by_text("answer token")).to_be_visible()
        assert adapter.digest[:12] in page.inner_text("body")
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert faults(page) == []
        if AXE.exists():
            for path in (page.url, "/playground"):
                show(page, path, width=1100)
                assert axe_faults(page) == [], path
