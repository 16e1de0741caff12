"""Triton kernels compiled to machine code for a GPU that need not be here."""

import pathlib
import re
import subprocess
import tempfile

import jax

from kernels import compat, interpreter
from kernels.compat import TritonCall


def calls(function, arrays) -> list[TritonCall]:
    """The different calls of Triton kernels that `function(*arrays)` makes."""
    with compat.lowering_for("gpu"), compat.recorded() as made:
        # what was traced before, JAX would remember, and call nothing
        jax.eval_shape(lambda *arrays: function(*arrays), *arrays)
    different = []
    for call in made:
        if call not in different:
            different.append(call)
    return different


def compiled(call: TritonCall, capability: int = 90) -> dict[str, int]:
    """Compiles the kernel of a call for an NVIDIA GPU of the compute capability.

    Returns:
        registers per thread, spilled bytes, shared memory in bytes.

    Raises:
        RuntimeError, triton.CompilationError: it does not compile.
    """
    compat.set_fusion()
    import triton
    from triton.backends.compiler import GPUTarget

    names = call.kernel.arg_names
    operands = [*call.arguments, *call.outputs]
    signature = {
        name: "i32" if isinstance(x, int) else "*" + interpreter.TYPES[x.dtype.name]
        for name, x in zip(names, operands, strict=False)
    }
    signature |= {name: "constexpr" for name in names[len(operands) :]}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, x in enumerate(operands)
        if not isinstance(x, int) or x % 16 == 0
    }
    source = triton.compiler.ASTSource(
        call.kernel, signature, constexprs=dict(call.constants), attrs=aligned
    )
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        binary = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": call.num_warps},
        )
    registers, spilled = _registers(binary.asm["ptx"])
    return {
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": binary.metadata.shared,
    }


def _registers(ptx: str) -> tuple[int, int]:
    """Registers per thread and spilled bytes, as the assembler reports them."""
    import triton

    folder = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    assembler = next(
        path for path in (folder / "ptxas-blackwell", folder / "ptxas") if path.exists()
    )
    architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as place:
        source = pathlib.Path(place, "kernel.ptx")
        source.write_text(ptx)
        process = subprocess.run(
            [assembler, "-v", f"-arch={architecture}", source, "-o", "/dev/null"],
            capture_output=True,
            text=True,
        )
    if process.returncode:
        raise RuntimeError(f"ptxas: {process.stderr.strip()}")
    registers = re.search(r"Used (\d+) registers", process.stderr)[1]
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", process.stderr)
    return int(registers), sum(map(int, spills))
