"""An example of your own reward: a function whose first argument is the completion's text.

    rewards:
      - {fn: accuracy_reward, weight: 1.0}
      - {fn: reward.py:concise, weight: 0.1, params: {max_words: 40}}

The other arguments are columns of the row (`answer`, `task`, ...) or `params`, by name. Return a
number, or None where the reward does not apply.
"""


def concise(completion: str, max_words: int) -> float:
    """Return 1 up to `max_words` words, falling to 0 at twice as many."""
    words = len(completion.split())
    return min(1.0, max(0.0, 2 - words / max_words))
