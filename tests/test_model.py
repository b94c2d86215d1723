"""The loss, the optimizer and the towers: by hand where a hand can, against OpenAI's and the authors' values."""
import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_load import audio_encoder_from_clip, lengthen, load_clip
from model import (
    CLIP,
    LARS,
    MLP,
    Attention,
    Transformer,
    VisionTransformer,
    info_nce,
    parameter_groups,
    schedule,
)


def test_loss_of_two_pairs_by_hand():
    """Two orthogonal pairs at scale e^1: each row's cross-entropy is log(1 + e^-e), counted both ways."""
    a = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # lengths must not matter
    loss = info_nce(a, torch.eye(2), torch.tensor(1.0))
    assert loss.item() == pytest.approx(2 * math.log(1 + math.exp(-math.e)), abs=1e-6)


def test_loss_of_unrelated_pairs_is_log_batch_both_ways():
    a = torch.ones(8, 4)
    assert info_nce(a, a, torch.tensor(2.0)).item() == pytest.approx(2 * math.log(8), abs=1e-5)


def test_loss_and_gradients_are_the_authors(shared):
    golden = np.load(shared / "golden/infonce.npz")
    a, b, log_scale = (torch.tensor(golden[k], requires_grad=True) for k in ("a", "b", "log_scale"))
    loss = info_nce(a, b, log_scale)
    loss.backward()
    assert loss.item() == pytest.approx(float(golden["loss"]), abs=1e-4)
    assert (a.grad - torch.tensor(golden["grad_a"])).abs().max() < 1e-4
    assert abs(log_scale.grad.item() - float(golden["grad_log_scale"])) < 1e-4


def test_lars_step_by_hand():
    """‖p‖ = 5, ‖g‖ = 1, η = 0.1: the step is lr · 0.1·5/1 · g; a bias takes lr · g."""
    weight, bias = torch.nn.Parameter(torch.tensor([[3.0, 4.0]])), torch.nn.Parameter(torch.tensor([1.0]))
    weight.grad, bias.grad = torch.tensor([[0.0, 1.0]]), torch.tensor([2.0])
    groups = [{"params": [weight], "lr": 2.0}, {"params": [bias], "lr": 0.5, "adapt": False}]
    LARS(groups, eta=0.1).step()
    assert weight.tolist() == [[3.0, 3.0]] and bias.tolist() == [0.0]


def test_lars_trust_ratio_is_one_where_a_norm_is_zero():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([{"params": [weight], "lr": 1.0}]).step()
    assert weight.tolist() == [[-1.0, -1.0], [-1.0, -1.0]]


def test_lars_with_its_schedule_is_the_authors_over_12_steps(shared):
    golden = np.load(shared / "golden/lars.npz")
    params = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(golden[f"p{i}"])) for i in range(4)])
    optimizer = LARS(parameter_groups(params, 0.2 * 432 / 256, 4.8e-3 * 432 / 256, 1e-6))
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(12):
        for group, peak, lr in zip(optimizer.param_groups, peaks, golden["lrs"][step]):
            group["lr"] = peak * schedule(step, 12, 3)
            assert group["lr"] == pytest.approx(lr, abs=1e-7)
        for i, p in enumerate(params):
            p.grad = torch.tensor(golden[f"g{i}_{step}"])
        optimizer.step()
        if step in (0, 4, 11):
            for i, p in enumerate(params):
                assert (p.detach() - torch.tensor(golden[f"p{i}_after{step}"])).abs().max() < 1e-4


def test_schedule_rises_to_the_peak_and_falls_to_a_thousandth():
    assert schedule(0, 100, 10) == 0 and schedule(5, 100, 10) == 0.5 and schedule(10, 100, 10) == 1
    assert schedule(55, 100, 10) == pytest.approx(0.5 + 0.0005)
    assert schedule(100, 100, 10) == pytest.approx(0.001)


def test_quickgelu_rides_on_the_weights():
    """silu with scaled weights is h·σ(1.702 h), the activation that CLIP was trained with."""
    mlp, x = MLP(16), torch.randn(3, 5, 16)
    h = mlp.c_fc(x)
    assert torch.allclose(mlp(x), mlp.c_proj(h * torch.sigmoid(1.702 * h)), atol=1e-5)


