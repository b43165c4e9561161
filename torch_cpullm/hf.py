"""HuggingFace side: the quantisation config, and the quantizer by which from_pretrained makes and loads packed models.

Loaded only when asked for, since it imports transformers; importing it registers ``quant_method: cpullm`` there.

    float checkpoint    each weight is quantised and packed when transformers reads it; a placeholder of one element
                        stands for it until all are there, so transformers ties and initialises what it always does
    ours                the stored tensors take the place of the weight's; packed when all are there
    another program's   the same with its tensors (formats/importing.py); see :func:`torch_cpullm.load`

Either way the modules are then swapped and finished as :func:`torch_cpullm.optimize` does it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import cqil, distributed, ops
from .checkpoint import MARKER, Form, Headers, check_headers, check_version, form_of, read_forms, read_headers
from .config import Settings
from .experts import WEIGHTS
from .formats.importing import stored_weights
from .formats.stored import StoredWeight
from .launch import apply_default_threads
from .layer_match import decoders
from .linear import Packed, entry
from .packing import PackedWeight, alike
from .plan import Target, check_overrides, check_strict, find_targets, stored_targets
from .share import Share, cut_targets
from .swap import dequantize, finish, freeze, progress, put_in_place, swap_module

_Packed = tuple[Packed, Tensor | None]  # a weight, and the order of its inputs


class CpuLlmConfig(Settings, QuantizationConfigMixin):
    """Settings of torch_cpullm with the conventions of transformers' quantisation configs.

    Arguments as :class:`torch_cpullm.config.Settings`. strict: raise instead of leaving a weight matrix in float,
    routers of packed experts aside; it is not saved. Unknown keyword arguments are accepted and ignored, as in
    transformers, so that a newer config loads; a ``format_version`` beyond what this package reads does not. Raises
    ValueError naming the field that is wrong.
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
        overrides: dict[str, dict[str, Any]] | None = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> None:
        self.quant_method = cast("Any", "cpullm")  # transformers types only the methods of its own
        self.strict = strict
        if "format_version" in kwargs:  # of a checkpoint
            check_version(kwargs["format_version"])
            for name in ("format_version", "modules", "tensors", "hint", "source"):
                setattr(self, name, kwargs.get(name))
        Settings.__init__(
            self, bits, group_size, sym, compute, head_bits, scale_dtype, modules_to_not_convert, kv_cache, overrides
        )

    def to_dict(self) -> dict[str, Any]:
        """The serialised fields."""
        return {**{name: value for name, value in vars(self).items() if name != "strict"}, **self.plain()}


