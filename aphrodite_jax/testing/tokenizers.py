"""A tokenizer for tiny models: a token for each byte, and special tokens behind them."""

from collections.abc import Sequence

import tokenizers
import transformers

__all__ = ["byte_tokenizer"]


def byte_tokenizer(special_tokens: Sequence[str] = ()) -> transformers.PreTrainedTokenizerFast:
    """Tokens ``<unk>``, ``<s>``, ``</s>``, then the 256 bytes, then ``special_tokens``; their ids are 259, 260, ..."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *alphabet, *special_tokens]
    model = tokenizers.models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(special_tokens),
    )
