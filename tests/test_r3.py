"""What r3.py adds: where demonstrations are cut, what a start gives, which starts a batch holds; and that the rest is ReFT."""
import collections
import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import torch

import ppo_reft as reft
import r3
from model import GPT, GPTConfig, InputError, Tokenizer
from processes import no_pictures
from test_losses import Words, tiny

ARGS = dataclasses.replace(r3.Args(), device="cpu")
PROGRAMS = {"cot": "program", "train_data": "x"}            # programs come from files only
PIECES = [chr(i) for i in range(32, 127)] + ["\n", "\n\n", "\n   ", ".\n", "####", "    ", " = ", "clips"]   # seams to get wrong


def encoded(record, tokenizer=None, **flags):
    """A record in ReFT's form, read and encoded as prepare() does."""
    args = dataclasses.replace(ARGS, **flags)
    return r3.encode_problem(r3.parse_record(record, args), tokenizer or Tokenizer.from_pieces(PIECES), args)


def given(state, problem):
    """The ids of the demonstration with which a start's prompt goes on."""
    length = len(problem["prompt"])
    assert state["prompt"][:length] == problem["prompt"]
    return state["prompt"][length:]


# ---- F10: p_k ----------------------------------------------------------------------------------------------------------------

TABLE = {1: [0, 0, 0, 0, 0], 2: [0, 0, 1, 1, 1], 3: [0, 1, 1, 2, 2], 4: [0, 1, 2, 2, 3], 5: [0, 1, 2, 3, 4], 6: [0, 1, 2, 4, 5],
         7: [0, 1, 3, 4, 6], 8: [0, 2, 3, 5, 6], 9: [0, 2, 4, 5, 7], 10: [0, 2, 4, 6, 8], 13: [0, 3, 5, 8, 10]}


@pytest.mark.parametrize("lines, expected", TABLE.items())
def test_lines_given_at_each_start(lines, expected):
    assert r3.evenly(lines, 5) == expected


def test_halves_are_rounded_up():
    assert r3.evenly(3, 6) == [0, 1, 1, 2, 2, 2]                             # round(0.5) would be 0
    assert r3.evenly(9, 6) == [0, 2, 3, 5, 6, 8]
    assert r3.evenly(7, 1) == [0]


# ---- F11: the seam -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pieces, tokens, count", [
    (["x", " =", " 1", "\n   ", " y", " 2"], ["x", " =", " 1", "\n   ", " y", " =", " 2"], 4),
    (["x", " =", " 1", "\n", "    y", " 2"], ["x", " =", " 1", "\n", "    y", " =", " 2"], 4),
    (["x", " =", " 1\n", "    y", " 2"], ["x", " =", " 1\n", "    y", " =", " 2"], 3),
])
def test_a_line_ends_where_the_next_one_begins(pieces, tokens, count):
    tokenizer, text = Tokenizer.from_pieces(pieces), "x = 1\n    y = 2"
    problem = {"header": "", "cot": text, "response": tokenizer.encode(text)}
    assert [tokenizer.decode([i]) for i in problem["response"]] == tokens
    whole = r3.tokens_of_lines(problem, 1, tokenizer)
    assert whole == (3 if "\n   " in pieces else count)                     # the token across the place is left to the policy
    assert r3.tokens_of_lines(problem, 0, tokenizer) == 0 and r3.tokens_of_lines(problem, 2, tokenizer) == len(tokens)


def test_the_question_alone_gives_nothing_of_a_demonstration():
    """Also where its ids begin with a space of their own that is a token by itself, as Llama 2's of "She" here and of any digit."""
    tokenizer = Tokenizer.from_file(Path(__file__).parent / "fixtures/tokenizers/llama2/tokenizer.json")
    problem = {"header": "", "prompt": [1], "cot": "She sold 3.\nThen 4.", "response": tokenizer.encode("She sold 3.\nThen 4.")}
    assert tokenizer.token_bytes(problem["response"][0]) == b" "
    for split in ("lines", "uniform"):
        states = r3.start_states(problem, tokenizer, dataclasses.replace(ARGS, split=split))
        assert states[0]["prompt"] == [1] and states[-1]["prompt"] != [1]


