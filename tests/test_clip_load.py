"""Tokenizer, where files come from, every layout of weights, the three changes, the authors'."""
import gzip
import hashlib
import http.server
import json
import os
import pickle
import random
import runpy
import sys
import threading

import clip_load
import model
import numpy as np
import pytest
import torch
import transformers
from clip_load import Tokenizer, load_clip, resize_positions
from safetensors.torch import save_file

LETTERS = ["l o", "lo w</w>", "e r</w>"]


def randomised(module):
    """A module whose norms and biases, too, are other than each other."""
    torch.manual_seed(0)
    for p in module.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    return module.eval()


def tiny_clip():
    torch.manual_seed(0)
    return randomised(model.CLIP(32, 8, 64, 2, 12, 517, 64, 1, 32))


@pytest.fixture
def clip_path(tmp_path):
    torch.save(tiny_clip().state_dict(), tmp_path / "clip.pt")
    (tmp_path / "v.gz").write_bytes(gzip.compress("\n".join(["v", *LETTERS]).encode()))
    return tmp_path / "clip.pt"


def test_byte_pair_encoding_by_hand():
    """Ids: 256 bytes, 256 that end a word, 3 merges, start, end. "lower" is lo, w, er."""
    tokenizer = Tokenizer(LETTERS)
    assert tokenizer.vocab_size == 512 + 3 + 2
    assert tokenizer(["low lower"])[0, :7].tolist() == [515, 513, 512, ord("w") - 33, 514, 516, 0]
    assert Tokenizer(LETTERS, 6)(["low " * 9]).tolist() == [[515, 513, 513, 513, 513, 516]]


def test_ids_are_clips_and_lead_back_to_the_text(shared, tmp_path):
    path = shared / "data/clip/bpe_simple_vocab_16e6.txt.gz"
    tokenizer = Tokenizer(path)
    for row in json.loads((shared / "golden/tokens.json").read_text()):
        assert tokenizer([row["text"]])[0].tolist() == (row["ids"] + [0] * 77)[:77], row["text"]
    assert tokenizer.encode("1 &lt; 2 < 3 &amp;amp; 4") == tokenizer.encode("1 < 2 < 3 & 4")
    units, byte = list(tokenizer.ids), {v: k for k, v in tokenizer.symbol.items()}
    word = "".join(units[i] for i in tokenizer.encode("a dog's 你好 ünd 🔊 42")[1:-1])
    assert bytes(byte[x] for x in word.replace("</w>", "")).decode() == "adog's你好ünd🔊42"
    merges = gzip.decompress(path.read_bytes()).decode().split("\n")[1:48_895]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))  # the hub's
    assert Tokenizer(tmp_path / "merges.txt").ids == Tokenizer(merges).ids == tokenizer.ids


