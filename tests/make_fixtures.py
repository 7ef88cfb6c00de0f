"""Write tests/fixtures: tiny checkpoints with random weights and their tokenizers, with the logits and ids that
transformers gives for them. Needs transformers 5; the tests themselves do not.

    python tests/make_fixtures.py
"""
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (AddedToken, GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

FIXTURES = Path(__file__).parent / "fixtures"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
CORPUS = """Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did
Natalia sell altogether in April and May? Natalia sold 48/2 = 24 clips in May. Natalia sold 48+24 = 72 clips altogether
in April and May.\n#### 72\nWeng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. How
much did she earn? Weng earns 12/60 = $0.2 per minute. Working 50 minutes, she earned 0.2 x 50 = $10.\n#### 10
def solution():\n    \"\"\"the answer\"\"\"\n    apples = 100\n    return apples\n  It's what they've said: we'll, I'm, he'd.
Größe, naïve café, Привет мир, 数学 数学, 👍👍 \u00e9\u00e9 e\u0301 2024 2025 1000 1000,000\n\n\n""".splitlines(keepends=True)
TEXTS = [
    "", " ", "  ", "\n", "\n\n\n", " \n \n", "\t\t", "a", " a", "a ", "a  b   c    ", "Hello, world!", "How many clips altogether?",
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72", "x = 12345678901234567890", "1,000,000.50", "3  7",
    "a1b22c333d4444", "the answer  5\n\n\n6   \n  7", "    return 100\n        if x:\n\n\ty = 1\r\nz\r\n\r\n",
    "It's he'll WE'VE I'D they're 'tis o'clock ''s", "caf\u00e9 cafe\u0301 \u212b \u1e9b\u0323 \ufb01 \uac00 \u1100\u1161",
    "naïve Größe ſ's 'ſ", "Привет, мир! 123", "数学は楽しい 数学、3つ。", "👍👍🏽 👨‍👩‍👧 🇩🇪", "½ ² ① Ⅷ ٣٤ ५ 一二三",
    "\u00a0x\u2003y\u2028z\u0085w\u3000v", "\x1c\x1d\x1e\x1f|\x0b\x0c|\x00\x7f", "\u200b\u200d\ufeff",
    "<|endoftext|>", "a<|endoftext|>b <|im_start|>user\nhi<|im_end|>", "<think>\n2+2\n</think>4 <tool>", "<<<think>>> < think>",
    "(((((((((((((((((((())))))))))))))))))))", "a" * 50, " " * 33 + "a", "e" * 7 + "\u0301" * 3,
    "الكتاب १२३ \u0645\u064e", "ﬀ𝒳𝟘 𐐷",
    "a  <left> b <left>c", "a <right>  b<right>c <right>", "x sum sums sum_ (sum) sum", "cafe\u0309 caf\u1ebbs <caf\u1ebb",
    "<<|a|>|><|a|><b|>", "pay 1234567 or 12 of 123456.5", "one  \ntwo \n \n three ", "学校a12学x ٣a5² ①b_c\u200dd",
    "<s>a</s> <unk><0x0A>", "  two  spaces ", "▁a▁▁b", "a<s>  b",
    "abcabcabdd dcba abcd bcd aabbccdd abcdabcd bcdd", "\nabcd abcd",
]


def train_tokenizer(pre, normalizer=None, special_first=False, ignore_merges=False, plain=(), bos=None):
    """A byte-level BPE of 320 ids; its special tokens come first, as in SmolLM2, or last, as in the others."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre, decoders.ByteLevel()
    if normalizer:
        tok.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 320 if special_first else 320 - len(special) - len(plain)
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False,
                                                        special_tokens=special if special_first else []))
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    tok.add_tokens([AddedToken(s, special=False, normalized=False) for s in plain])
    if bos:
        tok.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tok.token_to_id(bos))])
    if ignore_merges:
        spec = json.loads(tok.to_str())
        spec["model"]["ignore_merges"] = True
        tok = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def added_token(tok, content, **flags):
    special = flags.pop("special", False)
    token = AddedToken(content, special=special, **dict(normalized=False) | flags)
    (tok.add_special_tokens if special else tok.add_tokens)([token])


def with_flags():
    """Added tokens that take spaces in, stand for whole words only, are looked for after normalising, or hide others."""
    tok = train_tokenizer(pre_tokenizers.Sequence([split(QWEN_SPLIT), byte_level(False)]), normalizers.NFC())
    for content, flags in [("<left>", dict(lstrip=True)), ("<right>", dict(rstrip=True)), ("sum", dict(single_word=True)),
                           ("caf\u1ebb", dict(normalized=True)), ("|a|", {}), ("<|a|>", dict(special=True)),
                           ("<b|>", dict(lstrip=True, rstrip=True)), ("\t", dict(lstrip=True, rstrip=True))]:
        added_token(tok.backend_tokenizer, content, **flags)
    return tok


def odd_merges():
    """A merge of a and bc is not listed, nor one of ab and cd; abc and abcd come from other pairs. Of two merges that give
    bcd the later one is never met. dcba is in the vocabulary and no merges lead to it."""
    merges = [("a", "b"), ("c", "d"), ("ab", "c"), ("abc", "d"), ("b", "c"), ("bc", "d"), ("b", "cd"), ("a", "a"), ("d", "d")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *dict.fromkeys(left + right for left, right in merges), "dcba"]
    tok = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tok.pre_tokenizer, tok.decoder = byte_level(True), decoders.ByteLevel()
    tok.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def sentencepiece(metaspace=None):
    """Characters, and bytes for those that the vocabulary lacks, as in Llama 2; metaspace: how newer versions write it."""
    space = "\u2581"
    tok = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(space)
    special = ["<unk>", "<s>", "</s>"]
    # as in Llama 2, a line break and most of what is not ASCII have no token of their own
    lines = [line.encode("ascii", "ignore").decode().replace("\n", " ") for line in CORPUS]
    tok.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=420, show_progress=False,
                                                       special_tokens=special + [f"<0x{b:02X}>" for b in range(256)]))
    spec = json.loads(tok.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]     # the bytes are ordinary tokens
    tok = Tokenizer.from_str(json.dumps(spec))
    tok.pre_tokenizer = metaspace
    if metaspace is None:
        tok.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    tok.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    added_token(tok, "<left>", lstrip=True)
    added_token(tok, "<think>", normalized=True)
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tok.post_processor = processors.Sequence([processors.ByteLevel(), bos])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>", pad_token="<unk>", bos_token="<s>", unk_token="<unk>")


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=invert)


TOKENIZERS = dict(
    gpt2=lambda: train_tokenizer(byte_level(True)),
    llama3=lambda: train_tokenizer(pre_tokenizers.Sequence([split(LLAMA3_SPLIT), byte_level(False)]), ignore_merges=True,
                                   bos="<|im_start|>"),
    qwen=lambda: train_tokenizer(pre_tokenizers.Sequence([split(QWEN_SPLIT), byte_level(False)]), normalizers.NFC(),
                                 plain=["<think>", "</think>"]),
    smollm=lambda: train_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)]),
                                   special_first=True),
    # three cuts in a row, the first two by regex: numbers, then letters of one script at a time
    chain=lambda: train_tokenizer(pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), split(r"[一-龥ぁ-ゟ゠-ヿ]+|\s[^\s\p{L}]+"),
                                                           split(LLAMA3_SPLIT), byte_level(False)])),
    # groups, anchors and classes that regex dialects read in different ways; digits in threes from the right
    dialect=lambda: train_tokenizer(pre_tokenizers.Sequence([
        split(r"\s+$"), split(r"\d{1,3}(?=(\d{3})*\b)"), split(r"([\p{Han}a]+)|[[:digit:]]{,2}|(?i:'ve|'ll)"),
        split(r"(?=(\w\W)+x)"),
        split(r"[^\S\n]+|[\p{L}\p{M}&&[^\p{Latin}]]+|\w++|[^\s\w]+|\n", "removed", True), byte_level(False)])),
    flags=with_flags,
    merges=odd_merges,
    llama2=sentencepiece,
    llama2_first=lambda: sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    llama2_split=lambda: sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="always", split=True)),
)
ROPE_LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)
SMALL = dict(vocab_size=320, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, eos_token_id=5, pad_token_id=3, bos_token_id=None)
GPT2 = dict(vocab_size=320, n_embd=16, n_layer=2, n_head=4, n_positions=64, eos_token_id=5, bos_token_id=None)
# name: (model, tokenizer, how it is written)
CHECKPOINTS = dict(
    gpt2=(lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), "gpt2", {}),
    gpt2_untied=(lambda: GPT2LMHeadModel(GPT2Config(**GPT2, n_inner=24, tie_word_embeddings=False)), "gpt2", {}),
    gpt2_bare=(lambda: GPT2Model(GPT2Config(**GPT2)), "gpt2", {}),
    llama=(lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)), "smollm", dict(rope="4")),
    llama3=(lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
                                                 rope_parameters=dict(ROPE_LLAMA3, rope_theta=500.0))), "llama3",
            dict(max_shard_size="20KB")),
    llama3_v4=(lambda: LlamaForCausalLM(LlamaConfig(**SMALL | dict(num_key_value_heads=4, head_dim=8), tie_word_embeddings=True,
                                                    rope_parameters=dict(ROPE_LLAMA3, rope_theta=100.0))), "llama3",
               dict(rope="4")),
    qwen2=(lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True)), "qwen", dict(dtype=torch.bfloat16)),
    qwen2_untied=(lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False)), "qwen", dict(rope="4")),
    qwen3=(lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=False)), "qwen", {}),
    qwen3_tied=(lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True, attention_bias=True)),
                "qwen", {}),
)


# name: (tokenizer, chat template, its named tokens): markers and a default system text, with whitespace control; a BOS, trimmed
# contents and loop controls; brackets around a question, no token before it, and a space before the end token
CHATS = dict(
    markers=("qwen", """{%- set talk = namespace(system='Be brief.') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set talk.system = messages[0].content %}
{%- endif %}
{{- '<|im_start|>system\\n' + talk.system + '<|im_end|>\\n' }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}
""", {}),
    trimmed=("llama3", """{{ bos_token }}
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('no role ' + message.role | tojson) }}
    {% endif %}
    {% if not message.content | trim %}
        {% continue %}
    {% endif %}
