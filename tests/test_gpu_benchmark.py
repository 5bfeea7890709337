# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`benchmarks/gpu.py` with tiny models on a CPU: rows that run, a row that fails, and resuming."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.composition import tower_folder  # noqa: F401 - a fixture
from helpers.photo_parts import parts  # noqa: F401 - a fixture


ROOT = Path(__file__).parents[1]
# All rows take minutes, most of them to start their processes
ROWS = ("loss_iv", "step_iii", "generation")


def run(output: Path, *options: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        str(ROOT / "benchmarks/gpu.py"),
        "--output",
        str(output),
        "--threads",
        "1",
        "--minutes",
        "60",
        *options,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=2400)


def records(output: Path) -> dict:
    return json.loads((output / "gpu.json").read_text())


@pytest.fixture
def broken_data(parts) -> Iterator[Path]:  # noqa: F811
    """Return the file of rows that `step_iii` reads, with invalid contents during a test."""
    path = parts / "data/llava_pretrain_2k/chat.json"
    contents = path.read_bytes()
    path.write_text("no JSON")
    yield path
    path.write_bytes(contents)


@pytest.mark.slow
def test_rows_run_fail_and_resume(parts, broken_data, tmp_path):  # noqa: F811
    options = ("--shape", "tiny", "--device", "cpu", "--parts", str(parts), "--decoder", str(parts / "decoder"))
    early = run(tmp_path, *options, "--only", *ROWS, "--minutes", "0.001")
    assert early.returncode == 0 and early.stdout.count("not run") == len(ROWS)
    assert not (tmp_path / "rows").exists()

    done = run(tmp_path, *options, "--only", *ROWS)
    assert done.returncode == 1, done.stdout + done.stderr
    found = records(tmp_path)
    assert list(found) == [line.split()[0] for line in run(tmp_path, "--list").stdout.splitlines()]
    states = {name: record["status"] for name, record in found.items()}
    assert states == dict.fromkeys(found, "not run") | {
        "loss_iv": "done",
        "step_iii": "failed",
        "generation": "done",  # a row after the one that failed
    }
    assert found["step_iv"] == {"status": "not run", "error": "not in --only"}
    assert "JSONDecodeError" in found["step_iii"]["error"]

    losses = found["loss_iv"]["results"]
    assert {"ours", "masked, plain autograd", "released formulation", "matrix products alone"} <= set(losses)
    assert max(losses["ours"]["errors"].values()) < 1e-5
    assert any("Liger" in note for note in found["loss_iv"]["notes"])
    assert set(found["generation"]["results"]) == {"1", "16"}
    tables = (tmp_path / "gpu.md").read_text()
    assert all(record["table"] in tables for record in found.values() if record["status"] == "done")
    assert "**failed**" in tables

    # Rows that are done stay; the failed row would be measured again, but its data does not exist
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    broken_data.unlink()
    again = run(tmp_path, *options, "--only", *ROWS)
    assert again.returncode == 0 and again.stdout.count(" earlier") == 2
    assert "step_iii: skipped" in again.stdout and "chat.json does not exist; set --parts" in again.stdout
    for name in ("loss_iv", "generation"):
        path = tmp_path / "rows" / f"{name}.json"
        assert path.stat().st_mtime_ns == times[path] and records(tmp_path)[name] == found[name]
    other = run(tmp_path, *options, "--threads", "2", "--only", "loss_iv")
    assert other.returncode == 1 and "was measured with --threads 1" in other.stderr


def test_a_missing_decoder_is_named(parts, tmp_path):  # noqa: F811
    options = ("--shape", "tiny", "--device", "cpu", "--parts", str(parts), "--decoder", str(tmp_path / "absent"))
    absent = run(tmp_path, *options, "--only", "real_qlora")
    assert absent.returncode == 0 and "absent does not exist; set --decoder" in absent.stdout
