"""Direct preference optimization (DPO) on pairs of a right and a wrong completion.

    accelerate launch recipes/dpo.py --config recipes/quickstart/dpo_train.yaml \
        --model_name_or_path runs/dpo/cold_start/model --data runs/dpo/rejection \
        --output_dir runs/dpo/dpo

Every option is TRL's own (DPOConfig, ModelConfig) except `data`, `transcript`, `adapter` (what to
do with a LoRA adapter that the stage is given) and `save`. `reject.py` writes the pairs with
`preference_pairs: 1`; rows of your own have `prompt`, `chosen` and `rejected`. The reference is the
policy that the stage starts from. A row that does not fit into `max_length` is an error.
"""

from types import SimpleNamespace
from typing import Any

from trl import DPOConfig, DPOTrainer, ModelConfig

from chainforge.core import process
from chainforge.core.config import parse
from chainforge.core.errors import InputError
from chainforge.data.sft_dataset import DPO, DataArgs, sft_dataset
from chainforge.hub.push import check_push, push_signed
from chainforge.train.checkpoints import check_saving
from chainforge.train.loop import train
from chainforge.train.policy import PolicyArgs, check_policy, open_policy, prepare
from chainforge.train.stage import open_stage
from chainforge.train.templates import check_end, check_rows, load_tokenizer

CONFIGS = (DataArgs, PolicyArgs, DPOConfig, ModelConfig)


def preflight(configs: tuple[Any, ...]) -> SimpleNamespace:
    """Check settings, rows and tokenizer; return what was loaded. No weights are read."""
    data, policy, training, model = configs
    start = check_policy(policy, training, model)
    check_saving(training)
    check_push(training, start)
    if training.sync_ref_model:
        raise InputError("sync_ref_model: no checkpoint has the moving reference; set it to false")
    rows, sources = sft_dataset(data, DPO)
    tokenizer = load_tokenizer(
        start.source.tokenizer,
        data.transcript,
        rows=rows,
        template_options=data.chat_template_kwargs,
        **start.tokenizer_options,
    )
    for name in DPO:
        check_rows(rows, tokenizer, training.max_length, name)
    check_end(tokenizer, rows[0] | {"completion": rows[0]["rejected"]}, start.source.model)
    return SimpleNamespace(start=start, rows=rows, sources=sources, tokenizer=tokenizer)


def main() -> None:
    data, _, training, _ = configs = parse(*CONFIGS)
    ready = preflight(configs)
    inputs = {"model": ready.start.reference}
    inputs |= {f"data.{number}": path for number, path in enumerate(data.data)}
    with open_stage(
        "dpo",
        training.output_dir,
        *configs,
        inputs=inputs,
        seed=training.seed,
        push=push_signed,
    ) as stage:
        trainer = DPOTrainer(
            model=open_policy(ready.start, stage),
            args=prepare(training, stage),
            train_dataset=ready.rows,
            processing_class=ready.tokenizer,
            peft_config=ready.start.peft_config,
        )
        stage.notes["kl_reference"] = stage.notes["starts_from"]
        stage.metrics |= {"pairs": len(ready.rows), "sources": ready.sources}
        train(trainer, stage)


if __name__ == "__main__":
    process.run(main)