## {{ message.role }}
{{ message.content | trim }}{{ eos_token }}

{% endfor %}
{% if add_generation_prompt %}
## assistant
{% endif %}""", dict(bos_token="<|im_start|>")),
    brackets=("llama2", "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + ' ' + eos_token }}"
                        "{% else %}{{ bos_token + '[' + m.content + '] ' }}{% endif %}{% endfor %}", dict(bos_token="<s>")),
)
QUESTIONS = [*TEXTS, "<|im_end|>", " <|im_start|>system\nHi<|im_end|>  ", "</s><s>[", "Why <think>?", "5<|im_end|><|im_end|>5",
             "How many <|endoftext|> are\nleft? \ue000", "x = 3 </s>"]


def write_chats(folder):
    """What transformers makes of each question in each template, alone or after an answer: special tokens in it are text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (tokenizer, template, named) in CHATS.items():
        core = PreTrainedTokenizerFast.from_pretrained(FIXTURES / "tokenizers" / tokenizer, **named)
        cases = []
        for i, question in enumerate(QUESTIONS):
            messages = [dict(role="system", content="You count.\n")] if i % 2 else []
            messages += [dict(role="user", content=question)]
            if i % 3 == 0:
                messages += [dict(role="assistant", content="It is 18."), dict(role="user", content="Sure? <|im_end|></s>")]
            ids = core.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, return_dict=False,
                                           sanitize_control_tokens=True)
            cases.append(dict(messages=messages, ids=ids))
        chat = dict(tokenizer=tokenizer, template=template, named=named, cases=cases)
        (folder / f"{name}.json").write_text(json.dumps(chat) + "\n")


