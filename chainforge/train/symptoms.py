"""What the logs of RL say of its health: one plain function for each thing that goes wrong.

A rule takes the rows that a trainer logged, oldest first, and returns a `Finding` or None; its
keyword arguments are the thresholds. Rows that lack a rule's numbers do not count for it.

Sources: axolotl, docs/training_stability.qmd, "Key Metrics for RL (GRPO)" (the healthy ranges);
DeepSeek-R1 (Nature 645, 2025), Methods and Supplementary Information 2.5 (reward hacking); DAPO
(arXiv 2503.14476), section 4.3 (what to watch).
"""

from __future__ import annotations

from collections.abc import Callable

from chainforge.train.trends import Finding, History, course, latest, mean_of, values_of


def zero_variance(
    history: History, *, window: int = 8, most_alike: float = 0.8, least_mixed: float = 0.2
) -> Finding | None:
    """Find batches in which hardly a group teaches.

    axolotl: `frac_reward_zero_std` is healthy below 0.8. DAPO, section 3.2: groups that are all
    right, or all wrong, have no advantage. Dynamic sampling trains on none of these: see `starved`.
    """
    if values_of(history, "dynamic/kept"):
        return None
    alike = latest(history, "groups/alike", window)
    mixed = latest(history, "groups/mixed_correctness", window)
    if alike and alike.mean > most_alike:
        seen = f"groups/alike is {alike}: in so many groups all completions had the same reward"
    elif mixed and mixed.mean < least_mixed:
        seen = f"groups/mixed_correctness is {mixed}: so few groups had right and wrong answers"
    else:
        return None
    right = latest(history, "accuracy", window)
    means = "these groups have no advantage, so most of what was generated trains nothing"
    if right:
        level = "too easy" if right.mean > 0.8 else "too hard"
        if 0.2 <= right.mean <= 0.8:
            level = "either solved or out of reach"
        means += f"; with an accuracy of {right.mean:.0%} most prompts are {level}"
    return Finding(
        seen,
        means,
        "`dynamic_sampling: true`, or `gate_pool` with pass rates of this policy; other `tasks`; "
        "a larger `num_generations`",
    )


def starved(
    history: History, *, window: int = 8, least: float = 0.9, most: float = 5.0
) -> Finding | None:
    """Find dynamic sampling that gives up before its batches are full, or pays dearly for them.

    Below `least` of a batch, or above `most` groups generated for one that is trained on.
    """
    filled, rounds, made, kept = (
        latest(history, f"dynamic/{name}", window)
        for name in ("filled", "rounds", "generated", "kept")
    )
    if not (filled and rounds and made and kept):
        return None
    if filled.mean >= least and made.mean <= most * kept.mean:
        return None
    return Finding(
        f"dynamic/filled is {filled}, with {made.mean:.3g} groups generated in {rounds.mean:.3g} "
        f"rounds for the {kept.mean:.3g} that are trained on",
        "mixed groups are rare: the prompts are nearly all solved, or nearly all out of reach",
        "`tasks` of another difficulty, or a `gate_pool`; a larger `num_generations`; a larger "
        "`dynamic_max_rounds` fills the batch, and costs tokens",
    )


def truncated(history: History, *, window: int = 8, most: float = 0.3) -> Finding | None:
    """Find completions that are cut. axolotl: healthy below 0.3."""
    cut = latest(history, "completions/clipped_ratio", window)
    if not cut or cut.mean <= most:
        return None
    return Finding(
        f"completions/clipped_ratio is {cut}: that share of the completions was cut off",
        "a completion that is cut has no answer and is punished for its length, right or wrong",
        "a larger `max_completion_length`; else `mask_truncated_completions: true` and the reward "
        "`soft_overlong`, as in `preset: modern`",
    )


def entropy_collapse(
    history: History, *, window: int = 8, least: float = 0.01, fall: float = 0.1
) -> Finding | None:
    """Find a policy that stops exploring.

    axolotl: below 0.01 is a collapse. DAPO, section 3.1: entropy falls fast under symmetric
    clipping, and the samples of a group become nearly the same.
    """
    now = latest(history, "entropy", window)
    if not now:
        return None
    change = course(history, "entropy", window)
    seen = f"entropy is {now}"
    if change and change[1].mean < fall * change[0].mean:
        seen += f", from {change[0]}"
    elif now.mean >= least:
        return None
    return Finding(
        seen,
        "the policy writes nearly the same for a prompt each time: it can find nothing better, and "
        "groups no longer differ",
        "`epsilon_high: 0.28` with several updates a rollout; a lower `learning_rate`; "
        "`temperature: 1.0`; `beta` above 0, or `entropy_coef`; fewer `max_steps`",
    )


