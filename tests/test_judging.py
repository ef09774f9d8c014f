"""What a text answers, and whether that is right: the real checker, in its real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lark_fast.evaluation.answers import EMPTY, NONE, TOO_LONG, UNFINISHED, find_answer, has_answered, last_box
from lark_fast.evaluation.checker import CHOICE, MATH, UNREADABLE, Verdict
from lark_fast.evaluation.judging import TOO_SLOW, Judge, Task, Text, _votes_by_words

RIGHT, WRONG = True, False
MATRIX = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"

# gold, text, verdict
MATHEMATICS = [
    ("5", r"\boxed{5}", RIGHT),
    ("5", r"\boxed 5", RIGHT),
    ("5", r"\fbox{5}", RIGHT),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{\frac{4}{2}}}", RIGHT),
    (r"\frac{1}{2}", "so $\\boxed{\\frac{1}{2}}$ it is.", RIGHT),
    # Units, and what stands for them.
    ("5", r"\boxed{5 \text{ cm}}", RIGHT),
    ("5", r"\boxed{5\,\mathrm{km/h}}", RIGHT),
    ("18", r"\boxed{\$18}", RIGHT),
    ("18", r"\boxed{18 dollars}", RIGHT),
    ("90", r"\boxed{90^\circ}", RIGHT),
    # A percentage counts as 50 and as 0.5.
    ("50", r"\boxed{50\%}", RIGHT),
    ("0.5", r"\boxed{50\%}", RIGHT),
    (r"50\%", r"\boxed{50}", RIGHT),
    ("50", r"\boxed{0.5}", WRONG),
    # Fractions, decimals to six places, thousands.
    ("0.5", r"\boxed{\frac12}", RIGHT),
    ("1/3", r"\boxed{0.333}", WRONG),
    ("1,234", r"\boxed{1{,}234}", RIGHT),
    ("1234", r"\boxed{1,234}", RIGHT),
    ("072", r"\boxed{72}", RIGHT),
    ("142.0", r"\boxed{142}", RIGHT),
    # Intervals, sets, tuples, matrices, equations.
    (r"(3,\infty)", r"\boxed{(3, \infty)}", RIGHT),
    (r"(3,\infty)", r"\boxed{[3, \infty)}", WRONG),
    (r"\{1, 2\}", r"\boxed{\{2, 1\}}", RIGHT),
    (r"\{1, 2\}", r"\boxed{\{2, 3\}}", WRONG),
    ("(1, 2)", r"\boxed{(1,2)}", RIGHT),
    ("(1, 2)", r"\boxed{(2,1)}", WRONG),
    (MATRIX, r"\boxed{\begin{bmatrix}1&2\\3&4\end{bmatrix}}", RIGHT),
    (MATRIX, r"\boxed{\begin{bmatrix}1&2\\4&3\end{bmatrix}}", WRONG),
    ("5", r"\boxed{x = 5}", RIGHT),
    ("x^2 + 2x + 1", r"\boxed{(x+1)^2}", RIGHT),
    (r"\text{Monday}", r"\boxed{Monday}", RIGHT),
    # The last box counts, and nothing else.
    ("3", r"\boxed{1} or \boxed{2} or \boxed{3}", RIGHT),
    ("1", r"\boxed{1} or \boxed{2} or \boxed{3}", WRONG),
    ("7", r"\boxed{5}, and 7 is not it", WRONG),
    # No box: what is marked, else what comes last.
    ("18", "9 * 2 = 18\nA: 18", RIGHT),
    ("18", "A: $18.", RIGHT),
    ("18", "A: 17\nA: 18", RIGHT),
    ("18", "9 * 2 = 18\n#### 18", RIGHT),
    ("18", "**Final Answer:** 18", RIGHT),
    ("18", "The answer is **18**.", RIGHT),
    ("18", "The answer is 18 dollars, since 9 are left.", RIGHT),
    ("18", "The answer to the question is $18$ because 9 are left.", RIGHT),
    ("3.5", "the answer is 3.5.", RIGHT),
    ("42", "and so it all comes to 42", RIGHT),
    ("42", "42 is more than 41", WRONG),
    # Not merely a part of it.
    ("5", r"\boxed{5x}", WRONG),
    ("5", r"\boxed{15}", WRONG),
    ("5", r"\boxed{-5}", WRONG),
    ("5", r"\boxed{5xy}", WRONG),
    ("5xy", r"\boxed{5yx}", RIGHT),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", RIGHT),
    # Nor is a part of the right answer the right answer.
    (r"2\sqrt{3}", r"\boxed{2}", WRONG),
    (r"10\pi", r"\boxed{10}", WRONG),
    ("3x+4", r"\boxed{3}", WRONG),
    ("2^{10}", r"\boxed{2}", WRONG),
    (r"5 \text{ or } 7", r"\boxed{7}", WRONG),
    (r"\text{June 20}", r"\boxed{20}", WRONG),
    ("y = 2x + 3", r"\boxed{3}", WRONG),
    ("18 dollars", r"\boxed{18}", RIGHT),
    ("50%", r"\boxed{0.5}", RIGHT),
    # Words say what a number is.
    ("4", r"\boxed{4 million}", WRONG),
    ("4", r"\boxed{4\text{ million}}", WRONG),
    ("4", r"\boxed{4 and a half}", WRONG),
    ("5", r"\boxed{5\text{ or more}}", WRONG),
    ("5", "Answer: The value is at least 5", WRONG),
    ("3", "Answer: no solution for n = 3", WRONG),
    ("3", "A: Tom has 5 and Ann has 3", WRONG),
    ("listen", r"\boxed{silent}", WRONG),
    ("silent", r"\boxed{\text{Silent}}", RIGHT),
    # Digits of small numbers.
    (r"6.6 \times 10^{-34}", r"\boxed{1.2 \times 10^{-34}}", WRONG),
    (r"6.6 \times 10^{-34}", r"\boxed{6.6 \cdot 10^{-34}}", RIGHT),
    ("0.0000004", r"\boxed{0.0000003}", WRONG),
    # What may stand behind an answer, or around it.
    ("5", r"\boxed{5.}", RIGHT),
    ("18", "Final answer:\n\\[\n18\n\\]", RIGHT),
    ("18", "**Correct answer:** 18", RIGHT),
    # More of how units and answers are written.
    ("10", r"\boxed{10~\mathrm{cm}^3}", RIGHT),
    ("18", "A: She sells 9 eggs. The answer is 18, since 9 * 2 = 18.", RIGHT),
    ("18", "A: She makes 9 * 2 = $18 every day.", RIGHT),
    ("9", "A: She makes 9 * 2 = $18 every day.", WRONG),
    ("18", "**Answer:**\n\n18", RIGHT),
    ("24", "With the area\nA = 6\nthe perimeter is 24", RIGHT),
    # What may stand in a text.
    ("5", "\\boxed{5}\x00", RIGHT),
    ("5", "\ud800\\boxed{5}", RIGHT),
    ("5", r"\input{/etc/passwd} \write18{ls} \boxed{5}", RIGHT),
    # Thoughts.
    ("5", r"<think>maybe \boxed{4}</think> \boxed{5}", RIGHT),
    ("4", r"<think>maybe \boxed{4}</think> \boxed{5}", WRONG),
]
CITIES = ("Paris", "London", "It is 5 m/s", "Rome")
OPTIONS = [
    (r"\boxed{B}", RIGHT),
    (r"\boxed{(B)}", RIGHT),
    (r"\boxed{\text{B}}", RIGHT),
    (r"\boxed{b}", RIGHT),
    (r"\boxed{B. London}", RIGHT),
    (r"\boxed{London}", RIGHT),
    (r"\boxed{Rome}", WRONG),
    ("Answer: B", RIGHT),
    ("answer: london", RIGHT),
    ("The correct answer is **B**: London", RIGHT),
    ("The answer is (B).", RIGHT),
    ("So the answer is London.", RIGHT),
    ("Rome is far.\n\n**B**", RIGHT),
    ("A: Paris is no island.\nB", RIGHT),
    (r"\boxed{\textbf{(B)}\ London}", RIGHT),
    (r"\boxed{\mathrm{B}}", RIGHT),
    (r"\boxed{{B}}", RIGHT),
    ("Correct answer: B", RIGHT),
    (r"\boxed{\text{(B) London}}", RIGHT),
    ("(B) London", RIGHT),
    ("Answer: B - London", RIGHT),
    ("Answer: B, since it is on an island.", RIGHT),
    ("The correct option is B.", RIGHT),
    ("The answer is (C).", WRONG),
]
NO_OPTIONS = [
    "I think a good answer would be London.",
    "A city is meant.",
    r"\boxed{E}",
    "Paris or London",
    r"\boxed{(A) and (B)}",
    "Answer: A) or B)",
    "A. Paris\nB. London",
    r"\boxed{" + "." * 900 + "1 2}",
]
ENDLESS = (r"\boxed{9^{9^{9^{9}}}}", r"\boxed{100000000!}")


@pytest.fixture(scope="module")
def judge():
    with Judge(seconds=2, workers=1) as judge:
        yield judge


@pytest.fixture(scope="module")
def impatient():
    with Judge(seconds=1, workers=1) as judge:
        yield judge


def verdict(judge, kind, gold, text, choices=(), **settings):
    task = Task(kind=kind, gold=gold, texts=(Text(text=text, **settings),), choices=choices)
    ((found,),) = [judged.verdicts for judged in judge.judge([task])]
    return found


@pytest.mark.parametrize(("gold", "text", "right"), MATHEMATICS, ids=range(len(MATHEMATICS)))
def test_mathematics(judge, gold, text, right):
    found = verdict(judge, MATH, gold, text)
    assert (found.correct, found.fault) == (right, ""), found


@pytest.mark.parametrize(("text", "right"), OPTIONS, ids=range(len(OPTIONS)))
def test_options(judge, text, right):
    found = verdict(judge, CHOICE, "B", text, CITIES)
    assert (found.correct, found.fault) == (right, ""), found


@pytest.mark.parametrize("text", NO_OPTIONS, ids=range(len(NO_OPTIONS)))
def test_a_letter_in_a_sentence_is_no_option(judge, text):
    assert verdict(judge, CHOICE, "A", text, CITIES).fault == NONE


@pytest.mark.parametrize(
    ("text", "settings", "fault"),
    [
        ("", {}, EMPTY),
        (" \n\t", {}, EMPTY),
        ("<think> it is \\boxed{5}", {}, UNFINISHED),
        ("it is \\boxed{5}", {"thinking": True}, UNFINISHED),
        ("<think>a</think> <think> \\boxed{5}", {}, UNFINISHED),
        ("<think> it is \\boxed{5}</think>  ", {}, NONE),
        ("I do not know.", {}, NONE),
        ("\\boxed{}", {}, NONE),
        ("5 and then \\boxed{6", {"cut": True}, NONE),
        ("so far it is 5", {"cut": True}, NONE),
        ("\\boxed{" + "1 + " * 400 + "1}", {}, TOO_LONG),
    ],
    ids=range(11),
)
def test_texts_without_an_answer(judge, text, settings, fault):
    found = verdict(judge, MATH, "5", text, **settings)
    assert (found.correct, found.fault) == (False, fault)


def test_thoughts_that_the_prompt_opened(judge):
    assert verdict(judge, MATH, "5", "let me see</think> \\boxed{5}", thinking=True).correct
    assert verdict(judge, MATH, "5", "so far \\boxed{5} then", cut=True).correct, "a box is an answer, cut or not"


def test_an_expression_without_end_costs_its_own_text_only(impatient):
    texts = tuple(Text(text=text) for text in (r"\boxed{5}", *ENDLESS, r"\boxed{6}", "A: 5"))
    first, second = impatient.judge(
        [Task(kind=MATH, gold="5", texts=texts), Task(kind=MATH, gold="6", texts=texts[3:4])]
    )
    assert [found.correct for found in first.verdicts] == [True, False, False, False, True]
    assert [found.fault for found in first.verdicts] == ["", TOO_SLOW, TOO_SLOW, "", ""]
    assert first.votes == (0, None, None, 1, 0)
    assert first.majority.correct
    assert second.verdicts[0].correct


def test_texts_that_cannot_be_compared_keep_their_verdicts(impatient):
    """Each is soon seen to be no set; whether two of them are equal takes for ever."""
    answers = (r"\{2, 1\}", "(x+y+z)^{300}", "(x+y+z)^{299}(x+y+z+1)", "(x+y+z)^{300}")
    (judged,) = impatient.judge(
        [Task(kind=MATH, gold=r"\{1, 2\}", texts=tuple(Text(text=rf"\boxed{{{answer}}}") for answer in answers))]
    )
    assert [(found.correct, found.fault) for found in judged.verdicts] == [(True, ""), *[(False, "")] * 3]
    assert judged.votes == (0, 1, 2, 1)
    assert (judged.majority.answer, judged.majority.correct) == ("(x+y+z)^{300}", False)


def test_votes_where_values_cannot_be_compared():
    right, also = Verdict(correct=True, answer="0.5"), Verdict(correct=True, answer="1/2")
    wrong, none = Verdict(correct=False, answer="7"), Verdict(correct=False, answer="?", fault=UNREADABLE)
    assert _votes_by_words([wrong, right, none, also, wrong]) == [0, 1, None, 1, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process is not told that its parent has died")
def test_no_process_outlives_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        """
import multiprocessing
from lark_fast.evaluation.judging import Judge, Task, Text

