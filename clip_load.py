"""What comes from others: CLIP's tokenizer and weights, the authors' encoders (§3.2.1, Fig. 4).

    python clip_load.py                # fetch ViT-B/32 and its vocabulary; also ViT-B/16, ViT-L/14
    python clip_load.py vipant         # the authors' pre-trained encoder, with CLIP inside
    python clip_load.py vipant-gc      # the same after fine-tuning with AudioCaps' captions
    python clip_load.py import-vipant FILE_OR_ADDRESS OUT      # another checkpoint of theirs

B, C, D, L, P, T, F as in model.py; h×w: a grid of patches; N texts.
"""
import argparse
import gzip
import hashlib
import html
import json
import math
import pickle
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path

from data import FrontEnd, run, write_whole
from model import CLIP, LOG_SCALE, VisionTransformer, print0

import ftfy
import regex
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

# ---------------------------------------------------------------------------------- tokenizer
def read_merges(path):
    """A vocabulary, gzipped or not -> merges "a b", the most frequent first. Raises ValueError."""
    content = Path(path).read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        lines = content.decode().split("\n")[1:48_895]  # without a version, and the rarest
    except Exception as error:  # of a damaged file, anything
        raise ValueError(f"{path}: no vocabulary ({error})") from None
    if not lines:
        raise ValueError(f"{path}: no vocabulary, but a single line")
    return [line for line in lines if line.strip()]


class Tokenizer:
    """CLIP's byte-pair encoding: `Tokenizer(path)(["a dog barks"]) -> (1, 77) int64`.

    vocab: path of the vocabulary, or its list of merges. Ids: 256 bytes, 256 bytes that end a
    word, the merges, start-of-text, end-of-text.
    """
    WORDS = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
                          r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

    def __init__(self, vocab, context_length=77):
        self.context_length = context_length
        self.merges = vocab if isinstance(vocab, list) else read_merges(vocab)
        # a visible symbol for each byte: those that print first, the others from U+0100 on
        printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printing]
        self.symbol = {byte: chr(byte) for byte in printing}
        self.symbol |= {byte: chr(256 + i) for i, byte in enumerate(others)}
        units = list(self.symbol.values())
        units += [unit + "</w>" for unit in units]
        self.ids = {unit: i for i, unit in enumerate(units)}
        self.rank = {}  # of a pair in the order of merging
        for i, line in enumerate(self.merges):
            pair = tuple(line.split())
            if len(pair) != 2 or pair[0] not in self.ids or pair[1] not in self.ids:
                raise ValueError(f"{vocab!s:.200}: no vocabulary; '{line:.50}' merges nothing")
            self.rank[pair] = i
            self.ids["".join(pair)] = 512 + i
        self.start = 512 + len(self.merges)
        self.end, self.vocab_size = self.start + 1, self.start + 2
        self.known = {"<|startoftext|>": [self.start], "<|endoftext|>": [self.end]}  # word -> ids

    def encode_word(self, word):
        """One word -> ids: from bytes on, the most frequent pair is merged while there is one."""
        units = [self.symbol[byte] for byte in word.encode()]
        units[-1] += "</w>"
        while len(units) > 1:
            ranks = [self.rank.get(pair, math.inf) for pair in zip(units, units[1:])]
            i = ranks.index(min(ranks))
            if ranks[i] == math.inf:
                break
            units[i:i + 2] = [units[i] + units[i + 1]]
        return [self.ids[unit] for unit in units]

    def encode(self, text):
        """One text -> ids, as many as it takes, from start-of-text to the first end-of-text."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        ids = [self.start]
        for word in self.WORDS.findall(" ".join(text.split()).lower()):
            if word not in self.known:
                self.known[word] = self.encode_word(word)
            ids += self.known[word]
        ids.append(self.end)
        return ids[:ids.index(self.end) + 1]

    def __call__(self, texts):
        """Texts -> (N, L) int64, zero-padded. A longer text is cut and keeps its end-of-text."""
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)  # (N, L)
        for row, text in zip(tokens, texts):
            ids = self.encode(text)
            if len(ids) > self.context_length:
                ids = ids[:self.context_length - 1] + [self.end]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


# ----------------------------------------------------------------------- where files come from
CACHE = Path.home() / ".cache" / "clip"
OPENAI = "https://openaipublic.azureedge.net/clip/models"
MODELS = {  # name -> SHA-256 of OpenAI's file, which is also a folder of its address
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
}
VOCABULARY = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def find(url, sha256, repository, *files):
    """Path of a file: in CACHE, had from the hub before, at `url`, or on the hub, `files`' last."""
    path, hub = CACHE / url.rsplit("/", 1)[1], f"https://huggingface.co/{repository}"
    path.parent.mkdir(parents=True, exist_ok=True)
    tried = ""
    for place in (path, f"{hub}, fetched before", url, hub):
        found = path
        try:
            if place == path and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                raise ValueError(f"its SHA-256 is not {sha256}")
            elif place == url:
                torch.hub.download_url_to_file(url, str(path), sha256)
            elif place != path:
                for name in files:
                    found = hf_hub_download(repository, name, local_files_only=place != hub)
            print0(f"{found}: from {place}")
            return Path(found)
        except Exception as error:  # the hub's client has many of its own
            tried += f"\n  {place}: {error!s:.200}"
    raise FileNotFoundError(f"{path.name} can't be had:{tried}\nPut it at {path} by other means, "
                            f"or name another file with --clip or --vocab")


