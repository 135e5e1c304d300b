"""Scored samples with known faults: clean rows, hard to tell from faulty ones, and faulty ones."""

import random
import re

from chainforge.core.transcript import write
from chainforge.data.sources import example
from chainforge.generate.sampling import sample

NAMES = re.findall(
    r"\w+", "Ana Ben Chloé Dmitri Emma Farid Grace Hugo Ines Jonas Kira Liam Mei Noor Olaf Priya"
)
THINGS = re.findall(
    r"\w+",
    "apples books candles drums eggs flowers gloves hats jars kites lamps maps nails oranges pens "
    "ropes shells tickets umbrellas vases",
)
PLACES = re.findall(
    r"\w+", "market school library harbour station museum garden office bakery theatre farm village"
)
VERBS = re.findall(r"\w+", "buys collects finds packs sells counts borrows paints carries delivers")
TEMPLATES = (
    "{name} {verb} {a} {thing} at the {place} on Monday and {b} more on Tuesday, then gives {c} of them to {other}. How many {thing} does {name} have left at the end?",
    "At the {place} there are {a} boxes with {b} {thing} in each of them, and {c} {thing} lie beside the boxes. {name} wants to know how many {thing} there are in total.",
    "A {place} charges {a} coins for every {b} {thing}. {name} needs {c} {thing} for the party of {other}. How many coins does {name} have to pay?",
    "{name} and {other} share {a} {thing} in the ratio {b} to {c} after they come back from the {place}. How many {thing} does {name} get?",
)  # fmt: skip
SHORT = ("What is {a} * {b} + {c}?", "Compute {a} - {b} * {c}.", "{a} + {b} + {c} = ?")
STEPS = (
    "First I write down what is known: {name} has {x} {thing} to begin with.",
    "The next step adds {y} to that, because the {place} gives {y} more.",
    "So we have {x} + {y} = {z}, which is the number before anything is taken away.",
    "Let me check this once more: $ {x} + {y} = {z} $ is right, since \\( {z} - {y} = {x} \\).",
    "Now {other} takes some of the {thing}, and that has to be subtracted.",
    "Multiplying {x} by {y} would be wrong here, as the boxes are not equal.",
    "If each of the {y} parts holds {x} {thing}, the total grows accordingly.",
    "One could also count backwards from {z}, which leads to the same number.",
    "The question only asks about {thing}, so the visit to the {place} does not matter.",
    "I should be careful with the units; every {thing} counts once.",
    "Taking half of {z} first makes the arithmetic easier to follow.",
    "Therefore the intermediate value stays {z} until {other} leaves the {place}.",
)
FOREIGN = {
    "zh": "首先我们把已知的数字写下来然后再进行计算。|接下来把两个数加起来得到总数。|因此答案应该是这个数字不会有错。|让我再检查一遍这个步骤是否正确。|每个盒子里的数量都是一样的所以可以相乘。",
    "ru": "Сначала запишем все известные числа и внимательно посмотрим на условие.|Затем сложим эти два числа и получим общее количество.|Следовательно ответ должен быть равен именно этому числу.|Проверим ещё раз каждый шаг нашего рассуждения.|В каждой коробке лежит одинаковое количество предметов.",
}  # fmt: skip
CODE = (
    "```python\ntotal = {x} + {y}\nprint(total)\n```",
    "~~~\nint total = {x} + {y};\nreturn total;\n~~~",
)


