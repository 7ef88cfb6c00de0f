"""Answers in words: what a line says in one way only is read, all else is no answer, and nothing raises or takes long."""
import math
import random
import time

import pytest

from ppo_reft import read_float, read_letter, read_number

READ = {                                                              # kind: [(text, number)]
    "plain": [("18", 18), ("18.0", 18), ("$18", 18), ("18 apples.", 18), ("<18>.", 18), ("18.005", 18.005), ("19", 19),
        ("18.02", 18.02), ("18.", 18), ("18!", 18), (" 18 ", 18), ("0", 0), ("-7", -7), ("+5", 5), (".5", 0.5), ("-.5", -0.5),
        ("007", 7), ("18...", 18)],
    "after =": [("2 x 9 = 18", 18), ("= 18", 18), ("x=18", 18), ("2 + 3 = 5 = 10 / 2 = 5.", 5), ("2 x 9 = 18, 18 + 2 = 20", 20),
        ("100/3 ≈ 33.33", 33.33), ("9 * 2 => 18", 18), ("9 * 2 -> 18", 18), (r"x \approx 18", 18), ("9 ＝ 9", 9)],
    "minus": [("−5", -5), ("–5", -5), ("\u20115", -5), ("－5", -5), ("﹣5", -5), ("- 5", -5), ("is -5", -5), ("(-5)", -5),
        ("minus 5", -5), ("Negative 5", -5), ("x = − 5", -5), ("-5 %", -5)],
    "digits": [("５", 5), ("１，０００", 1000), ("١٨", 18), ("१८", 18), ("𝟏𝟖", 18), ("1\u200b8", 18), ("\ufeff18", 18)],
    "fractions": [("3/4", 0.75), ("3 / 4", 0.75), ("-3/4", -0.75), ("3/-4", -0.75), ("3⁄4", 0.75), ("3∕4", 0.75), ("½", 0.5),
        ("-½", -0.5), ("is -½", -0.5), ("2 1/2", 2.5), ("2½", 2.5), ("1 ⅓", 4 / 3), ("-2  ½", -2.5), ("2 and 1/2", 2.5),
        ("$2½", 2.5), ("1,000/3", 1000 / 3), ("1.5e3/3", 500), ("0/5", 0), ("1/2 cup", 0.5), ("(1/2)", 0.5)],
    "LaTeX": [(r"\frac{1}{2}", 0.5), (r"-\dfrac{3}{4}", -0.75), (r"\tfrac12", 0.5), (r"\frac{-1}{2}", -0.5),
        (r"2\frac{1}{2}", 2.5), (r"is $-\frac{1}{2}$", -0.5), (r"\frac{1,000}{8}", 125), (r"\(18\)", 18), (r"\[18\]", 18),
        ("$18$", 18), ("$-18$", -18), (r"\$18", 18), (r"50\%", 50), (r"\text{18}", 18), (r"18\text{ cm}^2", 18),
        (r"18~\mathrm{km}", 18), (r"\boxed{18}", 18), (r"\left(18\right)", 18), (r"\displaystyle 18", 18), ("1{,}000", 1000),
        (r"1\,000", 1000), (r"2~\frac{1}{2}", 2.5), (r"2\,\frac{1}{2}", 2.5), (r"10,\!000", 10000),
        (r"90^\circ", 90), (r"90^{\circ}", 90), ("90°", 90), (r"3 \times 4 = 12", 12)],
    "markdown": [("**18** apples", 18), ("*18*", 18), ("__18__ apples", 18), ("is __18__", 18), ("_18_", 18), ("`18`", 18),
        ("~18", 18), ("“18”", 18), ("<b>18</b>", 18), ("<answer>-18</answer>", -18), ("<<9*2=18>>18", 18)],
    "groups": [("1,000", 1000), ("1,234,567.5", 1234567.5), ("-1,000", -1000), ("18 000", 18000), ("1 234 567,5", 1234567.5),
        ("1\u202f234", 1234), ("1\u2009234", 1234), ("1\u00a0234", 1234), ("1'000", 1000), ("1’000’000.50", 1000000.5),
        ("1_000_000", 1000000), ("1.234.567", 1234567)],
    "commas": [("3,5", 3.5), ("-3,5", -3.5), ("0,005", 0.005), ("3,1416", 3.1416), ("1.234,5", 1234.5),
        ("1.234.567,89", 1234567.89), ("1.234", 1.234), ("3,50 €", 3.5), ("18,", 18), ("18, as said", 18)],
    "powers": [("2^3", 8), ("2**3", 8), ("2 ** 3", 8), ("2³", 8), ("10⁻³", 0.001), ("10^{6}", 1e6), ("10^(6)", 1e6),
        ("2^-3", 0.125), ("2^0.5", 2 ** 0.5), ("1.5e3", 1500), ("1.5E-3", 0.0015), ("1.5 x 10^3", 1500), ("1.5 × 10^{3}", 1500),
        (r"1.5 \times 10^{3}", 1500), (r"-1.5\cdot10^3", -1500), ("1.5*10**3", 1500), ("2·10³", 2000), ("1.5 x 10^3.", 1500)],
    "currency": [("-$5", -5), ("$-5", -5), ("- $5", -5), ("$ 5", 5), ("€5", 5), ("5€", 5), ("£1,000.50", 1000.5), ("¥500", 500),
        ("-₹500", -500), ("US$5", 5), ("-US$5", -5), ("-EUR 5", -5), ("USD18", 18), ("18 USD", 18), ("Rs.500", 500),
        ("$.50", 0.5), ("$5.", 5), ("is -$5", -5), ("(5)", 5)],
    "percent": [("50%", 50), ("50 %", 50), ("50 percent", 50)],
    "scales": [("3 million", 3e6), ("2.5 thousand", 2500), ("1.2 Billion", 1.2e9), ("$3 million dollars", 3e6), ("5k", 5000),
        ("5 hundred thousand", 500000.0), ("1 1/2 million", 1.5e6), ("2,5 millions", 2.5e6), ("3-million", 3e6),
        ("5million", 5e6), ("5 mİllİon", 5), ("2 lakh", 200000.0), ("1.5bn", 1.5e9)],
    "units": [("18 km/h", 18), ("18/day", 18), ("18kg", 18), ("5 K", 5), ("3 m", 3), ("18-inch", 18), ("30th", 30), ("18 m²", 18),
        ("18 m^2", 18), ("200cm³", 200), ("18 cm3", 18), ("5 p.m.", 5), ("5 months", 5), ("12 quarters", 12),
        ("18 cats and a dog", 18)],
}
NONE = {                                                              # kind: [text]
    "no number": ["", " ", "eighteen", "nan", "inf", "-inf", "∞", "-", "$", "a dozen", "million", "18 = x", "2 x 9 ="],
    "an expression": ["18 = 9 x 2", "81 = 9 x 9", "18 + 3", "18 - 3", "9 ÷ 3", "9 * 2", "n - 5", "n + 5", "5 + n", "5 * n", "n/5",
        "y*5", "y × 5", "y ÷ 5", "5 × n", "5 ÷ n", "x-5", "(a)-5", "f(5)", "sqrt(2)", "-(5)", "-(-5)", "(2)(3)", "5(3)", "18 ± 1"],
    "a bound": ["x ≥ 5", "≤ 5", "< 5", "> 5", "± 5", "x >= 5", "x != 5", "18 ≥ x", "18 ≤ x", "18 <= x", "18 < x", "18 > x",
        "18 ≠ x", "18+", "18 ± x"],
    "no rational": [r"\sqrt{2}", "√2", "2π", r"2\pi", "2 pi", "π 5", "∞ 5", "5 ∞", "5√x", r"\frac{\pi}{2}", r"\frac{2}{x}",
        r"\log 5", "root of 5", "5 squared", r"0.\overline{3}", "0.(3)"],
    "two numbers": ["18 or 19", "18 and 20", "18, 19", "18 (not 19)", "18 19", "18 apples for 3 people", "5-6", "5–6", "5 to 6",
        "5 ft 3 in", "5'3\"", "5$10", "$5 $600", "(3, 4)", "(3,4)", "(-3,4)", r"\{3,4\}", "Step 2: 18", "18 in 3 days",
        "seven or 8", "7 or eight", "x = 5, y = 6", "x = 5 or x = 6", "x = 5 and y = 6", "1 in 4", "3 thousand 5 hundred",
        "a hundred and 5", "five hundred 5"],
    "clocks, dates": ["3:30", "3:30 pm", "15:00", "3:4", "2020-01-02", "1/2/2020", "12.5.2020", "May 5, 2020"],
    "glued": ["x2", "H2O", "COVID-19", "0x1F", "1..5", "...18", "18 item3", "—18",
        "―18", "is—18", "is,5", "Profit - 18", "52₈", "52_8", "1️⃣8️⃣", "v.5"],
    "signs": ["--5", "+-5", "++5", "---5", "--.5", "-$-5", "- -5", "3/--5", "5/+-2", "−−5", "⁻5"],
    "groups": ["1234,567", "12,34,567", "1,234,5", "1.234.5", "1.234.567.8", "1 23 456", "1 200/300", "1'00", "1_00",
        "1,000.500.1"],
    "powers": ["-2^2", "2^3^2", "1/2^2", "2^1/2", "2^(1/2)", "3 x 2^4", "1/2 x 10^3", "2^3 x 10^2", "1.5 x 10^3^2", "2^", "2^x"],
    "not finite": ["1/0", "0/0", "0^-1", "1e400", "-1e400", "9^999", "10^{999}", "1e300 million billion", "9" * 400],
    "scales": ["5K", "3M", "$2.5B", "18 (in thousands)", "5 million-dollar", "2 dozen", "2 and a half", "2 hours and a half",
        "2 and three quarters", "3 halves", "2 thirds", "5 hundredths", "half of 18", "2 3/2", "2-1/2"],
}


