"""What a refused call says."""

from __future__ import annotations

import pytest

from spilt.errors import UserError


def message(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    return str(error.value)