CONTENT = bytes(1_000_000)


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404 if "404" in self.path else 200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:len(CONTENT) // 2 if "cut" in self.path else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of a server; a cache of its own; a hub that is not to be reached."""
    monkeypatch.setattr(clip_load, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(clip_load, "hf_hub_download", lambda *_, **__: open("no hub"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_clip_is_fetched_once_and_its_hash_is_checked(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clip_load, "OPENAI", server)
    monkeypatch.setitem(clip_load.MODELS, "ViT-B/32", hashlib.sha256(CONTENT).hexdigest())
    for place in (server, tmp_path):
        path = clip_load.find_clip("ViT-B/32")
        assert path.read_bytes() == CONTENT and f": from {place}" in capsys.readouterr().out
    path.write_bytes(b"half of it")
    assert clip_load.find_clip("ViT-B/32").read_bytes() == CONTENT


@pytest.mark.parametrize("what, said", [("wrong", "invalid hash"), ("cut", "invalid hash"),
                                        ("404", "404"), ("no network", "refused")])
def test_what_was_tried_is_said_and_nothing_half_gets_the_name(
        what, said, server, tmp_path, monkeypatch, capsys):
    url = "http://127.0.0.1:9/v.gz" if what == "no network" else f"{server}/{what}/v.gz"
    sha256 = hashlib.sha256(CONTENT if what == "cut" else b"").hexdigest()
    monkeypatch.setattr(clip_load, "VOCABULARY", url)
    monkeypatch.setattr(clip_load, "VOCABULARY_SHA256", sha256)
    for content in (None, b"other"):
        if content:
            (tmp_path / "cache/v.gz").write_bytes(content)
        with pytest.raises(FileNotFoundError) as error:
            clip_load.find_vocabulary()
        _, cache, earlier, address, hub, mend = str(error.value).split("\n")
        assert ("v.gz: its SHA-256 is not" if content else "No such file") in cache
        assert url in address and said in address and "no hub" in earlier and "no hub" in hub
        assert f"Put it at {tmp_path}/cache/v.gz" in mend and "--vocab" in mend
        assert len(os.listdir(tmp_path / "cache")) == bool(content)
    monkeypatch.setattr(clip_load, "hf_hub_download", lambda _, name, local_files_only: open(
        "not yet") if local_files_only else f"{tmp_path}/{name}")
    assert clip_load.find_vocabulary() == tmp_path / "merges.txt"
    assert capsys.readouterr().out.endswith("huggingface.co/openai/clip-vit-base-patch32\n")


def features(clip):
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        images = clip.encode_image(torch.randn(2, 3, 32, 32, generator=rng))
        return torch.cat([images, clip.encode_text(torch.randint(517, (2, 12), generator=rng))])


def test_features_are_clips_and_the_audio_encoders(shared, tmp_path):
    golden = {k: torch.tensor(v) for k, v in np.load(shared / "golden/clip_tiny.npz").items()}
    state = {k.removeprefix("weights/"): v for k, v in golden.items() if k.startswith("weights/")}
    torch.save(state, tmp_path / "clip.pt")
    clip = load_clip(tmp_path / "clip.pt")
    audio = clip_load.audio_encoder_from_clip(clip, 50, 32, (4, 6))
    ours = {"image": clip.encode_image(golden["image"]), "text": clip.encode_text(golden["text"]),
            "audio": audio(golden["audio_fbank"]),
            "audio_long": clip_load.lengthen(audio, 90)(golden["audio_long_fbank"])}
    for name, value in ours.items():
        assert (value - golden[f"{name}_features"]).abs().max() < 1e-4, name
    assert not any(p.requires_grad for p in clip.parameters()) and not clip.training


def test_every_layout_gives_the_same_features(shared, tmp_path, monkeypatch):
    clip = tiny_clip().half().float()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), str(tmp_path / "clip.pt")])
    runpy.run_path(str(shared / "cases/30_clip_formats.py"))
    expected = features(clip)
    nested = {f"clip.{key}": value for key, value in clip.state_dict().items()}
    torch.save({"args": clip_load.Inert(), "model": nested}, tmp_path / "nested.pt")
    clip.forward = lambda images, tokens: (clip.encode_image(images), clip.encode_text(tokens))
    for name in ("input_resolution", "context_length", "vocab_size"):  # as OpenAI's file has
        vars(clip).pop(name, None)
        clip.register_buffer(name, torch.tensor(7))
    inputs = torch.randn(2, 3, 32, 32), torch.randint(517, (2, 12))
    torch.jit.trace(clip, inputs, check_trace=False).save(tmp_path / "script.pt")
    paths = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(paths) == 17
    for path in paths:
        close = 0.05 if "bf16" in path.name else 1e-5
        assert (features(load_clip(path)) - expected).abs().max() < close, path.name


def hugging_face(act="quick_gelu", heads=5):
    vision = {"hidden_size": 320, "intermediate_size": 1280, "num_attention_heads": heads,
              "num_hidden_layers": 2, "image_size": 32, "patch_size": 8, "hidden_act": act}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1,
            "num_hidden_layers": 1, "vocab_size": 517, "max_position_embeddings": 12,
            "bos_token_id": 515, "eos_token_id": 516}
    return randomised(transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=vision, text_config=text, projection_dim=32)))


def test_hugging_faces_clip_has_its_own_features(tmp_path, capsys):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(515, (2, 12))
    tokens[:, -1] = 516
    for name in ("model.safetensors", "pytorch_model.bin"):
        clip = load_clip(tmp_path / name)
        expected = theirs.get_image_features(images).pooler_output
        assert (clip.encode_image(images) - expected).abs().max() < 1e-5
        expected = theirs.get_text_features(tokens).pooler_output
        assert (clip.encode_text(tokens) - expected).abs().max() < 1e-5
    assert "as config.json says" in capsys.readouterr().out