def test_blank_lines_do_not_count_and_belong_to_the_line_above():
    problem = encoded({"question": "How many?", "answer_cot": "a\n\n \nb\nc", "answer_value": "3"})
    states = r3.start_states(problem, Tokenizer.from_pieces(PIECES), ARGS)
    decode = Tokenizer.from_pieces(PIECES).decode
    assert [decode(given(s, problem)) for s in states] == ["", "a\n\n \n", "a\n\n \n", "a\n\n \nb\n", "a\n\n \nb\n"]


def test_text_counts_in_bytes():
    tokenizer = Tokenizer.from_pieces(PIECES + ["ä", "€"])
    problem = encoded({"question": "?", "answer_cot": "5 € = ä\n6 €", "answer_value": "6"}, tokenizer)
    states = r3.start_states(problem, tokenizer, ARGS)
    assert tokenizer.decode(given(states[4], problem)) == "5 € = ä\n"


def test_uniform_cuts_by_tokens_and_auto_takes_it_for_a_single_line():
    tokenizer = Tokenizer.from_pieces(PIECES)
    ten, three = ({"question": "?", "answer_cot": text, "answer_value": "1"} for text in ("a b c d ef", "abc"))

    def counts(record, **flags):
        problem = encoded(record, tokenizer)
        return [len(given(s, problem)) for s in r3.start_states(problem, tokenizer, dataclasses.replace(ARGS, **flags))]

    assert counts(ten, split="uniform") == counts(ten, split="auto") == [0, 2, 4, 6, 8]
    assert counts(three, split="uniform") == [0, 1, 1, 2, 2]
    assert counts(ten, split="lines") == [0] * 5
    two = {"question": "?", "answer_cot": "ab\ncd", "answer_value": "1"}
    assert counts(two, split="auto") == counts(two, split="lines") == [0, 0, 3, 3, 3]
    assert counts(two, split="uniform") == [0, 1, 2, 3, 4]


GSM = [{"question": "Ann sold 4 clips in May.\nHow many?",
        "answer": "In April 2+2=<<2+2=4>>4 clips.\n\nIn May 4/2 = <<4/2=2>>2.\nAll: 4+2=6\n#### 6"},
       {"question": "What is 1,000 + 0?", "answer": "1,000 is enough.\nIt stays.\n#### 1,000"}]
TEXT = [{"question": "What is 3 + 4?", "answer_cot": "3 + 4 = 7\n\nTherefore, the answer is <7>.", "answer_value": "7.0"},
        {"question": "What is 9 - 4?", "answer_cot": "9 less 4.\n9 - 4 = 5\nTherefore, the answer is <5>.", "answer_value": "5"}]


@pytest.mark.parametrize("split", ["lines", "uniform", "auto"])
@pytest.mark.parametrize("stages", [1, 5, 6])
@pytest.mark.parametrize("record", GSM + TEXT)
def test_start_and_rest_are_the_demonstration(record, stages, split):
    """The tokens of prompt + given + rest are those of the warm-up, no start holds the answer line, later ones give more, and the
    whole earns 1."""
    tokenizer, args = Tokenizer.from_pieces(PIECES), dataclasses.replace(ARGS, stages=stages, split=split)
    problem = encoded(record, tokenizer)
    states = r3.start_states(problem, tokenizer, args)
    counts = [len(given(s, problem)) for s in states]
    assert [s["stage"] for s in states] == list(range(stages)) and counts[0] == 0 and counts == sorted(counts)
    for state, count in zip(states, counts):
        assert r3.sft_row(state)[0] == r3.sft_row(problem)[0]
        begun = tokenizer.decode(given(state, problem))
        assert begun == state["header"]
        assert "#" not in begun and problem["cot"].startswith(begun) and begun.strip() != problem["cot"]
        assert r3.reward(r3.read_answers([tokenizer.decode(state["response"][:-1])], [state], args), [state], args).item() == 1


def test_the_answer_line_is_no_line_of_the_demonstration():
    tokenizer = Tokenizer.from_pieces(PIECES)
    for record in GSM[1], TEXT[1]:                                           # T = 2, not 3; SVAMP's closing sentence is gone
        states = r3.start_states(encoded(record, tokenizer), tokenizer, ARGS)
        assert [s["header"].count("\n") for s in states] == [0, 0, 1, 1, 1]
    assert tokenizer.decode(encoded(TEXT[1], tokenizer)["response"][:-1]) == "9 less 4.\n9 - 4 = 5\n#### 5"


