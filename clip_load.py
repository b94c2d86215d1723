"""The way in from OpenAI: tokenizer, verified download, weights, and CLIP's eye made an ear (§3.2.1, Fig. 4).

    python clip_load.py                      # fetch ViT-B/32 and the vocabulary into ~/.cache/clip
    python clip_load.py --model ViT-B/16     # or an eye with finer patches
    python clip_load.py import-vipant 00071478.pth out/authors.pt      # the authors' checkpoint, for evaluate.py

B, C, D, P, T, F as in model.py; h×w: a grid of patches; N texts of length L.
"""
import argparse
import functools
import gzip
import hashlib
import html
import http.client
import itertools
import math
import os
import pickle
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import FrontEnd
from model import CLIP, LOG_SCALE, VisionTransformer
from processes import run

CACHE = Path.home() / ".cache" / "clip"
ADDRESS = "https://openaipublic.azureedge.net/clip/models"
MODELS = {  # name -> SHA-256 of its file, which is also the file's folder there
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
}
VOCABULARY = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
VOCABULARY_PATH = CACHE / VOCABULARY.rsplit("/", 1)[1]
VOCABULARY_MERGES = 49152 - 256 - 2  # CLIP uses the first so many lines of a longer file


# ----------------------------------------------------------------------------------- tokenizer

def byte_symbols():
    """One visible character for each byte: itself where it prints, otherwise one from U+0100 on.

    So BPE can work on characters, and any text, in any language, has a spelling. The order (printing bytes
    first) fixes the first 256 ids.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merged(units, pair):
    """A word's units with every occurrence of a pair, from the left, made one."""
    found = []
    while units:
        take = 2 if tuple(units[:2]) == pair else 1
        found.append("".join(units[:take]))
        units = units[take:]
    return found


class Tokenizer:
    """CLIP's byte-pair encoding: `Tokenizer(vocab_path)(["a dog barks"]) -> (1, 77) int64`.

    The vocabulary file lists merges, most frequent first; ids follow from its order: 256 bytes, 256 bytes
    that end a word, the merges, start-of-text, end-of-text.
    """
    WORDS = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
                          regex.IGNORECASE)

    def __init__(self, vocab_path, context_length=77):
        self.context_length = context_length
        try:
            with gzip.open(vocab_path, "rt", encoding="utf-8") as file:
                lines = file.read(2 ** 26).split("\n")[1:1 + VOCABULARY_MERGES]  # the first line is a version
        except FileNotFoundError:
            raise FileNotFoundError(f"{vocab_path}: no such file. CLIP's vocabulary: python clip_load.py") from None
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise ValueError(f"{vocab_path}: not a gzipped vocabulary ({error})") from None
        merges = [tuple(line.split()) for line in lines if line]
        if any(len(merge) != 2 for merge in merges):
            raise ValueError(f"{vocab_path}: not a list of merges, two symbols a line")
        self.symbols = byte_symbols()
        units = list(self.symbols.values())
        units += [unit + "</w>" for unit in units] + ["".join(merge) for merge in merges]
        units += ["<|startoftext|>", "<|endoftext|>"]
        self.ids = {unit: i for i, unit in enumerate(units)}
        self.vocab_size = len(units)
        self.start, self.end = self.ids["<|startoftext|>"], self.ids["<|endoftext|>"]
        self.rank = {merge: i for i, merge in enumerate(merges)}
        self.encode_word = functools.lru_cache(100_000)(self.encode_word)  # bounded: a search box is fed by strangers

    def encode_word(self, word):
        """One word -> ids: start from bytes, then apply the most frequent merge there is, until there is none."""
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return [self.ids[word]]
        units = [self.symbols[byte] for byte in word.encode("utf-8")]
        units[-1] += "</w>"
        while len(units) > 1:
            best = min(itertools.pairwise(units), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            units = merged(units, best)
        return [self.ids[unit] for unit in units]

    def encode(self, text):
        """One text -> ids, start- and end-of-text included, of any length."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        words = self.WORDS.findall(" ".join(text.split()).lower())
        words = [word[:1000] for word in words]  # no context holds more
        ids = [self.start, *(i for word in words for i in self.encode_word(word)), self.end]
        return ids[:ids.index(self.end) + 1]  # what follows the first end the model never sees

    def __call__(self, texts):
        """Texts -> (N, context length) int64, zero-padded. A longer text is cut and keeps its end-of-text."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)  # (N, L)
        for row, text in zip(tokens, texts):
            ids = self.encode(text)
            if len(ids) > self.context_length:
                ids[self.context_length - 1:] = [self.end]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


# ------------------------------------------------------------------------------------ download

def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url, path, digest):
    """Fetch `url` to `path` unless it is there; returns the path. Raises ConnectionError or ValueError.

    What has arrived waits in `path`.part, so a second call goes on where the first was cut off; only a file
    with the right SHA-256 ever gets the name `path`.
    """
    path = Path(path)
    if path.exists():
        if sha256(path) != digest:
            raise ValueError(f"{path}: SHA-256 is not {digest}; delete the file and run: python clip_load.py")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.status != 206:  # a server that can't resume sends the whole file
                have = 0
            total = have + int(answer.headers.get("Content-Length") or 0)
            with open(part, "ab" if have else "wb") as file, \
                    tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := answer.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
                    have += len(block)
            if have < total:
                raise ConnectionError("the connection ended early")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: all bytes were already here
            raise ConnectionError(f"{url}: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{url}: {error}; run the same command again to go on, or put the file at {path} "
                              f"by other means") from None
    if sha256(part) != digest:
        part.unlink()
        raise ValueError(f"{url}: what arrived does not have SHA-256 {digest}; it was deleted")
    os.replace(part, path)
    return path


