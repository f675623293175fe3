"""Every multimodal architecture that ships, as small as it gets: for tests, and to start one's own config from."""

from collections.abc import Callable, Iterator, Mapping

from aphrodite_jax.testing.tiny.gemma import gemma3, paligemma, paligemma2
from aphrodite_jax.testing.tiny.llava import llava, llava_next, llava_onevision
from aphrodite_jax.testing.tiny.model import TinyModel
from aphrodite_jax.testing.tiny.pixtral import mistral3, pixtral
from aphrodite_jax.testing.tiny.qwen_vl import qwen2_5_vl, qwen2_vl, qwen3_vl
from aphrodite_jax.testing.tiny.tiles import idefics3, internvl, smolvlm

__all__ = ["TinyModel", "tiny_models"]

_BUILDERS: tuple[Callable[[], TinyModel], ...] = (
    llava,
    llava_next,
    llava_onevision,
    paligemma,
    paligemma2,
    gemma3,
    idefics3,
    smolvlm,
    internvl,
    pixtral,
    mistral3,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
)


class _TinyModels(Mapping[str, TinyModel]):
    """Builds a model when it is looked up."""

    def __init__(self):
        self._builders = {builder.__name__: builder for builder in _BUILDERS}

    def __getitem__(self, name: str) -> TinyModel:
        return self._builders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._builders)

    def __len__(self) -> int:
        return len(self._builders)


def tiny_models() -> Mapping[str, TinyModel]:
    """A tiny model for each multimodal architecture that ships, by a short name; built when it is looked up.

    Some architectures have two, over different language models. Widths are 16 and 32, there are two layers of each
    kind, and a prompt of two items of each modality fits in 128 to 512 tokens. ``check_multimodal_model(tiny.model_cls,
    tiny.config, **tiny.options)`` checks one.
    """
    return _TinyModels()
