"""On-policy distillation: the student samples, and learns the teacher's token probabilities there.

    accelerate launch recipes/distill.py --config recipes/quickstart/distill.yaml \
        --tasks '[{fn: reasoning_gym, params: {dataset: chain_sum}, size: 800}]' \
        --model_name_or_path runs/quickstart/student/model \
        --teacher_model_name_or_path runs/quickstart/rl_final/model --output_dir runs/distill

Every option is TRL's own (DistillationConfig, ModelConfig) except `tasks`, `transcript`,
`adapter` and `save`. Student and teacher need one tokenizer; their embeddings may be padded to
different sizes, as those of Qwen2.5-7B and 1.5B are. Distillation from written traces, which is
what DeepSeek-R1 did (section 2.4), is `sft.py` on the student. It may well come first: what a
student writes before it can do anything teaches it little.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from trl import DistillationConfig, DistillationTrainer, ModelConfig

from chainforge.core import process
from chainforge.core.config import parse
from chainforge.core.transcript import DEFAULT
from chainforge.data.tasks import TaskArgs, grpo_dataset, load_examples
from chainforge.generate.settings import TemplateArgs, check_prompts
from chainforge.hub.push import check_push, push_signed
from chainforge.train.checkpoints import check_saving
from chainforge.train.distill import check_teacher, open_teacher
from chainforge.train.loop import train
from chainforge.train.model_source import check_model
from chainforge.train.policy import PolicyArgs, check_policy, open_policy, prepare
from chainforge.train.stage import open_stage
from chainforge.train.templates import load_tokenizer


@dataclass
class DistillArgs(TemplateArgs):
    """The settings of distillation beside TRL's own options."""

    transcript: str = field(default=DEFAULT, metadata={"help": "Preset of the transcript's tags."})


CONFIGS = (TaskArgs, DistillArgs, PolicyArgs, DistillationConfig, ModelConfig)


def preflight(configs: tuple[Any, ...]) -> SimpleNamespace:
    """Check settings, rows and both tokenizers; return what was loaded. No weights are read."""
    tasks, args, policy, training, model = configs
    start = check_policy(policy, training, model)
    check_saving(training)
    check_push(training, start)
    teacher = check_model(training.teacher_model_name_or_path, training.trust_remote_code)
    rows = load_examples(tasks, args.transcript, training.seed)
    tokenizer = load_tokenizer(
        start.source.tokenizer,
        args.transcript,
        template=args.chat_template_path,
        rows=rows,
        template_options=training.chat_template_kwargs,
        **start.tokenizer_options,
    )
    sizes = check_teacher(tokenizer, start.source, training)
    longest = check_prompts(tokenizer, rows, start.source.model, training.max_completion_length,
                            "max_completion_length")  # fmt: skip
    return SimpleNamespace(start=start, teacher=teacher, rows=rows, tokenizer=tokenizer,
                           sizes=sizes, prompt_tokens=longest)  # fmt: skip


def main() -> None:
    _, _, _, training, model = configs = parse(*CONFIGS)
    ready = preflight(configs)
    with open_stage(
        "distill",
        training.output_dir,
        *configs,
        inputs={"model": ready.start.reference, "teacher": ready.teacher},
        seed=training.seed,
        push=push_signed,
    ) as stage:
        trainer = DistillationTrainer(
            model=open_policy(ready.start, stage),
            teacher_model=open_teacher(training, model, ready.sizes),
            args=prepare(training, stage),
            train_dataset=grpo_dataset(ready.rows).select_columns(["prompt"]),
            processing_class=ready.tokenizer,
            peft_config=ready.start.peft_config,
        )
        stage.notes["vocabulary"] = vars(ready.sizes)
        train(trainer, stage)


if __name__ == "__main__":
    process.run(main)
