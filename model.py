"""The mathematics of vip-AnT: CLIP's two towers, the loss and the optimizer (§3, Appendix B).

Nothing here is run by itself. `clip_load.py` fills these modules with OpenAI's weights and turns the
visual tower into the audio encoder, `train.py` trains that.

B  batch              T, F  time frames and mel bins of a sound
N  tokens             R, P  side of an image and of a patch in pixels
L  length of a text   C     width of a Transformer
                      D     width of the space that images, audio and text share
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------- Transformer

class Attention(nn.Module):
    """Multi-head self-attention; parameters named as in OpenAI's file."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, first_only=False):
        """Every token looks at all N, (B, N, C) -> (B, N, C); with `first_only` just the first does, -> (B, 1, C)."""
        C = x.shape[2]
        if first_only:
            q = F.linear(x[:, :1], self.in_proj_weight[:C], self.in_proj_bias[:C])          # (B, 1, C)
            k, v = F.linear(x, self.in_proj_weight[C:], self.in_proj_bias[C:]).split(C, 2)  # 2 × (B, N, C)
        else:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).split(C, 2)       # 3 × (B, N, C)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))     # (B, heads, ·, C/heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)                  # (B, heads, ·, C/heads)
        return self.out_proj(x.transpose(1, 2).flatten(2))                                  # (B, ·, C)


class MLP(nn.Module):
    """Two layers with QuickGELU(h) = h·σ(1.702 h) between them, (B, N, C) -> (B, N, C).

    Since h·σ(1.702 h) = silu(1.702 h) / 1.702, both factors can ride on the weights. What is left is one
    fused activation; written out, autograd would keep a second (B, N, 4C) tensor.
    """

    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        h = F.silu(F.linear(x, 1.702 * self.c_fc.weight, 1.702 * self.c_fc.bias))  # (B, N, 4C)
        return F.linear(h, self.c_proj.weight / 1.702, self.c_proj.bias)           # (B, N, C)


class Block(nn.Module):
    """Pre-norm residual block, (B, N, C) -> (B, N, C); with `first_only` -> (B, 1, C)."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.attn = Attention(width, heads, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, first_only=False):
        x = (x[:, :1] if first_only else x) + self.attn(self.ln_1(x), first_only)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, (B, N, C) -> (B, N, C); `causal` for text.

    With `first_only` -> (B, 1, C): of the last block nothing is computed that the first token does not need.
    """

    def __init__(self, width, layers, heads, causal=False):
        super().__init__()
        self.width = width
        self.resblocks = nn.Sequential(*(Block(width, heads, causal) for _ in range(layers)))
        for block in self.resblocks:  # residual branches start small, as CLIP's do
            nn.init.normal_(block.attn.out_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            for bias in (block.attn.out_proj.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias):
                nn.init.zeros_(bias)

    def forward(self, x, first_only=False):
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x)
        return last(x, first_only)

    def flops(self, tokens, first_only=False):
        """Floating point operations of one forward pass over `tokens` tokens of one sample."""
        C = self.width

        def block(queries):  # multiply-adds: k, v; then q, out, MLP; then q·k, weights·v
            return 2 * tokens * C ** 2 + (1 + 1 + 8) * queries * C ** 2 + 2 * queries * tokens * C

        return 2 * ((len(self.resblocks) - 1) * block(tokens) + block(1 if first_only else tokens))


# --------------------------------------------------------------------------- images, audio, CLIP

class VisionTransformer(nn.Module):
    """One class for both senses (Fig. 4): images (B, 3, R, R) -> (B, D) and audio (B, 1, T, F) -> (B, D).

    `stride` below `patch` makes neighbouring patches overlap, as the audio encoder's do:
    1000×128 frames × mel bins, patch 32, stride 16×24 -> a grid of 61×5 -> 306 tokens with the class token.
    """

    def __init__(self, input_size, patch, stride, channels, width, layers, heads, output_dim):
        super().__init__()
        self.config = {"input_size": tuple(input_size), "patch": patch, "stride": tuple(stride), "channels": channels,
                       "width": width, "layers": layers, "heads": heads, "output_dim": output_dim}  # to make it anew
        self.input_size = tuple(input_size)
        self.grid = tuple((size - patch) // step + 1 for size, step in zip(input_size, stride))
        if min(self.grid) < 1:
            raise ValueError(f"an input of {input_size} holds no patch of {patch}×{patch}")
        tokens = 1 + self.grid[0] * self.grid[1]
        self.conv1 = nn.Conv2d(channels, width, patch, stride, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, output_dim) * width ** -0.5)

    def forward(self, x):
        if tuple(x.shape[2:]) != self.input_size:
            raise ValueError(f"input of {tuple(x.shape[2:])}, the encoder was made for {self.input_size}")
        x = self.conv1(x).flatten(2).transpose(1, 2)                        # (B, N-1, C)
        cls = self.class_embedding.expand(len(x), 1, -1)                    # (B, 1, C)
        x = torch.cat([cls.to(x.dtype), x], 1) + self.positional_embedding  # (B, N, C)
        x = self.transformer(self.ln_pre(x), first_only=True)               # (B, 1, C)
        return self.ln_post(x[:, 0]) @ self.proj                            # (B, D)

    def flops(self):
        """Floating point operations of one forward pass of one sample."""
        patches = self.grid[0] * self.grid[1]
        return 2 * patches * self.conv1.weight.numel() + self.transformer.flops(1 + patches, first_only=True)


