"""Files that are not part of an adapter; links, devices, pipes."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
from pathlib import Path

from adapter_helpers import lora_config, write_adapter
from hostile.corpus import Payload, hostile
from tunewright.adapters.registry import WEIGHTS


@hostile("A pickle can run code")
def weights_as_a_pickle(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))
    return folder


@hostile("A pickle can run code")
def a_pickle_beside_good_weights(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Payload()))
    return folder


@hostile("The header claims .* bytes")
def a_pickle_that_is_called_safetensors(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).write_bytes(pickle.dumps(Payload()) + bytes(64))
    return folder


@hostile("An adapter must not contain code")
def code_beside_it(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "modeling_evil.py").write_text("import os")
    return folder


@hostile("This file is not part of an adapter")
def a_tokenizer_beside_it(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "evil.py"}}')
    return folder


@hostile("All weights must be in")
def weights_in_shards(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "adapter_model-00002-of-00002.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    return folder


@hostile("This folder is not part of an adapter")
def a_folder_within(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    write_adapter(folder / "default")
    return folder


@hostile("non-ASCII characters")
def a_name_with_a_homoglyph(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "аdapter_config.json").write_text("{}")  # its first letter is Cyrillic
    return folder


@hostile("non-ASCII characters")
def a_name_written_from_right_to_left(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "README‮dm.nib").write_text("")
    return folder


@hostile("The name has control characters")
def a_name_that_moves_the_cursor(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "\x1b[2Jadapter_config.json").write_text("{}")
    return folder


@hostile("More than 64 files and folders")
def a_folder_of_very_many_files(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    for number in range(100):
        (folder / f"adapter_config.json.{number}").touch()
    return folder


@hostile(f"Not an adapter: {WEIGHTS} missing")
def no_weights(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).unlink()
    return folder


@hostile("larger than 1 MB")
def a_configuration_of_two_megabytes(at: Path) -> Path:
    return write_adapter(at / "evil", lora_config(base_model_name_or_path="x" * (2 << 20)))


# Links, devices, pipes


@hostile("a symbolic link, not a plain file")
def weights_that_are_a_link(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).rename(at / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(at / "elsewhere.safetensors")
    return folder


@hostile("a symbolic link, not a plain file")
def a_readme_that_leads_to_a_secret(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / "README.md").symlink_to("/etc/passwd")
    return folder


@hostile("a symbolic link, not a plain file")
def checkpoints_that_lead_elsewhere(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    write_adapter(at / "elsewhere" / "step-1")
    (folder / "checkpoints").symlink_to(at / "elsewhere")
    return folder


@hostile("a hard link")
def weights_that_are_a_hard_link(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    os.link(folder / WEIGHTS, at / "the-other-name")
    return folder


@hostile("a pipe, not a plain file")
def weights_that_are_a_pipe(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    return folder


@hostile("archives are not imported")
def an_adapter_in_a_zip(at: Path) -> Path:
    return Path(shutil.make_archive(str(at / "evil"), "zip", write_adapter(at / "good")))


@hostile("archives are not imported")
def an_adapter_in_a_compressed_tar(at: Path) -> Path:
    return Path(shutil.make_archive(str(at / "evil"), "gztar", write_adapter(at / "good")))


@hostile("Not a folder")
def an_archive_that_is_a_pipe(at: Path) -> Path:
    os.mkfifo(at / "evil.tar")
    return at / "evil.tar"


@hostile("Not a folder")
def an_archive_that_is_an_endless_device(at: Path) -> Path:
    return Path("/dev/zero")


@hostile("a socket, not a plain file")
def weights_that_are_a_socket(at: Path) -> Path:
    folder = write_adapter(at / "evil")
    (folder / WEIGHTS).unlink()
    place = Path.cwd()
    os.chdir(folder)  # a socket's path may have 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(WEIGHTS)
    finally:
        os.chdir(place)
    return folder
