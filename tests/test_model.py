"""The loss, the optimizer and the Transformer, by hand and against what others compute."""
import math

import model
import numpy as np
import pytest
import torch


def test_the_loss_of_two_pairs_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # lengths do not count
    b = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    # cosines: a1·b1 = 1, a1·b2 = a2·b2 = √½, a2·b1 = 0; at temperature 1 each row is a softmax
    r = math.sqrt(0.5)
    a_to_b = (math.log(math.e + math.exp(r)) - 1 + math.log(1 + math.exp(r)) - r) / 2
    b_to_a = (math.log(math.e + 1) - 1 + math.log(2 * math.exp(r)) - r) / 2
    loss = model.info_nce(a, b, torch.tensor(0.0))
    assert loss.item() == pytest.approx(a_to_b + b_to_a, abs=1e-6)
    guessing = model.info_nce(torch.ones(7, 4), torch.ones(7, 4), torch.tensor(3.0))
    assert guessing.item() == pytest.approx(2 * math.log(7), abs=1e-5)


def test_loss_and_gradients_are_the_authors(shared):
    golden = np.load(shared / "golden/infonce.npz")
    a, b, log_scale = (torch.tensor(golden[name], requires_grad=True)
                       for name in ("a", "b", "log_scale"))
    loss = model.info_nce(a, b, log_scale)
    loss.backward()
    assert loss.item() == pytest.approx(float(golden["loss"]), abs=1e-4)
    assert (a.grad - torch.tensor(golden["grad_a"])).abs().max() < 1e-4
    assert abs(log_scale.grad.item() - float(golden["grad_log_scale"])) < 1e-4


def test_twelve_steps_of_lars_are_the_authors(shared):
    golden = np.load(shared / "golden/lars.npz")
    params = torch.nn.ParameterList(torch.tensor(golden[f"p{i}"]) for i in range(4))
    groups = model.parameter_groups(params, 0.2 * 432 / 256, 4.8e-3 * 432 / 256, 1e-6)
    optimizer = model.LARS(groups)
    for step in range(12):
        for group, rate in zip(optimizer.param_groups, golden["lrs"][step]):
            group["lr"] = group["peak"] * model.schedule(step, 12, 3)
            assert group["lr"] == pytest.approx(rate, abs=1e-9)
        for i, p in enumerate(params):
            p.grad = torch.tensor(golden[f"g{i}_{step}"])
        optimizer.step()
        for i, p in enumerate(params):
            if step in (0, 4, 11):
                assert np.abs(p.detach().numpy() - golden[f"p{i}_after{step}"]).max() < 1e-4


def test_a_step_of_lars_and_its_rates_by_hand():
    p = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))  # length 5
    optimizer = model.LARS([{"params": [p], "lr": 1.0, "weight_decay": 0.0, "adapt": True}])
    p.grad = torch.tensor([[0.0, 2.0]])                 # length 2: trust ratio 0.001 · 5 / 2
    optimizer.step()
    assert torch.allclose(p.data, torch.tensor([[3.0, 4.0 - 0.0025 * 2]]))
    optimizer.step()                                    # the momentum's 0.9, and the same again
    second = 0.9 * 0.005 + 0.001 * p.norm().item()
    assert p[0, 1].item() == pytest.approx(3.995 - second, abs=1e-5)
    rates = [model.schedule(step, 100, 10) for step in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5005, 0.001])


def test_recomputed_activations_give_the_same_gradients():
    encoder = model.VisionTransformer((40, 24), 8, (4, 6), 1, 64, 2, 2, 16).train()
    x, gradients = torch.randn(3, 1, 40, 24), []
    for recompute in (False, True):
        encoder.transformer.recompute = recompute
        loss = encoder(x).square().sum()
        gradients.append(torch.autograd.grad(loss, list(encoder.parameters())))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients))


def test_the_paper_audio_encoder_has_306_tokens_and_its_flops():
    encoder = model.VisionTransformer((1000, 128), 32, (16, 24), 1, 768, 12, 12, 512)
    assert encoder.grid == (61, 5) and len(encoder.positional_embedding) == 306
    C, N = 768, 306
    block = 12 * N * C * C + 2 * N * N * C        # q, k, v, out, MLP; scores and weighted values
    last = 2 * N * C * C + 10 * C * C + 2 * N * C
    assert encoder.flops() == 2 * (305 * C * 32 * 32 + 11 * block + last)
    with pytest.raises(ValueError, match="the encoder takes"):
        encoder(torch.randn(1, 1, 1001, 128))
