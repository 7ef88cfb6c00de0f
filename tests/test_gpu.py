"""tests/gpu.py where there is no GPU, at toy sizes: results, failures and their reasons."""
import json
import sys

import pytest

import gpu


def call(monkeypatch, out, *flags):
    """Exit status and gpu.json of `python tests/gpu.py flags`; only its sections are processes of their own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu, "CUDA", False)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["tests/gpu.py", "--out", str(out), *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    return end.value.code, json.loads((out / "gpu.json").read_text())


def test_a_section_is_measured_and_saved(monkeypatch, tmp_path, capsys):
    (tmp_path / "gpu.json").write_text('{"kernels": {"status": "passed"}}')
    status, results = call(monkeypatch, tmp_path, "--only", "iteration")
    assert status == 0 and list(results) == ["kernels", "iteration"] and "iteration: passed" in capsys.readouterr().out
    section = results["iteration"]
    assert {"machine", "versions", "commit", "date", "command", "seconds"} <= section.keys() and section["reason"] == ""
    rows = {row.pop("name"): row for row in section["rows"]}
    assert rows["ceilings"]["copy_GB_per_s"] > 0
    for script in ("ppo_reft.py", "prl.py"):
        for shape in ("toy Llama", "toy Qwen"):
            row = rows[f"{shape}, {script}"]
            phases = [row[f"{phase}_s"] for phase in ("generate", "check", "score", "update")]
            assert min(phases) > 0 and row["seconds"] / 2 < sum(phases) <= row["seconds"]
            assert 0 < row["MFU"] < 1


def test_what_fails_or_takes_too_long_is_named_and_the_next_goes_on(monkeypatch, tmp_path):
    files = [word for flag in ("model", "train-data", "eval-data") for word in (f"--{flag}", tmp_path / "none")]
    status, results = call(monkeypatch, tmp_path, "--only", "train", *files)
    assert status == 1 and "none" in results["train"]["reason"] and results["train"]["status"] == "failed"
    assert results["train"]["reason"].split(": ", 1)[1] in (tmp_path / "train.log").read_text()
    status, results = call(monkeypatch, tmp_path, "--minutes", "0", "--only", "defaults,kernels")
    assert status == 1 and {"train", "defaults", "kernels"} == results.keys()
    assert results["kernels"]["reason"] == "over its budget of 0 s"


def test_unknown_sections_are_refused(monkeypatch, tmp_path, capsys):
    """Sections that do not exist are refused before anything is written."""
    monkeypatch.setattr(sys, "argv", ["tests/gpu.py", "--out", str(tmp_path / "out"), "--only", "generate,speed"])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2 and "speed" in capsys.readouterr().err and not (tmp_path / "out").exists()