@pytest.mark.parametrize("split, lines", [("lines", [0, 1, 1, 2, 2]), ("uniform", None)])
def test_the_boxed_answer_of_math_is_not_given(split, lines):
    """Nor what follows it; the rest of a demonstration that is nothing else is the policy's, too."""
    tokenizer, args = Tokenizer.from_pieces(PIECES), dataclasses.replace(ARGS, split=split)
    cases = {"One.\nTwo.\nSo $\\boxed{3}$,\nand that\nwas all.": lines, "\\boxed{3}\nas it is.": [0] * 5, "1\n2\n\\boxed{3}": lines}
    for text, given_lines in cases.items():
        problem = {"header": "", "prompt": [1], "cot": text, "response": tokenizer.encode(text)}
        starts = [state["header"] for state in r3.start_states(problem, tokenizer, args)]
        assert all(text.startswith(start) and "box" not in start for start in starts)
        assert given_lines is None or [start.count("\n") for start in starts] == given_lines
    if split == "uniform":                                                  # six of the seven tokens before the box
        problem |= {"cot": "1 + 2 = $\\boxed{3}$", "response": tokenizer.encode("1 + 2 = $\\boxed{3}$")}
        assert r3.start_states(problem, tokenizer, args)[4]["header"] == "1 + 2 = "


# ---- programs ----------------------------------------------------------------------------------------------------------------

PROGRAM = 'def solution():\n    """How many?"""\n    a = 1\n    b = 2\n\n    c = a + b\n    d = c + 0\n    return d'   # 7 lines
SHORT = ['def solution():\n    """How many?"""\n    return 3', "def solution():\n    return 3"]
REWORDED = PROGRAM.replace("How many?", "So how\n    many?")


@pytest.mark.parametrize("split", ["lines", "uniform", "auto"])
@pytest.mark.parametrize("program", [PROGRAM, REWORDED, *SHORT])
def test_a_program_cut_anywhere_and_joined_runs(program, split):
    """Every start gives the prompt's def line and docstring, goes on with the program's own lines, and the whole earns 1."""
    tokenizer, args = Tokenizer.from_pieces(PIECES), dataclasses.replace(ARGS, **PROGRAMS, split=split)
    problem = encoded({"question": "How many?", "answer_cot": program, "answer_value": "3.0"}, tokenizer, **PROGRAMS)
    states = r3.start_states(problem, tokenizer, args)
    assert problem["header"] == PROGRAM[:PROGRAM.index("    a")] and tokenizer.decode(problem["prompt"]).endswith(problem["header"])
    assert states[0]["header"] == problem["header"] and states[0]["prompt"] == problem["prompt"]
    for state in states:
        assert r3.sft_row(state)[0] == r3.sft_row(problem)[0]
        assert state["header"] == problem["header"] + tokenizer.decode(given(state, problem))
    texts = [tokenizer.decode(state["response"][:-1]) for state in states]
    assert all(text.strip() for text in texts)
    assert (r3.reward(r3.read_answers(texts, states, args), states, args) == 1).all()


@pytest.mark.parametrize("split", ["lines", "uniform"])
@pytest.mark.parametrize("name", ["llama2", "llama2_first", "llama2_split"])
def test_a_program_keeps_its_indentation(name, split, monkeypatch):
    """Llama 2's tokenizers put a space before a text, but none before what goes on from the header or a start: the ids are those
    of the whole, and what is sampled from each start is run with the indentation that it has."""
    tokenizer = Tokenizer.from_file(Path(__file__).parent / f"fixtures/tokenizers/{name}/tokenizer.json")
    args = dataclasses.replace(ARGS, **PROGRAMS, split=split)
    problem = encoded({"question": "How many?", "answer_cot": PROGRAM, "answer_value": "3.0"}, tokenizer, **PROGRAMS)
    whole = tokenizer.encode(tokenizer.decode(problem["prompt"][len(tokenizer.bos_ids):]) + problem["cot"])
    assert tokenizer.bos_ids + whole + [tokenizer.eos_id] == problem["prompt"] + problem["response"]
    states = r3.start_states(problem, tokenizer, args)
    tokens, mask = r3.pack([r3.sft_row(state) for state in states], tiny()).values()
    monkeypatch.setattr(r3, "generate", lambda *_: (tokens, mask, torch.zeros(mask.shape)))
    data, texts, _ = r3.respond(None, states, tokenizer, args)
    assert [state["header"] + text for state, text in zip(states, texts)] == [PROGRAM] * args.stages
    assert (data["outcomes"] == 1).all()


