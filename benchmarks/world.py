"""What the benchmarks run on: random-weight models of real shapes, a tokenizer, synthetic rows, a complete base_dir.

The rows have the token statistics of the real psychopathy pairs under a Qwen-like template: 38 leading template tokens
(the default system turn), about 80 tokens a sequence, answers ' Yes' / ' No'. No real text is used.
"""

from __future__ import annotations

import json
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parents[1]
HPARAMS = Path("hparams/Steer/experiment_hparams/spilt_experiment")
PREFIX_TOKENS = 38  # of the template, before the question
FIXED_TOKENS = 19  # of the question: what all rows ask, a line break and a quote
STATEMENT = (13.0, 4.7, 4, 40)  # tokens of the statement: mean, deviation, least, most (real rows: 9.7 +- 3.5 words, 3 to 30)
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


class Shape(NamedTuple):
    """A model's config (arguments of AutoConfig.for_model), the layer that is steered, and whose settings are copied."""

    config: dict[str, Any]
    layer: int
    settings: str = "qwen2.5-7b-it"


def _shape(kind: str, hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocab, "max_position_embeddings": 4096, **more,
    }  # fmt: skip


SHAPES: dict[str, Shape] = {
    "tiny": Shape(_shape("qwen2", 32, 64, 4, 4, 2, 640), 1),
    "tiny-gemma-2": Shape(_shape("gemma2", 32, 64, 4, 4, 2, 640, head_dim=8, query_pre_attn_scalar=8), 1, "gemma-2-9b-it"),
    "qwen2-12x128": Shape(_shape("qwen2", 128, 352, 12, 4, 4, 8000), 6),
    "qwen2-12x512": Shape(_shape("qwen2", 512, 1408, 12, 8, 8, 8000), 6),
    "qwen2-12x512-kv2": Shape(_shape("qwen2", 512, 1408, 12, 8, 2, 8000), 6),
    "gemma2-12x512": Shape(_shape("gemma2", 512, 1408, 12, 8, 4, 8000, head_dim=64, query_pre_attn_scalar=64), 6, "gemma-2-9b-it"),
    "qwen2.5-0.5b": Shape(_shape("qwen2", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True), 12),
    "qwen2.5-7b": Shape(_shape("qwen2", 3584, 18944, 28, 28, 4, 152064), 14),
    "llama-3.1-8b": Shape(_shape("llama", 4096, 14336, 32, 32, 8, 128256), 16),
    "gemma-2-2b": Shape(_shape("gemma2", 2304, 9216, 26, 8, 4, 256000, head_dim=256, query_pre_attn_scalar=256), 12, "gemma-2-9b-it"),
    "gemma-2-9b": Shape(_shape("gemma2", 3584, 14336, 42, 16, 8, 256000, head_dim=256, query_pre_attn_scalar=256), 20, "gemma-2-9b-it"),
}


def config(shape: Shape | dict[str, Any]) -> Any:
    """The library's config of a shape. No special tokens: a random model would end its texts at random."""
    from transformers import AutoConfig

    fields = dict(shape.config if isinstance(shape, Shape) else shape)
    kind = fields.pop("model_type")
    return AutoConfig.for_model(kind, **fields, bos_token_id=None, eos_token_id=None, pad_token_id=0)


def model(shape: Shape | dict[str, Any], dtype: str = "float32", device: str = "cpu", seed: int = 0) -> Any:
    """A model of that shape with random weights, made where it will stay, in evaluation mode and frozen."""
    import torch
    from transformers import AutoModelForCausalLM

    made = config(shape)
    # as in spilt.model.host: sdpa leaves out the soft cap on Gemma-2's attention scores
    how = {"attn_implementation": "eager"} if getattr(made, "attn_logit_softcapping", None) else {}
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(made, dtype=getattr(torch, dtype), **how).eval().requires_grad_(False)


# ---------------------------------------------------------------- words


CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@cache
def words(n: int, seed: int = 0) -> list[str]:
    """n different made-up words of two syllables (there are 4900), in a drawn order."""
    syllables = [c + v for c in CONSONANTS for v in VOWELS]
    return random.Random(seed).sample([a + b for a in syllables for b in syllables], n)


SYSTEM = " ".join(words(PREFIX_TOKENS - 8, seed=1))
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '" + f"{START}system\\n{SYSTEM}{END}\\n" + "' }}{% endif %}"
    "{% for message in messages %}{{ '" + START + "' + message['role'] + '\\n' + message['content'] + '" + END + "' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + START + "assistant\\n' }}{% endif %}"
)


