"""Triton kernels in Triton's interpreter, which computes them with NumPy on the CPU.

It wants tensors of PyTorch, which are not needed for it: `_Tensor` has what it asks of
them. A kernel is called back from the compiled program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

TYPES = {  # what Triton calls them
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "bfloat16": "bf16",
    "int32": "i32",
    "int8": "i8",
    "bool": "i1",
}


class _Tensor:
    """A NumPy array as Triton's interpreter wants its tensors."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape
        self.dtype = TYPES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return _Tensor(self.array)

    def set_(self, storage, *_):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(x // self.array.itemsize for x in self.array.strides)

    def copy_(self, other):
        pass


@functools.cache
def _mend() -> None:
    """Makes the interpreter right for bfloat16, which it keeps as uint16: `tl.dot`
    would multiply it as such, and casts to it would cut off where a GPU rounds."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder = type(interpreter.interpreter_builder)
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        words = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(words.view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, x, target):
        if target.scalar != tl.bfloat16 or not x.dtype.scalar.is_floating():
            return cast(self, x, target)
        rounded = widened(x).data.astype(jnp.bfloat16)
        return interpreter.TensorHandle(rounded.view(np.uint16), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def call(kernel, grid, arguments, outputs, constants):
    """The outputs of a kernel as `compat.triton_call` takes it, computed on the CPU."""
    _mend()
    arrays = [x for x in arguments if not isinstance(x, int)]

    def run(*words):
        arrays_here = map(_from_words, words, arrays)
        operands = [
            x if isinstance(x, int) else _Tensor(next(arrays_here)) for x in arguments
        ]
        # what a kernel fails to write must not look right
        buffers = [_unwritten(out) for out in outputs]
        with np.errstate(all="ignore"):
            kernel[grid](*operands, *map(_Tensor, buffers), **constants)
        return tuple(map(_to_words, buffers))

    shapes = tuple(
        jax.ShapeDtypeStruct(words.shape, words.dtype)
        for words in (jax.eval_shape(_to_words_here, out) for out in outputs)
    )
    results = jax.pure_callback(
        run, shapes, *map(_to_words_here, arrays), vmap_method="sequential"
    )
    return tuple(map(_from_words_here, results, outputs))


# A callback may run in a thread that does not know of `jax.enable_x64`, where JAX would
# round its arrays to float32: 64 bits travel as two words.


def _to_words_here(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint32) if _is_long(x) else x


def _from_words_here(x, like):
    return jax.lax.bitcast_convert_type(x, like.dtype) if _is_long(like) else x


def _to_words(x):
    return x.view(np.uint32).reshape(*x.shape, 2) if _is_long(x) else x


def _from_words(x, like):
    x = np.array(x, order="C")
    return x.view(like.dtype).reshape(like.shape) if _is_long(like) else x


def _is_long(x):
    return jnp.dtype(x.dtype).itemsize == 8


def _unwritten(out):
    floating = jnp.issubdtype(out.dtype, jnp.floating)
    return np.full(out.shape, np.nan if floating else 0, out.dtype)
