"""Unify the spelling of an answer, reduce what surrounds it to the one answer it gives.

Everything here is linear in the text and runs in the trainer's own process; anything that needs a
parser of mathematics is left to `chainforge.rewards.verifier_pool`.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import islice, pairwise
from math import comb
from pathlib import Path

from chainforge.core.transcript import DEFAULT, is_blank, tags_of
from chainforge.rewards.values import MAX_ANSWER, MAX_DEPTH, depth, split_unit, squeeze

# Measured with math-verify 0.9: 50 nested parentheses, 30 nested fractions, 5,000 boxes, 100,000
# digits or a power that is 1,000 terms when multiplied out cost it seconds to minutes, so none of
# them reaches it.
MAX_TEXT = 20_000
MAX_DIGITS = 60
MAX_BOXES = 20
MAX_FRACTIONS = 12
MAX_TERMS = 1_000

_INVISIBLE = dict.fromkeys([0xAD, 0x061C, *range(0x200B, 0x2010), *range(0x2060, 0x2065), 0xFEFF])
_SYMBOLS = {
    ord(character.encode().decode("unicode_escape") if "\\u" in character else character): latex
    for line in Path(__file__).with_name("symbols.txt").read_text(encoding="utf-8").splitlines()[1:]
    for character, latex in [line.replace("␣", " ").split(" ", 1)]
}
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+|[₀-₉]+")
_VULGAR = re.compile(r"\s?([¼-¾⅐-⅞↉])")

_END = re.compile(r"<(?:\|[^<>|]{1,40}\||/s|eos|end_of_turn)>\Z")
_HEADING = re.compile(r"\A#{1,6}[ \t]+(?=\S[^\n]*\Z)")
_TICKS = "✓✔✅☑\ufe0f"
_FENCE = re.compile(r"\A```(?:[\w+-]*\n)?([^`]*)```\Z")
_STARRED = re.compile(r"\A\*([^*]+)\*\Z")
_WRAPS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("*", "*"),
          ("__", "__"), ("`", "`"), ('"', '"'), ("'", "'"))  # fmt: skip
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_NAME = re.compile(r"\\[A-Za-z]+")
_BARE = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?|[A-Za-z]")
_BARE_END = re.compile(r"\s*(?:\Z|\$|\\[)\]]|\n|[.,;:](?:\s|\Z|\$))|\s+(?![-+*/^=\\\d])")
_ARGUMENTS = {"frac": 2, "dfrac": 2, "tfrac": 2, "binom": 2, "sqrt": 1, "text": 1, "textbf": 1,
              "mathrm": 1, "mathbf": 1, "overline": 1, "pi": 0, "infty": 0, "emptyset": 0,
              "varnothing": 0}  # fmt: skip
_WHOLE_TEXT = re.compile(
    r"\\(?:text(?:bf|rm|it)?|math(?:rm|bf|it)|mbox|operatorname|emph)\s*\{([^{}]*)\}"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BOLD = re.compile(r"(?:^|(?<=\s))\*\*([^*\n]+)\*\*")
_THIN = re.compile(r"(?<=\d)(?:,?\\[,!]|\{,\}|\{\\,\}|,\{\})\s*(?=\d{3})")
_SPACING = re.compile(
    r"(\\\\(?:\[[\w. ]{0,8}\])?)|\\(?:[,;:! ]|q?quad\b|displaystyle\b|(?:left|right)(?![a-z])"
    r"|[bB]igg?[lr]?(?![a-z]))|(?<!~)~(?!~)"
)
_ALIASES = re.compile(
    r"\\(dfrac|tfrac|cfrac|leqslant|leq|lt|geqslant|geq|gt|neq?|varnothing|infin|textbf|textrm"
    r"|mathrm|mbox|bf|rm|degree|dbinom|tbinom|vee|wedge|ast|div)(?![A-Za-z])"
)
_ALIAS = {
    "lt": "<", "gt": ">", "degree": r"^{\circ}", "ast": "*", "div": "/", "bf": "", "rm": "",
    **{name: f"\\{alias}" for alias, names in {
        "frac": "dfrac tfrac cfrac", "le": "leqslant leq", "ge": "geqslant geq", "neq": "ne",
        "emptyset": "varnothing", "infty": "infin", "text": "textbf textrm mathrm mbox",
        "binom": "dbinom tbinom", "lor": "vee", "land": "wedge"}.items() for name in names.split()},
}  # fmt: skip
_SHORT_FRAC = re.compile(r"\\frac(?:\s*(\d)\s*(\d)|\s*(\d)\s*\{|(\{[^{}]*\})\s*(\d))")
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\[\d\])?\s*(?:(\d+)|([A-Za-z])|\(([^()]*)\))")
_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*(?=[\d(])")
_NAMES = re.compile(r"(?<![\\A-Za-z])(pi|infty|infinity)(?![A-Za-z])", re.IGNORECASE)
_CIRCLE = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)")
_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])((?:arc)?(?:sin|cos|tan)|(?:sin|cos|tan)h|cot|sec|csc|ln|log)"
    r"(?=\s*[(\d\\^_]|\s+[A-Za-z](?![A-Za-z]))"
)
_MINUS = re.compile(
    r"(\A|=\s*)(?:\\text\s*\{\s*)?(?:negative|minus)(?:\s*\}\s*|\s+)(?=[\d.]|\\frac|\\sqrt)",
    re.IGNORECASE,
)
_PYTHON_POWER = re.compile(r"(?<=[\w)])\*\*(?=[\w(-])")
_LETTER_TIMES = re.compile(r"(?<=\d)\s+x\s+(?=10\s*\^)")
_TOWER = re.compile(
    r"(?:\^|\*\*)[\s{(]*(?:\\left)?[\s{(]*\d+[\s})]*(?:\^|\*\*|!)[\s{(]*(?=[\d!}]|$)"
)
_HUGE_POWER = re.compile(r"(?:\^|\*\*)[\s{(]*[-+]?\d{5}")
# A power within an exponent, also beside something: `9^{9 \cdot 9^{9}}`.
_POWER_IN_POWER = re.compile(r"\^\s*[{(][^{}()^]*\d\s*(?:\^|\*\*)[\s{(]*\d")
_HUGE_CHOICE = re.compile(r"binom\s*\{\s*\d{4}|\d{4}[\s}]*\\choose")
_FACTORIAL = re.compile(r"\d{4}[\s})]*!|![\s})]*!")
_POWER_OF_SUM = re.compile(r"\(([^()]*[A-Za-z][^()]*)\)\s*(?:\^|\*\*)[\s{(]*(\d+)")
_FURTHER_TERM = re.compile(r"(?<=[^\s+\-(])\s*[+\-]")


def clean(text: str) -> str:
    """Unwrap an answer (`$..$`, box, bold, text, quotes, full stop) and unify its spelling."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return text
    text = _BOLD.sub(r"\1", _visible(text)).strip()
    for _ in range(5):
        before = text
        text = _FENCE.sub(r"\1", text).strip() if text.startswith("```") else text
        text = _unstopped(text)
        if text.endswith("\\") and len(text) > 1:
            text = text.rstrip("\\")
        for opening, closing in _WRAPS:
            inner = text[len(opening) : -len(closing)]
            if text.startswith(opening) and text.endswith(closing) and opening not in inner:
                text = inner.strip() or text
        box = _boxes(text) if text.startswith(("\\boxed", "\\fbox")) else None
        if box and box[0][1] == len(text):
            text = text[box[0][2] : box[0][3]].strip()
        elif whole := _WHOLE_TEXT.fullmatch(text):
            text = whole[1].strip()
        if text == before:
            break
        text = _END.sub("", text).strip()
    return _spell(text)