def test_other_activations_and_heads_are_refused_by_their_config(tmp_path):
    for options, said in (({"act": "gelu"}, "says gelu, heads of 64"), ({"heads": 4}, "of 80")):
        hugging_face(**options).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"model\.safetensors: .*{said}"):
            load_clip(tmp_path / "model.safetensors")
    open_clip = {"vision_cfg": {"width": 320}, "text_cfg": {"width": 64, "heads": 1}}
    for content, said in (({"model_cfg": open_clip}, "gelu"), ([], "list"), ("{", "str")):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"model\.safetensors: .*{said}"):
            load_clip(tmp_path / "model.safetensors")
    config = {"model_cfg": open_clip | {"quick_gelu": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_clip(tmp_path / "model.safetensors").visual.config["heads"] == 5


@pytest.mark.parametrize("keys, said", [
    (["visual.attnpool.c", "token_embedding.weight"], "taken for a ResNet and a text encoder"),
    (["text_model.embeddings.token_embedding.weight"], "taken for a text encoder"),
    (["vision_model.embeddings.class_embedding"], "taken for a ViT"),
    (["layer1.weight"], r"taken for something else \(layer1")])
def test_what_is_no_clip_is_refused_with_what_it_is_taken_for(keys, said, tmp_path):
    torch.save(dict.fromkeys(keys, torch.zeros(2)), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=rf"other\.pt: .*{said}"):
        load_clip(tmp_path / "other.pt")


def test_a_packed_clip_is_the_same_in_half_the_bytes_where_that_is_exact():
    for clip, dtype in (tiny_clip().half().float(), torch.half), (tiny_clip(), torch.float):
        packed = clip_load.pack_clip(clip, Tokenizer(LETTERS))
        other, tokenizer = clip_load.unpack_clip(packed)
        assert clip_load.digest(other) == clip_load.digest(clip)
        assert packed["state"]["visual.proj"].dtype == dtype
        assert tokenizer.merges == LETTERS and tokenizer.context_length == 12
    with pytest.raises(ValueError, match="514 tokens for a CLIP of 517; .*--vocab"):
        clip_load.pack_clip(clip, Tokenizer([]))


def test_positions_and_kernel_by_hand():
    """Rows are time: two become four, align_corners=False; the class position stays."""
    pos = torch.tensor([[9.0], [0.0], [4.0]])
    assert resize_positions(pos, (2, 1), (4, 1)).flatten().tolist() == [9, 0, 1, 3, 4]
    assert torch.equal(resize_positions(pos, (2, 1), (2, 1)), pos)
    clip, grey = tiny_clip(), torch.randn(1, 1, 8, 8)
    kernel = clip_load.audio_encoder_from_clip(clip, 60, 32, (4, 6)).conv1
    assert torch.allclose(3 * kernel(grey), clip.visual.conv1(grey.expand(1, 3, 8, 8)), atol=1e-5)


class Settings:
    """As OmegaConf's in the authors' files, but to make one would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def authors_file(path, encoder, clip, dicts=4, naming="heads", channels=3, positions="audio's"):
    """A checkpoint in one of the layouts that the authors' code has written."""
    state = dict(encoder.state_dict())
    if channels == 3:  # other channels, the same mean
        noise = torch.randn(64, 3, 8, 8)
        state["conv1.weight"] = state["conv1.weight"] + noise - noise.mean(1, keepdim=True)
    if positions == "image's":
        state["positional_embedding"] = clip.visual.positional_embedding
    names = {"transformer.": "encoder.", "ln_pre": "pre_encoder.ln", "conv1": "pre_encoder.conv1",
             "ln_post": "post_encoder.ln", "proj": "post_encoder.proj",
             "positional": "misc.positional", "class_emb": "misc.class_emb"}
    audio = {}
    for key, value in state.items():
        start = next(name for name in names if key.startswith(name))
        theirs = names[start] + key.removeprefix(start)
        audio[theirs if naming == "heads" else f"encoder.{key}"] = value
    image, loss = {"post_encoder.proj": clip.visual.proj}, {"x.logit_scale": torch.tensor(3.5)}
    parts = (audio, loss) if dicts == 2 else (image, audio, {}, loss)
    torch.save({"cfg": Settings(path.with_name("ran")), "model": parts}, path)


@pytest.fixture
def main(clip_path, monkeypatch):
    """Run clip_load.py with the tiny CLIP -> the checkpoint that it leaves."""
    def main(*flags, out="out/c.pt"):
        flags = ["clip_load.py", *flags, "--clip", "clip.pt", "--vocab", "v.gz"]
        monkeypatch.setattr(sys, "argv", flags)
        clip_load.main()
        assert not os.path.exists("ran")
        return torch.load(out, weights_only=True)

    monkeypatch.chdir(clip_path.parent)
    return main


@pytest.mark.parametrize("layout", [
    {}, {"dicts": 2}, {"naming": "CLIP's"}, {"dicts": 2, "naming": "CLIP's"}, {"channels": 1},
    {"positions": "image's"}, {"positions": "image's", "naming": "CLIP's", "channels": 1}], ids=str)
def test_the_authors_checkpoint_has_the_features_of_its_encoder(layout, clip_path, main):
    clip = load_clip(clip_path)
    encoder = clip_load.audio_encoder_from_clip(clip)
    authors_file(clip_path.with_name("a.pth"), encoder, clip, **layout)
    saved = main("import-vipant", "a.pth", "out/c.pt")
    ours = model.VisionTransformer(**saved["encoder"])
    learner = {key.removeprefix("audio_encoder."): value for key, value in saved["learner"].items()}
    assert learner.pop("log_scale") == 3.5 and saved["stage"] == "pretrain"
    ours.load_state_dict(learner)
    x = torch.randn(1, 1, 1000, 128)
    assert torch.allclose(ours(x), encoder(x), atol=1e-5)
    assert saved["front_end"]["sample_rate"] == 44_100 and saved["front_end"]["frames"] == 1000
    assert clip_load.digest(clip_load.unpack_clip(saved["clip"])[0]) == clip_load.digest(clip)


def test_by_name_from_an_address_whole_and_once(clip_path, main, monkeypatch, capsys, server):
    clip = load_clip(clip_path)
    authors_file(clip_path.with_name("a.pth"), clip_load.audio_encoder_from_clip(clip), clip)
    monkeypatch.setattr(sys.modules[__name__], "CONTENT", open("a.pth", "rb").read())
    for where, said in (("/cut", "4140.pth: no checkpoint"), ("/404", "404.*\n.*import-vipant")):
        monkeypatch.setattr(clip_load, "RELEASED", server + where)
        with pytest.raises(ValueError, match=said):
            main("vipant-gc")
        assert not os.path.exists("out")
    monkeypatch.setattr(clip_load, "RELEASED", server)
    for said in ("next: python evaluate.py --task search", "is kept"):
        saved = main("vipant-gc", out="out/vipant-gc/checkpoint.pt")
        assert said in capsys.readouterr().out
    assert saved["stage"] == "finetune" and saved["settings"]["source"] == "gc"


def test_an_encoder_of_another_clip_and_other_files_are_refused(clip_path, main):
    clip = load_clip(clip_path)
    encoder = clip_load.audio_encoder_from_clip(clip)
    for content in ({"model": 3}, {"model": ({}, {"x": 1}, {}, {})}, [1]):
        torch.save(content, "a.pth")
        with pytest.raises(ValueError, match=r"a\.pth: no checkpoint of the authors'"):
            main("import-vipant", "a.pth", "out/c.pt")
    clip.visual.proj.data += 0.1
    authors_file(clip_path.with_name("a.pth"), encoder, clip)
    with pytest.raises(ValueError, match="it chased another CLIP; name that with --clip"):
        main("import-vipant", "a.pth", "out/c.pt")


def test_damaged_files_are_refused_by_name_or_give_the_right_result(clip_path):
    """Zip and gzip files have checksums, so that a flipped bit shows; all are cut off, too."""
    folder, rng, refused = clip_path.parent, random.Random(0), 0
    state, expected = tiny_clip().state_dict(), clip_load.digest(tiny_clip())
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "x.safetensors")
    (folder / "bare.pt").write_bytes(pickle.dumps(Settings(folder / "ran")) + b"...")
    for name in 100 * ["clip.pt", "v.gz"] + 20 * ["clip.pt", "v.gz", "old.pt", "x.safetensors",
                                                 "bare.pt"]:
        content = bytearray((folder / name).read_bytes())
        if name in ("clip.pt", "v.gz") and rng.random() < 0.8:
            at = rng.choice([rng.randrange(len(content)), -rng.randrange(1, 9000)])
            content[at % len(content)] ^= 1 << rng.randrange(8)
        else:
            del content[rng.randrange(len(content)):]
        (folder / f"bad-{name}").write_bytes(content)
        try:
            if name == "v.gz":
                assert Tokenizer(folder / "bad-v.gz").merges == LETTERS
            else:
                assert clip_load.digest(load_clip(folder / f"bad-{name}")) == expected
        except (ValueError, FileNotFoundError) as error:
            assert f"bad-{name}" in str(error)
            refused += 1
    assert refused > 200 and not (folder / "ran").exists()
