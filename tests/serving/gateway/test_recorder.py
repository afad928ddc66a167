"""Requests that a server records: what is stored of them, who decides, and what happens when that fails."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event
from states import with_tenant
from tenant_server import ASKED, Running, Stored, tenant_server, until

from tunewright.serving.gateway.recorder import MAX_BYTES, MAX_WAITING, Received, Recorder
from tunewright.serving.gateway.schemas import ChatRequest
from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import Reservation
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.records import RequestRecord

pytest_plugins = ["tenant_server"]

on_sqlite = pytest.mark.parametrize("state_url", ["sqlite"], indirect=True)
"""For what does not depend on the database."""


@dataclass
class Recording:
    """A server that records, and the key of acme's requests."""

    server: Running
    state: State
    file: KeyFile
    key: str

    def post(self, path: str = "/v1/chat/completions", headers: dict[str, str] | None = None, **body: Any) -> Any:
        """Send a request of acme and return the response's document."""
        asked = {"model": "courts", "max_tokens": 3, **body}
        sent = {"Authorization": f"Bearer {self.key}", **(headers or {})}
        reply = httpx.post(f"{self.server.url}{path}", json=asked, headers=sent, timeout=60, trust_env=False)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def records(self, count: int) -> list[RequestRecord]:
        """Return acme's records, once there are this many."""
        until(lambda: sum(each.records for each in self.state.records.list("acme")) >= count)
        found = list(self.state.records.read("acme", self.file))
        assert len(found) == count
        return found

    def dropped(self, count: int) -> None:
        """Wait until this many dropped requests are counted, in the state too."""
        until(lambda: self.state.records.list("acme")[0].dropped == count)


@pytest.fixture
def recording(
    state: State, state_url: str, two_tenants: dict[str, str], adapters: dict[str, Stored], tmp_path: Path
) -> Iterator[Recording]:
    file = KeyFile(tmp_path / "record.key")
    with tenant_server(state_url, adapters, record_key=file) as running:
        yield Recording(running, state, file, two_tenants["acme"])


def test_recorded_request_has_request_answer_and_release_without_personal_data(
    recording: Recording, two_tenants: dict[str, str]
) -> None:
    recording.post(messages=ASKED)  # before the recording starts
    recording.state.records.start("acme", "DPA-17", 30, 1.0, recording.file)
    secret = f"I am maria@uni-bonn.de, my key is {recording.key}. Write to Maria@uni-bonn.de!"
    messages = [{"role": "user", "content": secret}]
    answered = recording.post(
        messages=messages, user="maria@uni-bonn.de", metadata={"who": "Maria"}, temperature=0.5, seed=7
    )
    recording.post("/v1/completions", prompt="District maria@uni-bonn.de", safety_identifier="maria@uni-bonn.de")
    first, second = recording.records(2)
    assert first.request.keys() == {"model", "max_tokens", "messages", "temperature", "seed"}
    text = first.request["messages"][0]["content"]
    name = text.split()[2].rstrip(",")
    assert name.startswith("<EMAIL_") and text.count(name) == 2 and "<TUNEWRIGHT_KEY_" in text
    assert first.redacted == {"email": 2, "tunewright_key": 1}
    assert second.request["prompt"] == f"District {name}", "the same placeholder for the same user"
    assert (first.unit, first.unit_kind) == (second.unit, "user")
    assert first.answers == [
        {
            "content": answered["choices"][0]["message"]["content"],
            "finish": answered["choices"][0]["finish_reason"],
        }
    ]
    assert (first.id, first.alias, first.release) == (answered["id"], "courts", 1)
    assert (first.path, second.path) == ("/v1/chat/completions", "/v1/completions")
    assert first.completion_tokens == answered["usage"]["completion_tokens"]
    assert "maria" not in json.dumps([first.request, second.request]).lower()
    assert recording.state.records.list("globex") == []
    httpx.post(
        f"{recording.server.url}/v1/chat/completions",
        json={"model": "recipes", "messages": ASKED, "max_tokens": 2},
        headers={"Authorization": f"Bearer {two_tenants['globex']}"},
        trust_env=False,
    ).raise_for_status()
    assert recording.state.records.list("globex") == []


