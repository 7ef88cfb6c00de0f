"""model.py against fixtures made with transformers (tests/make_fixtures.py), against its own uncached forward, and against
broken input. Cases whose numbers are random have a fixed seed."""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
from model import GPT, GPTConfig, InputError, Tokenizer, generate, load_checkpoint, save_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINTS = sorted(p.name for p in FIXTURES.iterdir() if p.name != "tokenizers")
TOKENIZERS = sorted(p.name for p in (FIXTURES / "tokenizers").iterdir())
RAGGED = [[7, 8, 9], [11], [4, 3, 2, 1, 10, 6, 7, 8, 9, 2], [3, 3]]


def small_gpt(seed=0, scale=8, **kwargs):
    """A model with a vocabulary of 12 whose predictions are far from uniform."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(**dict(vocab_size=12, eos_id=0, pad_id=1, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, max_len=64) | kwargs))
    with torch.no_grad():
        for p in gpt.parameters():
            if p.dim() == 2:
                p *= 0.02 * scale / gpt.config.init_std
    return gpt


GPT2_SHAPE = dict(norm="layer", positions="learned", mlp="gelu", qkv_bias=True, out_bias=True, mlp_bias=True, n_kv_head=4)
FAMILIES = dict(gpt2=GPT2_SHAPE, llama={}, qwen2=dict(qkv_bias=True, tied_head=False), qwen3=dict(qk_norm=True, head_dim=12))


def one_by_one(gpt, prompt, max_new_tokens):
    """Greedy continuation without a cache: the whole row through the model for every token."""
    row = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            row.append(int(gpt.logits(torch.tensor([row]))[0, -1].argmax()))
        if row[-1] == gpt.config.eos_id:
            break
    return row


def responses(tokens, mask):
    return [row[1:][m].tolist() for row, m in zip(tokens, mask)]


# ----------------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_those_of_transformers(name):
    gpt, tokenizer = load_checkpoint(FIXTURES / name)
    expected = load_file(FIXTURES / name / "expected.safetensors")
    with torch.no_grad():
        logits = gpt.logits(expected["tokens"])[:, expected["positions"]]
    assert expected["logits"].std() > 0.5               # logits near zero would be equal whatever the model does
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    assert all(p.dtype == torch.float32 for p in gpt.parameters())
    assert gpt.config.eos_id == tokenizer.eos_id == 5
    assert tokenizer.pad_id == gpt.config.pad_id == (317 if name.startswith("gpt2") else 3)


def test_fixtures_cover_the_options():
    configs = {name: load_checkpoint(FIXTURES / name)[0].config for name in CHECKPOINTS}
    assert {c.family for c in configs.values()} == {"gpt2", "llama", "qwen2", "qwen3"}
    for option in ("tied_head", "qkv_bias", "out_bias", "mlp_bias", "qk_norm"):
        assert {getattr(c, option) for c in configs.values()} == {True, False}, option
    assert {c.n_kv_head < c.n_head for c in configs.values()} == {True, False}
    assert {c.rope_scaling is None for c in configs.values()} == {True, False}
    texts = [(FIXTURES / name / "config.json").read_text() for name in CHECKPOINTS]
    assert any("rope_parameters" in t for t in texts) and any("rope_scaling" in t for t in texts)
    assert any((FIXTURES / name / "model.safetensors.index.json").exists() for name in CHECKPOINTS)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_saved_checkpoint_is_the_same_checkpoint(name, tmp_path):
    gpt, tokenizer = load_checkpoint(FIXTURES / name)
    save_checkpoint(tmp_path, gpt, tokenizer)
    again, tokenizer_again = load_checkpoint(tmp_path)
    assert again.config == gpt.config
    assert all(torch.equal(a, b) for a, b in zip(gpt.state_dict().values(), again.state_dict().values(), strict=True))
    assert tokenizer_again.files == tokenizer.files
    # the tensors have the names and shapes in which they came
    written = load_file(tmp_path / "model.safetensors")
    original = {}
    for path in (FIXTURES / name).glob("model*.safetensors"):
        original |= load_file(path)
    prefix = "transformer." if name == "gpt2_bare" else ""
    assert {prefix + k for k in original} == set(written)
    assert all(torch.equal(written[prefix + k], v.float()) for k, v in original.items())
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, FIXTURES / name))
    same = {"model_type", "vocab_size", "hidden_size", "num_key_value_heads", "intermediate_size", "n_embd", "n_positions",
            "n_inner", "rms_norm_eps", "rope_parameters", "rope_theta", "max_position_embeddings", "attention_bias", "mlp_bias"}
    for key in same & set(ours) & set(theirs) - {"n_inner"}:
        assert ours[key] == theirs[key], key
    assert ours["torch_dtype"] == ours["dtype"] == "float32"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_saves_and_loads(family, tmp_path):
    gpt = small_gpt(**FAMILIES[family])
    assert gpt.config.family == family
    gpt.add_value_head()
    torch.nn.init.normal_(gpt.value_head.weight)
    tokenizer = Tokenizer.from_pieces([f" {c}" for c in "abcdefghijk"])
    gpt.config.eos_id = tokenizer.eos_id
    save_checkpoint(tmp_path, gpt, tokenizer)
    assert not any(k.startswith("value") for k in load_file(tmp_path / "model.safetensors"))
    again, tokenizer_again = load_checkpoint(tmp_path)
    assert again.config == gpt.config and tokenizer_again.encode(" b a") == [1, 0]
    tokens = torch.randint(0, 12, (2, 9))
    hidden = gpt(tokens)
    assert torch.equal(hidden, again(tokens)) and torch.equal(gpt.values(hidden), again.values(hidden))
    gpt.value_head, gpt.config.value_head = None, False
    save_checkpoint(tmp_path, gpt, tokenizer)           # the old head does not stay behind
    assert load_checkpoint(tmp_path)[0].value_head is None


def test_files_are_replaced_as_a_whole(tmp_path, monkeypatch):
    gpt, tokenizer = small_gpt(), Tokenizer.from_pieces(list("abcdefghijk"))
    gpt.config.eos_id = tokenizer.eos_id
    save_checkpoint(tmp_path, gpt, tokenizer)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    gpt.embed.data += 1

    def killed(source, target):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, gpt, tokenizer)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".tmp"} == before


def copy_fixture(tmp_path, name="llama"):
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "REMOVE"}))


@pytest.mark.parametrize("listed, generation, named, expected", [
    (5, None, "<|im_end|>", 5), ([7, 2], None, "<|im_end|>", 2), ([7, 9], None, "<|im_end|>", 7),
    (None, [9, 2], "<|im_end|>", 2), (None, 9, "<|im_end|>", 9), (None, None, "<|im_start|>", 1),
    ([7, 1], None, {"content": "<|im_start|>", "special": True}, 1)])
def test_end_token_comes_from_the_configs(listed, generation, named, expected, tmp_path):
    folder = copy_fixture(tmp_path)
    edit_json(folder / "config.json", eos_token_id=listed, pad_token_id=None)
    edit_json(folder / "tokenizer_config.json", eos_token=named, pad_token="REMOVE")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=generation)))
    gpt, tokenizer = load_checkpoint(folder)
    assert gpt.config.eos_id == tokenizer.eos_id == expected
    assert gpt.config.pad_id == tokenizer.pad_id        # without a pad token: some id of the vocabulary, a filler
    assert 0 <= gpt.config.pad_id < 320


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def wrong_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16, 16)
    save_file(tensors, folder / "model.safetensors")


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def edit_tokenizer(**changes):
    def edit(folder):
        edit_json(folder / "tokenizer.json", **changes)
    return edit


def edit_model(**changes):
    def edit(folder):
        spec = json.loads((folder / "tokenizer.json").read_text())
        edit_json(folder / "tokenizer.json", model=spec["model"] | changes)
    return edit


def edit_config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


BROKEN = {                                              # what happens to a good folder: what the one line must say
    "no folder": (shutil.rmtree, ["no such folder"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "No such file"]),
    "config is no json": (lambda f: (f / "config.json").write_text("{'a': 1"), ["config.json", "not valid JSON"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "not a JSON object"]),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ["config.json", "not a text file"]),
    "key missing": (edit_config(num_hidden_layers="REMOVE"), ["config.json", "num_hidden_layers"]),
    "architecture": (edit_config(model_type="mamba"), ["config.json", "'mamba'", "gpt2, llama, qwen2, qwen3"]),
    "rope type": (edit_config(rope_scaling=dict(rope_type="yarn", factor=2.0)), ["config.json", "'yarn'", "default, llama3"]),
    "old rope type": (edit_config(rope_scaling=dict(type="linear", factor=2.0)), ["config.json", "'linear'", "default, llama3"]),
    "activation": (edit_config(hidden_act="gelu"), ["config.json", "'gelu'", "silu"]),
    "sliding window": (edit_config(layer_types=["full_attention", "sliding_attention"]), ["config.json", "sliding"]),
    "quantised": (edit_config(quantization_config=dict(bits=4)), ["config.json", "quantised"]),
    "end token": (edit_config(eos_token_id=320), ["config.json", "eos_token_id is 320"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", "no such file"]),
    "pickled weights": (pickled, ["pytorch_model.bin", "pickle", "safetensors"]),
    "half a file": (cut_off, ["model.safetensors", "damaged or incomplete"]),
    "tensor missing": (drop_tensor, ["no tensor model.layers.1.mlp.up_proj.weight"]),
    "wrong shape": (wrong_shape, ["k_proj", "(16, 16)", "(8, 16)"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json", "no such file"]),
    "only SentencePiece": (lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"), ["SentencePiece", "byte-level BPE"]),
    "tokenizer is no json": (lambda f: (f / "tokenizer.json").write_text(""), ["tokenizer.json", "not valid JSON"]),
    "Unigram": (edit_model(type="Unigram"), ["tokenizer.json", "SentencePiece", "byte-level BPE"]),
    "byte fallback": (edit_model(byte_fallback=True), ["tokenizer.json", "SentencePiece", "byte-level BPE"]),
    "WordPiece": (edit_model(type="WordPiece"), ["tokenizer.json", "WordPiece", "byte-level BPE"]),
    "word suffix": (edit_model(end_of_word_suffix="</w>"), ["tokenizer.json", "suffix"]),
    "merges missing": (edit_model(merges=["x y"]), ["tokenizer.json", "KeyError", "xy"]),
    "lower case": (edit_tokenizer(normalizer={"type": "Lowercase"}), ["tokenizer.json", "Lowercase"]),
    "Metaspace": (edit_tokenizer(pre_tokenizer={"type": "Metaspace"}), ["tokenizer.json", "Metaspace"]),
    "no pre-tokenizer": (edit_tokenizer(pre_tokenizer=None), ["tokenizer.json", "pre-tokenizer none"]),
    "prefix space": (edit_tokenizer(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=True)), ["tokenizer.json", "prefix space"]),
    "more ids than rows": (edit_config(vocab_size=300), ["tokenizer.json", "319", "300"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_one_line(case, tmp_path):
    folder = copy_fixture(tmp_path)
    load_checkpoint(folder)                             # it is good before
    damage, words = BROKEN[case]
    damage(folder)
    with pytest.raises(InputError) as error:
        load_checkpoint(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    for word in words:
        assert word in message


def test_a_missing_shard_is_named(tmp_path):
    folder = copy_fixture(tmp_path, "llama3")
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00004.safetensors: no such file"):
        load_checkpoint(folder)


def test_gpt2_options_that_change_the_logits_are_refused(tmp_path):
    for n, change in enumerate([dict(activation_function="relu"), dict(scale_attn_by_inverse_layer_idx=True), dict(scale_attn_weights=False)]):
        folder = copy_fixture(tmp_path / str(n), "gpt2")
        edit_json(folder / "config.json", **change)
        with pytest.raises(InputError, match="config.json"):
            load_checkpoint(folder)


# ------------------------------------------------------------------------------------------------------------- tokenizer
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_equal_those_of_the_original_tokenizer(name):
    tokenizer = Tokenizer.from_file(FIXTURES / "tokenizers" / name / "tokenizer.json")
    expected = json.loads((FIXTURES / "tokenizers" / name / "expected.json").read_text())
    for text, ids in zip(expected["texts"], expected["ids"], strict=True):
        assert tokenizer.encode(text) == ids, text
    assert tokenizer.vocab_size == 320
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.pad_id]) == "<|im_end|><|endoftext|>"


def test_decoding_gives_the_text_back():
    for name in ("gpt2", "llama3", "smollm", "chain"):  # qwen normalises
        folder = FIXTURES / "tokenizers" / name
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
        for text in json.loads((folder / "expected.json").read_text())["texts"]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    emoji = tokenizer.encode("👍")
    assert len(emoji) > 1 and tokenizer.decode(emoji[:-1]) == "\ufffd"       # incomplete UTF-8
    assert tokenizer.token_bytes(10 ** 6) == b""        # a row that only pads the embedding


def test_ids_need_not_follow_the_order_of_the_merges(tmp_path):
    """The same merges with the ids of the vocabulary turned round: the cuts stay, the ids are renamed."""
    source = FIXTURES / "tokenizers" / "gpt2" / "tokenizer.json"
    spec = json.loads(source.read_text())
    n = len(spec["model"]["vocab"])
    spec["model"]["vocab"] = {token: n - 1 - i for token, i in spec["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    plain, turned = Tokenizer.from_file(source), Tokenizer.from_file(tmp_path / "tokenizer.json")
    text = "Natalia sold 48/2 = 24 clips in May."
    assert turned.encode(text) == [n - 1 - i for i in plain.encode(text)]
    assert turned.decode(turned.encode(text)) == text


def test_text_outside_of_the_pattern_is_kept(tmp_path):
    """A pattern that matches letters only: what lies between is a piece of its own, as in the original."""
    spec = json.loads((FIXTURES / "tokenizers" / "llama3" / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{L}+"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("12 + ab, 3")) == "12 + ab, 3"


PIECES = ["Question:\n", "Answer:\n", "1", "2", "12", " ", "\n", " +", "+", "é", "#### ", "<b>", ".", "(", "a|b", "\\", "-", "]", "^"]


def test_pieces_are_the_vocabulary(tmp_path):
    tokenizer = Tokenizer.from_pieces(PIECES)
    assert tokenizer.vocab_size == len(PIECES) + 1 and tokenizer.eos_id == tokenizer.pad_id == len(PIECES)
    for i, piece in enumerate(PIECES):
        assert tokenizer.encode(piece) == [i] and tokenizer.token_bytes(i) == piece.encode()
    text = "Question:\n12 +1 2\n\n#### 121é.(a|b\\-]^<b>"
    ids = [PIECES.index(p) for p in ["Question:\n", "12", " +", "1", " ", "2", "\n", "\n", "#### ", "12", "1", "é", ".", "(", "a|b",
                                     "\\", "-", "]", "^", "<b>"]]
    assert tokenizer.encode(text) == ids                # the longest piece first
    assert tokenizer.decode(ids + [tokenizer.eos_id]) == text + "<eos>"
    tokenizer.save(tmp_path)
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.encode(text) == ids and again.files == tokenizer.files
    assert (again.eos_id, again.pad_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size)


@pytest.mark.parametrize("text, char", [("12x", "x"), ("Q", "Q"), ("1 2€3", "€"), ("<eos>", "<"), ("a", "a"), ("1\t", "\t"), ("a|bè", "è")])
def test_a_character_outside_of_the_vocabulary_is_named(text, char):
    with pytest.raises(InputError, match="no token for") as error:
        Tokenizer.from_pieces(PIECES).encode(text)
    assert repr(char) in str(error.value)


@pytest.mark.parametrize("pieces", [["a", "a"], ["a", ""], ["a", "<eos>"]])
def test_impossible_pieces_are_refused(pieces):
    with pytest.raises(InputError):
        Tokenizer.from_pieces(pieces)


# -------------------------------------------------------------------------------------------------------------- generate
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_cached_generation_equals_the_uncached_forward(name):
    gpt, _ = load_checkpoint(FIXTURES / name)
    torch.manual_seed(0)
    prompts = [torch.randint(0, 320, (1 + i,)).tolist() for i in range(20)]
    tokens, mask = generate(gpt, prompts, 40, temperature=0)
    continued = set()
    for prompt, row, m in zip(prompts, tokens.tolist(), mask):
        expected = one_by_one(gpt, prompt, 40)
        assert row[:len(expected)] == expected
        assert m.sum() == len(expected) - len(prompt)
        continued |= set(zip(expected[len(prompt) - 1:], expected[len(prompt):]))
    assert len(continued) > 20                          # a model that repeats one token would show nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_end_at_different_lengths_as_each_would_alone(family):
    gpt = small_gpt(**FAMILIES[family] | dict(tied_head=False))
    torch.manual_seed(1)
    prompts = [torch.randint(1, 12, (1 + i % 7,)).tolist() for i in range(40)]
    tokens, mask = generate(gpt, prompts, 20, temperature=0)
    lengths = mask.sum(1)
    assert lengths.min() < 10 and lengths.max() == 20 and len(lengths.unique()) > 3         # rows left at different times
    for prompt, row, m in zip(prompts, tokens, mask):
        alone, alone_mask = generate(gpt, [prompt], 20, temperature=0)
        T = alone.shape[1]
        assert torch.equal(row[:T], alone[0]) and (row[T:] == gpt.config.pad_id).all()
        assert torch.equal(m[:T - 1], alone_mask[0]) and not m[T - 1:].any()
        assert row[:T].tolist() == one_by_one(gpt, prompt, 20)


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("pad_id", [0, 1])              # 0 is the end token too
def test_the_mask_marks_exactly_the_sampled_tokens(pad_id, device):
    gpt = small_gpt(pad_id=pad_id).to(device)
    prompts = [[5, 0, 6], [1], [0], [0, 0, 1, 1, 0, 7, 8, 9, 0]]        # end and pad tokens in a prompt stop nothing
    torch.manual_seed(0)
    tokens, mask = generate(gpt, prompts, 12, group_size=16)
    assert tokens.shape[0] == 64 and mask.shape == (64, tokens.shape[1] - 1) and mask.dtype == torch.bool
    stopped = 0
    for b, (row, m) in enumerate(zip(tokens.tolist(), mask.tolist())):
        prompt = prompts[b // 16]                       # rows of one prompt are adjacent
        n = sum(m)
        start, end = len(prompt), len(prompt) + n
        assert row[:start] == prompt
        assert [t + 1 for t, sampled in enumerate(m) if sampled] == list(range(start, end))
        assert 1 <= n <= 12 and all(t == pad_id for t in row[end:])
        assert gpt.config.eos_id not in row[start:end - 1]
        assert n == 12 or row[end - 1] == gpt.config.eos_id                 # the sampled end token is in the mask
        stopped += row[end - 1] == gpt.config.eos_id
    assert 0 < stopped < 64
    longest = max(len(prompts[b // 16]) + sum(m) for b, m in enumerate(mask.tolist()))
    assert tokens.shape[1] == longest


@pytest.mark.parametrize("pad_id", [0, 1])
@pytest.mark.parametrize("schedule", [(32, 0.5, 256), (4, 0.5, 16), (3, 0.25, 5), (1, 0, 1)])
def test_when_rows_leave_changes_nothing(schedule, pad_id, monkeypatch):
    """CUDA's schedule, on which ended rows stay in the batch for a while, and others, against the CPU's."""
    gpt = small_gpt(pad_id=pad_id, tied_head=False)
    torch.manual_seed(1)
    prompts = [torch.randint(1, 12, (6 + i % 2,)).tolist() for i in range(60)]
    tokens, mask = generate(gpt, prompts, 50, temperature=0)
    monkeypatch.setitem(model.SCHEDULE, "cpu", schedule)
    again, mask_again = generate(gpt, prompts, 50, temperature=0)
    assert torch.equal(tokens, again) and torch.equal(mask, mask_again)
    assert len(mask.sum(1).unique()) > 3


def test_a_single_new_token_and_a_long_row():
    gpt = small_gpt()
    tokens, mask = generate(gpt, RAGGED, 1, temperature=0)
    assert mask.sum(1).tolist() == [1] * 4
    assert responses(tokens, mask) == [one_by_one(gpt, p, 1)[len(p):] for p in RAGGED]
    tokens, mask = generate(gpt, [[4]], 63, temperature=0)                  # up to the last place of the context
    assert tokens[0].tolist() == one_by_one(gpt, [4], 63)


def test_a_prompt_is_computed_once_and_ended_rows_leave(monkeypatch):
    gpt = small_gpt()
    batches, trunk = [], model.trunk
    monkeypatch.setattr(model, "trunk", lambda c, w, tokens, *rest: batches.append(tuple(tokens.shape)) or trunk(c, w, tokens, *rest))
    torch.manual_seed(0)
    _, mask = generate(gpt, [[4, 5, 6], [7, 8], [4, 5, 6]], 30, group_size=4)
    assert batches[0] == (2, 3)                         # two different prompts, whatever the number of rows
    lengths = mask.sum(1)
    assert len(lengths.unique()) > 3
    assert [b for b, _ in batches[1:]] == [int((lengths > step).sum()) for step in range(1, int(lengths.max()))]


def test_equal_prompts_draw_different_samples():
    tokens, _ = generate(small_gpt(), [[4, 5, 6], [4, 5, 6]], 20, group_size=8)
    assert len({tuple(row) for row in tokens.tolist()}) > 8


def test_the_same_seed_gives_the_same_rows():
    gpt = small_gpt()
    rows = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rows.append(generate(gpt, RAGGED, 20, group_size=4)[0])
    assert torch.equal(rows[0], rows[1]) and not (rows[0].shape == rows[2].shape and torch.equal(rows[0], rows[2]))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_frequencies_are_the_softmax(temperature):
    """First and second sampled token of 20,000 rows against the exact distribution: chi-square below its 99.9 % point."""
    gpt = small_gpt(scale=4)
    torch.manual_seed(0)
    n, prompt = 20000, [4, 5, 6]
    tokens, mask = generate(gpt, [prompt], 2, temperature=temperature, group_size=n)
    with torch.no_grad():
        first = (gpt.logits(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1)
        after = gpt.logits(torch.tensor([prompt + [v] for v in range(12)]))[:, -1]
        second = first[1:] @ (after[1:] / temperature).softmax(-1)          # rows that ended (id 0) have no second
    for t, expected in ((3, first), (4, second)):
        counts = torch.bincount(tokens[mask[:, t - 1], t], minlength=12)
        expected = expected / expected.sum() * counts.sum()
        assert expected.min() > 20 and expected.max() / expected.min() > 3  # neither empty cells nor a uniform law
        assert ((counts - expected) ** 2 / expected).sum() < 31.3           # 11 degrees of freedom


def test_mean_sampled_logprob_is_minus_the_entropy():
    """Sampled from the policy itself: E[log p(a)] = -entropy at each state, here within 4 standard errors."""
    gpt = small_gpt()
    torch.manual_seed(0)
    tokens, mask = generate(gpt, RAGGED, 20, group_size=500)
    with torch.no_grad():
        logprobs = gpt.logits(tokens[:, :-1]).log_softmax(-1)
    sampled = logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)[mask]
    entropy = -(logprobs.exp() * logprobs).sum(-1)[mask]
    gap = sampled + entropy
    assert entropy.mean() > 0.3
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(len(gap))


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """A vocabulary of 4,000 where one half of the mass is on token 0 and the other is spread evenly over the rest."""
    gpt = small_gpt(vocab_size=4000, tied_head=False)
    torch.manual_seed(0)
    with torch.no_grad():
        hidden = gpt(torch.tensor([[0]]))[0, 0]
        gpt.head.zero_()
        gpt.head[0] = hidden * math.log(3999) / hidden.square().sum()       # its logit is log(3999), all others are 0
    tokens, _ = generate(gpt, [[0]], 1, group_size=20000)
    assert abs((tokens[:, 1] == 0).float().mean() - 0.5) < 0.02
    rest = tokens[tokens[:, 1] > 0, 1].float()
    assert abs(rest.mean() - 2000) < 4 * 1155 / math.sqrt(len(rest))       # uniform over 1..3999


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value, temperature):
    gpt = small_gpt()
    gpt.blocks[1].down.data[3, 3] = value
    with pytest.raises(FloatingPointError, match="logits"):
        generate(gpt, RAGGED, 5, temperature=temperature)


def test_prompts_must_fit():
    gpt = small_gpt()
    with pytest.raises(InputError, match="60 prompt tokens and 5 new tokens exceed the context of 64"):
        generate(gpt, [[4] * 60, [4]], 5)
    for prompts, new in (([[4], []], 5), ([], 5), ([[4]], 0)):
        with pytest.raises(InputError, match="an empty prompt, or no prompt, or max_new_tokens below 1"):
            generate(gpt, prompts, new)
    with pytest.raises(InputError, match="65 tokens .* context of 64"):
        gpt(torch.ones(1, 65, dtype=torch.long))
    generate(gpt, [[4] * 60, [4]], 4)


def test_generated_rows_can_be_trained_on():
    gpt = small_gpt()
    tokens, mask = generate(gpt, RAGGED, 5)
    assert not tokens.is_inference() and not mask.is_inference() and tokens.dtype == torch.long
    logprobs = gpt.logits(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.where(mask, logprobs, 0).sum().backward()
    for name, p in gpt.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    tokens[0, 0] = 1                                    # and written to


# ----------------------------------------------------------------------------------------------------------------- model
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_changes_nothing(family):
    gpt = small_gpt(**FAMILIES[family])
    tokens = torch.randint(0, 12, (3, 17))
    padded = torch.cat((tokens, torch.randint(0, 12, (3, 9))), 1)
    with torch.no_grad():
        torch.testing.assert_close(gpt(padded)[:, :17], gpt(tokens), atol=1e-5, rtol=0)
        assert (gpt(tokens.flip(0)) - gpt(tokens)).abs().max() > 0.1        # the hidden states do depend on the tokens


def test_a_new_model_starts_near_the_uniform_distribution():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=200, eos_id=0, n_layer=8, n_head=4, n_embd=64))
    logprobs = gpt.logits(torch.randint(0, 200, (4, 32))).log_softmax(-1)
    assert abs(-logprobs.mean() - math.log(200)) < 0.3
    assert gpt.embed.std().item() == pytest.approx(math.sqrt(2 / 320), rel=0.05)
    assert gpt.blocks[0].up.std().item() == pytest.approx(math.sqrt(2 / 320), rel=0.05)
    assert gpt.blocks[0].out.std().item() == pytest.approx(math.sqrt(2 / 320) / 4, rel=0.05)    # 1 / sqrt(2 * 8 layers)
    assert gpt.config.n_inner == 176 and gpt.config.n_kv_head == 4 and gpt.config.pad_id == 0


def test_value_head():
    gpt = small_gpt()
    assert gpt.value_head is None and not gpt.config.value_head
    gpt.add_value_head()
    hidden = gpt(torch.randint(0, 12, (2, 5)))
    assert not gpt.values(hidden).any()                                     # V = 0 at first, and nothing pulls at the trunk
    assert not torch.autograd.grad((gpt.values(hidden) - 1).square().sum(), gpt.embed)[0].any()
    torch.nn.init.normal_(gpt.value_head.weight), torch.nn.init.normal_(gpt.value_head.bias)
    hidden = gpt(torch.randint(0, 12, (2, 5)))
    expected = hidden @ gpt.value_head.weight[0] + gpt.value_head.bias
    torch.testing.assert_close(gpt.values(hidden), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gpt.values(hidden), expected)            # not rounded
    assert gpt.config.value_head and GPT(gpt.config).value_head is not None


def test_head_weight_is_the_embedding_when_tied():
    tied, untied = small_gpt(), small_gpt(tied_head=False)
    assert tied.head_weight is tied.embed and untied.head_weight is untied.head and untied.head is not untied.embed


def test_a_mixture_of_families_is_refused():
    with pytest.raises(ValueError, match="no family"):
        GPTConfig(vocab_size=10, eos_id=0, norm="layer")


def test_only_the_listed_packages_are_imported():
    code = "import sys, model; print(sorted({m.split('.')[0] for m in sys.modules} & {'transformers', 'tokenizers', 'triton', 'tqdm'}))"
    env = {**os.environ, "PYTHONPATH": str(Path(model.__file__).parent)}
    assert "transformers" not in subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout
