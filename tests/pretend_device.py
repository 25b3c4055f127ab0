"""A pretend accelerator: real numbers on the CPU behind tensors that claim to live on ``pretend:0``.

Finds device mistakes without a GPU::

    with Pretend() as mistakes:            # strict=False notes mistakes and goes on
        model.to("pretend"); run(model)    # batches stay on the CPU, as those of users do

How: torch's PrivateUse1 key as a Python backend (``torch.utils.backend_registration``), a wrapper subclass on that
device, and a dispatch mode that sees factories and copies, too. Rules are those of CUDA: scalars of the CPU (no
dimensions) may join elementwise operations, indices of the CPU may index, and every other mixture is an error; so is
``numpy()`` of a tensor on the device. Autocast lowers products and raises norms and softmax, as on CUDA. Not
simulated: kernels, streams, memory, speed, and what travels between processes.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "pretend"
PACKAGE = "shrinkformer/"

_aten = torch.ops.aten
_CpuGenerator = torch.Generator
_inference_mode = torch.inference_mode

_COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten._copy_from.default, _aten.set_.source_Tensor}
_INDEXING = {
    _aten.index.Tensor,
    _aten._unsafe_index.Tensor,
    _aten.index_put_.default,
    _aten.index_put.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index_put.default,
}
_ELEMENTWISE = {"where", "masked_fill", "masked_fill_", "fill_", "clamp", "clamp_", "lerp", "addcmul", "addcmul_"}
"""Takes scalars of the CPU, and has no tag that says so."""

_LOWERED = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "scaled_dot_product_attention")
_RAISED = ("layer_norm", "softmax.int", "log_softmax.int", "rms_norm", "pow.Tensor_Scalar", "cumsum", "sum", "prod")
"""Operators that CUDA's autocast computes in the lower type, and in float32."""


class DeviceMistake(RuntimeError):  # noqa: N818
    """Tensors on different devices met."""


class PretendTensor(Tensor):
    """A tensor on the pretend device.

    Attributes:
        numbers: What it holds, on the CPU.
    """

    numbers: Tensor
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor, requires_grad: bool = False) -> Self:
        return Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )

    def __init__(self, numbers: Tensor, requires_grad: bool = False) -> None:
        self.numbers = numbers.detach()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, _active[-1] if _active else None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            new = PretendTensor(self.numbers.clone(), self.requires_grad)
            if getattr(self, "_is_param", False):
                new._is_param = True
            memo[id(self)] = new
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"pretend({self.numbers!r})"

    def __format__(self, spec: str) -> str:
        return format(self.numbers, spec)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self) -> Any:
        return self.numbers.untyped_storage()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, PretendTensor) or new.shape != self.shape:
            raise NotImplementedError("pretend: .data of another shape or device")
        if new.dtype == self.dtype:
            self.numbers = new.numbers
            return
        other = PretendTensor(new.numbers, self.requires_grad)
        other._is_param = getattr(self, "_is_param", False)
        torch.utils.swap_tensors(self, other)


class _Generator(torch.Generator):
    """A generator of the CPU that may claim to be on the device; takes the place of ``torch.Generator`` meanwhile."""

    ours: ClassVar[set[int]] = set()  # operators get another Python object, of the same address in C

    def __new__(cls, device: Any = "cpu") -> Self:
        pretends = torch.device(device).type == NAME
        made = super().__new__(cls, device="cpu" if pretends else device)
        made.pretends = pretends
        (cls.ours.add if pretends else cls.ours.discard)(made._cdata)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0) if self.pretends else _CpuGenerator.device.__get__(self)

    def manual_seed(self, seed: int) -> Self:
        super().manual_seed(seed)
        return self


