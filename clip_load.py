"""What comes from others: CLIP's tokenizer and weights, the authors' encoders (§3.2.1, Fig. 4).

    python clip_load.py                # fetch ViT-B/32 and its vocabulary; also ViT-B/16, ViT-L/14
    python clip_load.py vipant         # the authors' pre-trained encoder, with CLIP inside
    python clip_load.py vipant-gc      # the same after fine-tuning with AudioCaps' captions
    python clip_load.py import-vipant FILE_OR_ADDRESS OUT      # another checkpoint of theirs

B, C, D, L, P, T, F as in model.py; h×w: a grid of patches; N texts.
"""
import gzip
import hashlib
import html
import json
import pickle
import zipfile
from pathlib import Path

from data import FrontEnd, Parser, reading, run, write_whole
from model import CLIP, VisionTransformer, print0

import ftfy
import regex
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

# ---------------------------------------------------------------------------------- tokenizer
class Tokenizer:
    """CLIP's byte-pair encoding: `Tokenizer(path or merges)(["a dog barks"]) -> (1, 77) int64`."""
    WORDS = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
                          r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

    def __init__(self, vocab, context_length=77):
        self.context_length = context_length
        self.merges = vocab
        if not isinstance(vocab, list):
            with reading(vocab, "vocabulary"):
                content = Path(vocab).read_bytes()
                content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
                self.merges = content.decode().splitlines()[1:48_895]  # no version, no surplus
                if {len(merge.split()) for merge in self.merges} != {2}:
                    raise ValueError("its lines are not pairs")
        # a visible symbol for each byte: those that print first, the others from U+0100 on
        printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printing]
        units = [chr(code) for code in [*printing, *range(256, 256 + len(others))]]
        self.symbol = dict(zip(printing + others, units))
        # ids: 256 bytes, 256 bytes that end a word, the merges, start-of-text, end-of-text
        units += [unit + "</w>" for unit in units]
        units += ["".join(merge.split()) for merge in self.merges]
        self.ids = {unit: i for i, unit in enumerate(units)}
        self.rank = {tuple(merge.split()): i for i, merge in enumerate(self.merges)}
        self.start, self.end, self.vocab_size = len(units), len(units) + 1, len(units) + 2
        self.known = {"<|startoftext|>": [self.start], "<|endoftext|>": [self.end]}  # word -> ids

    def encode(self, text):
        """One text -> ids, as many as it takes, from start-of-text to the first end-of-text."""
        text = html.unescape(html.unescape(ftfy.fix_text(text))).lower()
        ids = [self.start]
        for word in self.WORDS.findall(text):
            if word not in self.known:
                units = [self.symbol[byte] for byte in word.encode()]
                units[-1] += "</w>"
                while pairs := [pair for pair in zip(units, units[1:]) if pair in self.rank]:
                    pair = min(pairs, key=self.rank.get)  # the most frequent one is merged first
                    i = list(zip(units, units[1:])).index(pair)
                    units[i:i + 2] = ["".join(pair)]
                self.known[word] = [self.ids[unit] for unit in units]
            ids += self.known[word]
        ids.append(self.end)
        return ids[:ids.index(self.end) + 1]

    def __call__(self, texts):
        """Texts -> (N, L) int64, zero-padded. A longer text is cut and keeps its end-of-text."""
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)  # (N, L)
        for row, text in zip(tokens, texts):
            ids = self.encode(text)[:-1][:self.context_length - 1] + [self.end]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


# ----------------------------------------------------------------------- where files come from
CACHE = Path.home() / ".cache" / "clip"
OPENAI = "https://openaipublic.azureedge.net/clip/models"
MODELS = {"ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
          "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
          "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"}  # SHA-256
