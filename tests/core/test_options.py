import re
from pathlib import Path

import pytest

from chainforge.core import options
from chainforge.core.config import _fields, parse
from chainforge.core.errors import InputError
from chainforge.core.options import _foreign, recipes, tables


@pytest.fixture(scope="module")
def kinds():
    return recipes()


def shown(kinds, capsys, option):
    with pytest.raises(SystemExit) as end:
        parse(*kinds, argv=["--config", "no/such.yaml", option])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("recipe", "own", "theirs"), [
    ("grpo", ["tasks", "rewards", "rollout_engine"], ["model_name_or_path", "num_generations", "output_dir"]),
    ("sft", ["data", "transcript", "save"], ["learning_rate", "max_length"]),
    ("reject", ["output_dir", "num_samples", "select"], []),
])  # fmt: skip
def test_help_shows_our_settings_and_then_the_most_used_of_trl(recipe, own, theirs, kinds, capsys):
    text = shown(kinds[recipe], capsys, "--help")
    names = re.findall(r"^  --(\w+)", text, re.M)
    assert [name for name in names if name in own + theirs] == own + theirs
    assert len(text.splitlines()) < 200
    assert len(set(names)) == len(names)
    everything = shown(kinds[recipe], capsys, "--help-all")
    all_names = set(re.findall(r"^  --(\w+)", everything, re.M))
    assert set(names) <= all_names
    assert "hub_token" not in all_names
    assert (f"... all {len(all_names)} with --help-all" in text) == bool(theirs)
    assert "transformers.TrainingArguments: all others" in everything or not theirs


def test_help_says_type_choices_and_default(kinds, capsys):
    text = shown(kinds["grpo"], capsys, "--help")
    assert (
        "  --health  warn | stop | off\n      Action when a health rule fires. (default: warn)"
        in text
    )
    assert "  --dtype  auto | bfloat16 | float16 | float32\n" in text
    assert re.search(r"--num_generations  int\n(      .*\n)*?      .*\(default: 8\)", text)


def test_the_documentation_has_the_same_table(kinds):
    text = tables(kinds["grpo"])
    assert (
        "| `health` | `warn \\| stop \\| off` | `warn` | Action when a health rule fires. |" in text
    )
    assert text.index("### How a completion is scored") < text.index("### TRL: model")
    assert "`num_generations`" in text
    assert "`adam_beta1`" not in text


def said(kinds, keys):
    """Return what one message says about each of the keys."""
    with pytest.raises(InputError) as error:
        parse(*kinds, argv=[f"--{key}=1" for key in keys])
    return dict(re.findall(r"unknown option --(\S+?); (.*)", str(error.value)))


@pytest.fixture(scope="module")
def known(kinds):
    return {recipe: _fields(classes) for recipe, classes in kinds.items()}


@pytest.mark.parametrize("recipe", ["collect", "sft", "grpo", "reject", "distill", "evaluate"])
def test_each_foreign_key_gets_a_name_that_is_there(recipe, kinds, known):
    names = {name.replace("*", "x") for _, _, names in _foreign() for name in names}
    keys = sorted(name for name in names - set(known[recipe]) if "token" not in name)
    answers = said(kinds[recipe], keys)
    assert set(answers) == set(keys)
    for key, answer in answers.items():
        name, others = re.search("mean '(.*?)'|'.*' is a setting of (.*)|$", answer).groups()
        assert name is None or name in known[recipe]
        for other in (others or "").split(", "):
            assert not other or re.search("'(.*)' is", answer)[1] in known[other]
        assert (
            name or others or "leave it out" in answer or answer in {a for _, a, _ in _foreign()}
        ), key


def test_each_answer_of_the_table_is_given_somewhere(kinds, known):
    assert len(_foreign()[0][0]) > 3
    for settings, alone, names in _foreign():
        wanted = {setting.partition("+")[0] for setting, _ in settings} - {"model", "base"}
        key = names[-1].replace("*", "x")
        given = " ".join(said(kinds[one], [key])[key] for one in kinds if key not in known[one])
        assert alone in given
        assert set(re.findall(r"'(\w+)'", given)) & wanted or alone, (wanted, key)


def test_the_table_is_short():
    text = Path(options.__file__).with_name("foreign.txt").read_text()
    assert len(text.splitlines()) <= 60


