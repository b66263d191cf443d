"""The overhead benchmark with seconds of load, so that it cannot rot: it runs, records everything, writes its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.__main__ import main
from tests.bench.reward import PAIRS_FILE
from tests.bench.storm import KINDS


@pytest.mark.slow
def test_the_stubbed_part_runs_and_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overhead", "--quick", "--output", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "overhead.json").read_text())
    figures = document["figures"]
    assert figures["stub_failed_requests"] == 0
    assert figures["stub_answered"] > 0
    assert figures["stub_recorded"] == figures["stub_answered"]
    assert figures["stub_lost"] == 0
    assert {series["kind"] for series in figures["stub"]} == {"plain", "stream"}
    assert [bar["bar"] for bar in document["bars"]] == [0.3, 1.0, 0.3, 1.0]
    assert (tmp_path / "overhead.png").stat().st_size > 10_000
    assert "bars met" in capsys.readouterr().out


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(SystemExit):
        main(["overhaed"])


@pytest.mark.slow
@pytest.mark.e2e
def test_a_small_swap_storm_on_a_real_server_harms_no_answer(tmp_path: Path) -> None:
    assert main(["swap", "--quick", "--output", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "swap.json").read_text())["figures"]
    assert figures["num_operations"] >= 40
    assert figures["answers"] > 100
    assert figures["pairs_of_a_user"] > 50
    wrong = {kind: figures[kind] for kind in (*KINDS, "leaked_slots", "engine_deaths")}
    assert wrong == dict.fromkeys(wrong, 0), figures["examples"]


@pytest.mark.slow
def test_a_small_reward_benchmark_trains_on_thumbs_and_on_the_real_pairs(tmp_path: Path) -> None:
    assert main(["reward", "--quick", "--output", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "reward.json").read_text())["figures"]
    assert 0 <= figures["thumbs, polite"]["figures"]["auroc"] <= 1
    if not PAIRS_FILE.is_file():
        pytest.skip(f"{PAIRS_FILE} is not there: set SCION_SHARED")
    assert figures["real pairs"]["figures"]["pairs"] == figures["real pairs"]["heldout"] > 0


@pytest.mark.slow
def test_a_good_candidate_passes_all_gates_and_each_spoiled_one_meets_its_own(tmp_path: Path) -> None:
    assert main(["gates", "--quick", "--output", str(tmp_path)]) == 0
    kinds = json.loads((tmp_path / "gates.json").read_text())["figures"]["kinds"]
    assert set(kinds) == {"good", "artifact", "kl", "parity", "baseline"}
    assert {kind: found["as_expected"] for kind, found in kinds.items()} == dict.fromkeys(kinds, 1), kinds


@pytest.mark.slow
@pytest.mark.e2e
def test_rollouts_beside_users_fail_nobody(tmp_path: Path) -> None:
    assert main(["rollouts", "--quick", "--output", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "rollouts.json").read_text())["figures"]
    assert figures["failed"] == 0
    assert {name: found["num_answers"] > 0 for name, found in figures["sampled"].items()} == {
        "beside rollouts": True,
        "beside unbridled rollouts": True,
    }
    assert figures["alone"]["p50_ms"] > 0


@pytest.mark.slow
def test_the_gpu_benchmark_trains_a_small_model_on_both_sides_without_a_gpu(tmp_path: Path) -> None:
    assert main(["gpu", "--quick", "--output", str(tmp_path)]) == 0
    trained = json.loads((tmp_path / "gpu.json").read_text())["figures"]["trained"]
    assert [(one["recipe"], one["side"], one["why"]) for one in trained] == [
        ("kto", "ours", ""),
        ("kto", "TRL", ""),
        ("ppo", "ours", ""),
    ]
    assert all(one["record"]["device_peak_bytes"] > 0 for one in trained)
    assert all(one["record"]["tokens_per_s"] > 0 for one in trained)
