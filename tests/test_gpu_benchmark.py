# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`benchmarks/gpu.py` with tiny models on a CPU: two rows, resuming, and a row that fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.composition import tower_folder  # noqa: F401 - a fixture
from helpers.photo_parts import parts  # noqa: F401 - a fixture


ROOT = Path(__file__).parents[1]
# All rows take minutes, most of them to start their processes
ROWS = ("loss_iv", "generation")


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


@pytest.mark.slow
def test_rows_run_and_resume(parts, tmp_path):  # noqa: F811
    options = ("--shape", "tiny", "--device", "cpu", "--parts", str(parts), "--decoder", str(parts / "decoder"))
    options += ("--only", *ROWS)
    done = run(tmp_path, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    found = records(tmp_path)
    assert [name for name, record in found.items() if record["status"] == "done"] == [
        name for name in found if name in ROWS
    ]
    assert list(found) == [line.split()[0] for line in run(tmp_path, "--list").stdout.splitlines()]

    losses = found["loss_iv"]["results"]
    assert {"ours", "masked, plain autograd", "released formulation", "matrix products alone"} <= set(losses)
    assert max(losses["ours"]["errors"].values()) < 1e-5
    assert any("Liger" in note for note in found["loss_iv"]["notes"])
    assert set(found["generation"]["results"]) == {"1", "16"}
    tables = (tmp_path / "gpu.md").read_text()
    assert all(record["table"] in tables for record in found.values() if record["status"] == "done")

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    again = run(tmp_path, *options)
    assert again.returncode == 0 and again.stdout.count(" earlier") == len(times)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()} == times
    assert records(tmp_path) == found


@pytest.mark.slow
def test_a_failing_row_is_recorded_and_the_next_runs(parts, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    broken = tmp_path / "broken"
    broken.mkdir()
    options = ("--shape", "tiny", "--device", "cpu", "--parts", str(parts), "--decoder", str(broken))
    failed = run(tmp_path, *options, "--only", "real_qlora", "loss_iii", "batches", "--minutes", "0.001")
    assert failed.returncode == 0 and failed.stdout.count("not run") == 3
    assert not (tmp_path / "rows").exists()
    failed = run(tmp_path, *options, "--only", "real_qlora", "loss_iii")
    assert failed.returncode == 1
    found = records(tmp_path)
    assert found["real_qlora"]["status"] == "failed" and "broken" in found["real_qlora"]["error"]
    assert found["loss_iii"]["status"] == "done"
    assert found["step_iv"] == {"status": "not run", "error": "not in --only"}
    assert "**failed**" in (tmp_path / "gpu.md").read_text()

    absent = run(tmp_path, *options[:-1], str(tmp_path / "absent"), "--only", "real_qlora", "loss_iii")
    assert absent.returncode == 0 and "absent does not exist; set --decoder" in absent.stdout
    assert "loss_iii: done earlier" in absent.stdout
    other = run(tmp_path, *options, "--threads", "2", "--only", "loss_iii")
    assert other.returncode == 1 and "was measured with --threads 1" in other.stderr