class _Backend:
    """What ``torch.<device>`` has to offer."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: Any = None) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return _CpuGenerator().get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Pretend(TorchDispatchMode):
    """While active, ``device="pretend"`` works. Gives the mistakes: what was wrong, by place in the package.

    Args:
        strict: Raise at the first mistake; otherwise note it and go on.
    """

    def __init__(self, *, strict: bool = True) -> None:
        super().__init__()
        _install()
        self.strict, self.mistakes = strict, dict[str, str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self)

    def __enter__(self) -> dict[str, str]:
        _active.append(self)
        torch.Generator = _Generator
        torch.inference_mode = torch.no_grad  # subclasses cannot be made of inference tensors
        torch.__future__.set_swap_module_params_on_conversion(True)  # so that tied weights stay tied
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self.mistakes

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(False)
        torch.inference_mode, torch.Generator = _inference_mode, _CpuGenerator
        _active.pop()

    def note(self, text: str) -> None:
        """A mistake."""
        place = _place()
        self.mistakes.setdefault(place, text)
        if self.strict:
            raise DeviceMistake(f"{place}: {text}")


_active: list[Pretend] = []
_libraries: list[Any] = []  # operators are registered as long as these live


def _place() -> str:
    """Line of the package that is at work."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if PACKAGE in frame.f_code.co_filename and "/tests/" not in frame.f_code.co_filename:
            return f"{frame.f_code.co_filename.split(PACKAGE)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


def _run(func: Any, args: Any, kwargs: Mapping[str, Any], mode: Pretend | None) -> Any:
    flat, _ = tree_flatten((args, kwargs))
    ours = [one for one in flat if isinstance(one, PretendTensor)]
    plain = [one for one in flat if isinstance(one, Tensor) and not isinstance(one, PretendTensor)]
    wanted = kwargs.get("device")
    on_device = bool(ours) if wanted is None else torch.device(wanted).type == NAME
    if not ours and not on_device:
        return func(*args, **kwargs)
    if func is _aten._fused_sdp_choice.default:
        return 0  # attention in single operators
    if mode is not None:
        _check(func, args, ours, plain, mode)
        generator = kwargs.get("generator")
        if on_device and generator is not None and generator._cdata not in _Generator.ours:
            mode.note(f"{func}: a CPU generator on the device")
    if wanted is not None and on_device:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner = [(one, one.numbers) for one in ours]
    args, kwargs = tree_map(_unwrapped, args), tree_map(_unwrapped, kwargs)
    out = func(*args, **kwargs)

    def wrap(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        for wrapper, numbers in inner:
            if one is numbers:
                return wrapper
        in_place = any(one is other for other in plain)
        return PretendTensor(one) if on_device and not in_place else one

    return tree_map(wrap, out)


def _unwrapped(one: Any) -> Any:
    return one.numbers if isinstance(one, PretendTensor) else one


def _check(func: Any, args: Any, ours: list[Any], plain: list[Tensor], mode: Pretend) -> None:
    """Whether CUDA would take this mixture."""
    if not ours or not plain or func in _COPIES:
        return
    if func in _INDEXING:
        if not isinstance(args[0], PretendTensor):
            mode.note(f"{func}: a CPU tensor indexed by, or filled from, the device")
        if "put" in func.__name__ and not isinstance(args[2], PretendTensor) and args[2].dim():
            mode.note(f"{func}: CPU values put into a tensor on the device")
        return
    name = func.__name__.split(".")[0]
    if all(one.dim() == 0 for one in plain) and (torch.Tag.pointwise in func.tags or name in _ELEMENTWISE):
        return
    shapes = [tuple(one.shape) for one in ours], [tuple(one.shape) for one in plain]
    mode.note(f"{func}: on the device {shapes[0]}, on the CPU {shapes[1]}")


def _install() -> None:
    """Once for each process."""
    if _libraries:
        return
    backend_registration._setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Backend())
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    operators = torch.library.Library("aten", "IMPL")
    for name in _LOWERED:
        operators.impl(name, _autocast(name, lambda: torch.get_autocast_dtype(NAME)), "AutocastPrivateUse1")
    for name in _RAISED:
        operators.impl(name, _autocast(name, lambda: torch.float32), "AutocastPrivateUse1")
    _libraries.extend((others, operators))


def _autocast(name: str, wanted: Callable[[], torch.dtype]) -> Callable[..., Any]:
    """An operator that computes in another type under autocast."""
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(_aten, packet), overload or "default")

    def cast(one: Any) -> Any:
        floating = isinstance(one, Tensor) and one.is_floating_point() and one.dtype != torch.float64
        return one.to(wanted()) if floating else one

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(NAME, enabled=False):
            return operator(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel


def on_the_device(model: nn.Module) -> Iterable[str]:
    """Names of parameters and buffers that are not on the device."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if tensor.device.type != NAME]