@pytest.mark.parametrize("program", [PROGRAM, REWORDED])
def test_lines_of_a_program_count_from_its_header(program):
    tokenizer, args = Tokenizer.from_pieces(PIECES), dataclasses.replace(ARGS, **PROGRAMS)
    problem = encoded({"question": "How many?", "answer_cot": program, "answer_value": "3"}, tokenizer, **PROGRAMS)
    states = r3.start_states(problem, tokenizer, args)
    assert [len(r3.line_starts(s["header"])) for s in states] == [2, 2, 3, 4, 6]
    assert [s["header"][len(problem["header"]):] for s in states[1:3]] == ["", "    a = 1"]             # "\n   " is one token
    two = encoded({"question": "How\nmany?", "answer_cot": PROGRAM, "answer_value": "3"}, tokenizer, **PROGRAMS)
    assert [len(r3.line_starts(s["header"])) for s in r3.start_states(two, tokenizer, args)] == [3, 3, 3, 5, 6]      # T = 8


def test_uniform_counts_the_tokens_of_a_programs_header():
    tokenizer, args = Tokenizer.from_pieces(PIECES), dataclasses.replace(ARGS, **PROGRAMS, split="uniform")
    problem = encoded({"question": "How many?", "answer_cot": PROGRAM, "answer_value": "3"}, tokenizer, **PROGRAMS)
    head, body = len(tokenizer.encode(problem["header"])), len(problem["response"]) - 1
    expected = [max(p - head, 0) for p in r3.evenly(head + body, 5)]
    assert [len(given(s, problem)) for s in r3.start_states(problem, tokenizer, args)] == expected
    assert expected[2] == 0 < expected[3]


def builtin(split=0, **flags):
    """Encoded built-in problems of a split, and their tokenizer."""
    args = dataclasses.replace(ARGS, **{"train_size": 80, "eval_size": 10} | flags)
    tokenizer = r3.builtin_tokenizer(args)
    return [r3.encode_problem(p, tokenizer, args) for p in r3.load_problems(args)[split]], tokenizer, args


def test_builtin_problems_have_the_seam_of_their_demonstrations():
    problems, tokenizer, args = builtin()
    for problem in problems:
        for state in r3.start_states(problem, tokenizer, args):
            assert r3.sft_row(state)[0] == r3.sft_row(problem)[0]
            assert "####" not in state["header"]


@pytest.mark.parametrize("look_ups", [3, 4])
def test_builtin_demonstrations_follow_the_tables_and_change_their_style_line_by_line(look_ups):
    problems, tokenizer, args = builtin(train_size=400, look_ups=look_ups)
    texts = [tokenizer.decode(p["response"][:-1]) for p in problems]
    assert (r3.reward(r3.read_answers(texts, problems, args), problems, args) == 1).all()        # right, however they are written
    assert all(sorted(table) == list(range(10)) for table in r3.TABLES.values())                # so no wrong state comes back
    careful, both = [], 0
    for problem, text in zip(problems, texts):
        assert problem["response"] == tokenizer.encode(text) + [tokenizer.eos_id]
        state, styles = int(problem["question"].partition("=")[2]), []
        steps = re.findall(rf"(\d+):([a-h]{{{look_ups}}})", problem["question"])
        for (number, step), line in zip(steps, problem["cot"].split("\n"), strict=True):
            long = f"{number}:"
            for letter in step:
                state = r3.TABLES[letter][state]
                long += f"{letter}{state}"
            styles.append(line == long)
            assert styles[-1] or line == f"{number}:{step}{state}"
        assert state == problem["gold"]
        judged = r3.judged_lines(problem, text)
        assert judged == [("careful" if style else "hasty", True) for style in styles]
        careful, both = careful + styles, both + (len(set(styles)) == 2)
    assert sum(careful) / len(careful) == pytest.approx(0.45, abs=4 * (0.25 / len(careful)) ** 0.5) and both > 250


