"""A model folder for an `Architecture`: the config and a small tokenizer, no weights.

vLLM fills the weights in (`--load-format dummy`). The tokenizer is a byte-level BPE trained on
the spot on the English prose that ships with every CPython.
"""

import json
import pydoc_data.topics
import tempfile
from pathlib import Path
from typing import Any

from besteffort.errors import EngineError
from besteffort.fleet import Architecture

# OPT's own ids (Zhang et al., 2022): 0 is unused here, generation starts after </s>.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_model(folder: Path, architecture: Architecture, max_model_len: int) -> None:
    """Make `folder` ready for vLLM's `--model`; nothing happens if it already is, byte for byte.

    Raises:
        EngineError: the tokenizers package is not installed.
    """
    config = json.dumps(_config(architecture, max_model_len), indent=2)
    if (folder / "config.json").is_file() and (folder / "config.json").read_text() == config:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two runs may get here at once: each fills its own folder, and the last one in place wins.
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        fresh = Path(name)
        _write_tokenizer(fresh, architecture.vocab_size, max_model_len)
        folder.mkdir(exist_ok=True)
        for file in sorted(fresh.iterdir()):
            file.replace(folder / file.name)
        (fresh / "config.json").write_text(config)
        (fresh / "config.json").replace(folder / "config.json")  # last: it says that all is there


def _config(architecture: Architecture, max_model_len: int) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "word_embed_proj_dim": architecture.hidden_size,
        "num_hidden_layers": architecture.num_hidden_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "ffn_dim": architecture.ffn_dim,
        "max_position_embeddings": max_model_len,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }


def _write_tokenizer(folder: Path, vocab_size: int, max_model_len: int) -> None:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise EngineError(
            "a model given as an architecture needs the package tokenizers to make its tokenizer; "
            "install besteffort[vllm], or run `make setup`"
        ) from None
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))  # noqa: S106 - a token, not a password
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": max_model_len,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