class Maker:
    """Makes rows; everything depends on the seed."""

    def __init__(self, seed=0):
        self.rng = random.Random(seed)
        self.count = 0

    def words(self):
        rng = self.rng
        x, y = rng.randint(12, 999), rng.randint(12, 999)
        name, other = rng.sample(NAMES, 2)
        return {
            "name": name, "other": other, "thing": rng.choice(THINGS), "place": rng.choice(PLACES),
            "verb": rng.choice(VERBS), "a": rng.randint(2, 999), "b": rng.randint(2, 999),
            "c": rng.randint(2, 999), "x": x, "y": y, "z": x + y,
        }  # fmt: skip

    def question(self, short=False):
        template = self.rng.choice(SHORT if short else TEMPLATES)
        return template.format(**self.words())

    def paragraph(self, sentences=4):
        words = self.words()
        return " ".join(s.format(**words) for s in self.rng.sample(STEPS, sentences))

    def reasoning(self, paragraphs=3):
        return "\n\n".join(self.paragraph() for _ in range(paragraphs))

    def row(self, reasoning=None, question=None, answer=None, index=0, **columns):
        self.count += 1
        answer = answer or str(self.rng.randint(1_000, 9_999))
        made = example(
            [{"role": "user", "content": question or f"{self.question()} (no. {self.count})"}],
            answer,
            task=columns.pop("task", "words"),
        )
        text = write(reasoning or self.reasoning(), answer)
        scores = {"reward": 1.2, "correct": True, "formatted": True, "finish_reason": "stop"}
        scores |= {"extracted": answer, "tokens": len(text) // 4}
        return sample(made, text, index, source="policy", **(scores | columns))

    def clean(self, n):
        return [self.row() for _ in range(n)]

    def edited(self, text, edits):
        """Change single words, as a rewording does; the numbers stay."""
        words = text.split(" ")
        places = [i for i, word in enumerate(words) if word.isalpha() and len(word) > 3]
        for place in self.rng.sample(places, edits):
            words[place] = self.rng.choice(("surely", "indeed", "clearly", "simply", "exactly"))
        return " ".join(words)

    # What is not quite a fault.

    def terse(self):
        """Return mathematics that is regular, but repeats nothing."""
        rng = self.rng
        kind = rng.randrange(4)
        if kind == 0:  # ones and twos are added up
            return " + ".join(rng.choice("12") for _ in range(rng.randint(8, 15))) + " = 17"
        if kind == 1:  # a list of steps in one form
            return "\n".join(
                f"Step {i}: add {rng.randint(1, 99)} to get {rng.randint(100, 999)}."
                for i in range(1, 9)
            )
        if kind == 2:  # an equation a line
            return "\n".join(f"{v} = {rng.randint(1, 99)}" for v in "abcdefgh")
        return self.paragraph() + "\n\nLet me check.\n\n" + self.paragraph() + "\n\nLet me check."

    def quoting(self):
        """Return English with a foreign name, a formula, and a short quotation."""
        quote = self.rng.choice(["das Haus", "la maison", "数学", "мир"])
        return f"{self.reasoning(4)}\n\nThe sign says {quote}, and \\frac{{1}}{{2}} of it is blue."

    def inline(self):
        """Return reasoning that names code and assigns values, but holds no block of it."""
        rng = self.rng
        return (
            f"{self.paragraph()}\n\nWith `x = {rng.randint(1, 9)}` and the function `sum` we get "
            f"this:\nx = {rng.randint(1, 99)}\ny = {rng.randint(1, 99)}\nz = x + y\n\nIf x > 3, we "
            f"return to the first case: for all n in the list it holds.\n\n{self.paragraph()}"
        )

    # Faults.

    def looping(self):
        rng = self.rng
        kind = rng.randrange(4)
        start = self.reasoning(rng.randint(1, 3))
        if kind == 0:  # a sentence again and again
            return start + "\n" + (self.paragraph(1) + " ") * rng.randint(14, 30)
        if kind == 1:  # a line again and again
            line = f"\n{self.words()['name']} still has to subtract the rest of it."
            return f"{start}\n{self.paragraph(1)}" + line * rng.randint(20, 40)
        if kind == 2:  # a word or two for ever
            return start + " " + rng.choice(["wait ", "no, wait, ", "and so on "]) * 120
        return "\n\n".join([start] * rng.randint(3, 5))  # everything again

    def mixed(self, languages, share=0.5):
        """Return reasoning of which about `share` of the paragraphs are in another language."""
        language = self.rng.choice(languages)
        sentences = FOREIGN[language].split("|")
        foreign = [" ".join(self.rng.sample(sentences, 4)) for _ in range(3)]
        paragraphs = [self.paragraph() for _ in range(3)] + foreign
        self.rng.shuffle(paragraphs)
        return "\n\n".join(paragraphs)

    def rambling(self, characters=1_500):
        text = ""
        while len(text) <= characters:
            text += self.paragraph() + " "
        return f"{self.paragraph()}\n\n{text}\n\n{self.paragraph()}"

    def coding(self):
        block = self.rng.choice(CODE).format(**self.words())
        return f"{self.paragraph()}\n\n{block}\n\n{self.paragraph()}"

    def wrapped(self, question):
        before = self.rng.choice(
            ["Solve the following problem and explain every step. ", "Here is a riddle for you: ",
             "You are a careful tutor. Your pupil asks: ", "Please help me with my homework.\n\n"]
        )  # fmt: skip
        after = self.rng.choice(
            [" Think before you answer.", "\n\nGive only the number.", " Thank you!", ""]
        )
        return before + question + after
