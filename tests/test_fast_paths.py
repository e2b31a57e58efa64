"""With bfloat16 and torch.compile switched on, the first update's losses are the float32 ones to 1%."""

import importlib
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F

from common.envs import EnvSpec

T, B, SIZES = 16, 16, dict(deter=64, hidden=48, units=48, layers=2, depth=8, stoch=8, classes=8)
KINDS = {"image_discrete": EnvSpec((32, 32, 3), 0, 5, True), "vector_continuous": EnvSpec(None, 6, 3, False)}
COMPILER = pytest.mark.skipif(sys.platform != "linux" or not (shutil.which("g++") or shutil.which("clang++")),
                              reason="torch.compile needs a C++ compiler here")


def first_losses(module, spec: EnvSpec, **flags) -> dict[str, float]:
    """Metrics of one update of a fresh agent on a fixed batch, from a fixed seed."""
    args = module.Args(size="XXS", **SIZES, image_size=32, batch_size=B, batch_length=T, horizon=5, **flags)
    torch.manual_seed(3)
    agent = module.Agent(args, spec, torch.device("cpu"))
    image = torch.randint(256, (T, B, *spec.image_shape), dtype=torch.uint8) if spec.image_shape else None
    vector = torch.randn(T, B, spec.vector_dim) if spec.vector_dim else None
    chosen = torch.randint(spec.action_dim, (T, B))
    action = F.one_hot(chosen).float() if spec.discrete else torch.rand(T, B, spec.action_dim) * 2 - 1
    batch = module.Batch(image, vector, action, 5 * torch.randn(T, B), torch.rand(T, B) < 0.1,
                         torch.rand(T, B) < 0.1)
    agent.train_step(batch, agent.blank_state(B))
    return {name: float(value) for name, value in agent.metrics.items() if name.startswith("loss/")}


@pytest.mark.parametrize("kind, flags", [
    pytest.param("image_discrete", {"amp": "on"}, id="bf16-image-discrete"),
    pytest.param("vector_continuous", {"amp": "on"}, id="bf16-vector-continuous"),
    pytest.param("vector_continuous", {"compile": True, "amp": "off"}, id="compile", marks=COMPILER)])
def test_first_losses_agree(kind: str, flags: dict, monkeypatch):
    module = importlib.import_module("dreamer_v3")
    if "compile" in flags:  # a compiled function draws other random numbers
        monkeypatch.setattr(module, "draw_classes", lambda probs: probs.argmax(-1))
        monkeypatch.setattr(module, "draw_noise", lambda mean: torch.full_like(mean, 0.5))
    plain = first_losses(module, KINDS[kind], amp="off")
    fast = first_losses(module, KINDS[kind], **flags)
    assert plain.keys() == fast.keys() and len(plain) >= 7
    for name, value in plain.items():
        assert fast[name] == pytest.approx(value, rel=0.01), name


def test_bf16_is_really_on():
    """The comparison above would hold trivially if the switch did nothing."""
    module = importlib.import_module("dreamer_v3")
    spec = KINDS["image_discrete"]
    assert first_losses(module, spec, amp="on") != first_losses(module, spec, amp="off")
    assert first_losses(module, spec, amp="off") == first_losses(module, spec, amp="off")
