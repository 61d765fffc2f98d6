"""Text to token ids and back: any Hugging Face fast tokenizer, or one trained here.

Encoding treats special tokens as ordinary text: a caption that contains the characters `<image>` or `</s>` must not be
able to place a placeholder or end a segment. Specials enter the stream only through batches/interleave.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from trichord.core.errors import ConfigError

TokenizerKind = Literal["bpe", "unigram", "word"]

PAD, BOS, EOS, UNK, IMAGE, AUDIO = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<audio>")


class TextTokenizer:
    """A tokenizer with the six ids that the stream needs.

    vocab_size counts every id, specials included. A released tokenizer without `<image>` or `<audio>` gets them
    appended; one without a beginning token uses its end token there, as GPT-style models do; likewise for padding.
    """

    def __init__(self, tokenizer: Tokenizer, specials: dict[str, str | None], name: str) -> None:
        """specials: names of the tokens under "bos", "eos" and "pad", None or absent where there is none.

        Raises:
            ConfigError: there is no end token, or a named token is not in the vocabulary.
        """
        tokenizer.no_truncation()  # a tokenizer.json may carry both, and then cuts or pads silently
        tokenizer.no_padding()
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (IMAGE, AUDIO)])
        self.name = name
        self._tokenizer = tokenizer
        self.image_id = self._id_of(IMAGE)
        self.audio_id = self._id_of(AUDIO)
        eos = specials.get("eos")
        if eos is None:
            raise ConfigError(f"tokenizer {name} names no end token; add `eos_token` to its tokenizer_config.json")
        self.eos_id = self._id_of(eos)
        self.bos_id = self._id_of(specials.get("bos") or eos)
        self.pad_id = self._id_of(specials.get("pad") or eos)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        added = tokenizer.get_added_tokens_decoder()
        marks = {token_id: token.content for token_id, token in added.items() if token.special and token.content != UNK}
        self._mark_ids = frozenset(marks)
        self._mark_pattern = re.compile("|".join(re.escape(m) for m in sorted(marks.values(), key=len, reverse=True)))

    def _id_of(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ConfigError(
                f"tokenizer {self.name} names the special token {token!r}, which is not in its vocabulary"
            )
        return token_id

    @property
    def special_ids(self) -> dict[str, int]:
        """The five ids that the model has to know, by name."""
        return {name: getattr(self, name) for name in ("pad_id", "bos_id", "eos_id", "image_id", "audio_id")}

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no [BOS], no [EOS], never cut, and no special id whatever characters are in it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, at less than half the cost per text."""
        if not texts:
            return []
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._without_marks(text, one.ids) for text, one in zip(texts, encoded)]

    def _without_marks(self, text: str, ids: list[int]) -> list[int]:
        if self._mark_ids.isdisjoint(ids):
            return ids
        # Break each special after its first character. (The library's `encode_special_tokens` is not enough: a unigram
        # model has the specials among its own pieces.)
        broken = self._mark_pattern.sub(lambda match: match[0][0] + "\0" + match[0][1:], text.replace("\0", " "))
        parts = [self._tokenizer.encode(part, add_special_tokens=False).ids for part in broken.split("\0")]
        return [token for part in parts for token in part if token not in self._mark_ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def fingerprint(self) -> str:
        """Hash of everything that decides the ids; two tokenizers with the same one encode alike."""
        return hashlib.blake2b(self._tokenizer.to_str().encode(), digest_size=8).hexdigest()

    def save(self, out_dir: Path) -> None:
        """Write a folder that `transformers.AutoTokenizer` and `load_tokenizer` read."""
        specials = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        names = {name: self._tokenizer.id_to_token(token_id) for name, token_id in specials.items()}
        _write_folder(self._tokenizer, names, out_dir)


def load_tokenizer(name: str) -> TextTokenizer:
    """Load a folder with a `tokenizer.json`, or `hub-id@revision` (from the hub's cache when offline).

    Raises:
        ConfigError: no such folder, no readable tokenizer.json in it, or the hub does not have it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ConfigError(
                f"batches.tokenizer: expected a folder with tokenizer.json or hub-id@revision, nothing is at {name!r}"
                "; train one with `trichord data tokenizer`, or give the folder of a released one"
            )
        folder = _fetch_from_hub(name)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"batches.tokenizer: {folder} has no tokenizer.json; save it as a fast tokenizer first "
            "(transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception for any bad content
        raise ConfigError(f"batches.tokenizer: {path} is no tokenizer.json that can be read: {error}") from error
    return TextTokenizer(tokenizer, _read_specials(folder), name)


def _fetch_from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"batches.tokenizer: {name!r} is no folder, and the Hugging Face hub gave no such tokenizer "
            f"({type(error).__name__}); check the name, or fetch it where there is "
            "internet: trichord-launch preflight CONFIG --fetch"
        ) from error


def _read_specials(folder: Path) -> dict[str, str | None]:
    """Names of the bos, eos and pad token from tokenizer_config.json, else special_tokens_map.json."""
    found: dict[str, str | None] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the second wins
        path = folder / file
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"batches.tokenizer: {path} is not valid JSON: {error}") from error
        for key in ("bos", "eos", "pad"):
            token = content.get(f"{key}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                found[key] = token
    return found


def train_tokenizer(texts: Iterable[str], kind: TokenizerKind, vocab_size: int, out_dir: Path | str) -> TextTokenizer:
    """Train on `texts` and write a folder that `load_tokenizer` and `transformers.AutoTokenizer` read.

    bpe: byte-level, encodes any text without loss. unigram: SentencePiece-like; characters never seen become <unk>.
    word: whole words and punctuation marks, the rest <unk>. The six special tokens take ids 0 to 5.

    Raises:
        ConfigError: the folder holds a tokenizer already, there is no text, or `vocab_size` is too small for the kind.
    """
    out_dir = Path(out_dir)
    if (out_dir / "tokenizer.json").exists():
        raise ConfigError(f"{out_dir} already holds a tokenizer.json; choose another folder or remove it")
    smallest = len(SPECIAL_TOKENS) + (256 if kind == "bpe" else 1)
    if vocab_size < smallest:
        raise ConfigError(f"a {kind} tokenizer needs a vocabulary of at least {smallest}, got {vocab_size}")
    tokenizer, trainer = _untrained(kind, vocab_size)
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += bool(text.strip())
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not seen:
        raise ConfigError("there is no text to train a tokenizer on; check that the sources have a text field")
    _write_folder(tokenizer, {"bos": BOS, "eos": EOS, "pad": PAD}, out_dir)
    return load_tokenizer(str(out_dir))


def _untrained(kind: TokenizerKind, vocab_size: int) -> tuple[Tokenizer, trainers.Trainer]:
    options = {"vocab_size": vocab_size, "special_tokens": list(SPECIAL_TOKENS), "show_progress": False}
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        return tokenizer, trainers.UnigramTrainer(unk_token=UNK, **options)
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer, trainers.WordLevelTrainer(**options)


def _write_folder(tokenizer: Tokenizer, specials: Mapping[str, str | None], out_dir: Path) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    config = {f"{name}_token": token for name, token in specials.items()}
    if tokenizer.token_to_id(UNK) is not None:
        config["unk_token"] = UNK
    config |= {
        "additional_special_tokens": [IMAGE, AUDIO],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
        "tokenizer_class": "PreTrainedTokenizerFast",  # read by transformers 4 and 5 alike
    }
    (out_dir / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
