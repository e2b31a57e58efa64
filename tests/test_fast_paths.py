"""The fast ways (bfloat16, torch.compile, a GPU's queue) compute what the plain one computes."""

import contextlib
import functools
import importlib
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS

import dreamer_v2
import dreamer_v3
from tests.tiny import has_flag, tiny_args, tiny_batch, tiny_spec, update

WIDE = dict(deter=64, hidden=48, units=48, stoch=8, classes=8, depth=8, mlp_units=48, batch_size=16,
            batch_length=16)


def first_losses(module, image: bool, **flags) -> dict[str, float]:
    """Losses of the first update of a fresh agent, from a fixed seed."""
    torch.manual_seed(3)
    spec = tiny_spec(module, discrete=image, image=image, vector=0 if image else 6)
    agent = module.Agent(tiny_args(module, image, **flags), spec, torch.device("cpu"))
    metrics = update(module, agent, tiny_batch(module, agent))
    return {name: float(value) for name, value in metrics.items() if name.startswith("loss/")}


def test_transposed_convolution_of_v1_and_v2_is_torchs():
    """Their own form of it, where it begins with one pixel: the same result and gradients."""
    torch.manual_seed(1)
    ours = dreamer_v2.PixelToGrid(4, 6, 5, stride=2)
    torchs = torch.nn.ConvTranspose2d(4, 6, 5, stride=2)
    torchs.load_state_dict(ours.state_dict())
    x, weight = torch.randn(3, 4, 1, 1, requires_grad=True), torch.randn(3, 6, 5, 5)
    found, known = ([y, *torch.autograd.grad((weight * y).sum(), [x, *layer.parameters()])]
                    for layer in (ours, torchs) for y in [layer(x)])
    for a, b in zip(found, known, strict=True):
        assert b.abs().max().item() > 0.1
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dreamer_v1", "dreamer_v3"])  # Gaussian and categorical latents
def test_first_losses_with_bf16(name):
    module = importlib.import_module(name)
    known = {name: value for name, value in WIDE.items() if has_flag(module, name)}
    for image in (True, False):
        plain, again, fast = (first_losses(module, image, **known, amp=amp)
                              for amp in ("off", "off", "on"))
        assert plain == again != fast and len(plain) >= 5
        # Rounding to 3 digits changes a loss by 0.2%, and by 1.3% where another class is drawn for
        # it in a few of the 256 states (which ones depends on the processor).
        assert fast == pytest.approx(plain, rel=0.05, abs=0.01)


def test_first_losses_with_compile(monkeypatch):
    """Traced and differentiated as by --compile, then run by torch itself: no C++ compiler here.

    `benchmarks/speed.py --compile` runs the generated code.
    """
    compiled, shipped = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda method, **flags: (
        compiled.append(method), shipped(method, **flags, backend="aot_eager"))[1])
    # A compiled function draws other random numbers.
    monkeypatch.setattr(dreamer_v3, "draw_classes", lambda probs: probs.argmax(-1))
    monkeypatch.setattr(dreamer_v3, "draw_noise", lambda mean: torch.full_like(mean, 0.5))
    sizes = dict(batch_size=2, batch_length=2, imag_horizon=2)
    plain = first_losses(dreamer_v3, False, **sizes)
    assert not compiled
    fast = first_losses(dreamer_v3, False, **sizes, compile=True)
    assert len(compiled) >= 6 and len(plain) >= 7
    # The actor's loss is a mean of numbers near 1 that cancel; a fault changes one by 1e-2.
    assert fast == pytest.approx(plain, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_update_never_waits_for_the_device(name, discrete, monkeypatch):
    """On tensors without values, of which none can be read, nor mixed with one on the CPU.

    On a GPU each of these would be a synchronisation, or an error.
    """
    script, meta = importlib.import_module(name), torch.device("meta")
    adam = functools.partial(torch.optim.Adam, foreach=True)  # there is no fused one without values
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, fused, **flags: adam(*args, **flags))
    monkeypatch.setattr(torch, "autocast", lambda *args, **flags: contextlib.nullcontext())
    agent = script.Agent(tiny_args(script, discrete),
                         tiny_spec(script, discrete, image=True), meta)
    batch = script.Batch(*(x if x is None else x.to(meta) for x in tiny_batch(script, agent)))
    for _ in range(2):
        metrics = update(script, agent, batch)
    assert {value.device for value in metrics.values()} == {meta} and len(metrics) >= 12
    with pytest.raises(RuntimeError, match="device"):
        update(script, agent, batch._replace(reward=torch.zeros(batch.reward.shape)))
    monkeypatch.setattr(script, "centre", lambda image: image / image.max().item())
    with pytest.raises(RuntimeError, match="item"):
        update(script, agent, batch)


def test_compiling_loads_what_it_configures():
    """In a process that has imported nothing else: V1 and V2 make no optimiser of torch's own."""
    code = ("from common.devices import compile_methods\nclass Layer:\n"
            "    def forward(self): pass\nlayer = Layer()\ncompile_methods(layer.forward)\n"
            "assert 'forward' in vars(layer)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