def _visible(text: str) -> str:
    """Drop invisible characters and end tokens; write Unicode's mathematics in ASCII and LaTeX."""
    text = text.strip()
    if not text.isascii():
        text = unicode_to_latex(text)
    for _ in range(8):
        text = text.rstrip().rstrip(_TICKS).rstrip()
        if not text.endswith(">") or not (end := _END.search(text, max(0, len(text) - 44))):
            break
        text = text[: end.start()]
    return text


def unicode_to_latex(text: str) -> str:
    """Write Unicode's mathematics in ASCII and LaTeX, and drop invisible characters."""
    text = text.translate(_INVISIBLE)
    text = _VULGAR.sub(_fraction, _RAISED.sub(_level, text))
    return unicodedata.normalize("NFKC", text.translate(_SYMBOLS)).translate(_SYMBOLS)


def _unstopped(text: str) -> str:
    """Drop the stops at the end, but no ellipsis: `1, 2, ...` has more than two values."""
    text = text.rstrip()
    return text if text.endswith("...") or len(text) < 2 else text.rstrip(".;, \n\t")


def _level(found: re.Match[str]) -> str:
    mark = "_" if found[0][0] in "₀₁₂₃₄₅₆₇₈₉" else "^"
    return f"{mark}{{{unicodedata.normalize('NFKC', found[0])}}}"


