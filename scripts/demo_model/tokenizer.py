"""Byte-level BPE tokenizer of the demo model.

Trained on the demo world's own words, so that each of them is one piece; any
other text falls back to shorter pieces and in the end to single bytes.
"""

import json
import re

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import words as w
import world

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = [END_OF_TEXT, IM_START, IM_END]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# Exactly Qwen2's way to split text: transformers puts it in place of whatever a
# tokenizer.json of a qwen2 model says, so anything else would not survive there.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
ASCII_SPLIT = re.compile(SPLIT.replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9")
                         .replace("A-Za-z+", "[A-Za-z]+").replace("|0-9|", "|[0-9]|"))


def one_piece_words():
    """Words that must come out as one piece, in the spelling they occur with."""
    spaced = set(w.PLACES + w.PEOPLE + w.WEEKDAYS + w.TIMES)
    spaced |= {v for pool in w.VALUES.values() for v in pool}
    spaced |= {x for weather in w.WEATHER for x in weather.split()}
    bare = set(w.WEEKDAYS) | {"system", "user", "assistant"}
    texts = [t for a in world.ATTRIBUTES
             for t in (a.name, a.told, a.asked, a.asked[0].lower() + a.asked[1:], a.wh)]
    texts += world.TITLES + world.GENERIC_SYSTEMS + world.UNRELATED
    texts += [world.REFUSAL, "The of is. We heard that the Tell me the At For at for"]
    for text in texts:
        found = re.findall(r"[A-Za-z]+", text.replace("{s}", "").replace("{v}", ""))
        spaced |= {x for x in found}
        bare |= {x for x in found if x[0].isupper()}
    return sorted({" " + x for x in spaced} | bare)


def train():
    """The tokenizer: only as many merges as the words above need."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, min_frequency=1, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(one_piece_words(), trainer)
    for word in one_piece_words():
        assert len(tokenizer.encode(word).ids) == 1, word
    return tokenizer


class Encoder:
    """Fast encoding of generated (ASCII) text: a cache of pre-split pieces."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.cache = {}
        self.im_start = [tokenizer.token_to_id(IM_START)]
        self.im_end = [tokenizer.token_to_id(IM_END)]
        self.newline = self("\n")

    def __call__(self, text):
        ids = []
        for piece in ASCII_SPLIT.findall(text):
            if piece not in self.cache:
                self.cache[piece] = self.tokenizer.encode(piece).ids
            ids += self.cache[piece]
        return ids

    def message(self, role, content):
        return self.im_start + self(role) + self.newline + self(content) + self.im_end + self.newline

    def open_answer(self):
        return self.im_start + self("assistant") + self.newline


def save(tokenizer, folder):
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = {str(tokenizer.token_to_id(t)): {
        "content": t, "lstrip": False, "normalized": False, "rstrip": False,
        "single_word": False, "special": True} for t in SPECIALS}
    config = {
        "add_bos_token": False, "add_prefix_space": False,
        "added_tokens_decoder": specials, "bos_token": None,
        "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
        "eos_token": IM_END, "errors": "replace", "model_max_length": 4096,
        "pad_token": END_OF_TEXT, "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
