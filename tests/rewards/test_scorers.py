import reasoning_gym
from reasoning_gym.factory import DATASETS

from chainforge.rewards.scorers import plain_scorer

ANSWERS = ["3", "03", "+3.0", "-3", "1e3", "1e999999999", "3 apples", "", "three", "1,000", "NaN"]


def test_a_plain_scorer_says_what_the_data_set_says():
    for name in ("chain_sum", "basic_arithmetic", "leg_counting", "gcd", "caesar_cipher"):
        entry = reasoning_gym.create_dataset(name, size=1, seed=3)[0]
        own, plain = reasoning_gym.get_score_answer_fn(name), plain_scorer(name)
        for answer in [*ANSWERS, entry["answer"], f"{entry['answer']} or so"]:
            assert (plain(answer, entry) >= 1) == (own(answer, entry) >= 1), (name, answer)


def test_scorers_that_parse_or_run_an_answer_are_left_to_the_judges():
    found = {name for name in DATASETS if plain_scorer(name)}
    assert not found & {"simple_integration", "rubiks_cube", "countdown", "game_of_life", "zebra"}
    assert plain_scorer("no such data set") is None
