"""Parsers that meet foreign bytes, on damaged seeds: each input is read, or refused with the parser's own error.

`tests/fuzz/corpus/TARGET/` has the seeds and every input that once found a fault. `make fuzz` changes them 10,000 times
for each target; CONTRIBUTING.md says how to run an hour.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tunewright.adapters.foreign.documents import check_history, check_lineage, check_replay, read_config
from tunewright.adapters.foreign.importer import read_header
from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.manifest import MANIFEST, SIGNATURE
from tunewright.adapters.signing import verify_signatures
from tunewright.config import DataConfig, GatewayConfig
from tunewright.config.io import parse_config
from tunewright.core.csv import read_sheet
from tunewright.core.errors import UserError
from tunewright.data.examples import Example, Message
from tunewright.data.options import RemoveOptions
from tunewright.data.readers import read_pairs
from tunewright.data.selection import select
from tunewright.data.trace import Origins
from tunewright.data.versions import Member
from tunewright.models.families import Shape
from tunewright.serving.gateway.connections import MAX_HEADER_BYTES, BoundedHttpProtocol, ConnectionState
from tunewright.serving.gateway.errors import ApiError, parse_request
from tunewright.serving.gateway.messages_api import MessagesRequest
from tunewright.serving.gateway.schemas import ChatRequest, CompletionRequest

CORPUS = Path(__file__).parent / "corpus"
SHAPE = Shape(2, 64, 128, 4, 2, 16, 384, tied=True, attention_bias=False, mlp_bias=False)


def _parse_chat(content: bytes, _folder: Path) -> None:
    try:
        request = parse_request(ChatRequest, content)
    except ApiError as error:
        assert error.status == 400
        json.dumps(error.body).encode()
        assert len(error.message) < 20_000
        return
    assert request.conversation
    assert request.beginning


def _parse_completion(content: bytes, _folder: Path) -> None:
    try:
        assert parse_request(CompletionRequest, content).texts
    except ApiError as error:
        assert error.status == 400


def _parse_messages(content: bytes, _folder: Path) -> None:
    try:
        assert parse_request(MessagesRequest, content).as_chat().conversation
    except ApiError as error:
        assert error.status == 400
        assert len(error.message) < 20_000


def _parse_yaml(content: bytes, _folder: Path) -> None:
    parse_config(content.decode("utf-8", "replace"), Path("tunewright.yaml"))


def _read_safetensors(content: bytes, folder: Path) -> None:
    (folder / "weights").write_bytes(content)
    read_header(folder / "weights", "weights")


def _read_adapter_config(content: bytes, _folder: Path) -> None:
    config = read_config(content, SHAPE, "LlamaForCausalLM", "adapter_config.json")
    for module in config.modules:
        rank, scale = config.rank_and_scale(module)
        assert rank >= 1 and scale == scale


def _read_metadata(content: bytes, folder: Path) -> None:
    (folder / "lines").write_bytes(content)
    for check in (lambda: check_lineage(content, "x"), lambda: check_history(folder / "lines", "x")):
        try:
            check()
        except UserError as error:
            assert error.what
    check_replay(folder / "lines", "x")


def _read_rows(name: str, data: DataConfig) -> Callable[[bytes, Path], None]:
    def use(content: bytes, folder: Path) -> None:
        (folder / name).write_bytes(content)
        reading = read_pairs(folder / name, data)
        assert reading.rows or reading.faults

    return use


def _read_sheet_xml(content: bytes, folder: Path) -> None:
    """Read the bytes as the sheet of a workbook, whose zip archive would hide most changes behind a checksum."""
    with ZipFile(CORPUS / "xlsx" / "shared.xlsx") as seed, ZipFile(folder / "sheet.xlsx", "w") as archive:
        for name in seed.namelist():
            archive.writestr(name, content if name == "xl/worksheets/sheet1.xml" else seed.read(name))
    reading = read_pairs(folder / "sheet.xlsx", DataConfig())
    assert reading.rows or reading.faults


def _read_table(content: bytes, folder: Path) -> None:
    (folder / "sheet.csv").write_bytes(content)
    read_sheet(folder / "sheet.csv", ("key",), "tunewright")


ROWS = b'{"a": [{"q": "x", "a": "y"}], "b": {"c": [1, "2", null, {"q": "x", "a": "y"}]}, "d": 1.5}'


EXAMPLE = Example((Message("user", "x"), Message("assistant", "y")))
ROW = Member(EXAMPLE, EXAMPLE.pair_key, "train", EXAMPLE.pair_key)


def _search(content: bytes, folder: Path) -> None:
    """Use the bytes as a JMESPath expression: data.rows on a document, and --where on rows."""
    expression = content.decode("utf-8", "replace")
    if not expression:
        return  # the config refuses it
    (folder / "rows.json").write_bytes(ROWS)
    try:
        read_pairs(folder / "rows.json", DataConfig(rows=expression, input="q", output="a"))
    except UserError as error:
        assert error.what
    select(RemoveOptions(where=expression), {ROW.key: ROW}, (), Origins(), folder)


def _render(content: bytes, folder: Path) -> None:
    """Use the bytes as a Jinja template of the config."""
    (folder / "rows.jsonl").write_bytes(b'{"q": "x", "a": ["y", 1], "b": {"c": null}}\n')
    template = "{{ q }}" + content.decode("utf-8", "replace")
    read_pairs(folder / "rows.jsonl", DataConfig(input="{{ q }}", output=template))


def _trust(content: bytes, folder: Path) -> None:
    with TemporaryDirectory(dir=folder) as keys:
        (folder / "ann.pub").write_bytes(content)
        assert TrustedKeys(Path(keys)).trust(folder / "ann.pub").id.startswith("SHA256:")


def _read_signers(content: bytes, folder: Path) -> None:
    with TemporaryDirectory(dir=folder) as keys:
        (Path(keys) / "allowed_signers").write_bytes(content)
        assert all(key.id.startswith("SHA256:") for key in TrustedKeys(Path(keys)).all)


def _verify(content: bytes, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"{}")
    (folder / SIGNATURE).write_bytes(content)
    assert all(each.status != "signed" for each in verify_signatures(folder, TrustedKeys(folder / "no-keys")))


class _Transport(asyncio.Transport):
    """A client that reads everything."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.sent = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def write_eof(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