def task(text):
    return Task(kind="math", gold="5", texts=(Text(text=text),))

if __name__ == "__main__":
    with Judge(seconds=100, workers=1) as judge:
        list(judge.judge([task("A: 5")]))
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        list(judge.judge([task(r"\\boxed{100000000!}")]))
"""
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        children = [int(child) for child in parent.stdout.readline().split()]
        time.sleep(1)  # until it is in the expression
        parent.kill()
    try:
        assert children
        for _ in range(100):
            if not any(map(runs, children)):
                break
            time.sleep(0.1)
        assert not any(map(runs, children))
    finally:
        for child in filter(runs, children):
            os.kill(child, signal.SIGKILL)


def runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    "text",
    [
        "1" * 1_000_000,
        "\\boxed{" * 100_000,
        "{" * 100_000 + "}" * 100_000,
        "answer is " * 100_000,
        "*" * 1_000_000,
        "\\boxed{" + "{" * 300 + "}" * 300 + "}",
    ],
    ids=["digits", "open boxes", "braces", "marks", "stars", "nested"],
)
def test_texts_made_to_be_slow(judge, text):
    assert not verdict(judge, MATH, "5", text).correct
    assert verdict(judge, MATH, "5", text + "\n\\boxed{5}").correct


def test_what_cannot_be_read(judge):
    found = verdict(judge, MATH, "5", r"\boxed{\text{}}")
    assert (found.correct, found.fault, found.answer) == (False, UNREADABLE, r"\text{}")


def test_all_right_answers_are_one_vote(judge):
    texts = tuple(Text(text=text) for text in (r"\boxed{0.5}", r"\boxed{50\%}", r"\boxed{50}"))
    (judged,) = judge.judge([Task(kind=MATH, gold="50", texts=texts)])
    assert [one.correct for one in judged.verdicts] == [False, True, True]
    assert judged.votes == (0, 1, 1)
    assert judged.majority.correct


def test_votes(judge):
    texts = tuple(Text(text=text) for text in (r"\boxed{1}", r"\boxed{0.5}", "", r"\boxed{\frac12}", "A: 1.0"))
    (judged,) = judge.judge([Task(kind=MATH, gold="1/2", texts=texts)])
    assert judged.votes == (0, 1, None, 1, 0)
    assert (judged.majority.correct, judged.majority.answer) == (False, "1"), "of as many votes the first counts"
    (judged,) = judge.judge([Task(kind=MATH, gold="1/2", texts=texts[1:])])
    assert judged.majority.correct
    (judged,) = judge.judge([Task(kind=MATH, gold="1/2", texts=texts[2:3])])
    assert (judged.majority.correct, judged.majority.answer) == (False, "")


def test_no_right_answer(judge):
    with pytest.raises(ValueError, match="without a right answer"):
        verdict(judge, MATH, " ", r"\boxed{5}")


def test_boxes_and_marks():
    assert last_box(r"\boxed{\{1\} \cup \{2\}} and \} {") == r"\{1\} \cup \{2\}"
    assert last_box(r"\boxed{a} \boxed{b") == "a"
    assert last_box(r"\boxed\frac") == r"\frac"
    assert last_box("boxed{5}") is None
    assert find_answer("The answer is (1, 2).").answer == "(1, 2)"
    assert find_answer("The answer is 12, 14").answer == "12, 14"
    assert not find_answer("A: Paris", lettered=True).marked
    assert has_answered(r"</think> \boxed{1}", thinking=True)
    assert not has_answered(r"\boxed{1}", thinking=True)