def test_coins_are_counted_line_by_line():
    """Problem 4 -> 6 letters in two steps: a right careful line, a hasty one right from a wrong state, and what is no line."""
    a, b = (r3.TABLES[letter] for letter in "ab")
    problem = {"start": 4, "chain": ["aba", "bbb"]}
    first, wrong = [a[4], b[a[4]], a[b[a[4]]]], (a[b[a[4]]] + 1) % 10
    careful, after = "1:a{}b{}a{}".format(*first), lambda state: b[b[b[state]]]
    lines = lambda *texts: r3.judged_lines(problem, "\n".join(texts))
    assert lines(careful, f"2:bbb{after(first[2])}\n#### 1") == [("careful", True), ("hasty", True)]
    assert lines(f"1:aba{wrong}", f"2:bbb{after(wrong)}\n#### 1") == [("hasty", False), ("hasty", True)]
    assert lines(careful, f"2:bbb{(after(first[2]) + 1) % 10}\n#### 1") == [("careful", True), ("hasty", False)]
    for broken in (f"2:abb{first[0]}", "3:bbb1", "2:bbb", "2:b1bb1", ""):
        assert lines(careful, broken) == [("careful", True), ("malformed", False)], broken
    assert lines(careful + "\n#### 1") == [("careful", True), ("malformed", False)]
    assert lines(careful, f"2:bbb{after(first[2])}", "3:aaa1\n#### 1")[2:] == [("malformed", False)]


def test_the_prediction_is_the_product_of_the_coins(monkeypatch):
    """Half of the steps right: a chain of 3 comes out right with 1/8, and by chance in a tenth of the rest."""
    problem = {"start": 4, "chain": ["aaa"] * 3, "gold": 0.0, "prompt": [1], "cot": "1:aaa1", "response": [1, 2], "header": ""}
    monkeypatch.setattr(r3, "start_states", lambda problem, *_: [problem])
    monkeypatch.setattr(r3, "respond", lambda _, batch, *rest: ({"outcomes": torch.ones(len(batch))}, ["x"] * len(batch), []))
    monkeypatch.setattr(r3, "judged_lines", lambda *_: [("careful", True), ("hasty", False)])
    found = r3.coins(None, [problem] * 4, None, ARGS)
    assert found["step_right"] == 0.5 and found["predicted"] == pytest.approx(1 / 8 + 7 / 80)
    assert (found["careful_right"], found["hasty_right"], found["careful_share"], found["sampled"]) == (1, 0, 0.5, 1)


@pytest.mark.parametrize("flags, words", [({"cot": "program"}, "--cot program needs --train-data"),
                                          ({"operations_train": 17}, "at most 16 steps"),
                                          ({"operations_high": 17}, "at most 16 steps"),
                                          ({"look_ups": 17}, "at most 16 look-ups")])
