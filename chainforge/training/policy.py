"""Open a policy for training, and leave it as directories that anything can open."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.transcript import DEFAULT, read, tags_of, write
from chainforge.training.hub import take_over
from chainforge.training.stage import Stage, is_main_process

logger = logging.getLogger(__name__)


class NothingTrained(RuntimeError):
    """A training stage that took no step or changed no weight."""


def check_model(reference: str | None) -> str:
    """Return the model's path or Hub id; raise `InputError` when a path is no model.

    Nothing is loaded: a directory is a model when it has a `config.json`.
    """
    if not reference:
        raise InputError("model_name_or_path: name a model, as --model_name_or_path PATH_OR_HUB_ID")
    path = Path(reference)
    if path.is_dir():
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            raise InputError(
                f"{path} is a LoRA adapter; give the stage's model/, where it is merged"
            )
        if not (path / "config.json").exists():
            inner = (
                " (its model/ is one: give that)" if (path / "model/config.json").exists() else ""
            )
            raise InputError(f"{path} is not a model directory: it has no config.json{inner}")
    elif path.exists() or reference.startswith(("/", "./", "../")) or reference.count("/") > 1:
        raise InputError(f"{path}: no such model directory (looked from {Path.cwd()})")
    return reference


def load_tokenizer(reference: str, transcript: str = DEFAULT, **options: Any) -> Any:
    """Load a tokenizer and prove that transcripts survive its chat template.

    Raises `InputError` when the template is missing, eats, doubles or pre-fills the tags.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(reference, **options)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{reference}: no tokenizer could be loaded: {_first_line(error)}"
        ) from None
    check_template(tokenizer, transcript, reference)
    return tokenizer


