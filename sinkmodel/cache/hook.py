"""A hook in the forward of a transformers class, for caches that need more of a forward than its keys.

A cache sees only keys. Positions, padding and the mask are settled in the model's forward, before the cache is called.
`install_hook` wraps three methods of the model's class, and `uninstall_hook` removes the wrappers. If the cache in
`past_key_values` is a `ForwardCache`, the wrappers hand over to it. They do nothing for any other cache.
The model, its config and its attention implementation stay unchanged.

    forward                          -> cache.run_forward(forward, model, args, kwargs)
    prepare_inputs_for_generation    -> cache.check_new_tokens(new), then as before
    _prepare_cache_for_generation    -> cache.check_generation(mode, prompt, most), then as before
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from sinkmodel.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])


class ForwardCache(Protocol):
    """The methods that the hook needs of a cache. It recognises such a cache by the attribute `run_forward`."""

    @property
    def in_forward(self) -> bool:
        """True while `run_forward` is running: the forwards that it calls then go directly to the model."""

    def run_forward(self, forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of `model(*args, **kwargs)`. `forward` is the method of the class, without the hook."""

    def check_new_tokens(self, new: int | None) -> None:
        """Raise UserError if `generate` must not feed the last `new` tokens of its text; None: not known."""

    def check_generation(self, mode: str, prompt: int | None, most: int) -> None:
        """Raise UserError, before the first token, if `generate` must not run with this cache.

        Args:
            mode: transformers' name of the generation mode, such as "sample" or "assisted_generation".
            prompt: columns of the whole prompt, by its 2-D attention mask; None if it is not known.
            most: largest number of tokens that the cache may hold at the end, as transformers counts them.
        """


def install_hook(model_or_config: Any) -> None:
    """Make the class of a model hand over to caches that have `run_forward`. A second call for a class does nothing.

    Args:
        model_or_config: the config of a model, or the model itself if its class is not one of transformers'.
    """
    model_class = _class_of(model_or_config)
    while _passed_over:
        torch._dynamo.decorators.skip(_passed_over.pop())
    for name, wrap in WRAPPERS.items():
        own = vars(model_class).get(name)
        if getattr(own, "is_hook", False):  # also if another library has wrapped the hook since, with functools.wraps
            continue
        method = _without_hook(model_class, name)
        wrapper = functools.wraps(method)(wrap(method))
        wrapper.is_hook = True  # type: ignore[attr-defined]
        setattr(model_class, name, wrapper)
        _installed.setdefault(model_class, {})[name] = wrapper, own


def uninstall_hook(model_or_config: Any) -> None:
    """Restore the own methods of a model's class and of the classes that it inherits from.

    This affects all models of these classes. A stream that is in use then refuses its next forward; it can continue
    after another `install_hook`. Without a hook, nothing happens. If a method was replaced after the hook was
    installed, raises UserError and changes nothing: the replacement has to be removed first.
    """
    classes = [each for each in _class_of(model_or_config).__mro__ if each in _installed]
    for each in classes:
        for name, (wrapper, own) in _installed[each].items():
            if vars(each).get(name) not in (wrapper, own):
                raise UserError(
                    f"{each.__name__}.{name} was replaced after the hook was installed; put back what was there, "
                    "then uninstall the hook"
                )
    for each in classes:
        for name, (_, own) in _installed.pop(each).items():
            if own is not None:
                setattr(each, name, own)
            elif name in vars(each):
                delattr(each, name)


# For each class: the wrappers that were put into it, with its own methods before; None for an inherited method.
_installed: weakref.WeakKeyDictionary[type, dict[str, tuple[Any, Any]]] = weakref.WeakKeyDictionary()


def _class_of(model_or_config: Any) -> Any:
    # Imported here: both load transformers' modelling code, which `import sinkmodel.cache` should not do.
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    import sinkmodel.architectures  # noqa: F401  transformers' Auto classes then know our models

    if isinstance(model_or_config, PreTrainedModel):
        if model_or_config.get_output_embeddings() is None:
            name = type(model_or_config).__name__
            raise UserError(f"{name} gives no logits; give a causal language model or its config")
        return type(model_or_config)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_or_config), None)
    if model_class is None:
        raise UserError(
            f"transformers has no causal language model for a {type(model_or_config).__name__}; "
            "give the config of one, or the model itself if its class is your own"
        )
    return model_class


def _without_hook(model_class: Any, name: str) -> Callable[..., Any]:
    """A method of the class, its own or inherited, without our wrapper."""
    method = getattr(model_class, name)
    ours = (_installed[each][name][0] for each in model_class.__mro__ if name in _installed.get(each, {}))
    return method.__wrapped__ if any(method is wrapper for wrapper in ours) else method


def _takes_over(cache: Any) -> bool:
    return hasattr(cache, "run_forward")


def _forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is None and args:
            cache = next((x for x in args if _takes_over(x)), None)
        if cache is None or not _takes_over(cache) or cache.in_forward:
            return original(self, *args, **kwargs)
        return cache.run_forward(original, self, args, kwargs)

    return forward


def _prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache: Any = kwargs.get("past_key_values")
        if not _takes_over(cache):
            return original(self, *args, **kwargs)
        cache.check_new_tokens(kwargs.get("next_sequence_length"))
        inputs = original(self, *args, **kwargs)
        if inputs.get("past_key_values") is not cache:  # Phi-3 with longrope, past a length
            raise UserError(
                f"generate of {type(self).__name__} drops the cache at this length of the text; "
                "continue with model(...) or sinkmodel.streaming"
            )
        return inputs

    return prepare_inputs_for_generation


def _prepare_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    def _prepare_cache_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        cache, mask = (given["model_kwargs"].get(name) for name in ("past_key_values", "attention_mask"))
        if _takes_over(cache):
            # transformers 5 drops a mask of ones but keeps its length (seen in 5.23).
            dropped = getattr(given["generation_config"], "_mask_length", None)
            prompt = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else dropped
            cache.check_generation(given["generation_mode"].value, prompt, given["max_cache_length"])
        return original(self, *args, **kwargs)

    return _prepare_cache_for_generation


WRAPPERS = {
    "forward": _forward,
    "prepare_inputs_for_generation": _prepare_inputs,
    "_prepare_cache_for_generation": _prepare_cache,
}


# ---------------------------------------------------------------------------------------------------- torch.compile

_passed_over: list[Callable[..., Any]] = []  # the next `install_hook` marks them: importing torch._dynamo is slow


def passed_over(function: Function) -> Function:
    """Decorator for a function that calls the model: torch.compile skips it, but compiles what it calls.

    `skip` is private to torch (seen in 2.13). With the public `disable` the model would not be compiled either. Without
    both, dynamo would try to compile this frame again at every step, which costs a millisecond.
    """
    _passed_over.append(function)
    return function


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: torch.compile skips `function` and everything it calls, as with `torch.compiler.disable`."""

    @passed_over
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _disabled(function)(*args, **kwargs)

    return call


@functools.cache
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)