# A recipe, keys that people bring to it, and what is right there.
BROUGHT = [
    ("grpo", "epochs n_epochs trainer.total_epochs num_epochs", "did you mean 'num_train_epochs'"),
    ("grpo", "batch_size per_device_batch_size actor.ppo_micro_batch_size_per_gpu", "did you mean 'per_device_train_batch_size'"),
    ("grpo", "lr actor_rollout_ref.actor.optim.lr laerning_rate Learning-Rate", "did you mean 'learning_rate'"),
    ("sft", "warmup_ratio", "did you mean 'warmup_steps' (below 1 it is a share of all steps)"),
    ("grpo", "num_rl_steps trainer.total_training_steps", "did you mean 'max_steps'"),
    ("grpo", "group_size rollout.n actor_rollout_ref.rollout.n num_samples n_samples_per_prompt", "did you mean 'num_generations'"),
    ("sft", "group_size", "'num_generations' is a setting of grpo"),
    ("reject", "group_size num_generations n", "did you mean 'num_samples'"),
    ("grpo", "clip_ratio eps_clip actor.clip_ratio_low", "did you mean 'epsilon'"),
    ("grpo", "device_map trainer.n_gpus_per_node", "leave it out: `accelerate launch"),
    ("sft", "torch_dtype", "did you mean 'dtype'"),
    ("grpo", "max_prompt_length data.max_prompt_length", "leave it out: no prompt is cut"),
    ("sft", "max_seq_length cutoff_len sequence_len", "did you mean 'max_length' (of prompt and completion)"),
    ("grpo", "max_seq_length", "did you mean 'max_completion_length' (of the completion alone)"),
    ("grpo", "max_new_tokens max_tokens data.max_response_length", "did you mean 'max_completion_length'"),
    ("evaluate", "max_tokens max_completion_length", "did you mean 'max_new_tokens'"),
    ("sft", "tasks dataset_name dataset", "did you mean 'data' (stages"),
    ("grpo", "data dataset_name data.train_files", "did you mean 'tasks' (a list"),
    ("sft", "rewards reward_weights", "is a setting of"),
    ("grpo", "reward_funcs custom_reward_function.reward_fn", "did you mean 'rewards' (each like"),
    ("grpo", "cosine_max_len cosine_min_value_wrong", "did you mean 'rewards' (as params"),
    ("grpo", "kl_coef algorithm.kl_ctrl.kl_coef actor.kl_loss_coef", "did you mean 'beta'"),
    ("distill", "kl_coef", "'beta' is a setting of grpo"),  # of distill it is another thing
    ("grpo", "critic.optim.lr critic.model.path", "GRPO has no critic"),
    ("grpo", "algorithm.adv_estimator", "did you mean 'loss_type' (each recipe is one algorithm"),
    ("grpo", "gradient_accumulation", "did you mean 'gradient_accumulation_steps'"),
    ("sft", "lora_rank peft_config.r", "did you mean 'lora_r'"),
    ("sft", "lora_target target_modules", "did you mean 'lora_target_modules'"),
    ("sft", "finetuning_type", "did you mean 'use_peft'"),
    ("sft", "system system_prompt", "did you mean 'data' (its rows hold the system turn)"),
    ("grpo", "system", "did you mean 'system_prompt'"),
    ("sft", "template chat_template", "did you mean 'chat_template_path'"),
    ("evaluate", "bf16 fp16", "did you mean 'dtype'"),
    ("evaluate", "model", "did you mean 'models'"),
    ("collect", "model_name", "did you mean 'model'"),
    ("reject", "use_vllm", "did you mean 'engine' (vllm)"),
    ("grpo", "rollout.name fast_inference", "did you mean 'use_vllm'"),
    ("reject", "vllm_tensor_parallel_size tensor_parallel_size", "did you mean 'engine_options'"),
    ("grpo", "actor_rollout_ref.rollout.temperature", "did you mean 'temperature'"),
    ("grpo", "overwrite_output_dir", "leave it out: the same command resumes"),
    ("grpo", "packing", "'packing' is a setting of sft"),
    ("grpo", "code_language", "no reward runs code"),
    ("grpo", "wandb_project", "set WANDB_PROJECT"),
    ("grpo", "heldout local size foo", "see --help-all"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "keys", "answer"), BROUGHT)
def test_what_people_bring_is_answered_rightly(recipe, keys, answer, kinds):
    answers = said(kinds[recipe], keys.split())
    assert list(answers) == [key.replace("-", "_") for key in keys.split()]
    assert [text for text in answers.values() if answer not in text] == []


def test_settings_in_the_form_of_hydra_are_answered_too(kinds):
    with pytest.raises(InputError) as error:
        parse(*kinds["grpo"], argv=["+data.max_response_length=9", "beta=1", "--epochs=1"])
    assert [re.search("mean '(.*?)'", line)[1] for line in str(error.value).splitlines()] == [
        "max_completion_length", "beta", "num_train_epochs"]  # fmt: skip