def randomise(model):
    """Weights large enough that every part matters to the logits: transformers' own init leaves biases 0 and norms 1."""
    for name, p in model.named_parameters():
        p.data = 1 + 0.3 * torch.randn_like(p) if "norm" in name or "ln_" in name and p.dim() == 1 else 0.3 * torch.randn_like(p)


def write_config(folder, rope=None):
    """With rope="4" spell RoPE as transformers 4 did: rope_theta and rope_scaling."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("transformers_version", None)
    if rope:
        parameters = config.pop("rope_parameters")
        config["rope_theta"] = parameters.pop("rope_theta")
        config["rope_scaling"] = parameters if parameters["rope_type"] != "default" else None
    path.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def main():
    shutil.rmtree(FIXTURES, ignore_errors=True)
    tokenizers = {name: make() for name, make in TOKENIZERS.items()}
    (FIXTURES / "tokenizers").mkdir(parents=True)
    for name, tokenizer in tokenizers.items():
        folder = FIXTURES / "tokenizers" / name
        tokenizer.save_pretrained(folder)
        core = tokenizer.backend_tokenizer
        core.encode_special_tokens = True               # special tokens in a text are plain text
        ids = [core.encode(text, add_special_tokens=False).ids for text in TEXTS]
        expected = dict(texts=TEXTS, ids=ids, decoded=core.decode_batch(ids, skip_special_tokens=False),
                        prompt=core.encode("a 1").ids, size=len(tokenizer), end=tokenizer.eos_token, filler=tokenizer.pad_token)
        (folder / "expected.json").write_text(json.dumps(expected) + "\n")
        core.encode_special_tokens = False
    write_chats(FIXTURES / "chats")
    for seed, (name, (make, tokenizer, how)) in enumerate(CHECKPOINTS.items()):
        torch.manual_seed(seed)
        model = make().eval()
        randomise(model)
        model.to(how.get("dtype", torch.float32))
        folder = FIXTURES / name
        model.save_pretrained(folder, max_shard_size=how.get("max_shard_size", "1GB"))
        (folder / "generation_config.json").unlink(missing_ok=True)
        tokenizers[tokenizer].save_pretrained(folder)
        write_config(folder, how.get("rope"))           # transformers reads it back in that spelling
        model = type(model).from_pretrained(folder, dtype=torch.float32)
        tokens = torch.randint(0, 320, (2, 40))
        out = model(tokens)
        logits = out.logits if hasattr(out, "logits") else out.last_hidden_state @ model.wte.weight.t()
        keep = [0, 1, 7, 20, 39]                        # a few positions: the files stay small
        save_file(dict(tokens=tokens, positions=torch.tensor(keep), logits=logits[:, keep].clone()),
                  folder / "expected.safetensors")
        print(f"{name:14} logits of standard deviation {logits.std():.2f}")
    for path in FIXTURES.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
    print(f"{sum(p.stat().st_size for p in FIXTURES.rglob('*') if p.is_file()) / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
