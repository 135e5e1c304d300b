"""Check on saving that what is published computes what was trained.

The same few rows go through the trained policy, through the base with `adapter/`, and through
`model/`, both read back from disk. They may differ by rounding, and by nothing else.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch

from chainforge.core.errors import Failed, first_line

logger = logging.getLogger(__name__)

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
        # Rows of embeddings beyond the tokenizer's ids are padding, and may be barred in training.
        self.known = 1 + max(int(number) for number in tokenizer.get_vocab().values())
        self._seen: tuple[str, torch.Tensor, float] | None = None

    def see(self, name: str, model: Any) -> None:
        """Run the rows through a form of the policy; raise `NotWhatWasTrained` if it differs."""
        try:
            logits, tolerance = self._logits(model), _tolerance(model)
        except (RuntimeError, ImportError) as error:  # it needs a device or a kernel of its own
            logger.warning("%s was not compared: it does not run here: %s", name, first_line(error))
            return
        if self._seen is None:
            self._seen = name, logits, tolerance
            return
        other, wanted, also = self._seen
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
        training = model.training
        model.eval()
        with torch.no_grad():
            found = forward(input_ids=self.ids.to(model.device), use_cache=False).logits
        model.train(training)
        if not found.isfinite().all() and model.dtype == torch.float16:
            # Large models may overflow in float16 in places where training, in float32, did not.
            return self._logits(copy.deepcopy(model).float())
        known: torch.Tensor = found[..., : self.known].float().cpu()
        return known - known.mean(-1, keepdim=True)  # what softmax leaves out


def _tolerance(model: Any) -> float:
    found = {weight.dtype for weight in model.parameters()} & TOLERANCE.keys()
    if model.device.type != "cpu":
        found.add(torch.float16)  # matrices are multiplied in TF32 where that is allowed
    return max((TOLERANCE[dtype] for dtype in found), default=TOLERANCE[torch.bfloat16])