VOCAB = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCAB_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def find(url, sha256, repository, file):
    """Path of a file: in CACHE, had from the hub before, at `url`, or on the hub."""
    path = CACHE / Path(url).name
    hub = f"https://huggingface.co/{repository}"
    tried = ""
    for place in (path, f"{hub}, fetched before", url, hub):  # the first that has it
        try:
            if place == url:
                write_whole(path, lambda out: torch.hub.download_url_to_file(url, str(out), sha256))
            elif place != path:
                path = hf_hub_download(repository, file, local_files_only=place != hub)
            elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                raise ValueError(f"its SHA-256 is not {sha256}")
            print0(f"{path}: from {place}")
            return Path(path)
        except Exception as error:  # the hub's client has many of its own
            tried += f"\n  {place}: {error!s:.200}"
    raise FileNotFoundError(f"{path.name} can't be had:{tried}\n"
                            f"Put it at {path}, or name another with --clip or --vocab")


# ------------------------------------------------------------------------------ CLIP's weights
class TensorsOnly:
    """torch.load's `pickle_module`: of what a file names only tensors are made; nothing runs."""
    class Inert(dict):  # in the place of all other classes
        __init__ = __setstate__ = append = extend = lambda self, *_, **__: None
        __hash__ = object.__hash__

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):  # but for storages, which torch.load finds by itself
            rebuilds = name in ("_rebuild_tensor_v2", "_rebuild_parameter")
            return getattr(torch._utils, name) if rebuilds else TensorsOnly.Inert


def read_weights(path):
    """What a file of weights holds, whatever its format: tensors in dicts, hopefully."""
    with open(path, "rb") as file:
        if file.read(9).endswith(b"{"):  # eight bytes of length, then JSON: safetensors
            return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load compares no checksums
                raise ValueError(f"{damaged} is damaged; make or fetch the file anew")
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):  # TorchScript
                return torch.jit.load(path, map_location="cpu").state_dict()
    try:
        return torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:  # objects lie beside the weights, as in the authors' files
        return torch.load(path, "cpu", TensorsOnly, weights_only=False)


NAMES = {  # parts of Hugging Face's, open_clip's, the authors' keys -> OpenAI's, in this order
    "vision_model.": "visual.", "text_model.": "", "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection", "encoder.layers.": "transformer.resblocks.",
    "embeddings.position_embedding.weight": "positional_embedding", "pre_layrnorm": "ln_pre",
    "embeddings.patch_embedding": "conv1", "embeddings.": "", "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final", "layer_norm": "ln_", "self_attn.": "attn.", "text.": "",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "encoder.resblocks.": "transformer.resblocks.",
    "pre_encoder.ln.": "ln_pre.", "post_encoder.ln.": "ln_post.", "pre_encoder.": "",
    "post_encoder.": "", "encoder.": "", "misc.": ""}
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")


def flatten(content, prefix=""):
    """Tensors of nested dicts, fp32, each under its path "outer.inner.key" in OpenAI's words."""
    for key, value in content.items():
        key = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flatten(value, f"{key}.")
        elif isinstance(value, torch.Tensor) and not key.endswith(NO_WEIGHTS):
            value = value.T if key.endswith("_projection.weight") else value  # of a Linear
            for theirs, ours in NAMES.items():
                key = key.replace(theirs, ours)
            yield key, value.float()


