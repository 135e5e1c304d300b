import pytest

from chainforge.core.errors import InputError
from chainforge.train import trl_internals


@pytest.mark.parametrize(
    "missing",
    [("trl.trainer.utils", None, "no_such"), ("transformers.trainer", "Trainer", "_no_such")],
)
def test_a_version_without_a_private_name_is_refused(missing):
    trl_internals.check_names()
    with pytest.raises(
        InputError, match=rf"{missing[2]} does not exist in trl .* supports TRL 1.16"
    ):
        trl_internals.check_names((missing,))