def test_what_built_in_problems_cannot_be_is_refused(flags, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(ARGS, **flags)


def test_programs_are_tested_without_training_data():
    assert dataclasses.replace(ARGS, cot="program", eval_data="x", evaluate_only=True).cot == "program"


def test_a_record_is_of_either_form_and_its_answer_a_number():
    same = {"question": "How many?", "cot": "9 + 9 = 18", "answer": "18", "gold": 18.0}
    assert r3.parse_record({"question": "How many? ", "answer": "9 + 9 = 18\n#### 18"}, ARGS) == same
    record = {"question": "How many?", "answer_cot": "9 + 9 = 18\n\nTherefore, the answer is <18>.", "answer_value": "18"}
    assert r3.parse_record(record, ARGS) == same
    program = dataclasses.replace(ARGS, **PROGRAMS)
    assert r3.parse_record(record | {"answer_cot": REWORDED}, program)["cot"] == PROGRAM[PROGRAM.index("    a"):]
    for raw, args, words in [(record | {"answer_value": "c"}, ARGS, "'c' is not a number"),
                             ({"answer": "#### 18"}, ARGS, "`question`"),
                             ({"question": "How many?", "answer": ["#### 18"]}, ARGS, "neither"),
                             ({"question": "How many?", "answer": "#### 18"}, program, "--cot program")]:
        with pytest.raises(InputError, match=words):
            r3.parse_record(raw, args)


def test_builtin_rollouts_start_from_problems_as_long_as_the_test():
    sizes = {"train_size": 200, "eval_size": 20, "operations_low": 5, "operations_high": 8, "operations_train": 10}
    (train, tokenizer, args), (test, *_) = builtin(**sizes), builtin(split=2, **sizes)
    starts = r3.all_starts(train, r3.initial_policy(args)[0], tokenizer, args)
    steps = lambda problem: problem["question"].count(":")
    assert {steps(p) for p in train} == set(range(1, 11)) and {steps(p) for p in test} == {5, 6, 7, 8}
    assert [states[0]["question"] for states in starts] == [p["question"] for p in train if 5 <= steps(p) <= 8]
    with pytest.raises(InputError, match="no training problem has --operations-low 12"):
        r3.all_starts(train, None, tokenizer, dataclasses.replace(args, operations_low=12, operations_high=12))


# ---- F12: which starts a batch holds -----------------------------------------------------------------------------------------

STARTS = [[{"stage": k, "number": i} for k in range(5)] for i in range(16)]


def stages_drawn(**flags):
    args = dataclasses.replace(ARGS, iterations=10, batch_size=8, **flags)
    return [r3.draw_starts(STARTS, iteration, args) for iteration in range(1, 11)]


def test_every_method_makes_as_many_rollouts():
    for method in ("r3", "staged", "rl"):
        assert sum(map(len, stages_drawn(method=method))) == 80


def test_staged_goes_backwards_an_equal_share_each():
    drawn = [{s["stage"] for s in batch} for batch in stages_drawn(method="staged")]
    assert drawn == [{k} for k in (4, 4, 3, 3, 2, 2, 1, 1, 0, 0)]
    for iterations in (1, 3, 7, 12, 60):                                    # no multiple of M: still ends with the question alone
        args = dataclasses.replace(ARGS, method="staged", iterations=iterations)
        ks = [r3.draw_starts(STARTS, i, args)[0]["stage"] for i in range(1, iterations + 1)]
        assert ks == sorted(ks, reverse=True) and ks[-1] == 0 and (iterations < 5 or set(ks) == {0, 1, 2, 3, 4})


def test_mixed_visits_every_start_once_an_epoch_equal_ones_included():
    drawn = sum(stages_drawn(method="r3"), [])                               # 80 = 16 problems * 5 starts
    assert sorted((s["number"], s["stage"]) for s in drawn) == [(i, k) for i in range(16) for k in range(5)]
    assert len({s["stage"] for s in drawn[:8]}) > 1
    assert {s["stage"] for batch in stages_drawn(method="rl") for s in batch} == {0}


def test_weights_repeat_or_drop_starts():
    counts = collections.Counter(s["stage"] for batch in stages_drawn(method="r3", stage_weights="2,0,1,1,1") for s in batch)
    assert counts == {0: 32, 2: 16, 3: 16, 4: 16}


@pytest.mark.parametrize("weights", ["1,1", "1,1,1,1,x", "0,0,0,0,0", "1,1,1,1,-1", "1.5,1,1,1,1", "1000,1,1,1,1", "1,1,1,1,"])
def test_wrong_weights_are_refused(weights):
    with pytest.raises(InputError, match="stage-weights"):
        dataclasses.replace(ARGS, stage_weights=weights)


def test_a_start_that_fills_the_context_is_refused():
    tokenizer = Tokenizer.from_pieces(PIECES)
    policy = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16, max_len=200,
                           eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id))
    problem = encoded(TEXT[1], tokenizer)
    used = len(r3.start_states(problem, tokenizer, ARGS)[-1]["prompt"])
    fits, too_long = (dataclasses.replace(ARGS, train_data="x", max_new_tokens=n - used) for n in (200, 201))
    assert r3.all_starts([problem], policy, tokenizer, fits)
    with pytest.raises(InputError, match="takes 201 tokens"):
        r3.all_starts([problem], policy, tokenizer, too_long)
    assert r3.all_starts([problem], policy, tokenizer, dataclasses.replace(too_long, method="rl"))       # gives nothing


# ---- outcomes ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("#### 18", 1), ("#### $18", 1), ("#### 18 apples.", 1), ("#### 19", 0.2), ("18", 0), ("#### nan", 0), ("#### 5\n#### 18", 1),
    ("#### 18\n#### 5", 0.2), ("The answer is 18", 0), ("####18", 1), ("", 0)])
def test_outcomes(text, expected):
    problem = {"gold": 18.0}
    assert r3.reward(r3.read_answers([text], [problem], ARGS), [problem], ARGS).item() == pytest.approx(expected)