def tokenizer(vocab: int) -> Any:
    """Byte-level BPE in which a word with its leading space is one token; at most `vocab` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = dict.fromkeys([PAD, START, END, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    merges: dict[tuple[str, str], None] = {}

    def merge(*pieces: str) -> None:
        """Make one token of a text that is these pieces by now."""
        whole = pieces[0]
        for piece in pieces[1:]:
            merges[whole, piece] = None
            whole += piece
            tokens[whole] = None

    for consonant in CONSONANTS:
        for vowel in VOWELS:
            merge(consonant, vowel)
    for pieces in ("s y s te m", "u se r", "a s si s ta n t", "Y e s", "N o", "Ġ Yes", "Ġ No"):
        merge(*pieces.split())
    for consonant in CONSONANTS:
        for vowel in VOWELS:
            merge("Ġ", consonant + vowel)
    for text in (SYSTEM, _asked()):
        first, *rest = text.split()
        merge(first[:2], first[2:])
        for word in rest:
            merge("Ġ" + word[:2], word[2:])
    for word in words(4900):
        if len(tokens) < vocab:
            merge("Ġ" + word[:2], word[2:])
    for word in words(4900):  # up to 16 000: the texts of a random model use every token
        for syllable in ("ba", "ri"):
            if len(tokens) < vocab:
                merge("Ġ" + word, syllable)
    assert len(tokens) <= vocab, f"a vocabulary of {vocab} is too small: {len(tokens)} tokens are needed"
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, additional_special_tokens=[START, END])
    fast.chat_template = TEMPLATE
    return fast


def _asked() -> str:
    return " ".join(words(FIXED_TOKENS - 3, seed=2))


def questions(n: int, vocab: int, seed: int, length: int | None = None) -> list[str]:
    """n different questions; `length`: tokens of each statement instead of the real spread."""
    rng = random.Random(seed)
    mean, deviation, least, most = STATEMENT
    known = words(4900)[: max(8, min(4900, vocab - 512))]
    made = []
    for _ in range(n):
        size = length or min(most, max(least, round(rng.gauss(mean, deviation))))
        made.append(f'{_asked()}?\n" {" ".join(rng.choice(known) for _ in range(size))}"')
    return made


# ---------------------------------------------------------------- folders


def write(
    base: Path,
    name: str,
    shape: Shape,
    *,
    train: int,
    test: int,
    new_tokens: int = 32,
    seed: int = 0,
    weights: bool = True,
    length: int | None = None,
) -> None:
    """A complete base_dir: models/, data/, hparams/. Settings are the released ones; layer, dtype and greedy decoding are ours."""
    folder = base / "models" / name
    folder.mkdir(parents=True)
    if weights:
        model(shape, seed=seed).save_pretrained(folder)
        tokenizer(shape.config["vocab_size"]).save_pretrained(folder)
    else:  # the model is made in memory
        config(shape).save_pretrained(folder)
    for split, rows in (("train", train), ("test", test)):
        path = base / "data" / "psychopathy" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for i, question in enumerate(questions(rows, shape.config["vocab_size"], 2 * seed + (split == "test"), length)):
            right, wrong = (" Yes", " No") if i % 2 == 0 else (" No", " Yes")
            lines.append(json.dumps({"question": question, "answer_matching_behavior": right, "answer_not_matching_behavior": wrong}))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (base / HPARAMS).mkdir(parents=True)
    shutil.copy(REPO / "hparams/Steer/dataset_format.yaml", base / "hparams/Steer")
    common = "torch_dtype: float32\nseed: 42\nuse_chat_template: true\nsystem_prompt: ''\n"
    (base / HPARAMS / "config.yaml").write_text(common, encoding="utf-8")
    decoding = f"generation_params: {{max_new_tokens: {new_tokens}, do_sample: false}}\ngenerate_orig_output: false\n"
    (base / HPARAMS / "apply_config.yaml").write_text(common + decoding, encoding="utf-8")
    for path in sorted((REPO / HPARAMS / "psychopathy" / shape.settings).rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        kept = [line for line in text.splitlines() if not line.startswith("#")]
        lines = [f"layers: [{shape.layer}]" if line.startswith("layers:") else line for line in kept]
        target = base / HPARAMS / "psychopathy" / name / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def invent_vectors(base: Path, name: str, shape: Shape, cells: list[tuple[str, str]], scale: float = 0.002, seed: int = 0) -> None:
    """Random stored interventions in the released formats, for measurements that need cells and no fit."""
    import torch

    torch.manual_seed(seed)
    d, f = shape.config["hidden_size"], shape.config["intermediate_size"]
    for method, form in cells:
        state: Any = torch.randn(d) * scale
        if form == "lora":
            state = {"lora_A": torch.randn(f, 4) * 0.1, "lora_B": torch.randn(4, d) * scale, "r": 4, "alpha": 32.0}
        elif form == "local_weight":
            state = {"weight": torch.randn(f, d) * scale, "bias": torch.zeros(d)}
        if form != "vector":
            state |= {"intervention_components": "mlp_mid", "concept_id": 0}
        leaf = "caa_vector" if method == "caa" else f"{method}_{form}"
        path = base / "vectors" / name / method / "psychopathy" / leaf / f"layer_{shape.layer}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
