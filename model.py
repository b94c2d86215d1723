"""The mathematics of vip-AnT: CLIP's two towers, the loss and the optimizer (§3, Appendix B).

`clip_load.py` fills these modules with OpenAI's weights and makes the audio encoder of the visual
tower; `pretrain.py` trains that.

B  batch              T, F  time frames and mel bins of a sound
N  tokens             R, P  side of an image and of a patch in pixels
L  length of a text   C     width of a Transformer
                      D     width of the space that images, audio and text share
"""
import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.utils.checkpoint import checkpoint

# -------------------------------------------------------------------------------------- ranks
def join_ranks():
    """Join torchrun's ranks, if any -> own device. Raises ValueError (more ranks than GPUs)."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    device = torch.device("cpu")
    if gpus:
        if local_rank >= gpus:
            raise ValueError(f"{gpus} GPUs are fewer than --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))  # banks take long
    return device


def rank_and_size():
    """(this process's rank, number of ranks); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print0(*parts):
    """print, on rank 0 alone."""
    if rank_and_size()[0] == 0:
        print(*parts, flush=True)


def gather(x):
    """(B, D) of this rank -> (ranks·B, D) of all, differentiable. B must be the same everywhere."""
    return torch.cat(all_gather(x)) if dist.is_initialized() else x


# -------------------------------------------------------------------------------- Transformer
class Attention(nn.Module):
    """Multi-head self-attention; parameters named as in OpenAI's file."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, at=None):
        """(B, N, C) -> (B, N, C); with `at` (B, 1, 1) that token alone asks, -> (B, 1, C)."""
        C, mask = x.shape[2], None
        queries = x if at is None else x.take_along_dim(at, dim=1)               # (B, ·, C)
        q = F.linear(queries, self.in_proj_weight[:C], self.in_proj_bias[:C])    # (B, ·, C)
        kv = F.linear(x, self.in_proj_weight[C:], self.in_proj_bias[C:])         # (B, N, 2C)
        k, v = kv.split(C, dim=2)                                                # 2 × (B, N, C)
        # each head sees its own part of the width: (B, ·, C) -> (B, heads, ·, C/heads)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        if self.causal and at is not None:  # is_causal would take a lone query for the first
            mask = (torch.arange(x.shape[1], device=x.device) <= at)[:, None]    # (B, 1, 1, N)
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and mask is None)
        return self.out_proj(x.transpose(1, 2).flatten(2))                       # (B, ·, C)


class Block(nn.Module):
    """Pre-norm residual block, (B, N, C) -> (B, N, C); with `at` (B, 1, 1) -> (B, 1, C)."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.attn = Attention(width, heads, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width),
                                  "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, at=None):
        x = (x if at is None else x.take_along_dim(at, dim=1)) + self.attn(self.ln_1(x), at)
        # QuickGELU, h·σ(1.702 h) = silu(1.702 h) / 1.702, scaled at width C: 4C would cost more
        fc, proj = self.mlp.values()
        hidden = F.silu(F.linear(1.702 * self.ln_2(x), fc.weight, 1.702 * fc.bias))  # (B, ·, 4C)
        return x.add(F.linear(hidden, proj.weight, 1.702 * proj.bias), alpha=1 / 1.702)  # (B, ·, C)


class Transformer(nn.Module):
    """Blocks, (B, N, C) -> (B, C), the token `at` (B, 1, 1): the last block computes no other."""

    def __init__(self, width, layers, heads, causal=False):
        super().__init__()
        self.recompute = False  # True: a block's activations are not kept, but computed again
        self.resblocks = nn.Sequential(*(Block(width, heads, causal) for _ in range(layers)))
        small = (2 * layers * width) ** -0.5  # residual branches start small, as CLIP's do
        for block in self.resblocks:
            for layer, std in ((block.attn.out_proj, small), (block.mlp.c_proj, small),
                               (block.mlp.c_fc, (2 * width) ** -0.5)):
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def forward(self, x, at):
        for block in self.resblocks:
            only = at if block is self.resblocks[-1] else None
            if self.recompute:
                x = checkpoint(block, x, only, use_reentrant=False)
            else:
                x = block(x, only)
        return x[:, 0]


# ------------------------------------------------------------------------- images, audio, CLIP
class VisionTransformer(nn.Module):
    """One class for both senses (Fig. 4): images (B, 3, R, R) and audio (B, 1, T, F) -> (B, D).

    `stride` below `patch` makes neighbouring patches overlap, as the audio encoder's do: 1000×128
    frames × mel bins, patch 32, stride 16×24 -> a grid of 61×5, with the class token 306 tokens.
    """

    def __init__(self, input_size, patch, stride, channels, width, layers, heads, output_dim):
        super().__init__()
        self.config = {"input_size": tuple(input_size), "patch": patch, "stride": tuple(stride),
                       "channels": channels, "width": width, "layers": layers, "heads": heads,
                       "output_dim": output_dim}
        self.grid = tuple((size - patch) // step + 1 for size, step in zip(input_size, stride))
        if min(self.grid) < 1:
            raise ValueError(f"an input of {input_size} holds no patch of {patch}×{patch}")
        self.conv1 = nn.Conv2d(channels, width, patch, stride, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        tokens = 1 + math.prod(self.grid)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, output_dim) * width ** -0.5)

    def forward(self, x):
        if x.shape[2:] != self.config["input_size"]:
            raise ValueError(f"{tuple(x.shape)}: the encoder takes {self.config['input_size']}")
        x = self.conv1(x).flatten(2).transpose(1, 2)                             # (B, N-1, C)
        first = self.class_embedding.expand(len(x), 1, -1)                       # (B, 1, C)
        x = torch.cat([first, x], dim=1) + self.positional_embedding             # (B, N, C)
        at = x.new_zeros(len(x), 1, 1, dtype=torch.int64)  # the class token
        return self.ln_post(self.transformer(self.ln_pre(x), at)) @ self.proj    # (B, D)

    def flops(self):
        """Floating point operations of a forward pass of one sample."""
        N, C = self.positional_embedding.shape
        layers = self.config["layers"]
        convolution = (N - 1) * self.conv1.weight.numel()
        keys_values = layers * N * 2 * C ** 2
        queries = (layers - 1) * N + 1  # in the last layer the class token alone asks
        per_query = 10 * C ** 2 + 2 * N * C  # query, output 2, MLP 8; scores and their mix 2 N
        return 2 * (convolution + keys_values + queries * per_query)  # multiplications, additions


LOG_SCALE = math.log(1 / 0.07)  # log(1/temperature) at the start, as CLIP's


class CLIP(nn.Module):
    """An image and a text encoder into one space (§3.2.1); state-dict keys are OpenAI's."""

    def __init__(self, image_size, patch, vision_width, vision_layers, context_length, vocab_size,
                 text_width, text_layers, output_dim):
        super().__init__()
        self.image_size, self.context_length = image_size, context_length
        self.visual = VisionTransformer(
            (image_size, image_size), patch, (patch, patch), channels=3, width=vision_width,
            layers=vision_layers, heads=vision_width // 64, output_dim=output_dim)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, text_width) * 0.01)
        self.transformer = Transformer(text_width, text_layers, text_width // 64, causal=True)
        self.ln_final = nn.LayerNorm(text_width)
        projection = torch.randn(text_width, output_dim) * text_width ** -0.5
        self.text_projection = nn.Parameter(projection)
        self.logit_scale = nn.Parameter(torch.tensor(LOG_SCALE))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images):
        """(B, 3, R, R) preprocessed images, on any device -> (B, D), not normalised."""
        return self.visual(images.to(self.logit_scale.device))

    def encode_text(self, tokens):
        """(B, L) int64 token ids, on any device, L <= context length -> (B, D), not normalised."""
        tokens = tokens.to(self.logit_scale.device)
        positions = self.positional_embedding[:tokens.shape[1]]                  # (L, C)
        # the feature is read where the text ends: at the largest id, which is end-of-text's
        at = tokens.argmax(dim=1)[:, None, None]                                 # (B, 1, 1)
        x = self.transformer(self.token_embedding(tokens) + positions, at)       # (B, C)
        return self.ln_final(x) @ self.text_projection                           # (B, D)


# --------------------------------------------------------------------------------------- loss
def unit(features):
    """(B, D) -> the same directions with length 1, float32."""
    return F.normalize(features.float(), dim=1)


def info_nce(a, b, log_scale):
    """InfoNCE both ways (Eq. 1) with the *global* batch as negatives -> ().

    a, b: (B, D) features of this rank's B pairs, of any length; log_scale: () log(1/temperature).
    Averaged over ranks, as DDP does with gradients, it is one process's loss of the whole batch.
    """
    a, b = unit(a), unit(b)                                                      # (B, D)
    scale = log_scale.exp()  # s(a, b) = cos(a, b) / temperature
    pair = torch.arange(len(a), device=a.device) + rank_and_size()[0] * len(a)   # (B,) partners
    logits_a = scale * a @ gather(b).T                                           # (B, ranks·B)
    logits_b = scale * b @ gather(a).T
    # differs from the paper: the -log of Eq. 1's shares, which it lacks as printed, and their mean
    # over the batch, not their sum; it does not say whose the negatives are: here all ranks'
    return F.cross_entropy(logits_a, pair) + F.cross_entropy(logits_b, pair)


# ---------------------------------------------------------------------------------- optimizer
def parameter_groups(module, lr_weights, lr_biases, weight_decay):
    """Two groups: weights; and all with ndim < 2 (biases, norms, class token, temperature)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    weights = [p for p in trained if p.ndim >= 2]
    biases = [p for p in trained if p.ndim < 2]
    return [{"params": weights, "peak": lr_weights, "weight_decay": weight_decay, "adapt": True},
            {"params": biases, "peak": lr_biases, "weight_decay": 0.0, "adapt": False}]


class LARS(torch.optim.Optimizer):
    """LARS (Table 5) as in the authors' code; You et al.: ‖g‖ + wd·‖p‖, rate in the momentum."""

    def __init__(self, groups, lr=0.0, momentum=0.9, eta=0.001):  # as parameter_groups makes them
        super().__init__(groups, {"lr": lr, "momentum": momentum, "eta": eta})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            momenta = [self.state[p]["momentum"] for p in params]
            grads = [p.grad for p in params]  # _foreach: all of them in a few kernels
            updates = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            if group["adapt"]:
                p_norm = torch.stack(torch._foreach_norm(params))                # (tensors,)
                g_norm = torch.stack(torch._foreach_norm(updates))               # (tensors,)
                ratio = group["eta"] * p_norm / g_norm  # η‖p‖ / ‖g + wd·p‖; 1 where one is 0
                ratio = ratio.where((p_norm > 0) & (g_norm > 0), 1.0)
                torch._foreach_mul_(updates, ratio.unbind())
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])


def schedule(step, steps, warmup_steps):
    """Factor on the peak learning rate: linear from 0 (Table 5), then cosine down to 0.1 %."""
    # differs from the paper, which names no schedule after the warm-up: as in the authors' code
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.001 + 0.999 * (1 + math.cos(math.pi * progress)) / 2