def test_svamp_pays_a_tenth_and_strict_reads_as_the_authors():
    problem, args = {"gold": 1000.0}, dataclasses.replace(ARGS, partial_reward=0.1)
    assert r3.reward(r3.read_answers(["#### 19"], [problem], args), [problem], args).item() == pytest.approx(0.1)
    assert r3.reward(r3.read_answers(["#### 1,000"], [problem], args), [problem], args).item() == 1
    strict = dataclasses.replace(ARGS, strict=True)
    assert r3.reward(r3.read_answers(["#### 1,000"], [problem], strict), [problem], strict).item() == 0


# ---- the loss sees sampled tokens only ---------------------------------------------------------------------------------------

def test_given_tokens_are_context_not_actions():
    """Prompt of 3 ids, 2 given, a response of 3: the mask marks the three sampled tokens, the outcome sits on the last."""
    policy, args = tiny(), dataclasses.replace(ARGS, max_new_tokens=3)
    problem = {"prompt": [5, 6, 7, 8, 9], "header": "89", "response": [2], "gold": 1.0, "stage": 1}
    torch.manual_seed(1)
    data, log = r3.rollout(policy, policy, policy, [problem] * 6, Words(), args)
    assert log["sample"].startswith("89")                                    # the log shows what was given of the sample, too
    row = next(i for i in range(6) if data["response_mask"][i].sum() == 3)
    assert data["response_mask"][row].tolist() == [False] * 4 + [True] * 3
    assert data["tokens"][row, :5].tolist() == [5, 6, 7, 8, 9]
    for name in ("old_logprobs", "old_values", "advantages", "returns"):
        assert not data[name][:, :4].any(), name
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 0, 0]]).bool()
    rewards = r3.token_rewards(torch.tensor([1.0]), torch.zeros(1, 9), torch.zeros(1, 9), mask, args)
    assert rewards[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0]


def test_log_by_stage():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]]).bool()
    data = {"outcomes": torch.tensor([1.0, 0.0, 0.0, 1.0]), "unparsed": torch.tensor([0, 0, 1, 0]).bool(), "response_mask": mask}
    log = r3.by_stage(data, [{"stage": k} for k in (0, 2, 2, 2)], dataclasses.replace(ARGS, stages=3))
    assert log["stage_rollouts"] == [1, 0, 3]
    assert log["stage_accuracy"] == [1, None, pytest.approx(1 / 3, abs=1e-6)]
    assert log["stage_unparsed"] == [0, None, pytest.approx(1 / 3, abs=1e-6)]
    assert log["stage_length"] == [2, None, 2]


# ---- from the question alone it is ReFT --------------------------------------------------------------------------------------

SMALL = dict(device="cpu", train_size=60, eval_size=8, n_layer=1, n_embd=16, n_head=2, warmup_epochs=1, warmup_batch_size=8,
             iterations=2, batch_size=8, minibatch_size=8, micro_batch_size=4, max_new_tokens=12, eval_every=2,
             partial_reward=0.1, operations_low=1, operations_high=6, vf_coef=5.0, lr=5e-4, lam=0.95, warmup_lr=2e-3)


def outcome_of(module, out, **flags):
    """A run's log without times, and its weights."""
    defaults = {f.name: f.default for f in dataclasses.fields(reft.Args)}
    names = {f.name for f in dataclasses.fields(module.Args)}
    with no_pictures():
        module.main(module.Args(**({k: v for k, v in defaults.items() if k in names} | SMALL | {"out": str(out)} | flags)))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    other = re.compile("seconds|phases|tokens_per_second|total_tokens|stage_")
    log = [{k: v for k, v in r.items() if not other.match(k)} for r in log]
    return log, torch.load(out / "state.pt", weights_only=True)["weights"]["policy"]


@pytest.mark.parametrize("kl", ["k1", "exact"])
def test_rl_from_the_question_is_reft_bit_for_bit(kl, tmp_path, monkeypatch):
    """With ReFT's prompt, trigger and partial reward: warm-up, rollouts, updates, evaluation; every number and every weight."""
    for name in ("PROMPT", "ANSWER", "TRIGGER"):
        monkeypatch.setattr(r3, name, getattr(reft, name))
    numeric = lambda rng, operations, args: reft.builtin_problem(rng, operations, reft.Args()) | {"chain": "+" * operations}
    monkeypatch.setattr(r3, "builtin_problem", numeric)
    monkeypatch.setattr(r3, "builtin_tokenizer", lambda args: reft.builtin_tokenizer(reft.Args()))
    monkeypatch.setattr(r3, "coins", lambda *_: {})
    ours, our_weights = outcome_of(r3, tmp_path / "r3", method="rl", kl=kl)
    theirs, weights = outcome_of(reft, tmp_path / "reft", method="reft", kl=kl)
    assert ours == theirs and len(ours) == 4
    assert our_weights.keys() == weights.keys() and all(torch.equal(our_weights[k], weights[k]) for k in weights)


