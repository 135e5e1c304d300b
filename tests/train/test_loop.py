"""A failure whose reason is known, and another version of TRL, are one message."""

from types import SimpleNamespace

import pytest
import torch

from chainforge.core.errors import Failed, InputError
from chainforge.train import loop, trl_internals


def test_out_of_memory_names_the_settings_to_change(tmp_path):
    def train(**options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    state, args = SimpleNamespace(global_step=3), SimpleNamespace(output_dir=str(tmp_path))
    with pytest.raises(Failed) as error:
        loop._run(SimpleNamespace(args=args, state=state, train=train), None)
    text = str(error.value)
    assert text.startswith("out of memory after step 3 (CUDA out of memory. Tried to allocate 2.00")
    for word in ("gradient_checkpointing", "per_device_train_batch_size", "chainforge doctor"):
        assert word in text


def test_a_version_without_a_private_name_is_refused(monkeypatch):
    trl_internals.check_versions()
    monkeypatch.setattr(trl_internals, "METHODS", ("no_such",))
    with pytest.raises(InputError, match=r"trl .* has no no_such: ChainForge supports TRL 1"):
        trl_internals.check_versions()