def cached(name, fetch=False):
    """Path of CLIP's weights: a model of OpenAI's, in the cache and verified; any other name is a path already.

    With `fetch`, what is not there is downloaded. Raises FileNotFoundError, ConnectionError, ValueError (hash).
    """
    if name not in MODELS:
        return name
    path = CACHE / f"{name.replace('/', '-')}.pt"
    if not (fetch or path.exists()):
        raise FileNotFoundError(f"{path}: CLIP's weights are not here yet. Run: python clip_load.py --model {name}")
    return download(f"{ADDRESS}/{MODELS[name]}/{path.name}", path, MODELS[name])


# ------------------------------------------------------------------------------------- weights

# What reading a file can raise in which one bit is flipped.
BROKEN = (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, EOFError, AttributeError, ImportError, LookupError,
          TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError, AssertionError)


class Record:
    """What stands in for an object of any class we do not know: it keeps its state and does nothing."""

    def __new__(cls, *args, **kwargs):
        record = super().__new__(cls)
        record.state = {}
        return record

    def __setstate__(self, state):
        self.state = state if isinstance(state, dict) else {"state": state}

    def __setitem__(self, key, value):
        self.state[key] = value

    def extend(self, values):  # pickle fills subclasses of list by it, or by append
        pass

    append = extend


STORAGES = {name + "Storage": dtype for name, dtype in {
    "Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64,
    "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64,
    "Bool": torch.bool}.items()}


# Packages whose names weights and their settings are known to bring along, and what they may name of the builtins.
HARMLESS = ("__torch__", "torch", "collections", "omegaconf", "typing", "enum", "pathlib", "operator", "_operator",
            "functools", "copyreg", "numpy")
PLAIN = ("object", "dict", "list", "tuple", "set", "frozenset", "str", "unicode", "bytes", "int", "long", "float",
         "bool", "complex", "slice", "type", "NoneType")