def test_the_demonstration_does_not_touch_rl_from_the_question():
    args = dataclasses.replace(ARGS, **(SMALL | {"method": "rl"}))
    tokenizer = r3.builtin_tokenizer(args)
    policy, _ = r3.initial_policy(args)
    policy.add_value_head()
    records, found = r3.load_problems(args)[0], []
    for change in (lambda cot: cot, lambda cot: "1:aaa1\n" + cot):
        problems = [r3.encode_problem(problem | {"cot": change(problem["cot"])}, tokenizer, args) for problem in records]
        batch = r3.draw_starts(r3.all_starts(problems, policy, tokenizer, args), 1, args)
        torch.manual_seed(0)
        found.append(r3.rollout(policy, policy, policy, batch, tokenizer, args)[0])
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_evaluation_gives_nothing_of_the_demonstration():
    """The dev and test problems that main evaluates come from prepare(): their prompt is the question's."""
    _, tokenizer, _, dev, test = r3.prepare(dataclasses.replace(ARGS, **SMALL))
    assert not any(problem["header"] or "stage" in problem for problem in dev + test)
    assert all(p["prompt"] == tokenizer.encode(r3.PROMPT.format(question=p["question"])) for p in dev + test)


# ---- why: success by start on a chain ----------------------------------------------------------------------------------------

def test_main_evaluates_from_the_question_alone_and_values_start_at_zero(tmp_path, monkeypatch):
    seen, evaluate = [], r3.evaluate
    monkeypatch.setattr(r3, "evaluate", lambda policy, problems, *rest: seen.extend(problems) or evaluate(policy, problems, *rest))
    log, _ = outcome_of(r3, tmp_path / "r3", method="r3", iterations=1, eval_every=1, max_new_tokens=20, warmup_epochs=40,
                        operations_high=1, operations_train=1)                           # of which some get an answer
    assert len(seen) > 20 and not any(problem["header"] or "stage" in problem for problem in seen)
    assert log[1]["explained_variance"] == 0                                             # V = 0: 1 - var(R - 0) / var(R)


def test_success_on_a_chain_of_ten_coins():
    remaining = [10 - p for p in r3.evenly(10, 5)]
    assert [2.0 ** -n for n in remaining] == [2 ** -10, 2 ** -8, 2 ** -6, 2 ** -4, 2 ** -2]
    mixed = sum(2.0 ** -n for n in remaining) / 5
    assert mixed == pytest.approx(0.066602, abs=1e-6) and mixed / 2 ** -10 == pytest.approx(68.2, abs=0.01)


def chain(method, iterations=1000, steps=10, batch=32):
    """One logit for each of ten steps, reward 1 if all that were left are right; REINFORCE on whitened outcomes, a mean per row
    and over rows. Returns the chance of success from the question alone."""
    torch.manual_seed(0)
    theta = torch.zeros(steps)
    args = dataclasses.replace(ARGS, method=method, iterations=iterations, batch_size=batch)
    starts = [[{"stage": k, "given": given} for k, given in enumerate(r3.evenly(steps, 5))] for _ in range(64)]
    for iteration in range(1, iterations + 1):
        given = torch.tensor([s["given"] for s in r3.draw_starts(starts, iteration, args)])
        mask = torch.arange(steps) >= given[:, None]                        # (B, steps)
        chance = theta.sigmoid()
        right = torch.rand(batch, steps) < chance
        outcomes = (right | ~mask).all(1).float()
        advantages, _ = r3.whiten(torch.where(mask, outcomes[:, None], 0), mask)
        row_mean = mask / mask.sum(1, keepdim=True) / batch
        theta += 0.5 * (row_mean * advantages * (right.float() - chance)).sum(0)        # d log pi / d logit = a - p
    return theta.sigmoid().prod().item()


def test_the_curriculum_finds_what_the_question_alone_does_not():
    assert chain("rl") < 0.05
    assert chain("r3") > 0.15 and chain("staged") > 0.15