def check_template(tokenizer: Any, transcript: str, name: str) -> None:
    """Send a transcript through the chat template and back; raise `InputError` if it changed."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{name}: the tokenizer has no chat template; set chat_template_path")
    prompt = [{"role": "user", "content": "1 + 1 ="}]
    text = write("1 + 1 = 2", "2", transcript)
    turn = {"role": "assistant", "content": text}
    before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, turn], tokenize=False)
    for tag in tags_of(transcript).all:
        if before.count(tag):
            raise InputError(f"{name}: the chat template itself writes {tag} before the completion")
        if whole.count(tag) != 1:
            raise InputError(
                f"{name}: the chat template keeps {tag} {whole.count(tag)} times, not once; "
                "use a template that leaves the assistant's text as it is"
            )
    if not whole.startswith(before):
        raise InputError(
            f"{name}: the chat template renders a prompt otherwise once it is answered"
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    if read(decoded, transcript) != read(text, transcript):
        raise InputError(
            f"{name}: the tags are lost in decoding ({decoded!r}); "
            "add them as ordinary tokens, not as special ones"
        )


def model_options(model_args: Any, training_args: Any) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` that the recipe's settings ask for."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": training_args.trust_remote_code,
        "use_safetensors": True,
        **(training_args.model_init_kwargs or {}),
    }


def prepare(training_args: Any, model_args: Any, stage: Stage) -> Any:
    """Point a TRL configuration at the stage: checkpoints inside it, the model as asked for."""
    take_over(training_args, model_args, stage)
    training_args.output_dir = str(stage.path("checkpoints"))
    training_args.model_init_kwargs = model_options(model_args, training_args)
    if os.environ.get("CHAINFORGE_CHAIN"):
        training_args.disable_tqdm = True  # the chain draws the bar; a log has no use for one
    return training_args


def check_lengths(rows: Any, tokenizer: Any, max_length: int | None) -> None:
    """Raise `InputError` when rows do not fit: TRL would cut them, or drop them, in silence.

    `rows` has conversational `prompt` and `completion` columns; `max_length` is in tokens.
    """
    if max_length is None:
        return
    conversations = [prompt + done for prompt, done in zip(rows["prompt"], rows["completion"])]
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    lengths = [len(one) for one in ids]
    if long := [index for index, length in enumerate(lengths) if length > max_length]:
        raise InputError(
            f"max_length: {len(long)} of {len(lengths)} rows have more than {max_length} tokens "
            f"(the first is row {long[0]}, the longest has {max(lengths)}) and would be cut; "
            "raise max_length, or drop them when the rows are made"
        )


def check_vocabulary(student: Any, teacher: Any) -> None:
    """Raise `InputError` unless two tokenizers mean the same by each token."""
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine != theirs:
        different = len(set(mine.items()) ^ set(theirs.items()))
        raise InputError(
            f"teacher and student differ in {different} tokens: distillation by logits needs one "
            "tokenizer; distil by traces instead (recipes/reject.py, then recipes/sft.py)"
        )


def weight_sums(model: Any) -> dict[str, float]:
    """Return one number for each trainable weight, to see whether training moved it."""
    trainable = (item for item in model.named_parameters() if item[1].requires_grad)
    return {name: float(weight.detach().double().sum()) for name, weight in trainable}


def train(trainer: Any, stage: Stage) -> None:
    """Train, from the last good checkpoint if there is one, and save the policy.

    Raises `NothingTrained` when no parameter can train, no step was taken or no weight moved.
    """
    from chainforge.training.callbacks import StageCallback
    from chainforge.training.checkpoints import last_good

    before = weight_sums(trainer.model)
    if not before:
        raise NothingTrained("no parameter of the model requires a gradient")
    trainer.add_callback(StageCallback(stage))
    checkpoint = last_good(stage.path("checkpoints"))
    if checkpoint:
        logger.info("resuming from %s", checkpoint)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    steps = trainer.state.global_step
    if steps == 0:
        raise NothingTrained("no step was taken: the data hold less than one batch")
    if weight_sums(trainer.model) == before:
        raise NothingTrained(
            f"no weight changed in {steps} steps: every gradient was zero. In RL this means that "
            "all completions of every group had the same reward (see reward_std in metrics.jsonl)"
        )
    stage.metrics |= {"steps": steps} | {
        key: value
        for key, value in result.metrics.items()
        if key in ("train_loss", "train_runtime")
    }
    stage.metrics |= _last_rewards(trainer.state.log_history)
    save(trainer, stage)


def _last_rewards(history: list[dict[str, Any]], window: int = 10) -> dict[str, float]:
    """Return the mean reward over the last logs, for the manifest."""
    rewards = [log["reward"] for log in history if isinstance(log.get("reward"), float)][-window:]
    return {"reward": round(sum(rewards) / len(rewards), 4)} if rewards else {}


def save(trainer: Any, stage: Stage) -> None:
    """Leave `model/`, a plain model, and with LoRA `adapter/`, the adapter alone."""
    from peft import PeftModel

    model = trainer.accelerator.unwrap_model(trainer.model)
    target = stage.path("model")
    if isinstance(model, PeftModel):
        _save_adapter(model, trainer.processing_class, stage.path("adapter"), target)
    else:
        trainer.save_model(str(target))
        if is_main_process():
            (target / "training_args.bin").unlink(missing_ok=True)
            (target / "README.md").unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()


def _save_adapter(model: Any, tokenizer: Any, adapter: Path, target: Path) -> None:
    """Save the adapter, and the base with the adapter merged in at the base's own precision.

    The base is loaded anew: merging into quantised weights would keep their rounding.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if not is_main_process():
        return
    config = model.peft_config["default"]
    base = config.base_model_name_or_path
    if Path(base).exists():
        # A relative path would bind the adapter to this working directory.
        config.base_model_name_or_path = base = str(Path(base).resolve())
    shutil.rmtree(adapter, ignore_errors=True)
    model.save_pretrained(str(adapter), selected_adapters=["default"])
    (adapter / "README.md").unlink(missing_ok=True)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)
    merged = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    merged.save_pretrained(str(target))
    for directory in (adapter, target):
        tokenizer.save_pretrained(str(directory))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