class ArchiveReader(pickle.Unpickler):
    """Reads the pickle inside a PyTorch zip file and can only ever build tensors, containers and Records.

    Neither pickle's own loading nor TorchScript's is used: both can run what the file says. Here nothing runs: every
    name but those below becomes a Record, and a name that weights have no use for is refused besides. (That is all
    it promises: a file made to waste time or memory still can.)
    """
    def __init__(self, archive, folder):
        super().__init__(archive.open(folder + "data.pkl"))
        self.archive, self.folder, self.storages = archive, folder, {}

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        harmless = name in PLAIN if module in ("builtins", "__builtin__") else module.split(".")[0] in HARMLESS
        if harmless:
            return Record
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which weights have no use for; refused")

    def persistent_load(self, pid):
        _, dtype, key, _, numel = pid  # "storage", what find_class made of its type, file, device, length
        if key not in self.storages:
            if self.archive.getinfo(f"{self.folder}data/{key}").compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"storage {key} is compressed, as PyTorch's never are")  # few bytes could fill memory
            data = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if len(self.storages[key]) != numel:
            raise ValueError(f"storage {key} has {len(self.storages[key])} elements, not {numel}")
        return self.storages[key]

    @staticmethod
    def rebuild_tensor(storage, offset, size, stride, *_):
        if math.prod(size) > storage.numel():
            raise ValueError(f"a tensor of {size} on a storage of {storage.numel()} elements")
        return storage.as_strided(size, stride, offset).clone()


def read_archive(path):
    """Content of a .pt file (torch.save's or TorchScript's zip) as tensors, containers and Records.

    Raises FileNotFoundError, ValueError. Nothing in the file is executed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if entry is None:
                raise ValueError("no data.pkl in it")
            return ArchiveReader(archive, entry[:-len("data.pkl")]).load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (*BROKEN, OSError) as error:  # OSError: an offset before the file's beginning
        raise ValueError(f"{path}: not a readable PyTorch weights file ({type(error).__name__}: {error})") from None


def tensors_of(module, prefix=""):
    """A TorchScript module, read as nested Records -> its state dict."""
    found = {}
    for name, value in module.state.items():
        if isinstance(value, torch.Tensor):
            found[prefix + name] = value
        elif isinstance(value, Record):
            found |= tensors_of(value, f"{prefix}{name}.")
    return found


def count_blocks(state, prefix):
    """Number of residual blocks whose weights the state dict holds under `prefix`."""
    return sum(key.startswith(prefix + "resblocks.") and key.endswith(".ln_1.weight") for key in state)


def load_clip(path, device="cpu"):
    """OpenAI's TorchScript archive or a plain state dict -> CLIP in fp32, in evaluation mode, frozen.

    Every size is read off the tensors' shapes, so any ViT loads. Raises FileNotFoundError, ValueError.
    """
    content = read_archive(path)
    try:
        state = tensors_of(content) if isinstance(content, Record) else dict(content)
        for extra in ("input_resolution", "context_length", "vocab_size"):  # OpenAI's file carries them along
            state.pop(extra, None)
        C, _, patch, _ = state["visual.conv1.weight"].shape
        vocab_size, text_width = state["token_embedding.weight"].shape
        clip = CLIP(image_size=patch * math.isqrt(len(state["visual.positional_embedding"]) - 1), patch=patch,
                    vision_width=C, vision_layers=count_blocks(state, "visual.transformer."),
                    context_length=len(state["positional_embedding"]), vocab_size=vocab_size, text_width=text_width,
                    text_layers=count_blocks(state, "transformer."), output_dim=state["text_projection"].shape[1])
        clip.load_state_dict(state)
    except BROKEN as error:
        raise ValueError(f"{path}: not the weights of a CLIP with a ViT ({type(error).__name__}: {error})") from None
    return clip.float().eval().requires_grad_(False).to(device)


def fingerprint(module):
    """Short hex digest of a module's weights: which CLIP made a bank, which one a checkpoint belongs to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def clip_identity(clip, weights, vocab):
    """What a checkpoint says of the CLIP that it was trained against, and of the files that this CLIP came from."""
    return {"weights": str(Path(weights).resolve()), "vocab": str(Path(vocab).resolve()),
            "fingerprint": fingerprint(clip)}