def test_attention_is_softmax_of_scaled_products_and_text_sees_no_future():
    attention, x = Attention(width=4, heads=1, causal=True), torch.randn(1, 3, 4)
    q, k, v = torch.nn.functional.linear(x, attention.in_proj_weight).chunk(3, dim=2)
    weights = (q @ k.transpose(1, 2) / 2).masked_fill(torch.ones(3, 3).triu(1).bool(), -math.inf).softmax(2)
    assert torch.allclose(attention(x), attention.out_proj(weights @ v), atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_several_heads_are_neighbouring_slices_as_in_pytorchs_attention(causal):
    ours, theirs = Attention(width=12, heads=3, causal=causal), torch.nn.MultiheadAttention(12, 3, batch_first=True)
    torch.nn.init.normal_(ours.in_proj_bias)
    theirs.load_state_dict(ours.state_dict())
    x, future = torch.randn(2, 5, 12), torch.ones(5, 5).triu(1).bool()
    assert torch.allclose(ours(x), theirs(x, x, x, attn_mask=future if causal else None)[0], atol=1e-6)


def test_clips_heads_are_64_wide():
    clip = CLIP(32, 8, 128, 1, 12, 300, 192, 1, 16)
    assert clip.visual.config["heads"] == clip.visual.transformer.resblocks[0].attn.heads == 2
    assert clip.transformer.resblocks[0].attn.heads == 3


def test_the_class_token_alone_comes_out_as_among_the_others():
    transformer, x = Transformer(width=64, layers=3, heads=2), torch.randn(2, 7, 64)
    assert torch.allclose(transformer(x, first_only=True), transformer(x)[:, :1], atol=1e-6)


def test_audio_grid_and_tokens_are_the_papers():
    encoder = VisionTransformer((1000, 128), patch=32, stride=(16, 24), channels=1, width=64, layers=1, heads=1,
                                output_dim=8)
    assert encoder.grid == (61, 5) and len(encoder.positional_embedding) == 306


def test_flops_of_the_full_encoder_are_about_160_g_a_clip_trained():
    encoder = VisionTransformer((1000, 128), 32, (16, 24), 1, width=768, layers=12, heads=12, output_dim=512)
    counted = FlopCounterMode(display=False)
    with counted, sdpa_kernel(SDPBackend.MATH):  # the fused kernel is not counted on CPUs
        encoder(torch.zeros(1, 1, 1000, 128))
    assert encoder.flops() == pytest.approx(counted.get_total_flops(), rel=0.02)
    assert 3 * encoder.flops() == pytest.approx(160e9, rel=0.1)


@pytest.fixture
def golden_clip(shared, tmp_path):
    golden = np.load(shared / "golden/clip_tiny.npz")
    weights = {k.removeprefix("weights/"): torch.tensor(golden[k]) for k in golden.files if k.startswith("weights/")}
    torch.save(weights, tmp_path / "clip.pt")
    return load_clip(tmp_path / "clip.pt"), {k: torch.tensor(golden[k]) for k in golden.files if "/" not in k}


def test_image_and_text_features_are_openais(golden_clip):
    clip, golden = golden_clip
    assert (clip.encode_image(golden["image"]) - golden["image_features"]).abs().max() < 1e-4
    assert (clip.encode_text(golden["text"]) - golden["text_features"]).abs().max() < 1e-4


def test_audio_features_are_the_authors_at_both_lengths(golden_clip):
    clip, golden = golden_clip
    short = audio_encoder_from_clip(clip, frames=50, mels=32, stride=(4, 6))
    for name, encoder in (("audio", short), ("audio_long", lengthen(short, 90))):
        assert (encoder.positional_embedding - golden[f"{name}_positional_embedding"]).abs().max() < 1e-4
        assert (encoder(golden[f"{name}_fbank"]) - golden[f"{name}_features"]).abs().max() < 1e-4


def test_wrong_input_size_is_said():
    clip = CLIP(32, 8, 64, 1, 12, 300, 64, 1, 16)
    with pytest.raises(ValueError, match=r"\(40, 32\).*\(32, 32\)"):
        clip.encode_image(torch.zeros(1, 3, 40, 32))
