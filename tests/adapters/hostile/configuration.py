"""The configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapter_helpers import lora_config, write_adapter
from hostile.corpus import hostile
from tunewright.adapters.registry import CONFIG


def _config(at: Path, **changes: Any) -> Path:
    return write_adapter(at / "evil", lora_config(**changes))


def _raw_config(at: Path, text: bytes) -> Path:
    folder = write_adapter(at / "evil")
    (folder / CONFIG).write_bytes(text)
    return folder


@hostile("auto_mapping: This key names a class to import")
def a_configuration_that_imports_a_class(at: Path) -> Path:
    return _config(at, auto_mapping={"base_model_class": "Evil", "parent_library": "os"})


@hostile("megatron_core: This key names a module to import")
def a_configuration_that_imports_a_module(at: Path) -> Path:
    return _config(at, megatron_core="antigravity")


@hostile("megatron_config: This key is for layers of Megatron")
def a_configuration_for_megatron(at: Path) -> Path:
    return _config(at, megatron_config={"tensor_model_parallel_size": 1})


@hostile("layer_replication: This key replicates layers")
def a_configuration_that_replicates_layers(at: Path) -> Path:
    return _config(at, layer_replication=[[0, 100_000]])


@hostile("use_dora: This key is DoRA")
def a_configuration_of_dora(at: Path) -> Path:
    return _config(at, use_dora=True)


@hostile("bias: This key adds trained biases")
def a_configuration_with_biases(at: Path) -> Path:
    return _config(at, bias="all")


@hostile("modules_to_save: This key adds complete layers")
def a_configuration_with_whole_layers(at: Path) -> Path:
    return _config(at, modules_to_save=["lm_head"])


@hostile("trainable_token_indices: This key adds token embeddings")
def a_configuration_with_tokens_of_its_own(at: Path) -> Path:
    return _config(at, trainable_token_indices=[1, 2])


@hostile("target_modules: Expected a list of linear layers")
def a_regular_expression_that_never_ends(at: Path) -> Path:
    return _config(at, target_modules="(a+)+$")


@hostile("target_modules: Expected a list of linear layers")
def a_target_that_no_llama_has(at: Path) -> Path:
    return _config(at, target_modules=["q_proj", "embed_tokens"])


@hostile("rank_pattern: Expected a map from linear layers' names")
def a_pattern_of_ranks_that_never_ends(at: Path) -> Path:
    return _config(at, rank_pattern={"(.*)*q_proj": 4})


@hostile("The key 'trust_remote_code' is not allowed")
def a_key_that_asks_for_trust(at: Path) -> Path:
    return _config(at, trust_remote_code=True)


@hostile("peft_type: Expected LORA")
def another_kind_of_adapter(at: Path) -> Path:
    return _config(at, peft_type="PREFIX_TUNING")


@hostile("init_lora_weights: Expected true, false or gaussian")
def a_start_that_changes_the_base(at: Path) -> Path:
    return _config(at, init_lora_weights="pissa")


@hostile("layers_to_transform: Layer 99")
def a_layer_that_the_base_does_not_have(at: Path) -> Path:
    return _config(at, layers_to_transform=[0, 99])


@hostile('duplicate key "r"')
def a_key_given_twice(at: Path) -> Path:
    return _raw_config(at, json.dumps(lora_config())[:-1].encode() + b', "r": 512}')


@hostile("NaN is not JSON")
def a_number_that_json_does_not_have(at: Path) -> Path:
    return _raw_config(at, json.dumps(lora_config(lora_alpha=float("nan"))).encode())


@hostile("Nested more than 32 levels")
def a_configuration_nested_too_deep(at: Path) -> Path:
    return _raw_config(at, b'{"r":' * 100_000 + b"1" + b"}" * 100_000)


@hostile("Expected a JSON object")
def a_configuration_that_is_a_list(at: Path) -> Path:
    return _raw_config(at, b"[]")


@hostile("Not strict JSON")
def a_number_of_a_million_digits(at: Path) -> Path:
    return _raw_config(at, b'{"r": ' + b"9" * 1_000_000 + b"}")


@hostile("lora_alpha: ")
def true_where_a_number_is_wanted(at: Path) -> Path:
    return _config(at, lora_alpha=True)