def find_clip(name):
    """Path of CLIP's weights: one of OpenAI's names is looked for, any other is a path already."""
    if name not in MODELS:
        return Path(name)
    url = f"{OPENAI}/{MODELS[name]}/{name.replace('/', '-')}.pt"
    size = name.replace("ViT-B/", "base-patch").replace("ViT-L/", "large-patch")
    return find(url, MODELS[name], f"openai/clip-vit-{size}", "config.json", "pytorch_model.bin")


def find_vocabulary(path=None):
    """Path of the vocabulary: the one that is named, or CLIP's."""
    if path:
        return Path(path)
    return find(VOCABULARY, VOCABULARY_SHA256, "openai/clip-vit-base-patch32", "merges.txt")


# ------------------------------------------------------------------------------ CLIP's weights
class Inert:
    """An object of any class but a tensor's: takes what pickle does to it, and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    __setstate__ = __setitem__ = append = extend = lambda self, *values: None


class TensorsOnly:
    """torch.load's `pickle_module`: of what a file names only tensors are made; nothing runs."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if f"{module}.{name}" in ("collections.OrderedDict", "torch._utils._rebuild_parameter",
                                      "torch._utils._rebuild_tensor_v2"):
                return super().find_class(module, name)
            return Inert  # but for storages, which torch.load finds by itself

    def load(file, **options):  # of files from before 2020
        return TensorsOnly.Unpickler(file, **options).load()


def check_zip(path):
    """Names in a zip file, as torch.save's are; [] for another file. Raises ValueError (damage)."""
    if not zipfile.is_zipfile(path):
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            names, damage = archive.namelist(), archive.testzip()
    except Exception as error:  # of a damaged file, anything
        damage = error
    if damage:
        raise ValueError(f"{path}: damaged ({damage}); make or fetch it anew")
    return names


def read_weights(path):
    """What a file of weights holds, whatever its format: tensors in dicts, hopefully."""
    names = check_zip(path)
    with open(path, "rb") as file:
        if file.read(9).endswith(b"{"):  # eight bytes of length, then JSON: safetensors
            return load_file(path)
    if any(name.endswith("/constants.pkl") for name in names):  # TorchScript, as OpenAI's file
        return torch.jit.load(path, map_location="cpu").state_dict()
    # not weights_only=True: that refuses a file with other objects, as the authors' settings are
    return torch.load(path, "cpu", pickle_module=TensorsOnly, weights_only=False)


HUGGING_FACE = {  # its names -> OpenAI's, replaced in this order
    "vision_model.": "visual.", "text_model.": "", "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection", "encoder.layers.": "transformer.resblocks.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding": "conv1", "embeddings.": "", "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post", "final_layer_norm": "ln_final", "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.": "attn.",
}


