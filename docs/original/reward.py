"""A reward of one's own: any function of the completion, and of columns of the row."""


def explains(completion: str, prompt: list) -> float:
    """Return the share of the question's words that the completion takes up."""
    asked = {word.lower() for word in prompt[-1]["content"].split() if len(word) > 3}
    said = completion.lower()
    return sum(word in said for word in asked) / len(asked)