# -------------------------------------------------------------------- the eye becomes an ear (Fig. 4)

def resize_positions(pos, grid, new_grid):
    """(1 + h·w, C) positions of an h×w grid -> (1 + h2·w2, C): bilinear; the class token keeps its own."""
    patches = pos[1:].reshape(1, *grid, -1).permute(0, 3, 1, 2)                                 # (1, C, h, w)
    patches = F.interpolate(patches, size=new_grid, mode="bilinear", align_corners=False)       # (1, C, h2, w2)
    return torch.cat([pos[:1], patches[0].flatten(1).T])                                        # (1 + h2·w2, C)


def blank_audio_encoder(clip, frames=FrontEnd.frames, mels=FrontEnd.mels, stride=(16, 24)):
    """The audio encoder with random weights, (B, 1, T, F) -> (B, D): what VA-Rand starts from (§4)."""
    return VisionTransformer(**(clip.visual.config | {"input_size": (frames, mels), "stride": stride, "channels": 1}))


def inherit(encoder, state, grid):
    """Load weights whose positions are those of another grid into an encoder; returns it, on their device."""
    positions = resize_positions(state["positional_embedding"], grid, encoder.grid)
    encoder.load_state_dict(state | {"positional_embedding": positions})
    return encoder.to(positions.device)


def audio_encoder_from_clip(clip, frames=FrontEnd.frames, mels=FrontEnd.mels, stride=(16, 24)):
    """CLIP's visual tower with the paper's three changes, (B, 1, T, F) -> (B, D) (§3.2.1)."""
    encoder = blank_audio_encoder(clip, frames, mels, stride)  # 1. patches overlap: stride below the kernel's size
    kernel = clip.visual.conv1.weight.mean(1, keepdim=True)    # 2. averaged over colours: (C, 3, P, P) -> (C, 1, P, P)
    state = clip.visual.state_dict() | {"conv1.weight": kernel}
    return inherit(encoder, state, clip.visual.grid)           # 3. positions 7×7 -> 61×5


def lengthen(encoder, frames):
    """The same audio encoder for inputs of another number of frames: its positions resized again (App. D)."""
    longer = VisionTransformer(**(encoder.config | {"input_size": (frames, encoder.input_size[1])}))
    return inherit(longer, encoder.state_dict(), encoder.grid)


# --------------------------------------------------------------------- the authors' checkpoints

# Their audio head's names -> those of CLIP's visual tower; the first that fits counts.
AUTHORS = {"encoder.": "transformer.", "pre_encoder.ln.": "ln_pre.", "pre_encoder.": "", "post_encoder.ln.": "ln_post.",
           "post_encoder.": "", "misc.": "", "": ""}


