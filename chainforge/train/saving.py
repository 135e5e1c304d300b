"""Save a trained policy in directories that any library can load, and check their logits.

`model/` is a plain model for `from_pretrained`, and `adapter/` the LoRA adapter alone, whose base
is a Hub id or an absolute path. Weights that are split over processes are gathered by all of them,
and written by the first. The same few rows go through the trained policy, through the base with
`adapter/`, and through `model/`, both read back from disk: they may differ by rounding alone.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from chainforge.core.artifacts import read_json, write_json
from chainforge.core.errors import Failed, InputError, first_line
from chainforge.generate.local import evaluating
from chainforge.train import trl_internals
from chainforge.train.model_source import ADAPTER_WEIGHTS, Source
from chainforge.train.stage import Stage, is_main_process

logger = logging.getLogger(__name__)

START = "start"  # where a stage that was given an adapter leaves what it started from

# The greatest distance of logits that counts as rounding: relative to their norm, in the median of
# all places, for the coarsest precision on either side. Merging rounds every weight once more. The
# median, because rounding may send single tokens of a mixture of experts another way.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}
ROWS, LENGTH = 2, 32
TEXT = "State the answer: 12345 + 6.78 = 12351.78\n\tdef f(x):  # naïve café\n\n  I'LL 第三 don't "


class NotWhatWasTrained(Failed):
    """A saved model or adapter that does not compute what the policy computed."""


class Agreement:
    """Logits of one policy in several forms; each form must agree with the first."""

    def __init__(self, tokenizer: Any) -> None:
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"] * ROWS * LENGTH
        self.ids = torch.tensor(ids[: ROWS * LENGTH]).reshape(ROWS, LENGTH)
        self._first: tuple[str, torch.Tensor, float] | None = None

    def check(self, name: str, model: Any) -> None:
        """Run the rows through a form of the policy; raise `NotWhatWasTrained` if it differs."""
        try:
            logits, tolerance = self._logits(model), _tolerance(model)
        except (RuntimeError, ImportError) as error:  # it needs a device or a kernel of its own
            logger.warning("%s was not compared: it does not run here: %s", name, first_line(error))
            return
        if self._first is None:
            self._first = name, logits, tolerance
            return
        other, wanted, also = self._first
        tolerance = max(tolerance, also)
        distance = ((logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median().item()
        if not distance <= tolerance:
            raise NotWhatWasTrained(
                f"{name} does not compute what {other} computes: their logits differ by "
                f"{distance:.2g} of the norm, and rounding explains {tolerance:g} at most"
            )
        logger.info("%s computes what %s computes (logits differ by %.1g)", name, other, distance)

    def _logits(self, model: Any) -> torch.Tensor:
        # accelerate's wrapper would compute in the precision of training.
        forward = getattr(model, "_original_forward", model.forward)
        with evaluating(model), torch.no_grad():
            found = forward(input_ids=self.ids.to(model.device), use_cache=False).logits
        logits: torch.Tensor = found.float().cpu()
        return logits - logits.mean(-1, keepdim=True)  # softmax ignores the mean


def _tolerance(model: Any) -> float:
    found = {weight.dtype for weight in model.parameters()} & TOLERANCE.keys()
    if model.device.type != "cpu":
        found.add(torch.float16)  # matrices are multiplied in TF32 where that is allowed
    return max(TOLERANCE[dtype] for dtype in found)


def save(trainer: Any, stage: Stage) -> None:
    """Save `model/` and, with LoRA, `adapter/`, as far as the stage keeps them.

    Every process of a launch must call this; the first writes while the others wait. Raises
    `NotWhatWasTrained` when what was saved computes something else than the policy did.
    """
    from peft import PeftModel

    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    split = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    state = None
    if split:  # all processes gather, and the first gets the weights
        whole = trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model
        state = trainer.accelerator.get_state_dict(whole)
    if is_main_process():
        if isinstance(model, PeftModel):
            _save_adapted(model, trainer.processing_class, stage, state)
        else:
            _save_whole(model, stage, state or model.state_dict())
            trainer.processing_class.save_pretrained(str(stage.path("model")))
            shutil.rmtree(stage.path(START), ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _save_whole(model: Any, stage: Stage, state: Mapping[str, Any]) -> None:
    """Save a model whose own weights were trained, in the precision of its base."""
    target, config = stage.path("model"), stage.policy.source.config
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, str(name), model.dtype)
    # Gathered weights share no memory, so transformers would not know which ones are tied.
    tied = {copy for copy, kept in model.all_tied_weights_keys.items() if kept in state}
    rounded = {
        name: weight.detach().to("cpu", dtype if weight.is_floating_point() else weight.dtype)
        for name, weight in state.items()
        if name not in tied
    }
    model.save_pretrained(str(target), state_dict=rounded)
    written = read_json(target / "config.json")  # transformers writes the precision of training
    write_json(target / "config.json", written | {"dtype": str(dtype).removeprefix("torch.")})


def _save_adapted(model: Any, tokenizer: Any, stage: Stage, state: dict[str, Any] | None) -> None:
    """Save the adapter, and its base with the adapter merged in; check that both are the policy.

    A policy that is split over processes, or on quantised weights, is not compared with the two.
    """
    start, adapter, target = stage.policy, stage.path("adapter"), stage.path("model")
    agreement = Agreement(tokenizer)
    if state is None and start.quantization is None:
        agreement.check("the trained policy", model)
    config = model.peft_config["default"]
    base = config.base_model_name_or_path
    if Path(base).exists():  # a relative path would bind the adapter to this working directory
        base = config.base_model_name_or_path = str(Path(base).resolve())
    else:
        config.revision = start.options["revision"]
    shutil.rmtree(adapter, ignore_errors=True)
    model.save_pretrained(str(adapter), selected_adapters=["default"], state_dict=state)
    (adapter / "README.md").unlink(missing_ok=True)
    try:
        merged = target if "model" in start.save else None
        _merge(agreement, base, adapter, start.options, tokenizer, merged)
    except NotWhatWasTrained:
        shutil.rmtree(adapter)
        shutil.rmtree(target, ignore_errors=True)
        raise
    if "adapter" in start.save:
        tokenizer.save_pretrained(str(adapter))
    else:
        shutil.rmtree(adapter)
    if base != str(stage.path(START).resolve()) or "adapter" not in start.save:
        shutil.rmtree(stage.path(START), ignore_errors=True)


def merge(source: Source, options: Mapping[str, Any], target: Path) -> None:
    """Write the model of an adapter's base with the adapter merged in, and its tokenizer.

    The base is opened at its own precision: merging into quantised weights would keep their
    rounding. Raises `ValueError` when a weight is not finite, and `NotWhatWasTrained` when what
    was written computes something else than the adapter on its base.
    """
    from transformers import AutoTokenizer

    assert source.adapter is not None
    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, revision=source.revision)
    _merge(Agreement(tokenizer), source.model, source.adapter, options, tokenizer, target)


def _merge(
    agreement: Agreement,
    base: str,
    adapter: Path,
    options: Mapping[str, Any],
    tokenizer: Any,
    target: Path | None,
) -> None:
    """Check an adapter on its base and, with a target, the model of both that is written there."""
    with _alone():
        adapted = attach(_open_base(base, options), adapter)
        agreement.check(f"{adapter} on its base", adapted)
        if target is not None:
            _write_merged(adapted, tokenizer, target)
            del adapted  # one model at a time
            agreement.check(str(target), _open_base(str(target), {**options, "revision": None}))


def _open_base(base: str, options: Mapping[str, Any]) -> Any:
    """Open a whole model in its own precision, with its head untied from the embeddings.

    `options` are those of `from_pretrained`, of which `revision` and `trust_remote_code` count.
    """
    model: Any = trl_internals.create_model(
        base,
        dtype="auto",
        device_map=None,
        use_safetensors=True,
        revision=options.get("revision"),
        trust_remote_code=bool(options.get("trust_remote_code")),
    )
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embeddings.weight:
        # What is merged into one of the two is not meant for the other.
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return model


def _write_merged(adapted: Any, tokenizer: Any, target: Path) -> None:
    """Merge the adapter of an opened model in, and write the model with its tokenizer.

    Head and embeddings are tied again when they are equal, and a turn may end with the tokenizer's
    token as well as with the base's.
    """
    config = adapted.get_base_model().config
    configs = [config, config.get_text_config()]
    tied = configs[1].tie_word_embeddings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        merged = adapted.merge_and_unload(safe_merge=True)
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    if tied and head is not None:
        if tied := torch.equal(head.weight, embeddings.weight):
            head.weight = embeddings.weight
        for config in configs:
            config.tie_word_embeddings = tied
    end, ends = tokenizer.eos_token_id, merged.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if end is not None and end not in ends:
        merged.generation_config.eos_token_id = [end, *ends]
        for config in configs:
            config.eos_token_id = end
    merged.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))


def attach(model: Any, adapter: Path, *, trains: bool = False) -> Any:
    """Put an adapter on a model; raise `InputError` when it was made for another one.

    PEFT only warns then, and leaves the weights that it did not find as they are initialised.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    # As TRL has it: ZeRO-3 needs one precision throughout, unless the weights are quantised.
    mixed = getattr(model, "quantization_method", None) or not is_deepspeed_zero3_enabled()
    adapted = PeftModel.from_pretrained(
        model, str(adapter), is_trainable=trains, autocast_adapter_dtype=bool(mixed)
    )
    with safe_open(str(adapter / ADAPTER_WEIGHTS), "pt") as file:
        found = set(file.keys())
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if different := sorted(key for key in found ^ wanted if "lora_" in key):
        raise InputError(
            f"{adapter} was made for another model than {model.name_or_path}: {len(different)} of "
            f"its weights find no place, or are missing, such as {different[0]}"
        )
    return adapted


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Load models whole, in this process: under ZeRO-3 loading would wait for the others."""
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and (config := reference()) is not None:
            deepspeed.set_hf_deepspeed_config(config)
