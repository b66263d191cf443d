"""The artifact gate, fault by fault: each of these was accepted by a server, or would have been served wrongly."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scion_adapters.errors import RejectedError
from scion_adapters.fingerprint import BaseInfo, read_base
from scion_adapters.preflight import AdapterLimits, check_adapter
from scion_adapters.sections.serving import LORA_TARGETS
from tests.helpers.adapters import LIMITS, Tensors, make_adapter, make_base, peft_config
from tests.helpers.faults import BAD_NAMES, FAULTS
from tests.helpers.serving import REPOSITORY

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
DOWN1 = "base_model.model.model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseInfo:
    return read_base(make_base(tmp_path_factory.mktemp("preflight") / "base"))


def reason_of(directory: Path, base: BaseInfo, limits: AdapterLimits = LIMITS) -> str:
    with pytest.raises(RejectedError) as caught:
        check_adapter(directory, base, limits)
    assert len(str(caught.value)) > 20, "a refusal explains itself"
    return caught.value.reason


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_good_adapter_passes(tmp_path: Path, base: BaseInfo, dtype: str) -> None:
    directory = make_adapter(tmp_path / "good", base, dtype=dtype, scion={"base_fingerprint": base.fingerprint})
    info = check_adapter(directory, base, LIMITS)
    assert (info.rank, info.alpha) == (4, 8.0)
    assert len(info.modules) == 14
    assert info.num_parameters == sum(4 * sum(base.modules[module]) for module in info.modules)
    assert info.size_bytes == sum(file.stat().st_size for file in directory.iterdir())


# configurations that are unusual and served correctly
SERVED = [
    {"use_rslora": True},  # another scale
    {"init_lora_weights": "gaussian"},  # only where training began
    {"task_type": None},  # PEFT's default
    {"lora_dropout": 0.1, "peft_version": "9.9"},  # nothing that is computed
    {"alpha_pattern": {"q_proj": 4.5}},  # another scale for one module
    {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 4}},  # PEFT writes the anchor itself
    {"target_modules": "all-linear"},  # says nothing about which modules to expect
    {"some_field_of_tomorrow": None},  # unknown, and unset
]


@pytest.mark.parametrize("config", SERVED)
def test_configurations_that_pass(tmp_path: Path, base: BaseInfo, config: dict[str, Any]) -> None:
    check_adapter(make_adapter(tmp_path / "good", base, config=config), base, LIMITS)


# a field of adapter_config.json, a value
UNSUPPORTED = [
    ("peft_type", "LOHA"),  # another kind of adapter
    ("peft_type", None),  # no kind at all
    ("task_type", "SEQ_CLS"),  # has a classifier beside the LoRA
    ("use_dora", True),  # magnitudes are not served
    ("bias", "all"),  # biases are not served
    ("bias", "lora_only"),  # nor these
    ("bias", None),  # the server refuses it
    ("lora_bias", True),  # nor these
    ("modules_to_save", ["lm_head"]),  # whole layers are not served
    ("trainable_token_indices", [1, 2]),  # embeddings are not served
    ("target_parameters", ["mlp.experts"]),  # not modules
    ("init_lora_weights", "pissa"),  # changed the base
    ("init_lora_weights", "pissa_niter_16"),  # its fast form
    ("init_lora_weights", "olora"),  # changed the base
    ("init_lora_weights", "loftq"),  # changed the base
    ("init_lora_weights", "corda"),  # changed the base
    ("init_lora_weights", ["gaussian"]),  # not a value of PEFT's
    ("fan_in_fan_out", True),  # transposed weights
    ("layer_replication", [[0, 2]]),  # a deeper model
    ("alora_invocation_tokens", [5]),  # on for some tokens only
    ("use_qalora", True),  # pooled inputs
    ("arrow_config", {"top_k": 2}),  # a router over adapters
    ("some_field_of_tomorrow", True),  # nobody knows what it does, so nobody would do it
    ("r", 0),  # no rank
    ("r", "4"),  # not a number
    ("r", True),  # Python takes True for 1
    ("lora_alpha", None),  # no scale
    ("lora_alpha", "8"),  # not a number
    ("use_rslora", "yes"),  # not a truth value
    ("target_modules", None),  # nothing
    ("target_modules", []),  # nothing
    ("rank_pattern", {"(a+)+$": 4}),  # a regular expression that never ends
    ("rank_pattern", {"q_proj": 0}),  # no rank
    ("rank_pattern", [4]),  # not a mapping
    ("alpha_pattern", {"q_proj": None}),  # no scale
    ("alpha_pattern", {f"q{i}": 4 for i in range(1025)}),  # each is compared with each module
]


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED)
def test_configurations_that_are_refused(tmp_path: Path, base: BaseInfo, field: str, value: Any) -> None:
    directory = make_adapter(tmp_path / "bad", base, config={field: value})
    with pytest.raises(RejectedError, match=field) as caught:
        check_adapter(directory, base, LIMITS)
    assert caught.value.reason == "unsupported_config"


def test_what_a_stranger_wrote_is_quoted_so_that_any_database_and_answer_can_hold_it(
    tmp_path: Path, base: BaseInfo
) -> None:
    name = "\0\ud800\u202e" + "x" * 1000
    for changes in (
        {"config": {name: True}},
        {"config": {"init_lora_weights": name}},
        {"scion": {"base_fingerprint": name}},
        {"scion": {"base_quantization": name}},
        {"edit": rename(f"{Q0}.lora_A.weight", name)},
        {"edit": rename(f"{Q0}.lora_A.weight", f"base_model.model.{name}.lora_A.weight")},
    ):
        with pytest.raises(RejectedError) as caught:
            check_adapter(make_adapter(tmp_path / "bad", base, **changes), nf4(base), LIMITS)
        assert str(caught.value).isascii()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500
        (tmp_path / "bad" / "scion.json").unlink(missing_ok=True)


def nf4(base: BaseInfo) -> BaseInfo:
    return dataclasses.replace(base, quantization="nf4")


def poison(key: str, value: float) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[key][-1, -1] = value

    return edit


def replace(key: str, shape: tuple[int, ...]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[key] = np.ones(shape, np.float32)

    return edit


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return edit


def drop(*fragments: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for key in [key for key in tensors if any(fragment in key for fragment in fragments)]:
            del tensors[key]

    return edit


def add_pair(module: str, in_features: int, out_features: int) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[f"{module}.lora_A.weight"] = np.ones((4, in_features), np.float32)
        tensors[f"{module}.lora_B.weight"] = np.ones((out_features, 4), np.float32)

    return edit


# what is done to the tensors, and the reason of the refusal
DAMAGED: list[tuple[Callable[[Tensors], None], str]] = [
    (poison(f"{Q0}.lora_A.weight", np.nan), "non_finite"),  # makes other tenants' answers NaN
    (poison(f"{DOWN1}.lora_B.weight", np.inf), "non_finite"),  # the same, in the last value of the last layer
    (poison(f"{Q0}.lora_B.weight", -np.inf), "non_finite"),  # the same, negative
    (poison(f"{Q0}.lora_A.weight", 1e30), "out_of_range"),  # finite, and NaN after two products
    (poison(f"{Q0}.lora_B.weight", 900.0), "out_of_range"),  # 900 times the scale alpha / r = 2
    (rename(f"{Q0}.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_A.weight"), "unmatched_keys"),  # no prefix
    (rename(f"{Q0}.lora_A.weight", f"{Q0}.lora_A.default.weight"), "unmatched_keys"),  # saved from the wrong level
    (rename(f"{Q0}.lora_A.weight", f"{Q0}.lora_magnitude_vector"), "unmatched_keys"),  # DoRA's
    (rename(f"{Q0}.lora_A.weight", f"{Q0}.lora_embedding_A"), "unmatched_keys"),  # an embedding's
    (add_pair("base_model.model.model.layers.2.self_attn.q_proj", 16, 16), "unmatched_keys"),  # a deeper model's
    (add_pair("base_model.model.", 16, 16), "unmatched_keys"),  # a pair without a module
    (add_pair("base_model.model.model.embed_tokens", 32, 16), "unmatched_keys"),  # not a linear layer
    (drop(f"{Q0}.lora_B"), "unmatched_keys"),  # half a pair
    (drop("layers.1."), "missing_keys"),  # a shallower model's: every key matches
    (drop("layers.1.mlp.down_proj"), "missing_keys"),  # cut off at the end
    (drop("."), "empty"),  # a file without tensors
    (replace(f"{Q0}.lora_A.weight", (4, 8)), "wrong_shape"),  # a smaller model's: vLLM would pad it with zeros
    (replace(f"{Q0}.lora_B.weight", (8, 4)), "wrong_shape"),  # also on the output side
    (replace(f"{Q0}.lora_A.weight", (16, 4)), "wrong_shape"),  # transposed
    (replace(f"{Q0}.lora_A.weight", (64,)), "wrong_shape"),  # flat
    (replace(f"{Q0}.lora_A.weight", (8, 16)), "rank_mismatch"),  # r in the configuration is not the tensors'
    (replace(f"{Q0}.lora_B.weight", (16, 2)), "rank_mismatch"),  # the halves do not fit each other
]


@pytest.mark.parametrize(("edit", "reason"), DAMAGED)
def test_damaged_tensors_are_refused(
    tmp_path: Path, base: BaseInfo, edit: Callable[[Tensors], None], reason: str
) -> None:
    assert reason_of(make_adapter(tmp_path / "bad", base, edit=edit), base) == reason


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_non_finite_values_are_found_in_every_dtype(tmp_path: Path, base: BaseInfo, dtype: str, value: float) -> None:
    bad = make_adapter(tmp_path / "bad", base, dtype=dtype, edit=poison(f"{DOWN1}.lora_B.weight", value))
    assert reason_of(bad, base) == "non_finite"


def test_a_rank_above_the_servers_limit_is_refused(tmp_path: Path, base: BaseInfo) -> None:
    limits = AdapterLimits(max_rank=8, target_modules=LORA_TARGETS)
    check_adapter(make_adapter(tmp_path / "eight", base, rank=8), base, limits)
    assert reason_of(make_adapter(tmp_path / "nine", base, rank=9), base, limits) == "rank_too_high"


def test_ranks_by_pattern_are_compared_with_the_tensors(tmp_path: Path, base: BaseInfo) -> None:
    def widen(tensors: Tensors) -> None:
        tensors[f"{Q0}.lora_A.weight"] = np.ones((6, 16), np.float32)
        tensors[f"{Q0}.lora_B.weight"] = np.ones((16, 6), np.float32)

    pattern = {"layers.0.self_attn.q_proj": 6}
    info = check_adapter(
        make_adapter(tmp_path / "good", base, edit=widen, config={"rank_pattern": pattern}), base, LIMITS
    )
    assert info.rank == 6
    pattern = {"q_proj": 6}  # says it of both layers
    assert (
        reason_of(make_adapter(tmp_path / "bad", base, edit=widen, config={"rank_pattern": pattern}), base)
        == "rank_mismatch"
    )


def test_a_module_that_the_server_does_not_offer_is_refused(tmp_path: Path, base: BaseInfo) -> None:
    limits = AdapterLimits(max_rank=16, target_modules=("q_proj", "v_proj"))
    check_adapter(make_adapter(tmp_path / "good", base, targets=("q_proj", "v_proj")), base, limits)
    assert reason_of(make_adapter(tmp_path / "bad", base), base, limits) == "target_not_allowed"


def test_tensors_that_the_trainer_would_ignore_are_refused(tmp_path: Path, base: BaseInfo) -> None:
    bad = make_adapter(tmp_path / "bad", base, config={"target_modules": ["q_proj", "k_proj"]})
    assert reason_of(bad, base) == "unmatched_keys"


@pytest.mark.parametrize(
    "other",
    [
        {"hidden": 32},  # a wider model
        {"layers": 1},  # a shallower one
        {"layers": 3},  # a deeper one
        {"intermediate": 32},  # only the feed-forward layers differ
    ],
)
def test_another_models_adapter_is_refused(tmp_path: Path, base: BaseInfo, other: dict[str, int]) -> None:
    bad = make_adapter(tmp_path / "bad", make_base(tmp_path / "other", **other))
    assert reason_of(bad, base) in {"wrong_shape", "unmatched_keys", "missing_keys"}


def test_the_fingerprint_tells_bases_of_one_shape_apart(tmp_path: Path, base: BaseInfo) -> None:
    other = read_base(make_base(tmp_path / "other", seed=1))
    assert other.modules == base.modules
    bad = make_adapter(tmp_path / "bad", base, scion={"base_fingerprint": other.fingerprint})
    assert reason_of(bad, base) == "wrong_base"
    check_adapter(bad, other, LIMITS)


def test_an_adapter_trained_on_another_quantization_of_the_base_is_refused(tmp_path: Path, base: BaseInfo) -> None:
    directory = make_adapter(tmp_path / "bad", base, scion={"base_quantization": "none"})
    assert reason_of(directory, nf4(base)) == "wrong_quantization"
    check_adapter(directory, dataclasses.replace(base, quantization="none"), LIMITS)


def test_a_rank_for_modules_that_are_not_there_counts_as_the_server_counts_it(tmp_path: Path, base: BaseInfo) -> None:
    bad = make_adapter(tmp_path / "bad", base, config={"rank_pattern": {"no_such_module": 17}})
    assert reason_of(bad, base) == "rank_too_high"


def test_the_dot_of_a_pattern_is_any_character_as_for_the_server(tmp_path: Path, base: BaseInfo) -> None:
    bad = make_adapter(tmp_path / "bad", base, config={"alpha_pattern": {"q.proj": 1e30}})
    assert reason_of(bad, base) == "out_of_range"


def write_config(content: str | bytes) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def link_weights(directory: Path) -> None:
    weights = directory / "adapter_model.safetensors"
    weights.rename(directory.parent / "elsewhere")
    weights.symlink_to(directory.parent / "elsewhere")


def pickle_only(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def truncate(directory: Path) -> None:
    weights = directory / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)


# what is done to the directory, and the reason of the refusal
FILES: list[tuple[Callable[[Path], object], str]] = [
    (link_weights, "symlink"),  # could point anywhere, and change later
    (pickle_only, "not_safetensors"),  # unpickling runs code
    (lambda d: (d / "optimizer.pt").touch(), "not_safetensors"),  # also beside good weights
    (lambda d: (d / "run.py").touch(), "foreign_file"),  # nobody knows what for
    (lambda d: (d / "reference").mkdir(), "foreign_file"),  # PEFT's second adapter
    (lambda d: (d / "manifest.json").touch(), "foreign_file"),  # the store's own name
    (lambda d: (d / "adapter_model.safetensors").unlink(), "empty"),  # no weights
    (lambda d: (d / "adapter_config.json").unlink(), "unreadable"),  # no configuration
    (truncate, "truncated"),  # a copy that was cut off
    (write_config("{"), "unreadable"),  # no JSON
    (write_config(b"\xff\xff"), "unreadable"),  # no text
    (write_config("[1]"), "unreadable"),  # no object
    (write_config(json.dumps(peft_config()).encode("utf-16")), "unreadable"),  # JSON, and not to the server
    (write_config(""), "empty"),  # a file of no bytes
    (lambda d: os.truncate(d / "adapter_model.safetensors", 0), "empty"),  # the same of weights
    (lambda d: (d / "scion.json").touch(), "empty"),  # the same of ours
    (write_config(json.dumps({**peft_config(), "lora_alpha": float("nan")})), "unreadable"),  # Python's JSON allows NaN
    (write_config('{"r": ' + "9" * 5000 + "}"), "unreadable"),  # a number that takes forever
    (write_config(json.dumps({"peft_type": "LORA", "x": "y" * (1 << 20)})), "unreadable"),  # a configuration of 1 MiB
    (write_config('{"r": ' + "[" * 100_000), "unreadable"),  # nested beyond the parser's stack
    (lambda d: (d / "scion.json").write_text("no"), "unreadable"),  # our own file, damaged
]


@pytest.mark.parametrize(("change", "reason"), FILES)
def test_directories_that_are_refused(
    tmp_path: Path, base: BaseInfo, change: Callable[[Path], object], reason: str
) -> None:
    directory = make_adapter(tmp_path / "bad", base)
    change(directory)
    assert reason_of(directory, base) == reason


def test_a_linked_directory_is_refused(tmp_path: Path, base: BaseInfo) -> None:
    make_adapter(tmp_path / "real", base)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert reason_of(tmp_path / "link", base) == "symlink"


def test_what_is_no_directory_is_refused(tmp_path: Path, base: BaseInfo) -> None:
    assert reason_of(tmp_path / "nowhere", base) == "unreadable"


def test_the_readme_that_peft_writes_is_left_out(tmp_path: Path, base: BaseInfo) -> None:
    directory = make_adapter(tmp_path / "good", base)
    (directory / "README.md").write_text("model card")
    check_adapter(directory, base, LIMITS)


def test_weights_of_zero_are_allowed(tmp_path: Path, base: BaseInfo) -> None:
    def clear(tensors: Tensors) -> None:
        for array in tensors.values():
            array[:] = 0

    check_adapter(make_adapter(tmp_path / "good", base, edit=clear), base, LIMITS)


def test_the_guide_explains_every_reason() -> None:
    guide = (REPOSITORY / "docs" / "guide.md").read_text(encoding="utf-8")
    reasons = {fault.reason for fault in FAULTS} | {reason for _, reason in BAD_NAMES}
    assert {reason for reason in reasons if f"`{reason}`" not in guide} == set()