def rename(state, names):
    """A state dict with parts of its keys replaced, one after the other; fp32."""
    renamed = {}
    for key, value in state.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        renamed[key] = value.float()
    return renamed


def flatten(content, prefix=""):
    """Nested dicts -> {"outer.inner": tensor}; what is no tensor drops out."""
    tensors = {}
    for key, value in content.items():
        if isinstance(value, dict):
            tensors |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            tensors[f"{prefix}{key}"] = value
    return tensors


def openai_state(content):
    """CLIP's weights in any layout -> state dict with OpenAI's keys. Raises ValueError."""
    tensors = flatten(content)
    names = " ".join(tensors)
    signs = {"a ResNet": "attnpool", "a ViT": "class_emb", "a text encoder": "token_emb"}
    parts = [part for part, sign in signs.items() if sign in names]
    if parts != ["a ViT", "a text encoder"]:
        raise ValueError(f"taken for {' and '.join(parts) or 'something else'} ({names:.60}…)")
    # dicts around them, DistributedDataParallel's "module.": what precedes one key precedes all
    ends = ("visual.class_embedding", "vision_model.embeddings.class_embedding")
    prefix = next(key for key in tensors if key.endswith(ends)).rpartition("vis")[0]
    drop = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
    state = {}
    for key, value in tensors.items():
        if key.startswith(prefix) and not key.endswith(drop):
            key = key.removeprefix(prefix).removeprefix("text.")  # open_clip's CustomTextCLIP
            state[key] = value
    if "visual.proj" in state:
        return state
    state = rename(state, HUGGING_FACE)
    for name in ("visual.proj", "text_projection"):
        state[name] = state[name].T
    for q in [key for key in state if "q_proj" in key]:  # three layers there, one here
        qkv = [state.pop(q.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        state[q.replace("q_proj.", "in_proj_")] = torch.cat(qkv)
    return state


def check_config(path):
    """What a config beside the weights says of activation and heads, which these do not tell."""
    known = "assumed: no config.json lies beside it"
    for name in ("config.json", "open_clip_config.json"):
        file = Path(path).with_name(name)
        config = json.loads(file.read_text()) if file.exists() else {}
        config = config.get("model_cfg", config)
        usual = "quick_gelu" if config.get("quick_gelu") or "vision_cfg" not in config else "gelu"
        for part in ("vision_config", "text_config", "vision_cfg", "text_cfg"):
            tower = config.get(part) or {"hidden_act": "quick_gelu"}
            activation = tower.get("hidden_act", usual)
            width = tower.get("hidden_size", tower.get("width"))
            heads = tower.get("num_attention_heads", tower.get("heads"))
            head = tower.get("head_width", width / heads if heads else 64)
            if activation != "quick_gelu" or head != 64:  # features would be silently wrong
                raise ValueError(f"{name} says {activation}, heads of {head:g}; built here are "
                                 f"quick_gelu and heads of 64, as OpenAI's")
            known = f"as {name} says" if part in config else known
    return known


def make_clip(state, device="cpu"):
    """State dict with OpenAI's keys -> CLIP of its sizes in fp32, in evaluation mode, frozen."""
    width, _, patch, _ = state["visual.conv1.weight"].shape                      # (C, 3, P, P)
    side = math.isqrt(len(state["visual.positional_embedding"]) - 1)  # of the grid of patches
    vocab_size, text_width = state["token_embedding.weight"].shape
    blocks = [key for key in state if key.endswith("ln_1.weight")]
    vision_layers = sum(key.startswith("visual.") for key in blocks)
    clip = CLIP(patch * side, patch, width, vision_layers, len(state["positional_embedding"]),
                vocab_size, text_width, len(blocks) - vision_layers,
                output_dim=state["text_projection"].shape[1])
    clip.load_state_dict(state)
    return clip.eval().requires_grad_(False).to(device)


def load_clip(path, device="cpu"):
    """A file of CLIP's weights in any layout -> CLIP as make_clip's; says what it is taken for."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; nor is it one of {', '.join(MODELS)}")
    try:
        known = check_config(path)
        clip = make_clip(openai_state(read_weights(path)), device)
    except Exception as error:  # of a damaged or foreign file, anything
        raise ValueError(f"{path}: no CLIP with a ViT: {error!s:.300}") from None
    print0(f"{path}: a CLIP whose ViT has {clip.visual.config}; QuickGELU, heads of 64 ({known})")
    return clip


def digest(module):
    """16 hex digits that follow from a module's weights."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return sha256.hexdigest()[:16]


def pack_clip(clip, tokenizer):
    """What a checkpoint carries of CLIP; fp16 where that is exact. Raises ValueError (misfit)."""
    if tokenizer.vocab_size != clip.token_embedding.num_embeddings:
        raise ValueError(f"a vocabulary of {tokenizer.vocab_size} tokens for a CLIP of "
                         f"{clip.token_embedding.num_embeddings}; name CLIP's own with --vocab")
    state = {}
    for key, value in clip.state_dict().items():
        value = value.cpu()
        exact = torch.equal(value.half().float(), value)
        state[key] = value.half() if exact else value
    return {"state": state, "merges": tokenizer.merges}


def unpack_clip(packed, device="cpu"):
    """What pack_clip made -> (CLIP, its tokenizer)."""
    clip = make_clip(packed["state"], device)
    return clip, Tokenizer(packed["merges"], clip.context_length)


# --------------------------------------------------- from images to sound: three changes (Fig. 4)
def resize_positions(pos, grid, new_grid):
    """(1 + h·w, C) positions of a grid -> (1 + h2·w2, C), bilinear; the class token's stays."""
    patches = pos[1:].reshape(1, *grid, -1).permute(0, 3, 1, 2)                  # (1, C, h, w)
    patches = F.interpolate(patches, new_grid, mode="bilinear", align_corners=False)
    return torch.cat([pos[:1], patches[0].flatten(1).T])                         # (1 + h2·w2, C)


def blank_audio_encoder(clip, frames=FrontEnd.frames, mels=FrontEnd.mels, stride=(16, 24)):
    """The audio encoder with random weights, (B, 1, T, F) -> (B, D): VA-Rand's start (§4)."""
    config = clip.visual.config | {"input_size": (frames, mels), "stride": stride, "channels": 1}
    return VisionTransformer(**config)


def inherit(encoder, state, grid):
    """Fill an encoder with weights whose positions are another grid's -> it, on their device."""
    positions = resize_positions(state["positional_embedding"], grid, encoder.grid)
    encoder.load_state_dict(state | {"positional_embedding": positions})
    return encoder.to(positions.device)


def audio_encoder_from_clip(clip, frames=FrontEnd.frames, mels=FrontEnd.mels, stride=(16, 24)):
    """CLIP's visual tower with the paper's three changes, (B, 1, T, F) -> (B, D) (§3.2.1)."""
    # 1. patches overlap: their stride is below the kernel's size
    encoder = blank_audio_encoder(clip, frames, mels, stride)
    # 2. the kernel is averaged over colours: (C, 3, P, P) -> (C, 1, P, P)
    kernel = clip.visual.conv1.weight.mean(1, keepdim=True)
    # 3. positions are resized from the image's grid to the sound's: 7×7 -> 61×5
    return inherit(encoder, clip.visual.state_dict() | {"conv1.weight": kernel}, clip.visual.grid)


def lengthen(encoder, frames):
    """An audio encoder for another number of frames: its positions resized again (App. D)."""
    config = encoder.config | {"input_size": (frames, encoder.input_size[1])}
    return inherit(VisionTransformer(**config), encoder.state_dict(), encoder.grid)


# ---------------------------------------------------------------------- the authors' checkpoints
RELEASED = "https://storage.googleapis.com/ai2-mosaic-public/projects/vipant/model"
VIPANT = {  # of their two with +AT GC, the one that is best on three datasets
    "vipant": "01FFQTZK9YBPRDQHHR6157AGBR/00071478.pth",
    "vipant-gc": "01FM2Y9HJ896B2G6NKRXTEVXZ7/00004140.pth",
}
AUTHORS = {  # their audio encoder's names -> CLIP's visual tower's, replaced in this order
    "encoder.resblocks.": "transformer.resblocks.", "pre_encoder.ln.": "ln_pre.",
    "post_encoder.ln.": "ln_post.", "pre_encoder.": "", "post_encoder.": "", "misc.": "",
    "encoder.": "",
}


def authors_encoder(content, clip):
    """A checkpoint of the authors', the CLIP it chased -> audio encoder, log(1/temperature) ()."""
    *others, loss = content["model"]  # (audio, loss), or (image, audio, text, loss)
    image, audio = others[:2] if len(others) == 3 else ({}, *others)
    state, encoder = rename(audio, AUTHORS), blank_audio_encoder(clip)
    kernel = state["conv1.weight"].mean(1, keepdim=True)  # of three channels, or of one
    images = len(state["positional_embedding"]) == len(clip.visual.positional_embedding)
    grid = clip.visual.grid if images else encoder.grid  # their code may resize while it loads
    inherit(encoder, state | {"conv1.weight": kernel}, grid)
    projection = rename(image or {}, AUTHORS).get("proj", clip.visual.proj)
    if not torch.allclose(projection, clip.visual.proj, atol=1e-3):
        raise ValueError("it chased another CLIP; name that with --clip")
    scales = [value for key, value in loss.items() if key.endswith("logit_scale")]
    return encoder, torch.tensor(float(scales[0] if scales else LOG_SCALE))


def import_vipant(source, out, clip, packed, settings):
    """Write a checkpoint of the authors', a file or an address, as one of ours with CLIP inside."""
    with tempfile.TemporaryDirectory() as folder:
        path = source
        try:
            if "://" in source:
                path = f"{folder}/theirs.pth"
                torch.hub.download_url_to_file(source, path)
            encoder, log_scale = authors_encoder(read_weights(path), clip)
        except Exception as error:  # of a damaged or foreign file, anything
            raise ValueError(f"{source}: no checkpoint of the authors': {error!s:.300}\nOne of "
                             f"yours: python clip_load.py import-vipant FILE {out}") from None
    learner = {f"audio_encoder.{key}": value for key, value in encoder.state_dict().items()}
    checkpoint = {"stage": "finetune" if "source" in settings else "pretrain",
                  "settings": settings | {"imported": Path(source).name}, "step": 0, "steps": 0,
                  "encoder": encoder.config, "learner": learner | {"log_scale": log_scale},
                  "front_end": asdict(FrontEnd()), "clip": packed,
                  "torch": str(torch.__version__)}
    write_whole(out, lambda part: torch.save(checkpoint, part))


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["ViT-B/32"])
    parser.add_argument("--clip", default="ViT-B/32", help="that the authors' checkpoint chased")
    parser.add_argument("--vocab", help="path of CLIP's vocabulary")
    args = parser.parse_args()
    name, *files = args.what
    if len(files) != (2 if name == "import-vipant" else 0):
        parser.error("needed: one name, or import-vipant FILE_OR_ADDRESS OUT")
    if name in VIPANT:
        files = [f"{RELEASED}/{VIPANT[name]}", f"out/{name}/checkpoint.pt"]
    if files and Path(files[1]).exists():
        print(f"{files[1]} is there already and is kept")
    else:
        clip = load_clip(find_clip(args.clip if files else name))
        tokenizer = Tokenizer(find_vocabulary(args.vocab), clip.context_length)
        packed = pack_clip(clip, tokenizer)
        if files:
            settings = {"source": "gc"} if name == "vipant-gc" else {"init": "clip"}
            import_vipant(*files, clip, packed, settings)
    command = "clip_load.py vipant"
    if files:
        command = f'evaluate.py --task search --checkpoint {files[1]} --audio FOLDER --query "..."'
    print(f"next: python {command}")


if __name__ == "__main__":
    run(main)
