"""The loss, the optimizer and the Transformer, by hand and against what others compute."""
import math

import model
import numpy as np
import pytest
import torch
import torch.nn.functional as F


def test_the_loss_of_two_pairs_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # lengths do not count
    b = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    # cosines: a1·b1 = 1, a1·b2 = a2·b2 = √½, a2·b1 = 0; at temperature 1 each row is a softmax
    r = math.sqrt(0.5)
    a_to_b = (math.log(math.e + math.exp(r)) - 1 + math.log(1 + math.exp(r)) - r) / 2
    b_to_a = (math.log(math.e + 1) - 1 + math.log(2 * math.exp(r)) - r) / 2
    loss = model.info_nce(a, b, torch.tensor(0.0))
    assert loss.item() == pytest.approx(a_to_b + b_to_a, abs=1e-6)


def test_who_guesses_has_a_loss_of_twice_the_logarithm_of_the_batch():
    a = torch.ones(7, 4)
    loss = model.info_nce(a, a, torch.tensor(3.0))
    assert loss.item() == pytest.approx(2 * math.log(7), abs=1e-5)


def test_loss_and_gradients_are_the_authors(shared):
    golden = np.load(shared / "golden/infonce.npz")
    names = ("a", "b", "log_scale")
    a, b, log_scale = (torch.tensor(golden[name], requires_grad=True) for name in names)
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
        if step in (0, 4, 11):
            for i, p in enumerate(params):
                expected = torch.tensor(golden[f"p{i}_after{step}"])
                assert (p.detach() - expected).abs().max() < 1e-4


def test_a_step_of_lars_by_hand():
    p = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))  # length 5
    optimizer = model.LARS([{"params": [p], "lr": 1.0, "adapt": True}])
    p.grad = torch.tensor([[0.0, 2.0]])                 # length 2: trust ratio 0.001 · 5 / 2
    optimizer.step()
    assert torch.allclose(p.data, torch.tensor([[3.0, 4.0 - 0.0025 * 2]]))
    optimizer.step()                                    # the momentum's 0.9, and the same again
    second = 0.9 * 0.005 + 0.001 * p.norm().item()
    assert p[0, 1].item() == pytest.approx(3.995 - second, abs=1e-5)


def test_rates_rise_from_nothing_and_end_at_a_thousandth():
    rates = [model.schedule(step, 100, 10) for step in range(101)]
    assert rates[0] == 0 and rates[5] == 0.5 and rates[10] == 1
    assert rates[55] == pytest.approx(0.5005) and rates[100] == pytest.approx(0.001)


def vit():
    torch.manual_seed(0)
    return model.VisionTransformer((40, 24), 8, (4, 6), channels=1, width=64, layers=2, heads=2,
                                   output_dim=16)


def test_only_the_class_token_of_the_last_block_is_computed_and_nothing_changes():
    encoder, x = vit(), torch.randn(3, 10, 64)
    short = encoder.transformer(x, first_only=True)
    assert short.shape == (3, 1, 64)
    assert torch.allclose(short, encoder.transformer(x)[:, :1], atol=1e-6)


def test_recomputed_activations_give_the_same_gradients():
    encoder, x, gradients = vit().train(), torch.randn(3, 1, 40, 24), []
    for recompute in (False, True):
        encoder.transformer.recompute = recompute
        encoder.zero_grad()
        encoder(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_the_mlp_is_quickgelu_as_printed():
    mlp, x = model.MLP(8), torch.randn(2, 3, 8)
    h = mlp.c_fc(x)
    assert torch.allclose(mlp(x), mlp.c_proj(h * torch.sigmoid(1.702 * h)), atol=1e-6)


def test_attention_is_pytorchs():
    ours = model.Attention(32, 4, causal=False)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 32)
    assert torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-6)


def test_text_is_read_where_it_ends_whatever_follows():
    torch.manual_seed(0)
    clip = model.CLIP(32, 8, 64, 1, 10, 50, 64, 2, 16)
    tokens = torch.tensor([[48, 3, 4, 49, 0, 0, 0, 0, 0, 0], [48, 3, 4, 49, 7, 7, 0, 0, 0, 0]])
    features = clip.encode_text(tokens)
    assert torch.allclose(features[0], features[1], atol=1e-6)
    assert torch.allclose(features[:1], clip.encode_text(tokens[:1, :4]), atol=1e-6)


def test_the_paper_audio_encoder_has_306_tokens_and_its_flops():
    encoder = model.VisionTransformer((1000, 128), 32, (16, 24), 1, 768, 12, 12, 512)
    assert encoder.grid == (61, 5) and len(encoder.positional_embedding) == 306
    C, N = 768, 306
    block = 12 * N * C * C + 2 * N * N * C        # q, k, v, out, MLP; scores and weighted values
    last = 2 * N * C * C + 10 * C * C + 2 * N * C
    assert encoder.flops() == 2 * (305 * C * 32 * 32 + 11 * block + last)


def test_an_input_of_another_size_is_refused():
    with pytest.raises(ValueError, match="the encoder takes"):
        vit()(torch.randn(1, 1, 41, 24))


def test_golden_features_do_not_depend_on_the_rest_of_the_batch():
    encoder, x = vit().eval(), torch.randn(4, 1, 40, 24)
    alone = torch.cat([encoder(part) for part in x.split(1)])
    assert F.cosine_similarity(alone, encoder(x)).min() > 1 - 1e-6
