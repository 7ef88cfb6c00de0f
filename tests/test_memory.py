"""What training takes of memory, as it is said before; layers of which only the input is kept."""
import math
import re
import resource
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import model
import ppo_reft as reft
from model import GPT, GPTConfig, InputError, training_memory
from processes import ROOT, fork

FAMILIES = {"llama": dict(n_kv_head=2), "qwen3": dict(qk_norm=True, head_dim=32, tied_head=False),
            "gpt2": dict(norm="layer", positions="learned", mlp="gelu", qkv_bias=True, out_bias=True, mlp_bias=True)}
ROWS, LENGTH = 4, 50


def config(family, **more):
    return GPTConfig(vocab_size=100, eos_id=0, n_layer=6, n_head=4, n_embd=64, **FAMILIES[family], **more)


def backward(gpt, mixed=False):
    """Bytes that autograd keeps of a forward pass, parameters and their copies in bf16 apart; and the gradients."""
    kept = {}
    torch.manual_seed(1)
    shapes = {shape for p in gpt.parameters() for shape in (tuple(p.shape), tuple(p.shape[::-1])) if p.dim() == 2}

    def keep(x):
        if not isinstance(x, torch.nn.Parameter) and tuple(x.shape) not in shapes:
            kept[x.untyped_storage().data_ptr()] = x             # held, so that no address is used again
        return x

    tokens = torch.randint(100, (ROWS, LENGTH))
    rounded = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), rounded:
        hidden = gpt(tokens)
    hidden.square().sum().backward()
    return sum(x.untyped_storage().nbytes() for x in kept.values()), [p.grad for p in gpt.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixed", [False, True])
def test_the_activations_are_what_autograd_keeps(family, mixed):
    c = config(family)
    kept, _ = backward(GPT(c), mixed)
    said = [training_memory(c, tokens, 0, mixed=mixed)["activations"] for tokens in (ROWS * LENGTH, 0)]
    head = 0 if mixed else 12 * ROWS * LENGTH * 100
    layer = (said[0] - said[1] - head) / (c.n_layer + 1)             # one more, for the gradients of a layer
    assert 0.95 < (said[0] - said[1] - head - layer) / kept < 1.15


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_keep_their_input_and_give_the_same_gradients(family, monkeypatch):
    gpt = GPT(config(family))
    kept, gradients = backward(gpt)
    gpt.zero_grad()
    monkeypatch.setattr(GPT, "checkpointed", True)
    fewer, again = backward(gpt)
    assert all(a is None and b is None or torch.equal(a, b) for a, b in zip(gradients, again))
    inputs = 4 * ROWS * LENGTH * 64
    assert 6 * inputs <= fewer < 9 * inputs < kept / 3               # of 6 layers, and what is kept at both ends
    said = [training_memory(gpt.config, ROWS * LENGTH, 0, checkpointed=again, mixed=False)["activations"]
            for again in (False, True)]
    assert kept - fewer == pytest.approx(said[0] - said[1], rel=0.15)


def test_the_flag_is_that_switch(monkeypatch):
    monkeypatch.setattr(GPT, "checkpointed", None)
    for chosen in True, False:
        reft.initial_policy(reft.Args(checkpoint_activations=chosen))
        assert GPT.checkpointed is chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_gradients_and_optimiser_are_counted_to_the_byte(family):
    gpt = GPT(config(family))
    optimizer = reft.adamw([gpt], 1e-3)
    gpt.logits(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    size = lambda tensors: sum(x.nbytes for x in tensors)
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    said = training_memory(gpt.config, 1, 10, mixed=False)
    assert said["weights"] == said["gradients"] == said["reference"] == size(gpt.parameters()) == 4 * said["parameters"]
    assert said["optimiser"] == size(moments) and said["copies"] == 0
    half = training_memory(gpt.config, 1, 10)
    matrices = [p for name, p in gpt.blocks.named_parameters() if "norm" not in name]
    assert half["reference"] == size(gpt.parameters()) - size(matrices) / 2
    assert half["copies"] == (size(matrices) + size([gpt.head_weight])) / 2
    assert said["cache"] == 10 * 6 * 2 * 4 * gpt.config.n_kv_head * gpt.config.head_dim
    assert training_memory(gpt.config, 1, 10, trained=2)["optimiser"] == 2 * said["optimiser"]


def test_what_training_takes_is_said_and_refused_with_what_would_fit(monkeypatch, capsys):
    args = reft.Args(device="cpu", train_size=50, eval_size=5)
    policy, _, train, _, _ = reft.prepare(args)
    assert re.search(r"memory of a process: 0\.1M parameters; weights 0\.\d MiB, .* activations of a micro-batch of \d+ tokens a ",
                     capsys.readouterr().out)
    args.device = "cuda"
    longest = max(reft.row_length(problem, args) for problem in train)
    needs = lambda rows, again, shards: training_memory(policy.config, rows * longest, 0, 1, again, True, shards)["least"]
    for free, words in ((needs(16, False, 1), "--micro-batch-size 16"), (2 ** 20, "a smaller model"),
                        (needs(2, True, 1), "--micro-batch-size 2 --checkpoint-activations")):
        monkeypatch.setattr(reft, "free_memory", lambda device: free + 2 ** 29)
        with pytest.raises(InputError, match=f"the GPU has .* what would fit: {words}$"):
            reft.check_memory(policy.config, train, args)


QWEN = {"0.5B": (896, 24, 14, 2, 4864, True), "1.5B": (1536, 28, 12, 2, 8960, True), "3B": (2048, 36, 16, 2, 11008, True),
        "7B": (3584, 28, 28, 4, 18944, False)}


def qwen(name):
    width, layers, heads, kv_heads, inner, tied = QWEN[name]
    return GPTConfig(vocab_size=152064 if name == "7B" else 151936, eos_id=0, n_embd=width, n_layer=layers, n_head=heads,
                     n_kv_head=kv_heads, n_inner=inner, tied_head=tied, qkv_bias=True)


def largest(c, card, again, shards):
    """The largest micro-batch, in rows of 1,024 tokens, for a card of so many GB."""
    needs = lambda rows: training_memory(c, 1024 * rows, 0, 1, again, True, shards)["least"]
    return max((rows for rows in (1, 2, 4, 8, 16, 32, 64) if needs(rows) <= card * 1e9 - 2 ** 29), default=0)


def memory_table(monkeypatch):
    models = {name: qwen(name) for name in QWEN}
    with torch.device("meta"):
        built = {name: GPT(c) for name, c in models.items()}         # to count a model's parameters, once
    monkeypatch.setattr(model, "GPT", lambda c: next(built[name] for name in QWEN if models[name] is c))
    lines = ["| model | one GPU: 24 GB | 48 GB | 80 GB | eight, --shard: 24 GB | 48 GB | 80 GB |", "|---" * 7 + "|"]
    for name in QWEN:
        cells = [[largest(models[name], card, again, shards) for again in (False, True)]
                 for shards in (1, 8) for card in (24, 48, 80)]
        lines.append("| " + " | ".join([name, *(f"{plain or '-'} / {again or '-'}" for plain, again in cells)]) + " |")
    return "\n".join(lines)


def test_what_is_spread_is_counted_by_parts():
    one, eight = [training_memory(qwen("7B"), 1024, 0, 1, True, True, shards) for shards in (1, 8)]
    for name in "weights", "gradients", "optimiser":
        assert eight[name] == one[name] / 8
    assert one["gathered"] == 0 and 0 < eight["gathered"] < one["weights"] and one["activations"] == eight["activations"]


def test_the_table_in_readme(monkeypatch):
    assert memory_table(monkeypatch) in (ROOT / "README.md").read_text()


def save_and_measure(folder):
    """In a process of its own: bytes that it held at its height more than before it saved."""
    tokenizer = model.Tokenizer.from_pieces([chr(i) for i in range(33, 127)])
    gpt = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, n_layer=18, n_head=8, n_embd=256))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.save_checkpoint(folder, gpt, tokenizer)
    (folder / "held").write_text(str(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


def test_a_checkpoint_is_written_in_the_memory_of_one_parameter(tmp_path):
    """To save 60 MB of weights takes at most a fifth of that on top of them; the file is the package's to the byte."""
    process = fork(save_and_measure, tmp_path)
    process.start(), process.join()
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size > 5e7 and int((tmp_path / "held").read_text()) < 0.2 * file.stat().st_size
    assert safetensors.torch.save(safetensors.torch.load_file(file), metadata={"format": "pt"}) == file.read_bytes()


class Held(TorchDispatchMode):
    """The bytes of tensors made while it is entered, at their height. On the meta device they are counted, and take no memory;
    there a copy to the host stays a tensor of that device."""

    def __init__(self):
        super().__init__()
        self.storages, self.height = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("device") == torch.device("cpu"):
            kwargs = kwargs | {"device": "meta"}
        made = function(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        for x in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self.storages[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes()
        self.storages = {key: kept for key, kept in self.storages.items() if not kept[0].expired()}
        self.height = max(self.height, sum(size for _, size in self.storages.values()))
        return made


def test_what_is_held_is_counted():
    with Held() as held:
        a = torch.zeros(100, device="meta")
        b = a.view(10, 10) + 1
        del a, b
        c = torch.zeros(50, device="meta").cpu()
    assert held.height == 800 and c.is_meta


def test_7b_is_loaded_and_saved_in_1_2_times_its_file(tmp_path, monkeypatch):
    """Counted on the meta device: a file in fp32, as training saves it, and one in bf16, whose weights become fp32."""
    tokenizer = model.Tokenizer.from_pieces([chr(i) for i in range(33, 127)])
    with torch.device("meta"):
        gpt = GPT(qwen("7B"))
    file = 4 * sum(p.numel() for p in gpt.parameters())
    assert file == pytest.approx(30.5e9, rel=0.01)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda x: b"")        # nothing to write
    with Held() as held:
        model.save_checkpoint(tmp_path, gpt, tokenizer)
    assert 0 < held.height < 0.2 * file                              # on top of the weights, wherever they are

    c, parts = gpt.config, {}
    for name, p in gpt.state_dict().items():
        parts |= dict(model._hf_parts(c, name, tuple(p.shape)))
    for dtype in torch.float32, torch.bfloat16:
        stored = SimpleNamespace(get_tensor=lambda name: torch.empty(parts[name], dtype=dtype, device="meta"))
        with torch.device("meta"):
            shapes = GPT(c)                                          # on the meta device in earnest: not counted
        monkeypatch.setattr(model, "GPT", lambda c: shapes)
        monkeypatch.setattr(model, "_open_weights", lambda folder: dict.fromkeys(parts, stored))
        with Held() as held:
            loaded, _ = model.load_checkpoint(tmp_path)
        assert sum(math.prod(p.shape) for p in loaded.parameters()) * 4 == file
        assert file <= held.height < 1.2 * file