def entropy_rise(
    history: History, *, window: int = 8, most: float = 1.0, rise: float = 2.0
) -> Finding | None:
    """Find a policy that comes apart. axolotl: above 1.0 it is not converging."""
    change = course(history, "entropy", window)
    if not change or change[1].mean < rise * change[0].mean or change[1].mean <= most:
        return None
    return Finding(
        f"entropy is {change[1]}, from {change[0]}",
        "the policy is coming apart: long completions usually turn into noise next, and the "
        "rewards fall after them",
        "a lower `learning_rate`; `beta` above 0; no or a smaller `entropy_coef`; a `temperature` "
        "of at most 1.0; `loss_type: dapo`, which holds long noise to account",
    )


def kl_growth(
    history: History, *, window: int = 8, most: float = 0.5, jump: float = 4.0
) -> Finding | None:
    """Find a policy that runs away from its reference.

    axolotl: healthy from 0 to 0.5, and growing slowly; a jump is above a tenth of `most` and
    `jump` times what the `window` before had.
    """
    now = latest(history, "kl", window)
    if not now:
        return None
    before = latest([row for row in history if row["step"] < now.first], "kl", window)
    jumped = before and now.mean > max(jump * before.mean, most / 10)
    if now.mean <= most and not jumped:
        return None
    seen = f"kl is {now}" + (f", from {before}" if before else "")
    return Finding(
        seen,
        "the policy is leaving the one it started from: what that could do besides is being lost, "
        "or a reward is being exploited",
        "a larger `beta`; a lower `learning_rate`; look at `rollouts.jsonl` for what pays",
    )


def length_drift(
    history: History, *, window: int = 8, factor: float = 2.0, gain: float = 0.02
) -> Finding | None:
    """Find completions that grow without getting better, or shrink.

    R1's grow with its accuracy (Nature 645, fig. 1b), which is no fault. axolotl: a steady growth
    up to the limit suggests reward hacking. Dr. GRPO (arXiv 2503.20783), section 3.1: dividing by
    the length makes wrong answers longer.
    """
    change = course(history, "completions/mean_length", window)
    if not change:
        return None
    start, now = change
    seen = f"completions/mean_length is {now} tokens, from {start}"
    if now.mean * factor < start.mean:
        return Finding(
            seen,
            "the policy reasons less and less: a penalty of length, or the form's reward, pays "
            "more than being right",
            "a smaller weight of rewards on length and form in `rewards`; a larger "
            "`max_completion_length` if completions were cut",
        )
    right = course(history, "accuracy", window)
    if now.mean < factor * start.mean or not right or right[1].mean - right[0].mean >= gain:
        return None
    return Finding(
        f"{seen}, while accuracy is {right[1]}, from {right[0]}",
        "completions grow without getting better: filler and repetition, which the loss does not "
        "punish where it divides by the length",
        "`loss_type: dr_grpo` or `dapo`; the reward `soft_overlong` or `repetition_penalty`",
    )


def format_over_accuracy(
    history: History, *, window: int = 8, rise: float = 0.1, gain: float = 0.02
) -> Finding | None:
    """Find a policy that learns the form and not the task."""
    form, right = course(history, "formatted", window), course(history, "accuracy", window)
    if not form or not right:
        return None
    if form[1].mean - form[0].mean < rise or right[1].mean - right[0].mean >= gain:
        return None
    return Finding(
        f"formatted is {form[1]}, from {form[0]}, while accuracy is {right[1]}, from {right[0]}",
        "the form is the easier reward and is all that is being learnt; the reward rises with it",
        "a smaller weight of `format_reward` in `rewards`; a cold start by SFT that teaches the "
        "form before RL; easier `tasks`",
    )


def reward_over_heldout(
    history: History, *, evaluations: int = 4, rise: float = 0.1, gain: float = 0.02
) -> Finding | None:
    """Find a reward that rises while accuracy on held-out rows does not.

    R1, Supplementary Information 2.5: with reward hacking the reward rises and the benchmark falls.
    DAPO, section 4.3: the reward in training often says little of the accuracy in validation.
    """
    half = evaluations // 2
    held_out = course(history, "eval_accuracy", half)
    if not held_out:
        return None
    start, now = held_out
    rewards = values_of(history, "reward")
    late = [pair for pair in rewards if pair[0] > now.first]
    if not late:
        return None
    before = mean_of([pair for pair in rewards if pair[0] <= start.last] or rewards[:1])
    after = mean_of(late)
    if after.mean - before.mean < rise or now.mean - start.mean >= gain:
        return None
    return Finding(
        f"reward is {after}, from {before}, while eval_accuracy on held-out rows is {now}, from "
        f"{start}",
        "what is learnt does not carry over: the prompts are being memorised, or a reward is being "
        "exploited",
        "`chainforge check` on the rewards; more rows in `tasks` or fewer `max_steps`; `beta` "
        "above 0; `keep_best: true`; a larger `heldout_size` if this may be chance",
    )


Rule = Callable[..., Finding | None]
RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        zero_variance,
        starved,
        truncated,
        entropy_collapse,
        entropy_rise,
        kl_growth,
        length_drift,
        format_over_accuracy,
        reward_over_heldout,
    )
}