def test_streamed_and_several_answers_are_recorded_whole(recording: Recording) -> None:
    recording.state.records.start("acme", "DPA-17", 30, 1.0, recording.file)
    client = recording.server.client(recording.key)
    chunks = list(client.chat.completions.create(model="courts", messages=ASKED, max_tokens=4, stream=True))
    recording.post(messages=ASKED, n=2, temperature=1, seed=1)
    streamed, two = recording.records(2)
    assert streamed.answers[0]["content"] == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert (streamed.id, len(two.answers)) == (chunks[0].id, 2)
    assert streamed.unit == two.unit, "two requests with the same beginning"
    assert {streamed.unit_kind, two.unit_kind} == {"conversation"}


def test_header_forbids_recording_and_permits_none(recording: Recording) -> None:
    recording.post(headers={"X-Tunewright-Record": "on"}, messages=ASKED)  # nobody recorded acme
    recording.state.records.start("acme", "DPA-17", 30, 1.0, recording.file)
    for value in ("off", "OFF", "false", "", "on, off"):
        recording.post(headers={"X-Tunewright-Record": value}, messages=ASKED)
    permitted = recording.post(headers={"x-tunewright-record": "on"}, messages=ASKED)
    assert [each.id for each in recording.records(1)] == [permitted["id"]]
    recording.state.records.stop("acme")
    recording.post(headers={"x-tunewright-record": "on"}, messages=ASKED)
    last = recording.state.records.start("acme", "DPA-17", 30, 1.0, recording.file)
    assert (last.records, last.dropped) == (1, 0)


def test_all_requests_of_a_sampled_user_are_recorded_and_none_of_others(recording: Recording) -> None:
    recording.state.records.start("acme", "DPA-17", 30, 0.5, recording.file)
    keys = recording.file.keys("acme")
    users = {str(number): int(keys.digest("user", str(number))[:2], 16) < 128 for number in range(8)}
    for _ in range(2):
        for user in users:
            recording.post(messages=ASKED, user=user)
    found = recording.records(2 * sum(users.values()))
    assert {each.subject for each in found} == {keys.digest("user", user) for user, sampled in users.items() if sampled}
    assert {each.probability for each in found} == {0.5}


@on_sqlite
def test_forgotten_user_is_in_no_file_also_with_an_answer_in_progress(recording: Recording, tmp_path: Path) -> None:
    planted, client = "planted-eve-7731", recording.server.client(recording.key)
    recording.state.records.start("acme", "DPA-17", 30, 1.0, recording.file)
    asked: list[Any] = [{"role": "user", "content": f"I am {planted}"}]
    whole = recording.post(messages=asked, user=planted)
    reply: Any = client.post("/feedback", body={"id": whole["id"], "reason": planted}, cast_to=object)
    assert reply["status"] == "recorded"
    recording.post(messages=ASKED, user="bob")
    recording.records(2)
    stream = client.chat.completions.create(
        model="courts", messages=asked, max_tokens=50_000, stream=True, user=planted
    )
    with stream as chunks:
        next(chunks)
        done = recording.state.records.forget("acme", recording.file, user=planted)
        assert (done.requests, done.records, done.feedback, done.scrubbed) == (2, 1, 1, True)
    until(lambda: [line.outcome for line in recording.state.usage.lines()][-1] == "disconnected")
    last = recording.post(messages=ASKED, user="bob")  # recorded after the interrupted answer
    assert recording.records(2)[-1].id == last["id"]
    recording.state.database.scrub()
    found = {path for path in tmp_path.rglob("*") if path.is_file() and planted.encode() in path.read_bytes()}
    assert found == set()
    assert done.digest is not None
    assert any(done.digest in line.details for line in recording.state.audit.lines()), "the tombstone"


def test_server_without_the_setting_records_nothing(
    state: State, state_url: str, two_tenants: dict[str, str], adapters: dict[str, Stored], tmp_path: Path
) -> None:
    file = KeyFile(tmp_path / "record.key")
    state.records.start("acme", "DPA-17", 30, 1.0, file)
    with tenant_server(state_url, adapters) as running:
        Recording(running, state, file, two_tenants["acme"]).post(messages=ASKED)
    (found,) = state.records.list()
    assert (found.records, found.dropped) == (0, 0)