@pytest.mark.parametrize("text, number", [pair for pairs in READ.values() for pair in pairs])
def test_what_has_one_reading_is_read(text, number):
    assert read_number(text) == pytest.approx(number, rel=1e-12, abs=0)


@pytest.mark.parametrize("text", [text for texts in NONE.values() for text in texts])
def test_what_has_none_or_several_is_no_answer(text):
    assert read_number(text) is None


def test_nothing_raises_and_what_is_read_is_finite():
    rng, read = random.Random(0), 0
    pieces = [*"00123456789  ..,,--++//**^^()[]{}<>==$€%xeEkKM'’_²³½⅓₂٣５−–—~\\\n\0\ud800", "\\frac{", "}{", "million", "mİllİon",
              "10^", " and ", "\\text{", "US$", "minus ", "nan"]
    for _ in range(5000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 10)))
        number = read_number(text)
        assert number is None or type(number) is float and math.isfinite(number), text
        read_float(text), read_letter(text)
        read += number is not None
    assert read > 300                                                 # not all of it is refused


def test_numbers_written_by_python_are_read():
    rng = random.Random(1)
    for _ in range(2000):
        number = rng.choice([rng.uniform(-1e7, 1e7), rng.gauss(0, 1), rng.gauss(0, 1) * 10 ** rng.randint(-30, 30)])
        whole = int(number) if abs(number) < 1e9 else 12
        written = {repr(number): number, f"{whole:,}": whole, f"{whole:_}": whole, f"-${abs(whole):,}.00": -abs(whole)}
        assert {text: read_number(text) for text in written} == written