def _fraction(found: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", found[1]).partition("⁄")
    return f"\\frac{{{top}}}{{{bottom}}}"


def _spell(text: str) -> str:
    """Unify LaTeX spellings that mean the same: spacing, fractions, thousands, relations."""
    if "\\" in text or "{" in text or "~" in text:
        text = text.replace(r"\%", "%").replace(r"\$", "¤")
        text = _SPACING.sub(lambda m: " \\\\ " if m[1] else " ", _THIN.sub("", text))
        text = _ALIASES.sub(lambda m: _ALIAS.get(m[1], m[0]), text)
        text = _SHORT_FRAC.sub(_braced, text)
    if "$" in text:
        text = text.replace("$", "¤") if text.count("$") == 1 else text.replace("$", " ")
    if "pi" in text or "sqrt" in text or "nfi" in text or "inf" in text:
        text = _NAMES.sub(
            lambda m: f"\\{m[1].lower().replace('inity', 'ty')}", _ROOT.sub(r"\\sqrt", text)
        )
        text = _SHORT_ROOT.sub(lambda m: f"\\sqrt{m[1] or ''}{{{m[2] or m[3] or m[4]}}}", text)
    if "^" in text:
        text = _CIRCLE.sub(r"^{\\circ}", text)
    if "*" in text:
        text = _PYTHON_POWER.sub("^", text)
    if "<" in text or ">" in text or "!" in text:
        text = text.replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\neq ")
    text = _MINUS.sub(r"\1-", _FUNCTION.sub(r"\\\1", text))
    if " x " in text:
        text = _LETTER_TIMES.sub(r" \\times ", text)
    return " ".join(text.split())


def _braced(found: re.Match[str]) -> str:
    one, two, top, group, bottom = found.groups()
    if one:
        return f"\\frac{{{one}}}{{{two}}}"
    return f"\\frac{{{top}}}{{" if top else f"\\frac{group}{{{bottom}}}"


def boxes(text: str) -> list[str] | None:
    r"""Return the contents of the outermost boxes; None when one cannot be read.

    `\boxed 4` and `\boxed\frac37` are boxes too. Unreadable are a box that does not close, one
    without braces whose end is unclear (`\boxed 4\pi`), and more than 20.
    """
    found = _boxes(text)
    return None if found is None else [text[start:end] for _, _, start, end in found]


def boxed_answers(text: str) -> list[str]:
    """Return the different answers in a solution's boxes, without those that it retracts.

    Raises `ValueError` saying why there is none that can be told for sure.
    """
    found = _boxes(text)
    if found is None:
        raise ValueError("a \\boxed that does not close or whose end is unclear")
    kept: dict[str, str] = {}
    for number, (start, _, first, last) in enumerate(found):
        if number and _TAKEN_BACK.search(text, found[number - 1][1], start):
            kept.clear()
        kept.setdefault(squeeze(clean(text[first:last])), text[first:last].strip())
    if "" in kept or not kept:
        raise ValueError("an empty \\boxed" if kept else "no \\boxed")
    return list(kept.values())


def _boxes(text: str) -> list[tuple[int, int, int, int]] | None:
    """Return where each box begins and ends, and where its content does."""
    found: list[tuple[int, int, int, int]] = []
    position = 0
    while match := _BOX.search(text, position):
        braced = text.startswith("{", match.end())
        end = _after(text, match.end())
        if end is None or len(found) >= MAX_BOXES:
            return None
        if not braced and not _BARE_END.match(text, end):
            return None
        inside = (match.end() + 1, end - 1) if braced else (match.end(), end)
        found.append((match.start(), end, *inside))
        position = end
    return found


def _after(text: str, place: int) -> int | None:
    """Return the end of a group in braces, a command with its arguments, a number or a letter."""
    while text[place : place + 1] == " ":
        place += 1
    if text.startswith("{", place):
        return _closing(text, place)
    if command := _NAME.match(text, place):
        end: int | None = command.end()
        for _ in range(_ARGUMENTS.get(command[0][1:], -1)):
            digit = end is not None and text[end : end + 1].isdigit()
            end = end + 1 if digit and end else _after(text, end) if end is not None else None
        return end if command[0][1:] in _ARGUMENTS else None
    bare = _BARE.match(text, place)
    return bare.end() if bare else None


def _closing(text: str, place: int) -> int | None:
    """Return the end of the group whose brace opens at a place; None where it does not close."""
    level = 0
    for brace in _BRACE.finditer(text, place):
        level += {"{": 1, "}": -1}.get(brace[0], 0)
        if level == 0:
            return brace.end()
    return None


# Words around an answer. What retracts or hedges is looked for where an answer is marked; elsewhere
# only the words listed may stand around it.
_RETRACTED = re.compile(
    r"\b(?:no|wait|actually|or|maybe|perhaps|possibly|scratch|correction|instead|mistaken?|oops"
    r"|sorry|incorrect|wrong|false|guess|unsure|uncertain|doubt|hmm+|rather|kidding|but|isn't|nope"
    r"|should (?:be|have)|could|might|probably|however|though|although|alternative(?:ly)?|also|else"
    r"|strike|edit|make (?:that|it)|reflection|revised?|recheck\w*|redo|recalculat\w*|meant|ignore"
    r"|disregard|never mind|i mean|on second thought"
    r"|not (?:right|correct|sure|certain|it|that|the))\b",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"\b(?:no|wait|actually|oops|sorry|correction|mistake)\b\s*[:,;.!-]|\bscratch that\b",
    re.IGNORECASE,
)
_UNSURE = re.compile(
    r"\b(?:(?:do not|don't) know|no idea|guess(?:ing)?|not sure|unsure|maybe|perhaps|possibly)\b",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"(?:\b(?:not|cannot|never|or|neither|nor|either|than|except|unless|if|maybe|perhaps|least|most"
    r"|twice|half|(?:anything|everything|all|nothing)\s+but)\b|n't\b|\\n(?:eq?|ot)\b)"
    r"[\s$:(\\]*(?:[a-z]+\s+){0,2}[\s$(\\\[]*\Z",
    re.IGNORECASE,
)
_DOUBT = re.compile(
    r"\b(?:not|no|nor|never|or|neither|either|cannot|than|least|most|except|unless|if|whether|but"
    r"|maybe|perhaps|possibly|probably|might|may|could|would|should|ignore|wrong|false|incorrect"
    r"|doubt|guess|unsure|know|says?|said|suppose|assum\w*|almost|nearly|some(?:one)?|between|twice"
    r"|half|double|opposite|negative|minus|all|none|anything"
    r"|plus|times|squared|cubed|root|modulo|of (?:the|my) answer|number of answers|nothing|nobody"
    r"|impossible|exceeds?|actually|wait|instead|every)\b|n't\b|\\(?:neg|lnot|not)(?![a-z])",
    re.IGNORECASE,
)
_SAID = re.compile(
    r"(?:\banswers?\b(?:\s+to\s+[^.\n:]{1,80}?)?(?:\s+(?:is|are)\b|\s*[:=])+|答案\s*(?:是|为|选|[:=])+"
    r"|答え\s*(?:は|:)|(?:选项|答)\s*(?:是|为|:)+|(?:respuesta|réponse|antwort|resposta|ответ|정답)\s*:"
    r"|(?:^|\n)####(?!#))\s*",
    re.IGNORECASE,
)
# Not the answer, but somebody's, one of several, or something made from it.
_ANOTHER = re.compile(
    r"(?:'s|\b(?:a|an|one|another|possible|first|previous|his|her|their|(?:of|claims?)(?: the)?))"
    r"\s+(?:\w+\s+)?\Z",
    re.IGNORECASE,
)
_SPOKEN = re.compile(r"\\text\s*\{([^{}]*answer[^{}]*)\}", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?\n]|,?\s\b(?:so|thus|hence|therefore|then)\b")
_LISTED = re.compile(r"\W*\d[\d\W]*(?:(?:the|my|our|final|and|so)\s+)*", re.IGNORECASE)
_FULL_STOP = re.compile(r"(?<![.\s])\.(\$*)(?:\s+|\Z)|\n+|;\s+|(?<=\w)\?\s")
_OPENING = re.compile(
    r"(?:so|thus|hence|therefore|then|finally|and|it's|that's|approximately|clearly|now"
    r"|final|answer|result|the|that|is|in fact|(?:total|sum|value|area|solution)(?=:)"
    r"|it follows that|we (?:get|have|find|obtain|see|conclude)(?: that)?)\b[,:]?\s+|:\s*",
    re.IGNORECASE,
)
_COPULA = re.compile(
    r"((?:\$?\\?[A-Za-z']+\$?,?\s+){0,15}?)(?:is|must be|are|was|were|equals?|gets?|have|has|had"
    r"|obtain|finds?|gives?|yields?|becomes?|costs|choose|chose|pick|select|selected|left with"
    r"|earns?|made|makes?|needs?|sold|takes?|took|measures?|weighs?|pays?|paid|spends?|spent|saves?"
    r"|saved|bought|buys?)\b[\s:]*"
    r"(?:equal to\s+|that\s+|exactly\s+)?(?=\S)(.+)",
    re.IGNORECASE | re.DOTALL,
)
_REASON = re.compile(r"(?:,?\s+|\s*\()(?:because|since)\b", re.IGNORECASE)
_REMARK = re.compile(r"\s*(?:,\s*|\s-\s+|\()([a-z][a-z .']*)\)?\Z", re.IGNORECASE)
_CLOSING = re.compile(
    r"\s+(?:of them|in (?:total|all)|altogether|overall"
    r"|(?:are|is|were|was|will be)? ?(?:left|remaining)"
    r"|(?:is|are) (?:the|my|our) (?:final |correct |right )?(?:answers?|result|solutions?|option"
    r"|choice)|is correct|is right"
    r"|as (?:required|desired|needed|requested|expected))\Z",
    re.IGNORECASE,
)
_HARMLESS_WORDS = """
i hope it is this that was correct right helps helped helpful the a an answer final result
solution see above below here in total all altogether overall as required desired needed requested
expected asked for of to you your question questions have any if let me know we are done qed so
therefore thus problem thank thanks good luck please explanation details calculation and steps
shown given my our verified checked simplified simplest form fully exact exactly value by left
remaining which been found computed calculated
"""
_HARMLESS = frozenset(_HARMLESS_WORDS.split())
_JOINT = re.compile(r"[\s$,;]*(?:\\text\s*\{\s*)?(?:and|or)?[\s$},;]*", re.IGNORECASE)
# Another value in the sentence of a box, or in what little follows it.
_NEXT = re.compile(
    r"[\s$]*(?:\d|(?:[,;/&(=<>-]|(?:and|or|to)\b)[^.!?\n]*[\d=<>])"
    r"|(?s:[\s$]*[.!?;:\n][^\d]{0,40}\d.{0,20}\Z)"
    r"|[\s$]{0,4}(?:\\text\s*\{)?\s?[A-Za-z]+[\s$.}]{0,4}(?:[/&=<>+,;?!\n或-]{1,3}|and\b|or\b|to\b)"
    r"[\s$]*\d[\d.,]*[\s$]*\Z",
    re.IGNORECASE,
)
_BEHIND = re.compile(
    r"[\s$]*(?:\\text\s*\{)?\s*([A-Za-z°][A-Za-z/ ]{0,30}(?:\^\{?\d\}?)?)\s*\}?(?:\^\{?(\d)\}?)?"
    r"[\s$]*(?:[.,;\n]|\Z)"
)
_FACTOR = re.compile(
    r"(?:[\d_^]|(?<![A-Za-z])[A-Za-z]|\\[dt]?frac\s*\{[^{}]*\}|[=\w)}]\s*[-+/]|[-+/](?<!\s-)"
    r"|\\(?:sqrt(?:\[\d\])?|cdot|times|[dt]?frac|ln|log|pi|pm|mp"
    r"|sin|cos|tan|neg|overline|[bx]?cancel|sout)|~~)\s*\{?\Z"
)
# What is alone left of `= \boxed{..}`, where it is another number, `2x` or `|x|`; `7; \boxed{8}`.
_LEFT = re.compile(
    r"(?:\A|[\n$,;:(\[]|[a-z]{2}\s)\s*(-?[\d.]+|-?\d+[A-Za-z]|\|[a-z]\|)\s*=[\s$]*\Z"
    r"|\A[\s$]*([-\d.,]+?)[\s$]*[,;\n][\s$]*\Z"
)
_TAIL = re.compile(
    r"(?:[\s$]|\*\*|\\[)\]])*(?:[%!^_/+=<>-]|(?<!\*)\*(?!\*)"
    r"|\\(?:%|cdot|times|pi|sqrt|frac)|(?:if|when|unless|otherwise)\b"
    r"|(?:\\text\s*\{\s*)?(?:percent|hundred"
    r"|thousand|million|billion|trillion|dozen|lakh|crore|gross|score|pairs?|tenths|hundredths"
    r"|thousandths|halves|thirds|quarters|eighths|times|plus|minus|squared|cubed|doubled)\b)",
    re.IGNORECASE,
)


def candidate(text: str) -> str | None:
    """Return the one answer that an answer text gives; None when it gives none, or contradicts.

    In this order: the boxes, what follows "answer is", the whole text, without the words that are
    known to say nothing about it. Boxes beside one another are one answer of several values.
    """
    if len(text) > MAX_TEXT:
        return None
    text = _visible(text)
    text = _HEADING.sub("", _STARRED.sub(r"\1", _FENCE.sub(r"\1", text))).strip()
    places = _boxes(text) if "\\" in text and "box" in text else []
    if places is None:
        return None
    if places:
        return _boxed(text, places)
    text = _SPOKEN.sub(r"\1 ", _BOLD.sub(r"\1", text))
    claims = list(_SAID.finditer(text))
    if not claims:
        return clean(_reduce(text))
    return _claimed(text, claims)


def _boxed(text: str, places: list[tuple[int, int, int, int]]) -> str | None:
    """Return what the boxes say, unless the words around them deny it."""
    values = {}
    for _, _, start, end in places:
        value = clean(text[start:end])
        values[squeeze(value)] = value
    first, last = places[0][0], places[-1][1]
    tail = _narrow(text[last:])
    one = next(iter(values.values()))
    before = text[max(0, first - 80) : first]
    left = _LEFT.search(before)
    denied = (_DENIED.search(before) or _FACTOR.search(before.rstrip("$ (\\"))
              or (left and (left[1] or left[2]) not in values))  # fmt: skip
    if "" in values or denied or _UNSURE.search(before) or _TAIL.match(tail):
        return None
    others = {number.rstrip(".,") for number in re.findall(r"\d[\d.,]*", tail)}
    if _RETRACTED.search(tail) or (_NEXT.match(tail) and (not others or others - values.keys())):
        return None
    for said in _SAID.finditer(text):
        place = said.end()
        line = text[place : place + 60].partition("\n")[0]
        inside = any(start <= place < end for start, end, _, _ in places)
        number = _ALONE.match(line)
        if not inside and number:
            said_value = _digits(squeeze(clean(number[1])))
            if said_value not in map(_digits, values) and said_value[-1:].isdigit():
                return None
    if len(values) == 1:
        return _with_unit(one, tail)
    between = (text[one[1] : two[0]] for one, two in pairwise(places))
    return " and ".join(values.values()) if all(map(_JOINT.fullmatch, between)) else None


_ALONE = re.compile(
    r"[\s$*]*([+-]?\d[\d,.]*|[A-Za-z]+(?:-[a-z]+)?)(?=[.\s$*\\]*(?:\Z|\n|[A-Z]|\\?box))"
)
_COUNTED_TO_TWENTY = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen
"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_ONES = _COUNTED_TO_TWENTY.split()
_COUNTS = {word: str(value) for value, word in enumerate(_ONES)} | {
    f"{ten}-{_ONES[one]}" if one else ten: str(10 * place + one)
    for place, ten in enumerate(_TENS.split(), 2)
    for one in range(10)
}
_TWICE = re.compile(r"(.*\S)\s*\(([\w -]+)\)", re.DOTALL)


def _digits(text: str) -> str:
    """Write `fifteen` and `1,500` in digits alone."""
    text = text.replace(",", "").strip("$ ")
    return _COUNTS.get("-".join(text.casefold().split()), text)


def _with_unit(value: str, tail: str) -> str | None:
    """Add the unit that a box has behind it; None where other letters are joined to the box."""
    if (behind := _BEHIND.match(tail[:80])) and not split_unit(value)[1]:
        unit = behind[1] + (f"^{behind[2]}" if behind[2] else "")
        if split_unit(f"1 {unit}")[1]:
            return f"{value} {unit}"
    return None if _GLUED.match(tail) else value


_GLUED = re.compile(r"[A-Za-z]")


def _claimed(text: str, claims: list[re.Match[str]]) -> str | None:
    """Return what follows "answer is", when all such places say the same."""
    if len(claims) > MAX_BOXES:
        return None
    found = {}
    for number, claim in enumerate(claims):
        before = _SENTENCE.split(text[max(0, claim.start() - 200) : claim.start()])[-1]
        if _DOUBT.search(before) or _LISTED.fullmatch(before) or _ANOTHER.search(before):
            return None
        stop = claims[number + 1].start() if number + 1 < len(claims) else len(text)
        rest = text[claim.end() : stop]
        if re.fullmatch(r"[\s*]*(?:so|thus|hence|therefore|the|my|our|final|correct|[,\s*])*",
                        rest, re.IGNORECASE):  # fmt: skip
            continue  # `Final answer: the final answer is`
        value = clean(_reduce(re.sub(r"\s+(?:the|my|our)(?: final| correct)?\s*\Z", "", rest)))
        found[squeeze(value)] = value
    return next(iter(found.values())) if len(found) == 1 and "" not in found else None


def _narrow(text: str) -> str:
    """Collapse repeated blanks: a pattern would try each of them."""
    return re.sub(r"\s+", lambda blank: "\n" if "\n" in blank[0] else " ", text)


def _reduce(text: str) -> str:
    """Cut the known words off both sides of an answer; what is unknown stays beside it."""
    text = _narrow(text.strip())
    while opening := _OPENING.match(text):
        text = text[opening.end() :]
    stops = islice(_FULL_STOP.finditer(text), MAX_BOXES)
    if ends := [stop for stop in stops if harmless(text[stop.end() :])]:
        text = text[: ends[0].start()] + (ends[0][1] or "")
    text = _unstopped(text)
    reason = _REASON.search(text)
    if (
        reason
        and ("(" not in reason[0] or text.endswith(")"))
        and not _RETRACTED.search(
            re.sub(r"\b(?:no|or|but|wrong|incorrect|not)\b", "", text[reason.end() :])
        )
    ):
        text = text[: reason.start()]
    for _ in range(3):
        if (remark := _REMARK.search(text, max(0, len(text) - 200))) and harmless(remark[1]):
            text = text[: remark.start()]
        text = _CLOSING.sub("", text).rstrip(", ")
    if (said := _COPULA.fullmatch(text)) and not _DOUBT.search(said[1]):
        text = said[2]
    if (twice := _TWICE.fullmatch(text)) and _digits(twice[1]) == _digits(twice[2]):
        return _digits(twice[1])
    return text


def doubted(text: str) -> bool:
    """Return whether a text has words that retract or hedge what stands beside it."""
    return bool(_RETRACTED.search(text))


def harmless(text: str) -> bool:
    """Return whether a text consists of words that say nothing about the answer beside them."""
    words = re.findall(r"[^\W_]+|[^\s.,!'*_)(-]", text)
    letters = {word for word in words if len(word) == 1} - {"I", "a"}
    known = _HARMLESS.issuperset(word.casefold() for word in words)
    return known and not letters and (not words or max(map(len, words)) > 1)


def hostile(text: str, gold: str = "") -> str | None:
    """Return why a candidate should not reach a parser, or None; a long gold allows more."""
    if len(text) > max(MAX_ANSWER, 2 * len(gold)):
        return "length"
    if sum(map(str.isdigit, text)) > max(MAX_DIGITS, 2 * sum(map(str.isdigit, gold))):
        return "digits"
    if text.count("\\frac") > max(MAX_FRACTIONS, gold.count("\\frac")):
        return "fractions"
    if depth(text) > MAX_DEPTH:
        return "nesting"
    if any(bomb.search(text) for bomb in (_TOWER, _HUGE_POWER, _FACTORIAL)) and text != gold:
        return "size"
    if any(bomb.search(text) and not bomb.search(gold) for bomb in (_POWER_IN_POWER, _HUGE_CHOICE)):
        return "size"
    if (terms := _terms(text)) > MAX_TERMS and terms > _terms(gold):
        return "size"
    return None


def _terms(text: str) -> int:
    """Return how many terms the longest power of a sum has when it is multiplied out."""
    powers = ((1 + len(_FURTHER_TERM.findall(inside)), int(exponent))
              for inside, exponent in _POWER_OF_SUM.findall(text))  # fmt: skip
    return max((comb(power + terms - 1, power) for terms, power in powers), default=1)


def balanced(text: str) -> bool:
    """Return whether each brace of a LaTeX text is closed, in order."""
    level = 0
    for brace in _BRACE.findall(text):
        level += {"{": 1, "}": -1}.get(brace, 0)
        if level < 0:
            return False
    return level == 0


_OPENED = re.compile(r"\\boxed\s*\{")
_ANSWER_IS = re.compile(r"\banswer(?:\s+is\b|\s*[:=])[ \t:]*", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:[.,/]\d+)*")


def _last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\\boxed{...}` that closes, of the last 20 that open."""
    for start in reversed([box.end() for box in _OPENED.finditer(text)][-20:]):
        if end := _closing(text, start - 1):
            return text[start : end - 1].strip() or None
    return None


def lenient_answer(text: str, preset: str = DEFAULT) -> str | None:
    """Find the most likely answer in any text, well formed or not; None in an empty one.

    Accuracy is also measured apart from format. In this order: the last answer block (also one that
    is cut off), the text after the reasoning, the last box, what follows the last "answer is", the
    last number, the last line.
    """
    tags = tags_of(preset)
    found = []
    if tags.answer_open and tags.answer_open in text:
        found.append(text.rpartition(tags.answer_open)[2].partition(tags.answer_close)[0])
    if tags.reasoning_close in text:
        found.append(text.rpartition(tags.reasoning_close)[2])
    for part in found:
        if not is_blank(part):
            return part.strip()
    for tag in tags.all:
        text = text.replace(tag, " ")
    if boxed := _last_boxed(text):
        return boxed
    said = _ANSWER_IS.split(text)[1:]
    if said and (line := said[-1].partition("\n")[0].partition(". ")[0].strip().rstrip(".")):
        return line
    if numbers := _NUMBER.findall(text):
        return str(numbers[-1])
    lines = [line.strip() for line in text.splitlines() if not is_blank(line)]
    return lines[-1] if lines else None