def import_vipant(path, clip, mels=FrontEnd.mels, stride=(16, 24)):
    """A checkpoint of the authors' -> encoder config, "learner" state and front end, as our checkpoints hold them.

    Their file is {"cfg": settings, "model": (image, audio, text, loss)} of state dicts; the kernel has 3 channels,
    whose mean they take in every forward pass. Nothing in the file is executed. clip: the CLIP it was trained
    against. Raises FileNotFoundError, ValueError (another format, another CLIP).
    """
    content = read_archive(path)
    try:
        image, audio, _, loss = content["model"]
        state = {}
        for key, value in audio.items():
            prefix = next(prefix for prefix in AUTHORS if key.startswith(prefix))
            state[AUTHORS[prefix] + key[len(prefix):]] = value.float()
        state["conv1.weight"] = state["conv1.weight"].mean(1, keepdim=True)          # (C, 3, P, P) -> (C, 1, P, P)
        C, _, patch, _ = state["conv1.weight"].shape
        rows = (len(state["positional_embedding"]) - 1) // ((mels - patch) // stride[1] + 1)
        # several numbers of frames give so many rows: the usual one, else the smallest
        frames = 1000 if (1000 - patch) // stride[0] + 1 == rows else patch + stride[0] * (rows - 1)
        encoder = VisionTransformer((frames, mels), patch, stride, channels=1, width=C, heads=C // 64,
                                    layers=count_blocks(state, "transformer."), output_dim=state["proj"].shape[1])
        encoder.load_state_dict(state)
        log_scale = next((value for key, value in loss.items() if key.endswith("logit_scale")), LOG_SCALE)
        learner = {f"audio_encoder.{key}": value for key, value in encoder.state_dict().items()}
        learner["log_scale"] = torch.as_tensor(log_scale).float().reshape(())
        if not all(value.isfinite().all() for value in learner.values()):
            raise ValueError("its weights are not finite")
        eye, visual = image.get("post_encoder.proj"), clip.visual
        if (patch, C, encoder.proj.shape) != (visual.config["patch"], visual.config["width"], visual.proj.shape) or (
                eye is not None and not torch.allclose(eye.float(), visual.proj.cpu(), atol=1e-3)):
            raise ValueError("it was trained against another CLIP; name its weights with --clip")
    except BROKEN as error:
        raise ValueError(f"{path}: not a checkpoint of the authors' ({type(error).__name__}: {error})") from None
    if eye is None:
        print(f"{path} does not hold the CLIP it was trained against; that it was this one can't be verified")
    return {"encoder": encoder.config, "learner": learner, "front_end": asdict(FrontEnd(mels=mels, frames=frames))}


# ------------------------------------------------------------------------------------ commands

def import_theirs(theirs, ours, clip, vocab):
    """Write a checkpoint of the authors' as one of ours; clip: a name of OpenAI's or a path."""
    from train import save_checkpoint, versions  # it imports this file
    weights = cached(clip)
    clip = load_clip(weights)
    content = import_vipant(theirs, clip)
    save_checkpoint(ours, content | {
        "stage": "pretrain", "step": 0, "steps": 0, "settings": {"init": "clip", "imported": theirs},
        "versions": versions(), "clip": clip_identity(clip, weights, vocab)})
    print(f"{ours}: audio encoder of {content['front_end']['frames'] / 100:g} s; "
          f"next: python evaluate.py --task all --checkpoint {ours}")


def main():
    parser = argparse.ArgumentParser(description="Download OpenAI's CLIP weights and vocabulary, verified.",
                                     allow_abbrev=False)
    parser.add_argument("--model", choices=MODELS, default="ViT-B/32", help="the paper uses ViT-B/32")
    commands = parser.add_subparsers(dest="command", metavar="import-vipant")
    command = commands.add_parser("import-vipant", help="turn a checkpoint of the authors' into one of ours")
    command.add_argument("theirs", help="their file, for example 00071478.pth")
    command.add_argument("ours", help="the checkpoint to write, for example out/authors.pt")
    command.add_argument("--clip", default="ViT-B/32", help="the CLIP it was trained against (ViT-B/32)")
    command.add_argument("--vocab", default=str(VOCABULARY_PATH), help="the tokenizer's")
    args = parser.parse_args()
    if args.command == "import-vipant":
        import_theirs(args.theirs, args.ours, args.clip, args.vocab)
        return
    weights = cached(args.model, fetch=True)
    vocabulary = download(VOCABULARY, VOCABULARY_PATH, VOCABULARY_SHA256)
    clip, tokenizer = load_clip(weights), Tokenizer(vocabulary)
    print(f"{weights}: {sum(p.numel() for p in clip.parameters()) / 1e6:.0f} M parameters, "
          f"images {clip.image_size}×{clip.image_size}, {clip.text_projection.shape[1]} dimensions, verified")
    print(f"{vocabulary}: {tokenizer.vocab_size} tokens, verified")
    print("next: python pretrain.py --data toy, or the full run in README.md")


if __name__ == "__main__":
    run(main)