class CpuLlmQuantizer(HfQuantizer):
    """What transformers calls while it loads a model with a CpuLlmConfig; one per model."""

    requires_calibration = False
    quantization_config: Any

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._clear()

    def _clear(self) -> None:
        self._targets: list[Target] = []
        self._later: list[Target] = []  # float in a packed checkpoint, and quantised when it is loaded
        self._skipped: dict[str, str] = {}
        self._frozen: set[str] = set()
        self._forms: dict[str, Form | StoredWeight] = {}  # by name of the parameter
        self._biases: set[int] = set()  # targets that have a bias in the files alone
        self._saved: dict[str, Any] = {}  # what the model had of its own
        self._joins: list[tuple[WeightConverter, list[ConversionOps]]] = []  # converters of experts, as they were
        # A float checkpoint: parameter name -> target, names tied to it, the placeholder's weight; the first error.
        self._by_name: dict[str, Target] = {}
        self._tied: dict[str, set[str]] = {}
        self._packed: dict[str, Packed] = {}
        self._error: ValueError | None = None
        self._share: Share | None = None  # of several ranks

    # ---- transformers' protocol: before ----

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """ValueError for a device map that names anything but the CPU, and what the package refuses in any case."""
        self.quantization_config.validate()
        ops.isa()
        places = kwargs.get("device_map")
        places = set(places.values()) if isinstance(places, dict) else {places}
        wrong = [place for place in places if not _is_cpu(place)]
        if wrong:
            hint = " (ranks: hide GPUs, CUDA_VISIBLE_DEVICES=)" if torch.distributed.is_initialized() else ""
            raise ValueError(f"torch_cpullm computes on the CPU: device_map must not name {wrong[0]}{hint}")
        if self.pre_quantized:
            check_version(getattr(self.quantization_config, "format_version", None))

    def update_device_map(self, device_map: Any) -> dict[str, Any]:
        """The CPU, whatever accelerators the machine has."""
        return {"": torch.device("cpu")}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Decide what becomes of every module of ``model``, which is on the meta device."""
        self._clear()
        self._share = distributed.expected_share(
            model.config,
            grouped=cqil.CONFIG in vars(model.config),
            supported=hasattr(HfQuantizer, "update_parallel_plan"),
        )
        with distributed.failing_together(self._share is not None):
            self._plan(model, kwargs.get("checkpoint_files"))
        apply_default_threads()
        return model

    def _plan(self, model: Any, files: Any) -> None:
        settings = self.quantization_config
        with torch.device("cpu"):  # here it is meta
            self._targets, self._skipped = find_targets(model, settings)
        self._frozen = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if self.pre_quantized:
            self._expect_stored(model, files)
        else:
            self._by_name = {name: target for target in self._targets for name in _parameters(target)}
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            check_overrides(settings, self._targets, self._skipped, tied)
            for target, source in tied.items():
                self._tied.setdefault(source, {source}).add(target)
            self._tied.update({name: names for names in list(self._tied.values()) for name in names})
        if settings.strict:
            check_strict(model, self._targets, self._skipped)
        if self._share is not None:
            cut_targets(model, self._targets, self._forms, self._share)

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Leave nothing to cut to transformers, whose hooks on linears know no packed weights: see :mod:`share`."""
        if self._share is None or plan is model.ep_plan:
            return
        from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

        plan.clear()  # it must have a rule: one that leaves a parameter alone, of no layer, since it marks the module
        layers = tuple(decoder.name + "." for decoder in decoders(model))
        outside = next(name for name, _ in model.named_parameters() if not name.startswith(layers))
        plan[replace_layer_number_by_wildcard(outside)] = "replicate"

    # ---- a float checkpoint ----

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether :class:`_Quantize` takes this parameter."""
        return not self.pre_quantized and param_name in self._by_name

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight, for transformers' estimates."""
        return self.quantization_config.bits / 8

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that takes a loaded float weight."""
        return _Quantize(self)

    def take(self, name: str, value: Tensor) -> Tensor:
        """Quantise and pack the weight of this name; returns what the module holds until all weights are there."""
        if name in self._packed:  # experts, see take_experts()
            return value
        target = self._by_name[name]
        stored = target.parameters[name.rpartition(".")[2]]
        if tuple(value.shape) != tuple(stored.shape):
            self._error = self._error or ValueError(
                f"{name} is {list(value.shape)} in the checkpoint, and must be {list(stored.shape)}"
            )
        tied = self._tied.get(name, {name})
        if self._error is None:
            try:
                self._packed[name] = target.packed(value)
            except ValueError as error:
                self._error = error
        if self._error is not None:  # raised when transformers is through: it would only log it here
            value = torch.zeros((), dtype=value.dtype).expand(stored.shape)
        elif tied <= self._by_name.keys():
            # transformers ties two weights of a checkpoint only if they are equal.
            others = [other for other in tied - {name} if other in self._packed]
            same = all(alike(self._packed[other], self._packed[name]) for other in others)
            value = torch.full((), 0 if same else 1, dtype=value.dtype).expand(value.shape)
        return value  # a weight that also serves a module which stays in float is kept as it is

    def take_experts(self, name: str, parts: list[list[Tensor]]) -> Tensor:
        """As :meth:`take`, from every expert's matrices, which are joined by rows. Empties the lists of ``parts``."""
        target = self._by_name[name]
        stored = target.parameters[name.rpartition(".")[2]]
        rows = sum(len(part[0]) for part in parts)
        shape = [len(parts[0]), rows, *parts[0][0].shape[1:]]
        dtype = parts[0][0].dtype
        if shape != [*stored.shape] or any([len(part), *part[0].shape[1:]] != [shape[0], *shape[2:]] for part in parts):
            self._error = self._error or ValueError(
                f"{name} is {shape} in the checkpoint, and must be {list(stored.shape)}"
            )

        def expert(i: int) -> Tensor:
            matrices = [part[i] for part in parts]
            for part in parts:
                part[i] = part[i].new_empty(0)  # it may be a copy in another dtype
            return torch.cat(matrices) if len(matrices) > 1 else matrices[0]

        if self._error is None:
            try:
                self._packed[name] = target.packed_experts(shape[0], expert)
            except ValueError as error:
                self._error = error
        return torch.zeros((), dtype=dtype).expand(stored.shape)

    # ---- packed checkpoints: ours, and those of other programs ----

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What transformers does to tensors that it reads.

        A float checkpoint: experts are packed one by one instead of being joined in float. Our checkpoints hold the
        model's own tensors, none to be joined, split or transposed: what renames stays. Another program's: as ever.
        """
        foreign = getattr(self.quantization_config, "source", None) is not None
        if self.pre_quantized and not foreign:
            return [each for each in weight_conversions if not isinstance(each, WeightConverter)]
        found = super().update_weight_conversions(weight_conversions, *args, **kwargs)
        for each in () if foreign else found:
            if isinstance(each, WeightConverter) and _joins_experts(each):
                self._joins.append((each, each.operations))
                each.operations = [_PackExperts(self, each.operations)]
        return found

    def _expect_stored(self, model: Any, files: Any) -> None:
        """Let the modules that the checkpoint has in packed form hold the stored tensors instead of a weight."""
        description = self.quantization_config
        headers = read_headers(files or ())
        source = getattr(description, "source", None)
        forms: dict[str, Any]  # Form or StoredWeight
        if source is None:
            forms = read_forms(getattr(description, "modules", None))
            if files:
                check_headers(headers, getattr(description, "tensors", None))
        else:
            forms = dict(stored_weights(source, headers))
            likely = Counter((form.bits, form.group_size, form.sym) for form in forms.values()).most_common(1)
            description.bits, description.group_size, description.sym = likely[0][0]
        prefix = getattr(model, "base_model_prefix", "")
        ours = stored_targets(model, lambda name: form_of(name, forms, prefix) is not None)
        packed = {name for target in ours for name in target.names}
        if source is not None and forms.keys() - packed:
            name = min(forms.keys() - packed)
            raise ValueError(f"{type(model).__name__} has no linear {name}, and the checkpoint has a weight for it")
        planned = [name for target in self._targets for name in target.names]
        self._skipped.update({name: "float in the checkpoint" for name in planned if name not in packed})
        self._later = [] if source is None else self._of_float(packed)
        for target in ours:
            for parameter, weight in target.parameters.items():
                form = cast("Form | StoredWeight", form_of(entry(target.name, parameter), forms, prefix))
                try:
                    tensors = form.tensors(target.shape(weight), parameter)
                except ValueError as error:
                    raise ValueError(f"{entry(target.name, parameter)}: {error}") from error
                self._forms.update({f"{name}.{parameter}": form for name in target.names})
                del target.module._parameters[parameter]
                weight._is_hf_initialized = True  # type: ignore[attr-defined]
                target.module.__dict__[parameter] = weight  # for code that looks at it
                for name, (size, dtype) in tensors.items():
                    empty = torch.empty(size, dtype=dtype, device="meta")
                    target.module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
                if source is not None and target.module._parameters.get("bias", weight) is None:
                    self._expect_bias(target, weight, headers)
        self._targets = ours
        self._set_aside(model, markers=source is None)

    def _of_float(self, packed: set[str]) -> list[Target]:
        """Head and embedding, if another program has left them in float: they follow head_bits like those of a float
        model. What else it has left in float stays so.
        """
        later = [t for t in self._targets if (t.head or t.kind == "embedding") and not packed & set(t.names)]
        for name in (name for target in later for name in target.names):
            del self._skipped[name]
        return later

    def _expect_bias(self, target: Target, weight: Tensor, headers: Headers) -> None:
        """Some programs give every linear a bias, of zeros where the model has none."""
        if f"{target.name}.bias" in headers:
            empty = torch.empty(target.shape(weight)[0], dtype=weight.dtype, device="meta")
            target.module.register_parameter("bias", nn.Parameter(empty, requires_grad=False))
            self._biases.add(id(target))

    def _set_aside(self, model: Any, *, markers: bool) -> None:
        """Tie stored tensors where transformers would tie weights, and expect the markers of our own checkpoints."""
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        forms = self._forms
        now = {}
        for target, source in tied.items():
            if forms.get(target) != forms.get(source):
                continue  # two weights of their own in the checkpoint
            own, _, parameter = target.rpartition(".")
            if target in forms:
                other = source.rpartition(".")[0]
                now.update({f"{own}.{name}": f"{other}.{name}" for name in forms[target].names(parameter)})
            else:
                now[target] = source
        expected = {rf"^{MARKER}$", *(rf"^{name}$".replace(".", r"\.") for name in forms)} if markers else set()
        before = getattr(model, "_keys_to_ignore_on_load_unexpected", None)  # a list or None in transformers 5.0
        ignored = before | expected if isinstance(before, set) else [*(before or ()), *expected]
        for name, value in (("all_tied_weights_keys", now), ("_keys_to_ignore_on_load_unexpected", ignored)):
            if name in model.__dict__:
                self._saved[name] = model.__dict__[name]
            setattr(model, name, value)

    def _pack_stored(self, model: Any) -> None:
        """Swap in the packed form of every stored weight."""
        for name in ("all_tied_weights_keys", "_keys_to_ignore_on_load_unexpected"):
            model.__dict__.pop(name, None)
        model.__dict__.update(self._saved)
        missing = [
            f"{target.name}.{name}"
            for target in self._targets
            for parameter in target.parameters
            for name in self._forms[f"{target.name}.{parameter}"].names(parameter)
            if not getattr(target.module._parameters[name], "_is_hf_initialized", False)
        ]
        if missing:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise ValueError(f"this checkpoint lacks, or has in another shape: {', '.join(missing[:4])}{more}")
        packed: dict[tuple[int, Any], _Packed] = {}
        for target in progress(self._targets):
            weights = target.parameters
            own = [self._pack_one(target, parameter, weight, packed) for parameter, weight in weights.items()]
            if id(target) in self._biases and not bool(cast("Tensor", target.module.bias).any()):
                target.module._parameters["bias"] = None
            dtype, compute, order = next(iter(weights.values())).dtype, self.quantization_config.compute, own[0][1]
            put_in_place(model, target, target.replacement([new for new, _ in own], dtype, compute, order))

    def _pack_one(
        self, target: Target, parameter: str, weight: Tensor, packed: dict[tuple[int, Any], _Packed]
    ) -> _Packed:
        """The packed form of one weight, and its order, from its stored tensors, which leave the module; packed: those
        made so far.
        """
        module, form = target.module, self._forms[f"{target.name}.{parameter}"]
        del module.__dict__[parameter]
        tensors = {name: cast("Tensor", module._parameters.pop(name)) for name in form.names(parameter)}
        module._parameters[parameter] = None
        key = id(next(iter(tensors.values()))), form
        try:
            if key not in packed:
                whole, order = form.packed(tensors, target.shape(weight), parameter)
                packed[key] = (whole if target.cut is None else target.cut.of(cast("PackedWeight", whole))), order
        except ValueError as error:
            raise ValueError(f"this checkpoint is damaged: {entry(target.name, parameter)}: {error}") from error
        return packed[key]

    # ---- transformers' protocol: after ----

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Swap the modules and finish the model, as optimize() does."""
        settings = self.quantization_config
        for converter, operations in self._joins:  # save_pretrained() of the restored model reverses them
            converter.operations = operations
        with distributed.failing_together(self._share is not None), torch.no_grad():
            if self._error is not None:
                raise self._error
            if self.pre_quantized:
                self._pack_stored(model)
            targets = self._later if self.pre_quantized else self._targets
            parameters = {name: weight for target in targets for name, weight in _parameters(target).items()}
            packed = {id(parameters[name]): weight for name, weight in self._packed.items()}
            freeze(model)
            for target in targets:
                swap_module(model, target, settings, packed)
            del packed  # the memory of what finish() moves is free then
        skipped, frozen, share = self._skipped, self._frozen, self._share
        vars(settings).pop("source", None)  # from here on the model is one of ours
        self._clear()
        if share is not None:
            distributed.join_shares(model)
        finish(model, settings, skipped, frozen)
        if share is not None:
            distributed.check_shares(model)
        elif cqil.saved_plan(model) is not None:
            cqil.apply(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        quantizer = model.__dict__.get("hf_quantizer")
        dequantize(model, dtype)
        if quantizer is not None:
            model.hf_quantizer = quantizer  # transformers removes it next
        model.is_quantized = False
        return model

    def remove_quantization_config(self, model: Any) -> None:
        """Make the model a float one in transformers' eyes."""
        super().remove_quantization_config(model)
        for module in model.modules():
            getattr(getattr(module, "config", None), "__dict__", {}).pop("_is_quantized", None)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """True: see :mod:`torch_cpullm.saving`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: packed weights have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """True."""
        return True


class _Quantize(ConversionOps):
    """Takes the float weights of a :class:`CpuLlmQuantizer` and lets all other tensors pass."""

    def __init__(self, quantizer: CpuLlmQuantizer) -> None:
        self._quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Name -> tensor, or a list of one, as the model gets it."""
        result = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            wanted = self._quantizer.param_needs_quantization(None, name)
            result[name] = self._quantizer.take(name, tensor) if wanted else tensor
        return result


class _PackExperts(ConversionOps):
    """Stands for the operations that join a checkpoint's experts; those of other modules are joined as ever."""

    def __init__(self, quantizer: CpuLlmQuantizer, operations: list[ConversionOps]) -> None:
        self._quantizer, self._operations = quantizer, operations

    def __deepcopy__(self, memo: dict[int, Any]) -> _PackExperts:
        return self  # transformers copies a converter for every tensor

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pattern -> the experts' tensors, in lists, to target pattern -> what the model gets."""
        sources, (target,) = kwargs["source_patterns"], kwargs["target_patterns"]
        name = kwargs["full_layer_name"]
        if self._quantizer.param_needs_quantization(None, name):
            parts = [input_dict[source] for source in sources if source in input_dict]
            return {target: self._quantizer.take_experts(name, parts)}
        for operation in self._operations:
            input_dict = operation.convert(input_dict, *args, **kwargs)
        return input_dict


def _joins_experts(converter: WeightConverter) -> bool:
    """Whether a converter makes one of :data:`experts.WEIGHTS` of experts' matrices: stacked, and joined by rows."""
    targets = [pattern.rpartition(".")[2] for pattern in converter.target_patterns]
    steps = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    joins = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    return len(targets) == 1 and targets[0] in WEIGHTS and steps in joins


def _is_cpu(place: Any) -> bool:
    """Whether this entry of a device map may mean the CPU; names of strategies do."""
    if place is None or place in ("auto", "balanced", "balanced_low_0", "sequential"):
        return True
    return place == "cpu" or getattr(place, "type", None) == "cpu"


def _parameters(target: Target) -> dict[str, nn.Parameter]:
    """Full name -> weight, in every place that the module is registered at."""
    return {f"{name}.{key}": weight for name in target.names for key, weight in target.parameters.items()}


def _register() -> None:
    """Once per process; another registration of this name is ours from an earlier import."""
    AUTO_QUANTIZATION_CONFIG_MAPPING["cpullm"] = CpuLlmConfig
    AUTO_QUANTIZER_MAPPING["cpullm"] = CpuLlmQuantizer


_register()
