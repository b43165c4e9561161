"""HuggingFace side: the quantisation config. Loaded only when asked for, since it imports transformers."""

from __future__ import annotations

from typing import Any, cast

from transformers.utils.quantization_config import QuantizationConfigMixin

from .config import Settings


class CpuLlmConfig(Settings, QuantizationConfigMixin):
    """Settings of torch_cpullm with the conventions of transformers' quantisation configs.

    Arguments as :class:`torch_cpullm.config.Settings`. Unknown keyword arguments are accepted and ignored, as in
    transformers, so that a newer config loads. Raises ValueError naming the field that is wrong.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 32,
        sym: bool = False,
        compute: str = "int8",
        head_bits: int | None = 8,
        scale_dtype: str = "float16",
        modules_to_not_convert: list[str] | None = None,
        kv_cache: str = "auto",
        **kwargs: Any,
    ) -> None:
        self.quant_method = cast("Any", "cpullm")  # transformers types only the methods of its own
        Settings.__init__(
            self, bits, group_size, sym, compute, head_bits, scale_dtype, modules_to_not_convert, kv_cache
        )

    def to_dict(self) -> dict[str, Any]:
        """The serialised fields."""
        return dict(vars(self))