def openai_state(content):
    """CLIP's weights in any layout -> state dict with OpenAI's keys. Raises ValueError."""
    tensors = dict(flatten(content))
    names = " ".join(tensors)
    signs = {"a ResNet": "attnpool", "a ViT": "visual.class_emb", "a text encoder": "token_emb"}
    parts = [part for part, sign in signs.items() if sign in names]
    if parts != ["a ViT", "a text encoder"]:
        raise ValueError(f"taken for {' and '.join(parts) or 'something else'} ({names:.60}…)")
    # dicts around them, DistributedDataParallel's "module.": what precedes one key precedes all
    prefix = names[:names.index("visual.class_emb")].rpartition(" ")[2]
    state = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
    for q in [key for key in state if "q_proj" in key]:  # three layers there, one here
        qkv = [state.pop(q.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        state[q.replace("q_proj.", "in_proj_")] = torch.cat(qkv)
    return state


def check_config(path):
    """Refuse what only a config beside the weights tells: other activations, other heads."""
    for name in ("config.json", "open_clip_config.json"):
        file = path.with_name(name)
        config = json.loads(file.read_text()) if file.exists() else {}
        config = config.get("model_cfg", config)
        quick = config.get("quick_gelu", "vision_cfg" not in config)  # open_clip's default: GELU
        for part in ("vision_config", "text_config", "vision_cfg", "text_cfg"):
            tower = config.get(part) or {}
            act = tower.get("hidden_act", "quick_gelu" if quick else "gelu")
            width = tower.get("hidden_size", tower.get("width", 64))
            heads = tower.get("num_attention_heads", tower.get("heads", width // 64))
            head = tower.get("head_width", width / heads)
            if act != "quick_gelu" or head != 64:  # features would be silently wrong
                raise ValueError(f"{name}: {act}, heads of {head:g}; needed: quick_gelu, 64")


def make_clip(state, device="cpu"):
    """State dict with OpenAI's keys -> CLIP of its sizes in fp32, in evaluation mode, frozen."""
    width, _, patch, _ = state["visual.conv1.weight"].shape                      # (C, 3, P, P)
    side = int((len(state["visual.positional_embedding"]) - 1) ** 0.5)  # of the grid of patches
    vocab_size, text_width = state["token_embedding.weight"].shape
    blocks = [key for key in state if key.endswith("ln_1.weight")]
    vision_layers = sum(key.startswith("visual.") for key in blocks)
    clip = CLIP(patch * side, patch, width, vision_layers, len(state["positional_embedding"]),
                vocab_size, text_width, len(blocks) - vision_layers,
                output_dim=state["text_projection"].shape[1])
    clip.load_state_dict(state)
    return clip.eval().requires_grad_(False).to(device)


def load_clip(path, device="cpu"):
    """A name of OpenAI's or a file -> CLIP as make_clip's. Raises Unreadable, FileNotFoundError."""
    if path in MODELS:
        url = f"{OPENAI}/{MODELS[path]}/{path.replace('/', '-')}.pt"
        hub = path.lower().replace("b/", "base-patch").replace("l/", "large-patch")
        path = find(url, MODELS[path], f"openai/clip-{hub}", "pytorch_model.bin")
    with reading(path, f"CLIP with a ViT, nor one of {', '.join(MODELS)}"):
        check_config(Path(path))
        clip = make_clip(openai_state(read_weights(path)), device)
    print0(f"{path}: taken for a CLIP with QuickGELU, heads of 64 and a ViT {clip.visual.config}")
    return clip


def load_tokenizer(path, clip):
    """CLIP's tokenizer: of the vocabulary at `path`, or OpenAI's. Raises ValueError (a misfit)."""
    path = path or find(VOCAB, VOCAB_SHA256, "openai/clip-vit-base-patch32", "merges.txt")
    tokenizer = Tokenizer(path, clip.context_length)
    needed = clip.token_embedding.num_embeddings
    if tokenizer.vocab_size != needed:
        raise ValueError(f"{path}: {tokenizer.vocab_size} tokens; CLIP has {needed}; wrong --vocab")
    return tokenizer


def digest(module):
    """16 hex digits that follow from a module's weights."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(name.encode() + tensor.cpu().numpy().tobytes())
    return sha256.hexdigest()[:16]


def short_digest(*texts):
    """16 hex digits that follow from texts."""
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def pack_clip(clip, tokenizer):
    """What a checkpoint carries of CLIP, for make_clip and Tokenizer; fp16 where that is exact."""
    state = clip.state_dict()
    for key, value in state.items():
        half = value.half()
        state[key] = (half if torch.equal(half.float(), value) else value).cpu()
    return {"state": state, "merges": tokenizer.merges}


# --------------------------------------------------- from images to sound: three changes (Fig. 4)
def resize_positions(pos, grid, new_grid):
    """(1 + h·w, C) positions of a grid -> (1 + h2·w2, C), bilinear; the class token's stays."""
    patches = pos[1:].reshape(1, *grid, -1).permute(0, 3, 1, 2)                  # (1, C, h, w)
    patches = F.interpolate(patches, new_grid, mode="bilinear", align_corners=False)
    return torch.cat([pos[:1], patches[0].flatten(1).T])                         # (1 + h2·w2, C)


def inherit(encoder, state, grid):
    """Fill an audio encoder with weights for another grid or for colours -> it, on their device."""
    # 2. the kernel is averaged over colours: (C, 3, P, P) -> (C, 1, P, P)
    kernel = state["conv1.weight"].mean(1, keepdim=True)
    # 3. positions are resized, from the image's grid to the sound's: 7×7 -> 61×5
    positions = resize_positions(state["positional_embedding"], grid, encoder.grid)
    encoder.load_state_dict(state | {"conv1.weight": kernel, "positional_embedding": positions})
    return encoder.to(positions.device)


def audio_encoder_from_clip(clip, frames=FrontEnd.frames, mels=FrontEnd.mels, stride=(16, 24)):
    """CLIP's visual tower with the three changes, (B, 1, T, F) -> (B, D) (§3.2.1)."""
    # 1. patches overlap: their stride is below the kernel's size
    config = clip.visual.config | {"input_size": (frames, mels), "stride": stride, "channels": 1}
    if max(stride) > config["patch"]:
        print0(f"warning: --stride-time or --stride-mel above {config['patch']} skips sound")
    return inherit(VisionTransformer(**config), clip.visual.state_dict(), clip.visual.grid)


def lengthen(encoder, frames):
    """An audio encoder for another number of frames: its positions resized again (App. D)."""
    config = encoder.config | {"input_size": (frames, encoder.config["input_size"][1])}
    return inherit(VisionTransformer(**config), encoder.state_dict(), encoder.grid)


# ---------------------------------------------------------------------- the authors' checkpoints
RELEASED = "https://storage.googleapis.com/ai2-mosaic-public/projects/vipant/model"
VIPANT = {"vipant": "01FFQTZK9YBPRDQHHR6157AGBR/00071478.pth",
          "vipant-gc": "01FM2Y9HJ896B2G6NKRXTEVXZ7/00004140.pth"}  # of two, best on three sets


def import_vipant(source, out, clip, packed):
    """Make of the authors' checkpoint, a file or an address, one of ours with CLIP inside."""
    name = Path(source).name
    with reading(source, "checkpoint of the authors'"):
        if "://" in source:
            torch.hub.download_url_to_file(source, str(out))
            source = out  # theirs lies there until ours is written
        parts = read_weights(source)["model"]
        state = dict(flatten(parts[0 if len(parts) == 2 else 1]))  # (image, audio, text, loss)
        (scale,) = [value for key, value in parts[-1].items() if key.endswith("logit_scale")]
        encoder = audio_encoder_from_clip(clip)
        # theirs may still have the image's positions, which their code resizes on loading
        resized = len(state["positional_embedding"]) == len(encoder.positional_embedding)
        inherit(encoder, state, encoder.grid if resized else clip.visual.grid)
    learner = {f"audio_encoder.{key}": value for key, value in encoder.state_dict().items()}
    learner["log_scale"] = torch.tensor(float(scale))
    gc = name in ("00004140.pth", "00006210.pth")  # fine-tuned; the others are pre-trained
    torch.save({"stage": "finetune" if gc else "pretrain", "clip": packed, "learner": learner,
                "settings": {"imported": name, "source": "gc" if gc else ""},
                "encoder": encoder.config, "front_end": vars(FrontEnd())}, out)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("what", nargs="*")
    parser.add_argument("--clip", default="ViT-B/32", help="that the authors' encoder learned from")
    parser.add_argument("--vocab", help="path of CLIP's vocabulary")
    args = parser.parse_args()
    name, *files = args.what or [args.clip]
    if name in VIPANT:
        files += [f"{RELEASED}/{VIPANT[name]}", f"out/{name}/checkpoint.pt"]
    if len(files) != (2 if name in (*VIPANT, "import-vipant") else 0):
        parser.error("needed: one name, or import-vipant FILE_OR_ADDRESS OUT")
    clip = load_clip(args.clip if files else name)
    packed = pack_clip(clip, load_tokenizer(args.vocab, clip))
    if files:
        write_whole(files[1], lambda part: import_vipant(files[0], part, clip, packed))
        print(f"python evaluate.py --task search --checkpoint {files[1]} --audio DIR --query WORDS")


if __name__ == "__main__":
    run(main)
