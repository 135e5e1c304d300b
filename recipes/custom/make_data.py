"""Write the example's own data: questions about points, and worked answers to some of them.

    python recipes/custom/make_data.py

Yours come from elsewhere. What to keep from here: the answers that SFT learns from are to questions
of the train split only, because `split_of` is what holds the others out of training.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from chainforge.core.transcript import write
from chainforge.data.sources import split_of

HERE = Path(__file__).parent
QUESTIONS, WORKED = 600, 300


def game(rng: random.Random) -> tuple[str, str, list[tuple[int, int, int]]]:
    """Return a question, its answer, and the steps from one to the other."""
    total = rng.randint(0, 9)
    words, steps = [str(total)], []
    for _ in range(rng.randint(1, 3)):
        change = rng.choice([number for number in range(-9, 10) if number])
        words.append(f"{'+' if change > 0 else '-'} {abs(change)}")
        steps.append((total, change, total + change))
        total += change
    return f"Points of a game: {' '.join(words)}. What is the total?", str(total), steps


def reasoning(steps: list[tuple[int, int, int]], wordy: bool) -> str:
    """Write the steps; in half of the answers with words after them, of which RL will be rid."""
    told = "Step by step: " + ", ".join(f"{a}{change:+d}={b}" for a, change, b in steps) + "."
    end = f" That was the final step of the problem, and so it must be {steps[-1][2]}."
    return told + end if wordy else told


def main() -> None:
    rng = random.Random(0)
    games: dict[str, tuple[str, list[tuple[int, int, int]]]] = {}
    while len(games) < QUESTIONS:
        question, answer, steps = game(rng)
        games[question] = (answer, steps)
    with open(HERE / "problems.jsonl", "w", encoding="utf-8") as file:
        for question, (answer, _) in games.items():
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")
    train = [question for question in games if split_of(question) == "train"]
    with open(HERE / "traces.jsonl", "w", encoding="utf-8") as file:
        for number, question in enumerate(train[:WORKED]):
            answer, steps = games[question]
            said = write(reasoning(steps, wordy=number % 2 == 0), answer)
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": said},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


if __name__ == "__main__":
    main()
