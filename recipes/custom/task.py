"""An example of your own task: a function that yields questions with their answers.

    tasks:
      - {fn: task.py:ages, params: {oldest: 60}, size: 200, split: train}

`verifier` says how an answer is judged: math (the default), arithmetic, exact, choice or numeric.
Which questions are held out is decided by their content, not here.
"""

import random
from collections.abc import Iterator

NAMES = ("Ada", "Ben", "Chen", "Dina", "Emil")


def ages(seed: int, oldest: int = 60) -> Iterator[dict[str, str]]:
    """Yield questions on how old somebody will be; as many as are asked for."""
    rng = random.Random(seed)
    while True:
        name, age, years = rng.choice(NAMES), rng.randint(1, oldest), rng.randint(1, 30)
        yield {
            "question": f"{name} is {age} years old. How old will {name} be in {years} years?",
            "answer": str(age + years),
            "verifier": "exact",
        }
