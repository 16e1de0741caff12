"""Over which axes of a mesh arrays vary, inside of `jax.shard_map`.

There every array has a set of mesh axes along which the devices may hold different
values. What is made inside, a carry of zeros, varies along none, and neither does a
replicated parameter. JAX joins the sets where arrays meet in an operation, but not

    in a loop         whose carry must vary from the start as it does at the end;
    in a custom_vjp   whose backward rule must give to each operand a cotangent that
                      varies as the operand does.

So a carry is made `like` the arrays that the loop reads, and the operands of a
`custom_vjp` are brought `together` before it: JAX then adds up over the devices what
each of them gives to the gradient of a replicated parameter.

Outside of `jax.shard_map`, and inside with check_vma=False, both return what they were
given and cost nothing.
"""

import jax


def axes(*arrays) -> frozenset:
    """The mesh axes along which any of these varies: arrays, or trees with them."""
    names = frozenset()
    for array in jax.tree.leaves(arrays):
        names |= _axes(array)
    return names


def like(value, *arrays):
    """`value`, varying along every mesh axis along which one of `arrays` varies, and
    along those along which it varies already.

    Args:
        value: an array or a tree of arrays (or None), the carry of a loop.
        *arrays: arrays or trees of them (or None), all that the loop reads.
    """
    names = axes(*arrays)
    return jax.tree.map(lambda x: _widened(x, names), value) if names else value


def together(*values):
    """All of them, each an array or a tree (or None), varying along the same axes: a
    tuple, the operands of a `custom_vjp` or of an operation that has one inside."""
    return like(values, values)


def _axes(array) -> frozenset:
    return jax.typeof(array).mat.varying


def _widened(array, names):
    missing = tuple(sorted(names - _axes(array), key=str))
    return jax.lax.pcast(array, missing, to="varying") if missing else array
