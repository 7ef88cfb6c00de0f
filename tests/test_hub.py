"""--model with a hub id, out of a cache in huggingface_hub's layout; what a script says it needs."""
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

import ppo_reft as reft
from model import InputError
from processes import ROOT, SCRIPTS
from test_scripts import GSM, read_log, refuse, run, write

FIXTURES = Path(__file__).parent / "fixtures"


def snapshot(repository, commit, source, without=()):
    """A snapshot of one commit as huggingface_hub keeps it: links to blobs."""
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.name not in without and file.name != "expected.safetensors":
            blob = repository / "blobs" / f"{source.name}-{file.name}"
            if not blob.exists():
                shutil.copyfile(file, blob)
            (folder / file.name).symlink_to(Path("../../blobs") / blob.name)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache with a model of three commits, of which the branch main is the second and v3 the third, and a half model."""
    for name, value in ("HF_HUB_OFFLINE", "1"), ("HF_HUB_CACHE", str(tmp_path / "hub")), ("HF_HOME", str(tmp_path)):
        monkeypatch.setenv(name, value)
    repository = tmp_path / "hub" / "models--someone--a-model"
    for commit, source in ("a" * 40, "llama"), ("b" * 40, "qwen2"), ("c" * 40, "llama3"):
        snapshot(repository, commit, FIXTURES / source)
    for ref, commit in ("main", "b" * 40), ("v3", "c" * 40):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    half = tmp_path / "hub" / "models--half"
    snapshot(half, "d" * 40, FIXTURES / "llama3", without=["model-00002-of-00004.safetensors"])
    (half / "refs").mkdir()
    (half / "refs" / "main").write_text("d" * 40)
    return tmp_path / "hub"


def train(out, model, data, *flags):
    return run("ppo_reft", out, "--model", model, "--train-data", data, "--eval-data", data, "--warmup-epochs", "1",
               "--warmup-batch-size", "16", "--iterations", "1", "--batch-size", "4", "--minibatch-size", "4",
               "--max-new-tokens", "4", "--eval-size", "2", "--device", "cpu", *flags, tiny=False)


@pytest.fixture
def data(tmp_path):
    """Few enough tokens for the fixtures' context of 64."""
    records = [{"question": f"{i}?", "answer": f"{i}\n#### {i}"} for i in range(len(GSM))]
    return write(tmp_path / "data.jsonl", records)


def test_a_hub_id_is_found_in_the_cache(hub, data, tmp_path):
    """The commit of the branch main, not the newest; another one by ID@REVISION; the folder's own files train the same."""
    for model, source in ("someone/a-model", "qwen2"), ("someone/a-model@v3", "llama3"), ("someone/a-model@" + "a" * 40, "llama"):
        name, plain = tmp_path / f"{source}-hub", tmp_path / source
        for out, given in (name, model), (plain, FIXTURES / source):
            result = train(out, given, data)
            assert result.returncode == 0, result.stderr
        assert read_log(name) == read_log(plain)
    info = json.loads((tmp_path / "qwen2-hub" / "args.json").read_text())
    assert info["args"]["model"] == "someone/a-model"
    assert train(tmp_path / "qwen2-hub", "someone/a-model", data, "--resume").returncode == 0
    (hub / "models--someone--a-model" / "refs" / "main").write_text("a" * 40)                 # the branch has moved on
    refuse(train(tmp_path / "qwen2-hub", "someone/a-model", data, "--resume"), "--model", "has changed")


@pytest.mark.parametrize("model, words", [
    ("someone/another", ["--model someone/another", "no such folder", "outgoing traffic has been disabled"]),
    ("someone/a-model@v4", ["--model someone/a-model@v4", "no such folder"]),
    ("misspelt", ["--model misspelt", "no such folder"]),
    ("half", ["model-00002-of-00004.safetensors"]),
    ("a/b/c", ["a/b/c: no such folder"]),                            # no hub id
    ("./misspelt", ["misspelt"]),
    ("..", ["config.json"]),
    ("a" * 300, ["no such folder"]),                                 # longer than a name may be
])
def test_what_is_not_to_be_had_is_refused_in_one_line(model, words, hub, data, tmp_path):
    refuse(train(tmp_path / "run", model, data), *words)
    assert not (tmp_path / "run").exists()


def test_without_huggingface_hub_a_folder_is_all_there_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="--model someone/no-model: no such folder; a hub id needs huggingface_hub"):
        reft.find_model("someone/no-model")
    assert reft.find_model(str(FIXTURES)) == str(FIXTURES)


def test_no_more_is_fetched_than_is_read(monkeypatch):
    """Neither pickles nor another library's copy of the weights."""
    from fnmatch import fnmatch
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **more: asked.update(more, name=name) or "folder")
    assert reft.find_model("someone/new@main") == "folder" and (asked["name"], asked["revision"]) == ("someone/new", "main")
    wanted = lambda name: any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])
    assert all(map(wanted, ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
                            "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]))
    assert not any(map(wanted, ["pytorch_model.bin", "onnx/model.onnx", "original/consolidated.00.pth", "flax_model.msgpack",
                                "original/model.safetensors", "README.md", "code.py"]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_header_asks_for_what_requirements_txt_names(script):
    """PEP 723, read as `uv run` reads it."""
    text = (ROOT / f"{script}.py").read_text()
    found = re.findall(r"(?m)^# /// ([a-zA-Z0-9-]+)$\s((?:^#(?:| .*)$\s)+)^# ///$", text)
    assert [kind for kind, _ in found] == ["script"]
    header = tomllib.loads("".join(line[2:] for line in found[0][1].splitlines(keepends=True)))
    required = (ROOT / "requirements.txt").read_text().replace('"', "'").splitlines()
    assert header == {"requires-python": ">=3.11", "dependencies": required}