LOG_SCALE = math.log(1 / 0.07)  # log(1/temperature) at the start, as CLIP's


class CLIP(nn.Module):
    """An image and a text encoder into one space (§3.2.1); state-dict keys are OpenAI's."""

    def __init__(self, image_size, patch, vision_width, vision_layers,
                 context_length, vocab_size, text_width, text_layers, output_dim):
        super().__init__()
        self.image_size, self.context_length = image_size, context_length
        self.visual = VisionTransformer((image_size, image_size), patch, (patch, patch), channels=3,
                                        width=vision_width, layers=vision_layers,
                                        heads=vision_width // 64, output_dim=output_dim)  # CLIP's heads are 64 wide
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, text_width) * 0.01)
        self.transformer = Transformer(text_width, text_layers, text_width // 64, causal=True)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, output_dim) * text_width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(LOG_SCALE))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images):
        """(B, 3, R, R) preprocessed images -> (B, D), not normalised."""
        return self.visual(images)

    def encode_text(self, tokens):
        """(B, L) int64 token ids, L <= context length -> (B, D), not normalised.

        The feature is read where the text ends: at the largest id, which is the end-of-text token's.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]  # (B, L, C)
        x = self.ln_final(self.transformer(x))                                          # (B, L, C)
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(1)]                  # (B, C)
        return x @ self.text_projection                                                 # (B, D)


# ---------------------------------------------------------------------------------------- loss

class AllGather(torch.autograd.Function):
    """(B, D) on every rank -> (ranks·B, D) on every rank; a row's gradient comes home to its owner."""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """(B, D) of this rank -> (ranks·B, D) of all, differentiable. B must be the same everywhere."""
    return AllGather.apply(x) if dist.is_initialized() else x


def info_nce(a, b, log_scale):
    """InfoNCE both ways (Eq. 1) with the *global* batch as negatives.

    a, b: (B, D) features of B pairs on this rank, of any length (they are normalised here);
    log_scale: () = log(1/temperature). Returns (): the mean over this rank's pairs, a->b and b->a summed.
    Averaged over the ranks, as DDP averages gradients, it is the loss of one process with the whole batch.
    """
    a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)  # (B, D)
    rank = dist.get_rank() if dist.is_initialized() else 0
    pair = rank * len(a) + torch.arange(len(a), device=a.device)         # (B,) where a row's partner stands
    scale = log_scale.exp()                                              # s(a, b) = cos(a, b) / temperature
    # Eq. 1's two shares, added. differs from the paper: cross_entropy takes their -log, which Eq. 1 as printed lacks,
    # and the mean over i, not the sum; negatives, of which it says nothing, are those of all ranks
    return (F.cross_entropy(scale * a @ gather(b).T, pair)               # (B, ranks·B) logits
            + F.cross_entropy(scale * b @ gather(a).T, pair))


# ----------------------------------------------------------------------------------- optimizer

def parameter_groups(module, lr_weights, lr_biases, weight_decay):
    """Two groups for LARS: weights, and all that has ndim < 2 (biases, norms, class token, temperature)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    weights, biases = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    return [{"params": weights, "lr": lr_weights, "weight_decay": weight_decay, "adapt": True},
            {"params": biases, "lr": lr_biases, "weight_decay": 0.0, "adapt": False}]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017; Table 5).

    In groups with `adapt`, each tensor's step has the trust ratio η‖p‖ / ‖g + wd·p‖ (1 where either norm
    is zero), so that no layer moves faster than its own size allows. Then plain momentum.
    """

    def __init__(self, param_groups, lr=0.0, weight_decay=0.0, momentum=0.9, eta=0.001, adapt=True):
        super().__init__(param_groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta,
                                        "adapt": adapt})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            # _foreach: all tensors in a few kernels instead of a few each
            momenta = [self.state[p]["momentum"] for p in params]
            updates = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            if group["adapt"]:
                p_norm = torch.stack(torch._foreach_norm(params))                   # (tensors,)
                g_norm = torch.stack(torch._foreach_norm(updates))
                ratio = torch.where((p_norm > 0) & (g_norm > 0), group["eta"] * p_norm / g_norm, 1.0)
                torch._foreach_mul_(updates, ratio.unbind())
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])


def schedule(step, steps, warmup_steps, end=0.001):
    """Factor on the peak learning rate: linear from 0 over the warm-up (Table 5), then cosine down to `end`."""
    # differs from the paper, which names no schedule after the warm-up: as in the authors' code
    if step < warmup_steps:
        return step / warmup_steps
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
    return cosine + (1 - cosine) * end
