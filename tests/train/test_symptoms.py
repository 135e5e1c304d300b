"""Each rule fires on a made history that it is for, and not on one that is sound."""

import pytest

from chainforge.train.symptoms import RULES


def rows(**series):
    """Rows of a log, one a step, from series of equal length; None was not logged."""
    return [
        {"step": step} | {key: value for key, value in zip(series, values) if value is not None}
        for step, values in enumerate(zip(*series.values(), strict=True), start=1)
    ]


def line(start, end, count=24):
    return [start + (end - start) * at / (count - 1) for at in range(count)]


def named(rows, **names):
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


def dynamic(**values):
    return [{"step": n} | {f"dynamic/{key}": value for key, value in values.items()}
            for n in range(1, 9)]  # fmt: skip


ALIKE, MIXED, CUT = "groups/alike", "groups/mixed_correctness", "completions/clipped_ratio"
LENGTH = "completions/mean_length"
EVALS = [{"step": 6 * n, "eval_accuracy": value} for n, value in enumerate([0.5, 0.5, 0.49, 0.5])]
LEARNT = [{"step": 6 * n, "eval_accuracy": value} for n, value in enumerate([0.5, 0.5, 0.6, 0.7])]

FIRES = {
    "alike": ("zero_variance", named(rows(a=[0.9] * 8, accuracy=[1.0] * 8), a=ALIKE),
              r"groups/alike is 0.9 \(steps 1-8\).*prompts are too easy.*`dynamic_sampling"),
    "unmixed": ("zero_variance", named(rows(a=[0.1] * 8, accuracy=[0.02] * 8), a=MIXED),
                r"groups/mixed_correctness is 0.1 .*with an accuracy of 2% .* too hard"),
    "starved": ("starved", dynamic(filled=0.5, rounds=10.0, generated=100.0, kept=8.0),
                r"filled is 0.5 \(steps 1-8\), with 100 groups .* in 10 rounds for the 8 .*`gate_pool`"),
    "dear": ("starved", dynamic(filled=1.0, rounds=7.0, generated=90.0, kept=16.0), "with 90 groups"),
    "truncated": ("truncated", named(rows(a=line(0.2, 0.9)), a=CUT),
                  r"clipped_ratio is 0.79.*\(steps 17-24\).*`max_completion_length`"),
    "collapse": ("entropy_collapse", rows(entropy=line(0.5, 0.001)[:12] + [0.02] * 12),
                 r"entropy is 0.02 \(steps 17-24\), from 0.42.* `epsilon_high: 0.28`"),
    "no entropy": ("entropy_collapse", rows(entropy=[0.004] * 8), r"entropy is 0.004 \(steps 1-8\)"),
    "noise": ("entropy_rise", rows(entropy=line(0.4, 4.0)), r"from 0.94.*lower `learning_rate`"),
    "far": ("kl_growth", rows(kl=line(0.0, 1.0)), r"kl is 0.84.* `beta`"),
    "jump": ("kl_growth", rows(kl=[0.01] * 8 + [0.2] * 8), r"kl is 0.2 .* from 0.01 \(steps 1-8\)"),
    "filler": ("length_drift", named(rows(a=line(100, 500), accuracy=[0.5] * 24), a=LENGTH),
               r"from 161 .*while accuracy is 0.5 .*`loss_type: dr_grpo`"),
    "shrinking": ("length_drift", named(rows(a=line(500, 50)), a=LENGTH), "reasons less and less"),
    "form": ("format_over_accuracy", rows(formatted=line(0.2, 1.0), accuracy=line(0.3, 0.25)),
             r"formatted is 0.87.*while accuracy is 0.25.*`format_reward`"),
    "hacked": ("reward_over_heldout", rows(reward=line(0.4, 1.0)) + EVALS,
               r"reward is .*\(steps 13-24\), from .*\(steps 1-6\), while eval_accuracy .* is 0.495"),
}  # fmt: skip

SOUND = {
    "zero_variance": named(rows(a=line(0.1, 0.8), b=line(0.9, 0.3)), a=ALIKE, b=MIXED),
    "starved": dynamic(filled=1.0, rounds=3.0, generated=24.0, kept=16.0),
    "truncated": named(rows(a=[0.9] * 16 + [0.1] * 8), a=CUT),
    "entropy_collapse": rows(entropy=line(0.16, 0.045)),  # as the quickstart's, which learns
    "entropy_rise": rows(entropy=line(0.3, 0.9)),
    "kl_growth": rows(kl=line(0.0, 0.3)),
    # As R1's: longer and better.
    "length_drift": named(rows(a=line(100, 500), accuracy=line(0.3, 0.6)), a=LENGTH),
    "format_over_accuracy": rows(formatted=line(0.2, 1.0), accuracy=line(0.1, 0.5)),
    "reward_over_heldout": rows(reward=line(0.4, 1.0)) + LEARNT,
}


def told(finding):
    return f"{finding.seen}; {finding.means}; {finding.change}"


@pytest.mark.parametrize("case", FIRES)
def test_a_rule_fires_with_numbers_and_steps_and_a_key(case):
    import re

    rule, history, words = FIRES[case]
    found = RULES[rule](history)
    assert found is not None
    assert re.search(words, told(found)), told(found)
    assert "`" in found.change


def test_every_rule_has_a_case_of_each_kind():
    assert {rule for rule, _, _ in FIRES.values()} == set(SOUND) == set(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_silent_on_a_sound_run_and_on_logs_without_its_numbers(rule):
    assert RULES[rule](SOUND[rule]) is None
    assert RULES[rule]([]) is None
    assert RULES[rule](rows(loss=line(1, 0))) is None


@pytest.mark.parametrize("case", FIRES)
def test_too_few_logs_say_nothing(case):
    rule, history, _ = FIRES[case]
    assert RULES[rule](history[:4]) is None


def test_thresholds_decide():
    history = FIRES["truncated"][1]
    assert RULES["truncated"](history, most=0.95) is None
    assert RULES["truncated"](history, window=24, most=0.5) is not None


def test_groups_that_dynamic_sampling_leaves_out_are_no_fault():
    history = FIRES["unmixed"][1]
    assert RULES["zero_variance"](history) is not None
    assert RULES["zero_variance"]([row | {"dynamic/kept": 16} for row in history]) is None
