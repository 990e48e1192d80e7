"""What the operators' tests share: memory that a kernel forgot to write shows up as NaN."""

import pytest
import torch

with torch.device("cpu"):  # torch looks up once which functions obey this: before we replace some
    torch.empty(0)


def _poisoned(make):
    def empty(*args, **kwargs):
        tensor = make(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return empty


@pytest.fixture(autouse=True)
def poison_empty_memory(monkeypatch):
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch, "empty_strided", _poisoned(torch.empty_strided))