async def _echo(request: Request) -> Response:
    try:
        body = await request.body()
    except ClientDisconnect:
        return Response(status_code=400)
    assert sum(len(name) + len(value) for name, value in request.scope["headers"]) <= MAX_HEADER_BYTES
    return JSONResponse({"bytes": len(body)})


async def _exchange(content: bytes, parts: int) -> bytes:
    loop = asyncio.get_running_loop()
    failures: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: failures.append(context))
    state = ConnectionState(GatewayConfig())
    app = Starlette(routes=[Route("/", _echo, methods=["GET", "POST"])])
    config = uvicorn.Config(app, ws="none", log_config=None, lifespan="off")
    config.load()
    protocol = BoundedHttpProtocol(config, state, {}, loop)
    transport = _Transport()
    protocol.connection_made(transport)
    step = max(1, len(content) // parts)
    for at in range(0, len(content), step):
        if transport.closed:
            break
        protocol.data_received(content[at : at + step])
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    protocol.connection_lost(None)
    for _ in range(5):
        await asyncio.sleep(0)
    for task in state.tasks:
        assert task.done(), "a request outlives its connection"
    assert not failures, failures
    return transport.sent


def _serve(content: bytes, _folder: Path) -> None:
    parts = 1 + content[0] % 8 if content else 1
    sent = asyncio.run(_exchange(content, parts))
    if sent:
        assert sent.startswith(b"HTTP/1.1 ")
        assert not sent.startswith(b"HTTP/1.1 5"), sent[:200]


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "http": _serve,
    "chat": _parse_chat,
    "completion": _parse_completion,
    "messages": _parse_messages,
    "yaml": _parse_yaml,
    "safetensors": _read_safetensors,
    "adapter_config": _read_adapter_config,
    "metadata": _read_metadata,
    "jsonl": _read_rows("a.jsonl", DataConfig()),
    "json": _read_rows("a.json", DataConfig(rows="rows[]")),
    "csv": _read_rows("a.csv", DataConfig()),
    "parquet": _read_rows("a.parquet", DataConfig()),
    "gzip": _read_rows("a.jsonl.gz", DataConfig()),
    "zstd": _read_rows("a.csv.zst", DataConfig()),
    "xlsx": _read_rows("a.xlsx", DataConfig()),
    "xlsx_sheet": _read_sheet_xml,
    "sheet": _read_table,
    "jmespath": _search,
    "jinja": _render,
    "public_key": _trust,
    "allowed_signers": _read_signers,
    "signature": _verify,
}
SEEDS = {name: [file.read_bytes() for file in sorted((CORPUS / name).iterdir())] for name in TARGETS}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One folder for all inputs: a folder for each would take longer than the parser."""
    with TemporaryDirectory() as name:
        yield Path(name)


def _try(target: str, content: bytes, folder: Path) -> None:
    try:
        TARGETS[target](content, folder)
    except UserError as error:
        assert error.what


def _edits(seeds: list[bytes]) -> st.SearchStrategy[Any]:
    pieces = sorted({piece for seed in seeds for piece in seed.replace(b"\n", b" ").split(b" ") if 0 < len(piece) < 40})
    odd = [
        b"\x00",
        b"\n",
        b"\r\n",
        b"\x00" * 8,
        b"9" * 30,
        b"\xed\xa0\x80",
        b"\xff\xff\xff\xff",
        "\u0300".encode() * 40,
    ]
    odd += [b"\xff", *b"\" \\ { } [ ] : , -1 0 1e999 NaN {{ }} ' * @".split()]
    piece = st.sampled_from([*pieces, *odd]) | st.binary(max_size=4)
    share = st.floats(0, 1, exclude_max=True)
    return st.lists(st.tuples(st.sampled_from("iirdcx"), share, share, piece), min_size=1, max_size=6)


def _edited(content: bytes, edits: list[tuple[str, float, float, bytes]]) -> bytes:
    for kind, start, share, piece in edits:
        at = int(start * (len(content) + 1))
        end = at + int(share * share * share * (len(content) - at + 1))  # short ranges are the more frequent ones
        content = {
            "i": content[:at] + piece + content[at:],
            "r": content[:at] + piece + content[at + len(piece) :],
            "d": content[:at] + content[end:],
            "c": content[:end] + content[at:end] + content[end:],
            "x": content[:at] + bytes(byte ^ 1 << (at % 8) for byte in content[at : at + 1]) + content[at + 1 :],
        }[kind]
    return content[: 1 << 16]


@pytest.mark.parametrize("target", TARGETS)
def test_parser_reads_or_refuses_its_corpus(target: str, folder: Path) -> None:
    assert SEEDS[target]
    for content in SEEDS[target]:
        _try(target, content, folder)


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.data())
def test_parser_reads_or_refuses_changed_seeds(target: str, data: st.DataObject, folder: Path) -> None:
    seeds = SEEDS[target]
    _try(target, _edited(data.draw(st.sampled_from(seeds)), data.draw(_edits(seeds))), folder)
