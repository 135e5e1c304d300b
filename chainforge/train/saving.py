"""Save a trained policy as directories that anything can open, and check that they compute it.

`model/` is a plain model for `from_pretrained`, and `adapter/` the LoRA adapter alone, whose base
is a Hub id or an absolute path. Weights that are split over processes are gathered by all of them,
and written by the first. The same few rows go through the trained policy, through the base with
`adapter/`, and through `model/`, both read back from disk: they may differ by rounding alone.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from chainforge.core.artifacts import read_json, write_json
from chainforge.core.errors import Failed, InputError, first_line
from chainforge.train import trl_internals
from chainforge.train.model_source import ADAPTER, ADAPTER_WEIGHTS, Source
from chainforge.train.stage import Stage, is_main_process

logger = logging.getLogger(__name__)

KEPT = ("model", "adapter", "checkpoints")
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
    """Logits of one policy in several forms; each form must agree with the first.

    `first` are ids that the rows begin with, besides a text of all kinds of characters.
    """

    def __init__(self, tokenizer: Any, first: Sequence[int] = ()) -> None:
        ids: list[int] = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        ids = ([*first[: LENGTH // 2], *ids]) * ROWS * LENGTH
        self.ids = torch.tensor(ids[: ROWS * LENGTH]).reshape(ROWS, LENGTH)
        # Rows of embeddings beyond the tokenizer's ids are padding, and may be masked in training.
        self.known = 1 + max(int(number) for number in tokenizer.get_vocab().values())
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
                f"{name} does not compute what {other} computes: on {ROWS} rows of {LENGTH} tokens "
                f"their logits differ by {distance:.2g} of the norm, and rounding explains "
                f"{tolerance:g} at most. Nothing is signed"
            )
        logger.info("%s computes what %s computes (logits differ by %.1g)", name, other, distance)

    def _logits(self, model: Any) -> torch.Tensor:
        # accelerate's wrapper would compute in the precision of training.
        forward = getattr(model, "_original_forward", model.forward)
        config = model.config.get_text_config()
        ids = self.ids[:, : getattr(config, "max_position_embeddings", None) or LENGTH]
        training = model.training
        model.eval()
        with torch.no_grad():
            found = forward(input_ids=ids.to(model.device), use_cache=False).logits
        model.train(training)
        if not found.isfinite().all() and model.dtype == torch.float16:
            # Large models may overflow in float16 in places where training, in float32, did not.
            return self._logits(copy.deepcopy(model).float())
        known: torch.Tensor = found[..., : self.known].float().cpu()
        return known - known.mean(-1, keepdim=True)  # softmax ignores the mean


def _tolerance(model: Any) -> float:
    found = {weight.dtype for weight in model.parameters()} & TOLERANCE.keys()
    if model.device.type != "cpu":
        found.add(torch.float16)  # matrices are multiplied in TF32 where that is allowed
    return max((TOLERANCE[dtype] for dtype in found), default=TOLERANCE[torch.bfloat16])


def save(trainer: Any, stage: Stage) -> None:
    """Save `model/` and, with LoRA, `adapter/`, as far as the stage keeps them.

    Every process of a launch must call this; the first writes while the others wait. Raises
    `NotWhatWasTrained` when what was saved computes something else than the policy did.
    """
    from peft import PeftModel

    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    state = _gathered(trainer)
    if is_main_process():
        if isinstance(model, PeftModel):
            _save_adapted(model, trainer.processing_class, stage, state)
        else:
            _save_whole(model, stage, state)
            trainer.processing_class.save_pretrained(str(stage.path("model")))
            shutil.rmtree(stage.path(START), ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _gathered(trainer: Any) -> dict[str, Any] | None:
    """Return the weights, gathered from all processes.

    None where each process has them whole, and where another process got them.
    """
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        return None
    split = trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model
    state = trainer.accelerator.get_state_dict(split)
    return state and dict(state)


def _save_whole(model: Any, stage: Stage, state: dict[str, Any] | None) -> None:
    """Save a model whose own weights were trained, in the precision of its base."""
    target, dtype = stage.path("model"), _precision(stage.policy)
    if state is None and dtype not in (None, model.dtype):
        state = model.state_dict()
    if state is not None:
        # Gathered weights share no memory, so transformers would not know which ones are tied.
        tied = {copy for copy, kept in model.all_tied_weights_keys.items() if kept in state}
        state = {name: _rounded(name, state[name], dtype) for name in state if name not in tied}
    model.save_pretrained(str(target), state_dict=state)
    if dtype is not None:  # transformers writes the precision of training
        config = target / "config.json"
        write_json(config, read_json(config) | {"dtype": str(dtype).removeprefix("torch.")})


def _precision(start: Any) -> Any:
    """Return the precision of the model that a stage started from; None when it is not known."""
    from safetensors import safe_open

    if start is None:
        return None
    config = start.source.config
    for part in (config, config.get("text_config") or {}):
        if name := part.get("dtype") or part.get("torch_dtype"):
            return getattr(torch, str(name).removeprefix("torch."), None)
    for path in sorted(Path(start.source.model).glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if (dtype := file.get_slice(key)[:0].dtype) in TOLERANCE:
                    return dtype
    return None


def _rounded(name: str, weight: Any, dtype: Any) -> Any:
    """Return a weight in another precision, out of the memory of the device that trains."""
    if dtype is None or not weight.is_floating_point():
        return weight
    rounded = weight.detach().to("cpu", dtype)
    if not rounded.isfinite().all() and weight.isfinite().all():
        raise Failed(
            f"{name} has values that {dtype}, the precision of the base, cannot hold. Start from a "
            "base in bfloat16 or float32: set dtype in its config.json and convert its weights"
        )
    return rounded


def _save_adapted(model: Any, tokenizer: Any, stage: Stage, state: dict[str, Any] | None) -> None:
    """Save the adapter, and its base with the adapter merged in; check that both are the policy."""
    start = stage.policy
    kept = start.save if start else KEPT
    options = start.options if start else {}
    adapter, target = stage.path("adapter"), stage.path("model")
    config = model.peft_config["default"]
    agreement = Agreement(tokenizer, _trained_ids(config))
    if state is not None or getattr(model.get_base_model(), "quantization_method", None):
        logger.info("adapter/ and model/ are compared with one another alone: the policy that was "
                    "trained is split over processes, or on quantised weights")  # fmt: skip
    else:
        agreement.check("the trained policy", model)
    if Path(config.base_model_name_or_path).exists():
        # A relative path would bind the adapter to this working directory.
        config.base_model_name_or_path = str(Path(config.base_model_name_or_path).resolve())
    elif start:
        config.revision = options["revision"]
    shutil.rmtree(adapter, ignore_errors=True)
    model.save_pretrained(str(adapter), selected_adapters=["default"], state_dict=state)
    (adapter / "README.md").unlink(missing_ok=True)
    try:
        with _alone():
            if start and start.joins:
                _join(start.source, adapter, options)
            base = read_json(adapter / ADAPTER)["base_model_name_or_path"]
            saved = attach(_open_base(base, options), adapter)
            agreement.check(f"{adapter} on its base", saved)
            if "model" in kept:
                _write_merged(_merged(saved, like=model.get_base_model()), tokenizer, target)
                del saved  # one model at a time
                agreement.check(str(target), _open_base(str(target), options | {"revision": None}))
    except NotWhatWasTrained:
        shutil.rmtree(adapter)
        shutil.rmtree(target, ignore_errors=True)
        raise
    if "adapter" in kept:
        tokenizer.save_pretrained(str(adapter))
    else:
        shutil.rmtree(adapter)
    if base != str(stage.path(START).resolve()) or "adapter" not in kept:
        shutil.rmtree(stage.path(START), ignore_errors=True)


def _write_merged(merged: Any, tokenizer: Any, target: Path) -> None:
    merged.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))


def _trained_ids(config: Any) -> list[int]:
    """Return the ids of single tokens that an adapter trains."""
    tokens = config.trainable_token_indices or []
    lists = tokens.values() if isinstance(tokens, dict) else [tokens]
    return [int(token) for one in lists for token in one]


def _open_base(base: str, options: Mapping[str, Any]) -> Any:
    """Open a model at its own precision and whole, its head a weight of its own.

    `options` are those of `from_pretrained`, of which `revision` and `trust_remote_code` count.
    """
    model: Any
    with _alone():
        model = trl_internals.create_model(
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


def merge(source: Source, options: Mapping[str, Any], target: Path) -> None:
    """Write the model of an adapter's base with the adapter merged in, and its tokenizer.

    The base is opened at its own precision: merging into quantised weights would keep their
    rounding. Raises `ValueError` when a weight is not finite, and `NotWhatWasTrained` when what
    was written computes something else than the adapter on its base.
    """
    from transformers import AutoTokenizer

    assert source.adapter is not None
    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, revision=source.revision)
    with _alone():
        adapted = attach(_open_base(source.model, options), source.adapter)
        agreement = Agreement(tokenizer, _trained_ids(adapted.peft_config["default"]))
        agreement.check(f"{source.adapter} on its base", adapted)
        merged = _merged(adapted)
        ends = merged.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if tokenizer.eos_token_id not in [None, *ends]:  # the adapter may end turns with another
            merged.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
        _write_merged(merged, tokenizer, target)
        del adapted, merged  # one model at a time
        agreement.check(str(target), _open_base(str(target), {**options, "revision": None}))


def _merged(adapted: Any, like: Any = None) -> Any:
    """Merge the adapter of an opened model in; `like` has the settings that training left."""
    tied = adapted.get_base_model().config.get_text_config().tie_word_embeddings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        merged = adapted.merge_and_unload(safe_merge=True)
    if like is not None:
        merged.generation_config = copy.deepcopy(like.generation_config)
        config = copy.deepcopy(like.config)
        for part, own in zip((config, config.get_text_config()),
                             (merged.config, merged.config.get_text_config())):  # fmt: skip
            part.dtype, part.use_cache = own.dtype, own.use_cache
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        merged.config = config
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    if tied and head is not None:
        equal = torch.equal(head.weight, embeddings.weight)
        if equal:
            head.weight = embeddings.weight
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = equal
    return merged


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


def _join(source: Source, adapter: Path, options: Mapping[str, Any]) -> None:
    """Make of the adapter in `adapter`, and of the one below it, one on that one's base.

    The sum of two low-rank products is the product of their factors side by side, so the rank is
    the sum of both ranks, and nothing is lost.
    """
    from peft.tuners.lora import LoraLayer

    assert source.adapter is not None
    model = attach(_open_base(source.model, options), source.adapter)
    model.load_adapter(str(adapter), "fresh")
    for name in ("default", "fresh"):
        # PEFT makes the new adapter's settings of these. Each layer knows its own scale already.
        config = model.peft_config[name]
        config.target_modules = {
            place
            for place, module in model.get_base_model().named_modules()
            if isinstance(module, LoraLayer) and name in module.r
        }
        config.use_rslora, config.init_lora_weights = False, True
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    model.base_model.add_weighted_adapter(["default", "fresh"], [1.0, 1.0], "joined", "cat")
    shutil.rmtree(adapter)
    model.save_pretrained(str(adapter.parent), selected_adapters=["joined"])
    (adapter.parent / "README.md").unlink(missing_ok=True)
    (adapter.parent / "joined").rename(adapter)
    settings = {"base_model_name_or_path": source.model, "revision": source.revision}
    write_json(adapter / ADAPTER, read_json(adapter / ADAPTER) | settings)


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