def test_request_is_answered_and_counted_when_its_record_cannot_be_made(
    recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = KeyFile(recording.file.path.with_name("elsewhere"))  # made by the command on another machine
    recording.state.records.start("acme", "DPA-17", 30, 1.0, elsewhere)
    with caplog.at_level(logging.WARNING, "tunewright"):
        for _ in range(3):
            recording.post(messages=ASKED)
        recording.dropped(3)
    assert caplog.text.count("The key file of recorded requests is missing") == 1
    recording.file.path.write_bytes(elsewhere.path.read_bytes())
    recording.file.path.chmod(0o600)
    recording.post(messages=ASKED)
    recording.records(1)


class Answered:
    """A recorder, and requests of a recorded tenant that were answered."""

    def __init__(self, state: State, folder: Path) -> None:
        _, self.release = with_tenant(state)
        self.file = KeyFile(folder / "record.key")
        state.records.start("acme", "DPA-17", 30, 1.0, self.file)
        key, _ = state.keys.create("acme")
        self.caller = state.keys.caller(key)
        self.state = state
        self.recorder = Recorder(state, self.file)
        self.asked = 0

    def put(self, text: str = "Which court?") -> None:
        self.asked += 1
        response_id = f"chatcmpl-{self.asked}"
        ids = self.caller.tenant_id, self.caller.key_id
        made = Reservation(*ids, self.release.alias, self.release.id, self.release.digest, 9, None, response_id)
        number = self.state.quota.reserve(made, "g")
        raw = json.dumps({"model": "a", "messages": [{"role": "user", "content": text}]}).encode()
        received = Received("/v1/chat/completions", raw, ChatRequest.model_validate_json(raw))
        self.recorder.put(self.caller, number, response_id, received, [{"content": "D. Guam", "finish": "stop"}])

    @property
    def stored(self) -> tuple[int, int]:
        (found,) = self.state.records.list()
        return found.records, found.dropped


@on_sqlite
def test_full_disk_drops_records_and_counts_them_once_there_is_room(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answered = Answered(state, tmp_path)
    full = threading.Event()

    @event.listens_for(state.database._engine, "begin")
    def limit(connection: Any) -> None:
        # SQLite reports a full disk when its file would have more pages.
        on_thread = threading.current_thread().name == "tunewright-recorder"
        pages = 1 if on_thread and full.is_set() else 1_000_000
        connection.connection.cursor().execute(f"PRAGMA max_page_count = {pages}")

    full.set()
    with caplog.at_level(logging.WARNING, "tunewright"):
        answered.put("x" * 100_000)
        until(lambda: answered.recorder.counts[1] == {"acme": 1})
    assert "database or disk is full" in caplog.text
    assert "requests are answered and not recorded" in caplog.text
    full.clear()
    answered.put()
    until(lambda: answered.stored == (1, 1))
    answered.recorder.close()
    assert answered.recorder.counts == ({"acme": 1}, {"acme": 1})


def test_requests_beyond_the_queue_are_dropped_without_waiting(state: State, tmp_path: Path) -> None:
    answered = Answered(state, tmp_path)
    more = 5
    hold = threading.Event()

    @event.listens_for(state.database._engine, "checkout")
    def wait(*_connection: Any) -> None:
        if threading.current_thread().name == "tunewright-recorder":
            hold.wait(60)

    answered.put()
    until(lambda: answered.recorder._queue.empty())  # the thread has taken it, and waits for the database
    for _ in range(MAX_WAITING + more):
        answered.put()
    assert answered.recorder.counts[1] == {"acme": more}
    hold.set()
    until(lambda: answered.stored == (1 + MAX_WAITING, more))
    answered.recorder.close()


@on_sqlite
def test_bodies_that_cannot_be_searched_are_dropped(state: State, tmp_path: Path) -> None:
    answered = Answered(state, tmp_path)
    answered.put("x" * MAX_BYTES)
    answered.put("[" * 900 + "]" * 900)
    answered.put("[1, 2")
    until(lambda: answered.stored[0] >= 1)
    answered.recorder.close()
    records, dropped = answered.stored
    assert (records + dropped, dropped >= 1) == (3, True)
