"""Answers in LaTeX: which are equal, where they stand in a response, and that no text of a model hangs or ends the trainer."""
import dataclasses
import functools
import time

import pytest
import torch

import ppo_reft as reft
import prl
import r3
import score

SCRIPTS = {"ppo_reft": reft, "r3": r3, "score": score, "prl": prl}
EQUAL = [(r"\frac{1}{2}", "0.5"), (r"\frac12", r"\dfrac{1}{2}"), (r"\tfrac{3}{4}", "3/4"), (r"3\frac{1}{2}", r"\frac{7}{2}"),
         (r"\frac{1}{3}", "0.333333"), (r"\sqrt{8}", r"2\sqrt{2}"), (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
         ("2^{10}", "1024"), ("1,000", "1000"), (r"10{,}000", "10000"), (r"\$18.90", "18.9"), (r"50\%", "50"), (r"90^\circ", "90"),
         (r"5\text{ cm}", "5"), (r"1.5\times 10^3", "1500"), ("x^2+2x+1", "(x+1)^2"), ("(a-b)(a+b)", "a^2-b^2"),
         (r"2\sin x\cos x", r"\sin 2x"), ("y=2x+1", "y=1+2x"), ("5", "x=5"), (r"\{1,2\}", r"\{2,1\}"), (r"[0,1)", "[0, 1)"),
         (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"), (r"\text{(C)}", "C"), (r"\begin{pmatrix}1\\2\end{pmatrix}",
         r"\begin{pmatrix} 1 \\ \frac{4}{2} \end{pmatrix}")]
UNEQUAL = [(r"\frac{1}{3}", "0.33"), (r"\sqrt{2}", "1.41"), ("0.01", "0.005"), ("5", "-5"), ("5", r"5 \text{ or } 6"),
           ("5", "5, 6"), ("5", r"\pm 5"), ("(1,2)", "(2,1)"), ("[0,1)", "(0,1]"), ("x^2+2x+1", "(x-1)^2"), ("2x", "2y"),
           ("p-q", "q-p"), (r"\text{east}", r"\text{west}"), (r"\text{C}", "D"), ("3", r"\infty")]


def boxed(text):
    return f"\\boxed{{{text}}}"


@pytest.mark.parametrize("a, b, equal", [(*pair, True) for pair in EQUAL] + [(*pair, False) for pair in UNEQUAL])
def test_forty_pairs(a, b, equal):
    assert reft.same_latex(boxed(a), boxed(b)) == equal
    assert reft.same_latex(boxed(b), boxed(a)) == equal


HOSTILE = ["9^{9^{9^9}}", "(" * 400, "{1," * 300, r"\frac{1}{" * 90 + "1" + "}" * 90, "1+" * 490 + "1", "1" * 990,
           r"\sum_{n=1}^{10^{10}} \frac{1}{n^2}", "\ud800\0\u2028\n", "$" * 900, "\\" * 999,
           "__import__('os').system('touch pwned')", "1" * 1_000_000, ""]


def test_no_text_hangs_or_ends_the_trainer(monkeypatch, tmp_path):
    """Hostile answers in threads, as in a rollout; the right one among them is found, and what is left of the workers is alive."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reft, "COMPARING", [])
    monkeypatch.setattr(reft, "COMPARE", reft.COMPARE.replace("dump_traceback_later(5", "dump_traceback_later(1"))
    problems = [{"gold": boxed("5")}] * (len(HOSTILE) + 1)
    began = time.monotonic()
    assert reft.agree([boxed(text) for text in HOSTILE] + [boxed("2+3")], problems) == [False] * len(HOSTILE) + [True]
    assert time.monotonic() - began < 4 * len(HOSTILE) and not list(tmp_path.iterdir())
    assert all(worker.poll() is None for worker in reft.COMPARING)


def test_a_worker_that_died_is_replaced():
    assert reft.same_latex(boxed("6"), boxed("7-1"))
    for worker in reft.COMPARING:
        worker.kill()
        worker.wait()
    assert reft.same_latex(boxed("6"), boxed("8-2"))


BOXES = [(r"so $\boxed{7}$.", "7"), (r"\boxed{\frac{1}{\sqrt{2}}} and more", r"\frac{1}{\sqrt{2}}"),
         (r"\boxed{1} or \boxed{2}", "2"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
         (r"\boxed{\boxed{3}}", "3"), (r"\boxed{4", None), (r"\boxed{1} and \boxed{4", None), ("no box", None), (r"\boxed{}", ""),
         (r"our answer is $\boxed 2$.", "2"), (r"\boxed{1} or $x=\boxed 12$", "12"), (r"the $\boxed{}$, not \boxed 2 of them", "")]


@pytest.mark.parametrize("text, inside", BOXES)
def test_last_box(text, inside):
    assert reft.last_box(text) == inside


A = reft.ANSWER
NUMBERS = [                                                           # text, read, whether in the asked form
    (f"so{A}18", 18, True), (f"so{A}$18", 18, False), (f"so{A}18\nand more", 18, False), (r"so \boxed{18}", 18, False),
    (r"so \boxed{1,\!000}", 1000, False), (f"so \\boxed{{3}}{A}18", 18, True), (f"so{A}3, no: \\boxed{{18}}", 18, False),
    (f"so{A}\\boxed{{18}}", 18, False), (r"so \boxed{18 or 19}", None, False),
    (f"so{A}\\boxed{{18", 18, False), ("so 18", None, False)]


@pytest.mark.parametrize("text, number, form", NUMBERS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_numbers_are_read_from_boxes_too(name, text, number, form):
    script, problem = SCRIPTS[name], {"gold": 18.0, "header": ""}
    text = text.replace(A, script.ANSWER)
    assert script.read_answers([text], [problem], script.Args()) == [number]
    assert script.in_form(text, problem, script.Args()) == form
    if name != "prl":
        assert script.read_answers([text], [problem], dataclasses.replace(script.Args(), strict=True)) == [number if form else None]


@pytest.mark.parametrize("text, answer, form", [
    (r"so $x = \boxed{\frac12}$.", r"\frac12", True), (rf"so{A}\boxed{{\frac12}}", r"\frac12", True),
    (rf"so{A}$\frac12$.", r"\frac12", False), (rf"so{A}\(\frac12\)", r"\frac12", False), (rf"so{A}\frac12", r"\frac12", False),
    (f"so{A}$.5$.", ".5", False), (r"so \frac12", None, False), (f"so{A}", None, False)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_latex_is_read_from_boxes_and_behind_the_trigger(name, text, answer, form):
    script, problem = SCRIPTS[name], {"gold": boxed("0.5"), "header": ""}
    text = text.replace(A, script.ANSWER)
    answers = script.read_answers([text], [problem], script.Args())
    assert answers == [answer and boxed(answer)] and script.in_form(text, problem, script.Args()) == form
    assert script.reward(answers, [problem], script.Args()).tolist() == [float(answer is not None)]
    if name != "prl":
        args = dataclasses.replace(script.Args(), strict=True)
        assert script.read_answers([text], [problem], args) == [answer and form and boxed(answer) or None]


def test_a_wrong_expression_earns_nothing_and_votes_count_equal_ones_together():
    problem = {"gold": boxed(r"\sqrt{2}")}
    assert reft.reward([boxed("2"), None], [problem] * 2, reft.Args()).tolist() == [0, 0]       # no number, so no partial reward
    assert reft.vote([boxed("3"), boxed("0.5"), None, boxed("4"), boxed(r"\frac12")]) == boxed("0.5")


RECORDS = [({"problem": " Find $x$. ", "solution": r"It is $\boxed{\frac{1}{2}}$.", "answer": r"\frac{1}{2}"},
            r"\frac{1}{2}", True),
           ({"problem": "Find $x$.", "solution": r"It is $\boxed{\frac{1}{2}}$."}, r"\frac{1}{2}", True),         # MATH as released
           ({"problem": "Find $x$.", "solution": r"Our answer is $\boxed 2$."}, "2", True),        # train/algebra/24014 and 25040
           ({"problem": "Find $x$.", "answer": 27.0, "question": "Find $x$."}, "27", False),                         # AMC 23
           ({"problem": "Find $x$.", "answer": r"Start: \[ s=\boxed{1.6} \mathrm{cm} \]"}, "1.6", True)]             # Minerva


@pytest.mark.parametrize("record, gold, demonstrated", RECORDS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_records_of_maths_form(name, record, gold, demonstrated):
    script = SCRIPTS[name]
    problem = script.parse_record(record, script.Args())
    assert (problem["question"], problem["answer"], problem["gold"]) == ("Find $x$.", boxed(gold), boxed(gold))
    assert bool(problem["cot"]) == demonstrated
    text = f"{problem['cot']}{script.ANSWER}{problem['answer']}"                          # what the warm-up teaches
    assert script.reward(script.read_answers([text], [problem | {"header": ""}], script.Args()), [problem],
                         script.Args()).tolist() == [1]
    assert script.in_form(text, problem, script.Args())


@pytest.mark.parametrize("record", [{"problem": "a"}, {"problem": "a", "solution": "no box"}, {"problem": "a", "answer": [1]},
                                    {"problem": "a", "answer": ""}, {"problem": "a", "answer": "1", "solution": 7}])
def test_a_record_without_an_answer_is_refused(record):
    with pytest.raises(reft.InputError):
        reft.parse_record(record, reft.Args())


def test_math_verify_is_needed_for_latex_alone(monkeypatch):
    """Where its process cannot start, whatever the reason, LaTeX is refused: no answer would be right."""
    monkeypatch.setattr(reft, "COMPARE", "import json, sympy, nothing_of_this_name")
    monkeypatch.setattr(reft, "COMPARING", [])
    monkeypatch.setattr(reft, "same_latex", functools.lru_cache(reft.same_latex.__wrapped__))
    with pytest.raises(reft.InputError, match="pip install math-verify"):
        reft.parse_record(RECORDS[0][0], reft.Args())
    reft.parse_record({"question": "a", "answer": "b\n#### 1"}, reft.Args())


def test_no_module_of_the_folder_takes_the_place_of_one_that_compares(monkeypatch, tmp_path):
    (tmp_path / "sympy.py").write_text("raise ImportError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reft, "COMPARING", [])
    assert reft.same_latex(boxed("6"), boxed("5+1"))


def test_a_long_text_is_no_answer_and_starts_nothing(monkeypatch):
    monkeypatch.setattr(reft, "COMPARING", [])
    monkeypatch.setattr(reft.subprocess, "Popen", None)
    assert not reft.same_latex(boxed("5"), boxed("5" + " " * 1000))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_box_is_the_asked_form_where_one_is_asked_for(name):
    script, problem = SCRIPTS[name], {"gold": 18.0, "header": ""}
    asked = dataclasses.replace(script.Args(), system="Put your answer in \\boxed{}.")
    texts = r"so \boxed{18}", r"so \boxed{\$18}", f"so{script.ANSWER}18"
    assert [script.in_form(text, problem, asked) for text in texts] == [True, False, False]
    assert [script.in_form(text, problem, script.Args()) for text in texts] == [False, False, True]


@pytest.mark.parametrize("name", ["ppo_reft", "r3", "score"])
def test_only_programs_have_one_form(name):
    """A start state of r3.py has lines of its demonstration as its header, and is no program."""
    script, problem = SCRIPTS[name], {"gold": 18.0, "header": "9 + 9 = 18"}
    program = dataclasses.replace(script.Args(), cot="program", train_data="x", eval_data="x")
    assert [script.in_form(f"{script.ANSWER}{text}", problem, script.Args()) for text in ("18", "$18")] == [True, False]
    assert script.in_form("    return 18", problem, program)


def test_strict_accuracy_counts_right_answers_in_the_asked_form(monkeypatch):
    texts = f"so{A}18", f"so{A}$18", f"so{A}19"

    class Words:
        eos_id = 0

        def decode(self, ids, goes_on):
            return texts[ids[0] - 1]

    monkeypatch.setattr(reft, "generate", lambda *_: (torch.tensor([[5, 1, 0], [5, 2, 0], [5, 3, 0]]),
                                                      torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, 2)))
    data, _, answers = reft.respond(None, [{"gold": 18.0, "prompt": [5]}] * 3, Words(), reft.Args())
    measured = reft.measures(data, answers)
    assert measured["accuracy"] == [True, True, False] and measured["strict_accuracy"] == [True, False, False]