@pytest.mark.parametrize("piece", ["1", "1,111", "111 ", "111.", "1 1/2 ", "-", "-(", "=", "a=,", " ", "<<1", "{", r"\frac{1", "**",
                                   "1^", "$ ", "5 hundred", "and (", "m^(", "½", "ab "])
def test_a_long_line_takes_linear_time(piece):
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    for line in text[:30_000], text + "1":
        read_number(line), read_float(line), read_letter(line)
    assert time.process_time() - start < 5                            # half a second, in square a minute at least


@pytest.mark.parametrize("text, number", [("18", 18), (" 18.0\n", 18), ("18.", 18), ("-1e3", -1000), ("1_000", 1000), ("٣", 3),
                                          ("inf", math.inf), ("9" * 400, math.inf)])
def test_strict_reads_what_float_reads(text, number):
    assert read_float(text) == number


@pytest.mark.parametrize("text", ["", "18\nand more", "$18", "18 apples.", "1,000", "<18>.", "2 x 9 = 18", "--5", "1/2", "½",
                                  "\ud800", "\0"])
def test_strict_reads_nothing_else(text):
    assert read_float(text) is None


def test_strict_nan_is_a_number():
    assert math.isnan(read_float("nan"))                              # never right, but paid the partial reward, as by the authors


@pytest.mark.parametrize("text", ["c", "C", "(C)", "C.", "c ) 870", "'c'", "$C$", "**C**", "option c", "Option (C)", r"\text{C}",
                                  r"\boxed{\text{(C)}}"])
def test_one_letter_is_read(text):
    assert read_letter(text) == "c"


@pytest.mark.parametrize("text", ["", "none", "a or b", "a, b", "ab", "870", "option", "c ) 870 km"])
def test_none_or_several_letters_are_no_answer(text):
    assert read_letter(text) is None
